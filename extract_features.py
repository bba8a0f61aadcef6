"""Write features of videos or images; see ``jobs/extract_features.py``."""

import sys

from glore_common import run_main
from jobs.extract_features import main

if __name__ == "__main__":
    sys.exit(run_main(main))
