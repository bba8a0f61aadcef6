"""Test a checkpoint; see ``jobs/evaluate.py``."""

import sys

from glore_common import run_main
from jobs.evaluate import main

if __name__ == "__main__":
    sys.exit(run_main(main))
