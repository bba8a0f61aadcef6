"""Make MXNet 1.9.1 importable and quiet on today's machines. Import it before ``mxnet``.

Every module of this project that needs MXNet writes ``import mxnet_compat  # noqa: F401`` (or
uses something of it) above ``import mxnet as mx``. What it does, all before MXNet is loaded:

* ``numpy.bool`` is an alias that MXNet 1.9.1 uses and NumPy removed in 1.24
  (https://github.com/apache/mxnet/issues/21165); it is given back as ``numpy.bool_``.
* ``OMP_NUM_THREADS``: left alone, MXNet uses half of the cores it sees
  (https://mxnet.apache.org/versions/1.9.1/api/faq/env_var); it is set to the number of physical
  cores that this process may use.
* ``NNVM_EXEC_MATCH_RANGE=0``: the executor behind ``Module`` and ``Symbol.bind`` lets arrays of
  different layouts share memory; at small maps a GloRe unit then fails with "size of NDArray
  doesn't match the requested MKLDNN memory desc" (measured on 1.9.1).
* ``MXNET_STORAGE_FALLBACK_LOG_VERBOSE=0`` silences a message per operator without a sparse or
  oneDNN kernel.

A variable that the user has set is never changed.
"""

import importlib.util
import os
import sys
import warnings

from glore_common import GloReError

SUPPORTED_PYTHON = ((3, 9), (3, 12))


class EnvironmentProblem(GloReError):
    """The Python environment cannot run MXNet 1.9.1; the message says what to install."""


def physical_cores():
    """Return how many physical cores this process may use (at least 1).

    Hyper-threads of one core are counted once (Linux; elsewhere the logical count is returned).
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            with open(path) as stream:
                cores.add(stream.read().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def _check_python():
    low, high = SUPPORTED_PYTHON
    if not low <= sys.version_info[:2] <= high:
        raise EnvironmentProblem(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported: MXNet 1.9.1 "
            f"runs on Python {low[0]}.{low[1]} to {high[0]}.{high[1]}. ./run_local.sh looks for "
            "one and makes an environment with it."
        )


def _alias_numpy_bool():
    import numpy as np

    if int(np.__version__.split(".")[0]) >= 2:
        raise EnvironmentProblem(
            f"NumPy {np.__version__} is installed, MXNet 1.9.1 needs NumPy 1: "
            "pip install numpy==1.26.4 (or use ./run_local.sh, which pins it)."
        )
    if "bool" not in np.__dict__:
        np.bool = np.bool_


def _set_environment():
    os.environ.setdefault("OMP_NUM_THREADS", str(physical_cores()))
    os.environ.setdefault("NNVM_EXEC_MATCH_RANGE", "0")
    os.environ.setdefault("MXNET_STORAGE_FALLBACK_LOG_VERBOSE", "0")


def _load_mxnet():
    if sys.version_info >= (3, 12) and importlib.util.find_spec("setuptools") is None:
        raise EnvironmentProblem(
            "setuptools is missing: MXNet 1.9.1 imports distutils, which Python 3.12 has no "
            "longer and setuptools below 81 brings: pip install 'setuptools<81'."
        )
    if importlib.util.find_spec("mxnet") is None:
        raise EnvironmentProblem("mxnet is not installed: pip install mxnet==1.9.1")
    try:
        with warnings.catch_warnings():
            # MXNet compares versions with distutils; that is nothing its user can mend.
            warnings.simplefilter("ignore", DeprecationWarning)
            import mxnet
    except OSError as error:
        raise EnvironmentProblem(
            f"MXNet's library does not load: {error}. On a slim Debian or Ubuntu: "
            "apt-get install libgomp1"
        ) from error
    return mxnet


_check_python()
_alias_numpy_bool()
_set_environment()
mx = _load_mxnet()
