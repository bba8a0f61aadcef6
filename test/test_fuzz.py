"""Every reader of files is given thousands of damaged ones, with a fixed seed."""

import os
import re
import subprocess
import sys

import pytest

READERS = (
    *("symbol", "params", "manifest", "torch", "records", "index", "video-list", "image-list"),
    *("mapping", "hosts", "options", "safetensors"),
)


def fuzz(root, reader, count, seed):
    program = os.path.join(root, "test", "helpers", "fuzz.py")
    path = os.pathsep.join((root, os.path.dirname(program)))
    return subprocess.run(
        [sys.executable, program, reader, str(count), str(seed)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        errors="replace",
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "count", [pytest.param(5000, marks=pytest.mark.slow, id="many"), pytest.param(60, id="few")]
)
def test_damaged_files_give_clean_errors(root, reader, count):
    done = fuzz(root, reader, count, seed=7)
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused = re.search(r"(\d+) read, (\d+) refused", done.stdout).groups()
    assert int(read) + int(refused) == count
    assert int(refused) > count / 4
