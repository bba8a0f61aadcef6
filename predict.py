"""Say what videos or images show; see ``jobs/predict.py``."""

import sys

from glore_common import run_main
from jobs.predict import main

if __name__ == "__main__":
    sys.exit(run_main(main))
