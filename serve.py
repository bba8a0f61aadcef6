"""Serve a checkpoint over HTTP; see ``jobs/serve.py``."""

import sys

from glore_common import run_main
from jobs.serve import main

if __name__ == "__main__":
    sys.exit(run_main(main))
