"""Train a detector; see ``jobs/train_detection.py``."""

import sys

from glore_common import run_main
from jobs.train_detection import main

if __name__ == "__main__":
    sys.exit(run_main(main))
