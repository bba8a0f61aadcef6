"""Write a checkpoint for other programs; see ``jobs/export.py``."""

import sys

from glore_common import run_main
from jobs.export import main

if __name__ == "__main__":
    sys.exit(run_main(main))
