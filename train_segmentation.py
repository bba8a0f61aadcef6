"""Train a segmentation network; see ``jobs/train_segmentation.py``."""

import sys

from glore_common import run_main
from jobs.train_segmentation import main

if __name__ == "__main__":
    sys.exit(run_main(main))
