"""MXNet's im2rec, which packs images into a record file: ``python -m dataset.im2rec``.

The tool that MXNet 1.9.1 ships fails on NumPy 1.24 and newer before it begins
(https://github.com/apache/mxnet/issues/21165); here it runs after :mod:`mxnet_compat`, otherwise
as it is. Its two steps, a list (PREFIX.lst) and the file (PREFIX.rec, PREFIX.idx)::

    python -m dataset.im2rec --list --recursive PREFIX FOLDER
    python -m dataset.im2rec --resize 480 --quality 95 --num-thread 8 PREFIX FOLDER

``--pass-through`` packs the files as they are. With ``--list --recursive`` classes are numbered in
the order of the sorted folders' names.
"""

import os
import runpy
import sys

from mxnet_compat import mx


def main() -> None:
    """Run the tool with this process's arguments."""
    path = os.path.join(os.path.dirname(mx.__file__), "tools", "im2rec.py")
    sys.argv[0] = path
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
