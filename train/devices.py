"""The devices that a run uses."""

import logging
from typing import Optional

import mxnet_gpu
from glore_common import UsageError
from mxnet_compat import how_to_install, mx

from .options import DeviceOptions

LOGGER = logging.getLogger("glore.train")


def contexts_of(options: DeviceOptions, seen: Optional[int] = None) -> list[mx.Context]:
    """Turn ``--gpus`` (and ``--cpus``) into MXNet contexts, and say in the log what runs where.

    Parameters
    ----------
    options
        ``gpus``: numbers, ``()`` for the CPU, None for all GPUs that MXNet can use, else the CPU.
        ``cpus``, where there is that option: so many devices on the CPU, between which each batch
        is divided as between GPUs.
    seen
        Number of GPUs; asked of the driver by default.

    Raises
    ------
    UsageError
        If a GPU does not exist or MXNet has no kernels for it, or GPUs are asked for as well as
        CPUs.
    """
    gpus, cpus = options.gpus, getattr(options, "cpus", None)
    if cpus is not None:
        if gpus:
            raise UsageError("give --gpus or --cpus, not both")
        LOGGER.info("Running on %d device(s) of the CPU, as asked", cpus)
        return [mx.cpu(index) for index in range(cpus)]
    if gpus == ():
        LOGGER.info("Running on the CPU, as asked")
        return [mx.cpu()]
    listed: tuple[mxnet_gpu.GPU, ...] = ()
    if seen is None and mx.runtime.Features().is_enabled("CUDA"):
        listed = mxnet_gpu.list_gpus()
    seen = len(listed) if seen is None else seen
    useless = mxnet_gpu.without_kernels(listed)
    if gpus is None:
        for problem in useless.values():
            LOGGER.warning("%s", problem)
        gpus = tuple(index for index in range(seen) if index not in useless)
        if not gpus:
            LOGGER.info("MXNet sees no GPU: running on the CPU")
            return [mx.cpu()]
    missing = [index for index in gpus if index >= seen]
    if missing:
        raise UsageError(
            f"GPU {missing[0]} was asked for, but MXNet sees {seen}. Give the ones to use with "
            "--gpus 0,1, or --gpus '' for the CPU." + ("" if seen else f" {how_to_install()}")
        )
    problems = [useless[index] for index in gpus if index in useless]
    if problems:
        raise UsageError("\n".join(problems))
    LOGGER.info("Running on GPU %s", ", ".join(map(str, gpus)))
    return [mx.gpu(index) for index in gpus]
