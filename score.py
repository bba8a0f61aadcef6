"""x"""

import sys

from glore_common import run_main
from jobs.score import main

if __name__ == "__main__":
    sys.exit(run_main(main))
