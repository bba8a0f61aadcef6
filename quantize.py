"""Find the ranges that a checkpoint's network needs in INT8; see ``jobs/quantize.py``."""

import sys

from glore_common import run_main
from jobs.quantize import main

if __name__ == "__main__":
    sys.exit(run_main(main))
