"""Start the processes of a cluster job; see ``jobs/launch.py``."""

import sys

from glore_common import run_main
from jobs.launch import main

if __name__ == "__main__":
    sys.exit(run_main(main))
