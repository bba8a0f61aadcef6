"""Draw what a network's blocks do; see ``jobs/explain.py``."""

import sys

from glore_common import run_main
from jobs.explain import main

if __name__ == "__main__":
    sys.exit(run_main(main))
