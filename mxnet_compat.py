"""Make MXNet 1.9.1 importable and quiet on today's machines. Import it before ``mxnet``.

Every module of this project that needs MXNet writes ``import mxnet_compat  # noqa: F401`` (or
uses something of it) above ``import mxnet as mx``. What it does:

* Names that NumPy removed and MXNet uses (https://github.com/apache/mxnet/issues/21165,
  https://numpy.org/doc/stable/numpy_2_0_migration_guide.html): ``numpy.bool`` is given back as
  ``numpy.bool_`` where NumPy 1.24 to 1.26 lack it. All others are answered to MXNet's own modules
  only, while they are imported; afterwards NumPy is as it was.
* On NumPy 2, three things of MXNet's own that work differently there: see ``_mend_for_numpy_2``.
* The CUDA libraries of MXNet's GPU build are loaded from their wheels (``mxnet_gpu``).
* ``OMP_NUM_THREADS``: left alone, MXNet uses half of the cores it sees
  (https://mxnet.apache.org/versions/1.9.1/api/faq/env_var); it is set to the number of physical
  cores that this process may use.
* ``NNVM_EXEC_MATCH_RANGE=0``: the executor behind ``Module`` and ``Symbol.bind`` lets arrays of
  different layouts share memory; at small maps a GloRe unit then fails with "size of NDArray
  doesn't match the requested MKLDNN memory desc" (measured on 1.9.1).
* ``MXNET_STORAGE_FALLBACK_LOG_VERBOSE=0`` silences a message per operator without a sparse or
  oneDNN kernel.
* The GNU C library's ``malloc`` keeps what is freed: see ``_keep_freed_memory``.

A variable that the user has set is never changed. ``python -m mxnet_compat`` prints what this
machine has and lacks (``jobs/doctor.py``).
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import types
import warnings

import mxnet_gpu
from glore_common import GloReError

SUPPORTED_PYTHON = ((3, 9), (3, 13))
# Constants that NumPy 2 removed.
_CONSTANTS = {
    "PZERO": 0.0,
    "NZERO": -0.0,
    "PINF": float("inf"),
    "NINF": float("-inf"),
    "Inf": float("inf"),
    "NAN": float("nan"),
    "NaN": float("nan"),
}


class EnvironmentProblem(GloReError):
    """The Python environment cannot run MXNet 1.9.1; the message says what to install."""


def physical_cores() -> int:
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


def _set_environment():
    os.environ.setdefault("OMP_NUM_THREADS", str(physical_cores()))
    os.environ.setdefault("NNVM_EXEC_MATCH_RANGE", "0")
    os.environ.setdefault("MXNET_STORAGE_FALLBACK_LOG_VERBOSE", "0")


def _keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation; return whether it does.

    MXNet 1.9.1 frees the arrays of a step on a CPU and allocates them again in the next one, and
    glibc gives what is large back to the system each time: of a training step of RESNET50_GLORE a
    sixth went into half a million page faults. One arena, because what one thread has freed the
    next one needs. Numbers of parameters and names of variables: malloc.h, mallopt(3).
    """
    wanted = {
        "MALLOC_ARENA_MAX": (-8, 1),
        "MALLOC_MMAP_MAX_": (-4, 0),
        "MALLOC_TRIM_THRESHOLD_": (-1, -1),
        "MALLOC_TOP_PAD_": (-2, 64 << 20),
    }
    # Another allocator, or one that the user has set up.
    taken = {"LD_PRELOAD", "GLIBC_TUNABLES", *wanted} & set(os.environ)
    if taken or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) for setting in wanted.values())


@contextlib.contextmanager
def _removed_numpy_names():
    """Answer names that NumPy has removed to MXNet's modules, within the block.

    ``mxnet/numpy/fallback.py`` looks up functions such as ``numpy.mirr`` to offer them as
    ``mx.np.mirr``: they become functions that raise when called.
    """
    import numpy as np

    if "bool" not in np.__dict__:
        np.bool = np.bool_  # stays: ``mxnet/numpy/multiarray.py`` uses it at run time
    original = np.__getattr__

    def answer(name):
        try:
            return original(name)
        except AttributeError:
            asker = sys._getframe(1).f_globals.get("__name__", "")
            if asker.partition(".")[0] != "mxnet" or name.startswith("__"):
                raise
        return _CONSTANTS[name] if name in _CONSTANTS else _removed(name)

    np.__getattr__ = answer
    try:
        yield
    finally:
        np.__getattr__ = original


def _removed(name):
    def function(*args, **kwargs):
        raise AttributeError(f"NumPy {sys.modules['numpy'].__version__} has no numpy.{name}")

    function.__name__ = name
    return function


def _mend_for_numpy_2(mxnet):
    """Change what MXNet does at run time and NumPy 2 answers differently.

    All changes are in MXNet's modules; NumPy itself stays untouched.

    * A tuple with NumPy integers was written ``(2, 3)`` and is ``(np.int64(2), 3)`` now
      (https://numpy.org/neps/nep-0051-scalar-representation.html). MXNet passes an operator's
      shape or axis to its library as such a text, which refuses it.
    * ``0.0 + numpy.float32(x)`` was a float64 and is a float32 now
      (https://numpy.org/neps/nep-0050-scalar-promotion.html), so that ``mx.metric`` would add up
      an epoch in single precision.
    * ``numpy.Inf`` (handlers of ``gluon.contrib.estimator``) and ``numpy.core`` (``moveaxis``) are
      removed and deprecated (https://numpy.org/doc/stable/release/2.0.0-notes.html).
    """
    import numpy as np

    for module in (mxnet._ctypes.ndarray, mxnet._ctypes.symbol):
        module.str = _text  # they use it for operators' attributes only
    for module in (mxnet.symbol, mxnet.symbol.symbol):
        module.var = module.Variable = _with_plain_shape(mxnet.symbol.symbol.var)
    for method in ("reset", "reset_local"):
        setattr(
            mxnet.metric.EvalMetric, method, _in_double(getattr(mxnet.metric.EvalMetric, method))
        )
    names = types.ModuleType("numpy")
    names.__dict__.update(vars(np), Inf=np.inf, core=np._core)
    mxnet.gluon.contrib.estimator.event_handler.np = names
    mxnet.ndarray.ndarray.np = names


def _text(value):
    """Return ``str(value)``, in which NumPy's scalars look like Python's."""
    return str(_plain(value)) if isinstance(value, (tuple, list)) else str(value)


def _plain(value):
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value.item() if isinstance(value, sys.modules["numpy"].generic) else value


def _with_plain_shape(var):
    @functools.wraps(var)
    def wrapped(name, attr=None, shape=None, *args, **kwargs):
        return var(name, attr, _plain(shape), *args, **kwargs)

    return wrapped


def _in_double(reset):
    @functools.wraps(reset)
    def wrapped(self):
        reset(self)
        for name in ("sum_metric", "global_sum_metric"):
            if isinstance(getattr(self, name, None), float):
                setattr(self, name, sys.modules["numpy"].float64(getattr(self, name)))

    return wrapped


def _check_builds():
    """Raise when the installed packages cannot give a working ``mxnet``."""
    if sys.version_info >= (3, 12) and importlib.util.find_spec("setuptools") is None:
        raise EnvironmentProblem(
            "setuptools is missing: MXNet 1.9.1 imports distutils, which Python 3.12 has no "
            "longer and setuptools below 81 brings: pip install 'setuptools<81'."
        )
    builds = mxnet_gpu.installed_builds()
    if len(builds) > 1:
        raise EnvironmentProblem(
            f"{' and '.join(builds)} are installed, which overwrite each other: pip uninstall "
            f"-y {' '.join(builds)}, then install one of them."
        )
    if importlib.util.find_spec("mxnet") is None:
        raise EnvironmentProblem(f"MXNet is not installed. {how_to_install()}")
    return builds


def how_to_install() -> str:
    """Say how to get MXNet for a CPU and for a GPU, in the form that fits this installation."""
    if not __package__:
        return "For a CPU: ./run_local.sh; for a GPU: GLORE_GPU=1 ./run_local.sh"
    if sys.version_info < (3, 13):
        return (
            "For a CPU: pip install 'glore-mxnet[cpu]'; for an NVIDIA GPU: pip install "
            "'glore-mxnet[gpu]' (one of them, never both)."
        )
    # Its metadata says numpy<2, which has no wheel for Python 3.13; it works with NumPy 2.
    return (
        "For a CPU: pip install --no-deps mxnet==1.9.1; for an NVIDIA GPU: pip install "
        "'glore-mxnet[gpu]' && pip install --no-deps mxnet-cu117==1.9.1 (one of them, never both)."
    )


def _load_mxnet():
    import numpy as np

    builds = _check_builds()
    on_gpu = bool(builds) and builds[0] in mxnet_gpu.GPU_BUILDS
    if on_gpu:
        mxnet_gpu.load_libraries()
    try:
        with warnings.catch_warnings(), _removed_numpy_names():
            # MXNet compares versions with distutils; that is nothing its user can mend.
            warnings.simplefilter("ignore", DeprecationWarning)
            import mxnet
    except OSError as error:
        raise EnvironmentProblem(_library_problem(error, on_gpu)) from error
    if int(np.__version__.split(".")[0]) >= 2:
        _mend_for_numpy_2(mxnet)
    return mxnet


def _library_problem(error, on_gpu):
    missing = mxnet_gpu.missing_libraries() if on_gpu else ()
    if mxnet_gpu.DRIVER_LIBRARY in missing:
        return (
            "MXNet's GPU build needs the NVIDIA driver, and this machine has none "
            f"({mxnet_gpu.DRIVER_LIBRARY} is not found). Install the driver, or use the CPU build: "
            + ("pip uninstall -y mxnet-cu117; " if __package__ else "without GLORE_GPU. ")
            + (how_to_install() if __package__ else "")
        ).strip()
    if missing:
        return (
            f"MXNet's GPU build finds no {', '.join(missing)}. They are in the nvidia-* packages "
            "of requirements-gpu.txt and of the extra 'gpu'; a CUDA 11 of your own must be on "
            "LD_LIBRARY_PATH."
        )
    return (
        f"MXNet's library does not load: {error}. On a slim Debian or Ubuntu: "
        "apt-get install libgomp1"
    )


if __name__ == "__main__":
    from jobs.doctor import main

    sys.exit(main())
_check_python()
_set_environment()
_keep_freed_memory()
mx = _load_mxnet()
