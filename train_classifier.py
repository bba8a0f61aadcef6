"""Train a fine-grained classifier; see ``jobs/train_classifier.py``."""

import sys

from glore_common import run_main
from jobs.train_classifier import main

if __name__ == "__main__":
    sys.exit(run_main(main))
