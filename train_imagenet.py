"""Train an image network; see ``jobs/train_imagenet.py``."""

import sys

from glore_common import run_main
from jobs.train_imagenet import main

if __name__ == "__main__":
    sys.exit(run_main(main))
