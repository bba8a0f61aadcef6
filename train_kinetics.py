"""Train a video network; see ``jobs/train_kinetics.py``."""

import sys

from glore_common import run_main
from jobs.train_kinetics import main

if __name__ == "__main__":
    sys.exit(run_main(main))
