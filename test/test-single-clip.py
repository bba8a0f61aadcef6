"""Upstream's testing script: hands over to ``evaluate.py``, which takes its options and more.

A script in this folder would not find the packages, which lie one folder up; the script there
does. The hyphens in this file's name keep pytest from collecting it.
"""

import os
import sys

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "evaluate.py")

if __name__ == "__main__":
    os.environ["GLORE_CALLED_AS"] = os.path.basename(__file__)
    os.execv(sys.executable, [sys.executable, SCRIPT, *sys.argv[1:]])
