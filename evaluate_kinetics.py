"""x"""

import sys

from glore_common import run_main
from jobs.evaluate_kinetics import main

if __name__ == "__main__":
    sys.exit(run_main(main))
