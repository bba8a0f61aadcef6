"""Pack images into a record file: ``python -m dataset.im2rec``, with the options of MXNet's im2rec.

Its two steps, a list (PREFIX.lst) and the file (PREFIX.rec, PREFIX.idx)::

    python -m dataset.im2rec --list --recursive PREFIX FOLDER
    python -m dataset.im2rec --resize 480 --quality 95 --num-thread 8 PREFIX FOLDER

``--pass-through`` packs the files as they are. With ``--list --recursive`` classes are numbered as
training on the folder itself numbers them, which MXNet's own tool does not do. Images that cannot
be read are named and left out, and the exit code is 1.
"""

import sys

from data.image.pack import main
from glore_common import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
