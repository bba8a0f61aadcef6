"""NVIDIA GPUs for MXNet's GPU build: its CUDA libraries, the driver, and the kernels it has.

``mxnet-cu117==1.9.1`` from PyPI links against CUDA 11 and cuDNN 8, which PyPI has as ``nvidia-*``
wheels. Those put their libraries where the dynamic linker does not look, so they are loaded here,
before MXNet. MXNet itself is not imported.
"""

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterable
from typing import NamedTuple, Optional

LOGGER = logging.getLogger("glore")
GPU_BUILDS = ("mxnet-cu117", "mxnet-cu112")
# Compute capabilities with machine code in the GPU builds (cuobjdump --list-elf). Neither has PTX,
# which a driver could translate for newer GPUs.
KERNELS = ((5, 0), (6, 0), (7, 0), (8, 0), (8, 6))
# (library, folder of its wheel below nvidia/), each after those it needs.
LIBRARIES = (
    ("libcudart.so.11.0", "cuda_runtime"),
    ("libnvrtc.so.11.2", "cuda_nvrtc"),
    ("libnvToolsExt.so.1", "nvtx"),
    ("libcublasLt.so.11", "cublas"),
    ("libcublas.so.11", "cublas"),
    ("libcufft.so.10", "cufft"),
    ("libcurand.so.10", "curand"),
    ("libcusparse.so.11", "cusparse"),
    ("libcusolver.so.11", "cusolver"),
    ("libnccl.so.2", "nccl"),
    ("libcudnn.so.8", "cudnn"),
)
DRIVER_LIBRARY = "libcuda.so.1"
# The wheels' CUDA 11 runs on drivers of this CUDA and later ones (minor version compatibility:
# https://docs.nvidia.com/deploy/cuda-compatibility/).
OLDEST_CUDA = (11, 0)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


class GPU(NamedTuple):
    """One GPU as the driver numbers it (``CUDA_VISIBLE_DEVICES`` is honoured)."""

    number: int
    name: str
    capability: tuple[int, int]
    memory: int  # bytes

    @property
    def has_kernels(self) -> bool:
        """Whether the GPU builds can run on it: code for x.y runs on x.z with z >= y."""
        return any(
            self.capability[0] == major and self.capability[1] >= minor for major, minor in KERNELS
        )


class Driver(NamedTuple):
    """What the driver says: the newest CUDA it knows, its GPUs, and what is wrong, if anything."""

    cuda: Optional[tuple[int, int]]
    gpus: tuple[GPU, ...]
    problem: Optional[str]


def installed_builds() -> list[str]:
    """Return the names of the installed distributions that bring the package ``mxnet``."""
    found = []
    for name in ("mxnet", *GPU_BUILDS):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def load_libraries() -> list[str]:
    """Load the CUDA libraries of the ``nvidia-*`` wheels that the system does not have.

    A library that the dynamic linker finds by itself (``LD_LIBRARY_PATH``, ``ldconfig``) is the
    user's choice and is left to it. Returns the paths that were loaded from wheels.
    """
    loaded = []
    for name, wheel in LIBRARIES:
        if _loads(name):
            continue
        path = _in_wheel(name, wheel)
        if path is not None:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            loaded.append(path)
    return loaded


def missing_libraries() -> list[str]:
    """Return which libraries of MXNet's GPU build are not to be found, the driver's included."""
    missing = [n for n, wheel in LIBRARIES if not _loads(n) and _in_wheel(n, wheel) is None]
    return missing if _loads(DRIVER_LIBRARY) else [*missing, DRIVER_LIBRARY]


def read_driver() -> Driver:
    """Ask the NVIDIA driver for its version and GPUs."""
    try:
        cuda = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return Driver(None, (), f"no NVIDIA driver ({DRIVER_LIBRARY} is not found)")
    try:
        version, count = ctypes.c_int(), ctypes.c_int()
        _call(cuda.cuDriverGetVersion, ctypes.byref(version))
        newest = (version.value // 1000, version.value % 1000 // 10)
        if newest < OLDEST_CUDA:
            problem = f"the NVIDIA driver knows CUDA {newest[0]}.{newest[1]} only"
            return Driver(newest, (), f"{problem}, MXNet needs {OLDEST_CUDA[0]}.0: update it")
        if cuda.cuInit(0) == _NO_DEVICE:
            return Driver(newest, (), None)
        _call(cuda.cuInit, 0)
        _call(cuda.cuDeviceGetCount, ctypes.byref(count))
        return Driver(newest, tuple(_gpu(cuda, index) for index in range(count.value)), None)
    except (OSError, AttributeError) as error:
        return Driver(None, (), f"the NVIDIA driver does not answer: {error}")


def is_wheel() -> bool:
    """Return whether MXNet is a GPU build from PyPI, whose kernels are known."""
    return bool(set(installed_builds()) & set(GPU_BUILDS))


def list_gpus() -> tuple[GPU, ...]:
    """Return the driver's GPUs; a problem of the driver is told in the log, and leaves none.

    ``mx.context.num_gpus`` ends with "CUDA: Check failed" where the driver is too old or broken.
    """
    driver = read_driver()
    if driver.problem is not None:
        LOGGER.warning("No GPU can be used: %s", driver.problem)
    return driver.gpus


def without_kernels(gpus: Iterable[GPU]) -> dict[int, str]:
    """Return by number what is wrong with GPUs that the installed build cannot run on.

    Unasked, the failure is "no kernel image is available" in the middle of the first step. Of a
    build of the user's own nothing is known.
    """
    if not is_wheel():
        return {}
    return {gpu.number: kernel_problem(gpu) for gpu in gpus if not gpu.has_kernels}


def kernel_problem(gpu: GPU) -> str:
    """Say that the GPU builds cannot run on ``gpu``, and what to do."""
    known = ", ".join(f"{major}.{minor}" for major, minor in (*KERNELS, (8, 9)))
    return (
        f"GPU {gpu.number} ({gpu.name}) has compute capability {gpu.capability[0]}."
        f"{gpu.capability[1]}; MXNet 1.9.1 has kernels for {known} (Maxwell to Ada; not Hopper, "
        "not Blackwell). Use another GPU, or the CPU: --gpus cpu"
    )


def _loads(name):
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _in_wheel(name, wheel):
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = os.path.join(folder, wheel, "lib", name)
        if os.path.exists(path):
            return path
    return None


def _call(function, *arguments):
    code = function(*arguments)
    if code:
        raise OSError(f"{function.__name__} returned {code}")


def _gpu(cuda, index):
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    _call(cuda.cuDeviceGet, ctypes.byref(device), index)
    _call(cuda.cuDeviceGetName, name, len(name), device)
    _call(cuda.cuDeviceTotalMem_v2, ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(cuda.cuDeviceGetAttribute, ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return GPU(index, name.value.decode(errors="replace"), tuple(capability), memory.value)
