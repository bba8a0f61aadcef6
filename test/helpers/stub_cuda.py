"""Builds a ``libcuda.so.1`` that stands in for NVIDIA's driver (``stub_cuda.c``)."""

import os
import shutil
import subprocess

import pytest


def build_stub(folder):
    """Compile the stub into ``folder`` and return the folder, for ``LD_LIBRARY_PATH``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = os.path.splitext(os.path.abspath(__file__))[0] + ".c"
    target = os.path.join(folder, "libcuda.so.1")
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, source, "-ldl", "-o", target], check=True)
    return folder
