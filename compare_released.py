"""Compare a checkpoint with a released one; see ``jobs/compare_released.py``."""

import sys

from glore_common import run_main
from jobs.compare_released import main

if __name__ == "__main__":
    sys.exit(run_main(main))
