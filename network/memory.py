"""Memory of a network's activations, and whether its Non-local blocks fit.

A Non-local block (Wang et al., CVPR 2018) scores every position against every other: its memory
grows with the square of the positions, and on a clip's early maps it alone can exceed a machine's.
:func:`check_memory` says so before anything is computed.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from glore_common import GloReError
from mxnet_compat import mx

from .shapes import Node, Shape, input_shapes, operations
from .symbol_context import AFFINITY

# Operations that give their input another shape and share its memory.
VIEWS = ("Reshape", "Flatten", "reshape_like", "expand_dims")


class MemoryProblem(GloReError):
    """Something that cannot fit into memory; the message says how much it needs and what helps."""


class Activations(NamedTuple):
    """Bytes of a graph's activations.

    ``training``: all values computed, each once; what the backward pass keeps is at most this.
    ``inference``: the most that is alive at once when each value is freed after its last use.
    ``scores``: of ``training``, the position-by-position scores of Non-local blocks.
    """

    training: int
    inference: int
    scores: int


class Scores(NamedTuple):
    """What the position-by-position scores of a Non-local block need, in bytes.

    ``name`` of the block, ``shape`` (n, L, L') of its scores, and what stays until the backward
    pass (``kept``), is needed once more while it runs (``passing``), or is needed for inference.
    Measured on MXNet 1.9.1: a softmax's gradient takes two arrays of the size of the scores, a
    division's one; the relu of a concatenation keeps its own output.
    """

    name: str
    shape: Shape
    kept: int
    passing: int
    inference: int


def activation_bytes(symbol: mx.sym.Symbol, inputs: Any, itemsize: int = 4) -> Activations:
    """Return the :class:`Activations` of a graph.

    Parameters
    ----------
    symbol
    inputs : InputConf, or mapping of str to tuple of int
        Input shapes; a mapping includes the batch axis, an InputConf stands for one sample.
    itemsize
        Bytes of a number.

    Raises
    ------
    UsageError
        When the shapes do not fit the graph.
    """
    nodes = operations(symbol, inputs)
    # A view is another name of what it views.
    owner: dict[str, Optional[str]] = {}
    for node in nodes:
        owner[node.name] = owner.get(node.inputs[0]) if node.op in VIEWS else node.name
    size = {node.name: itemsize * math.prod(node.shape) for node in nodes if node.op not in VIEWS}
    last: dict[str, int] = {}
    for step, node in enumerate(nodes):
        for source in node.inputs:
            origin = owner.get(source)
            if origin is not None:
                last[origin] = step
    alive = peak = 0
    for step, node in enumerate(nodes):
        alive += size.get(node.name, 0)
        peak = max(peak, alive)
        done = {owner.get(source) for source in node.inputs}
        alive -= sum(size[name] for name in done if name is not None and last[name] == step)
    scores = sum(found.kept for found in non_local_scores(nodes, itemsize))
    return Activations(sum(size.values()), peak, scores)


def non_local_scores(nodes: Sequence[Node], itemsize: int = 4) -> list[Scores]:
    """Return the :class:`Scores` of every Non-local block among the operations of a graph."""
    by_name = {node.name: node for node in nodes}
    found = []
    for node in nodes:
        block = node.name[: -len(AFFINITY)]
        if not node.name.endswith(AFFINITY) or f"{block}_attention" not in by_name:
            continue
        size = itemsize * math.prod(node.shape)
        has_relu = f"{node.name}_relu" in by_name
        is_division = by_name[f"{block}_attention"].op != "softmax"
        found.append(
            Scores(
                block,
                node.shape,
                kept=2 * size if has_relu else size,
                passing=size if is_division and not has_relu else 2 * size,
                inference=size,
            )
        )
    return found


def _read_number(path: str) -> Optional[int]:
    try:
        with open(path) as stream:
            return int(stream.read())
    except (OSError, ValueError):
        return None


def available_memory(ctx: Optional[mx.Context] = None) -> Optional[int]:
    """Return the free memory of a device in bytes, or None where the system does not tell.

    On a CPU: what Linux calls available, or less where the process group (cgroup) has a limit.

    Parameters
    ----------
    ctx
        The CPU by default.
    """
    if ctx is not None and ctx.device_type == "gpu":
        return mx.context.gpu_memory_info(ctx.device_id)[0]
    if not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as stream:
        fields = dict(line.split(":") for line in stream)
    free = 1024 * int(fields["MemAvailable"].split()[0])
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, used = _read_number(limit_file), _read_number(used_file)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used))
    return free


def check_memory(
    symbol: mx.sym.Symbol,
    inputs: Any,
    batch_size: int = 1,
    *,
    limit: Optional[int] = None,
    training: bool = True,
    itemsize: int = 4,
    ctx: Optional[mx.Context] = None,
) -> int:
    """Raise an error when the Non-local blocks of a network cannot fit into memory.

    Counted are their scores alone, the least that a pass over the network needs: what passes here
    may still be too large with everything else.

    Parameters
    ----------
    symbol
        Any graph; without Non-local blocks there is nothing to check.
    inputs : InputConf, or mapping of str to tuple of int
        An InputConf stands for one sample, a mapping includes the batch axis.
    batch_size
        Samples of an InputConf that a device computes at once.
    limit
        Bytes; by default what ``ctx`` has free.
    training
        Whether gradients are computed.
    itemsize
        Bytes of a number.
    ctx
        The CPU by default.

    Returns
    -------
    int
        The bytes that the scores need; 0 without Non-local blocks.

    Raises
    ------
    MemoryProblem
        The message names the block that needs most, and what makes it smaller.
    """
    outputs = symbol.get_internals().list_outputs()
    if not any(name.endswith(f"{AFFINITY}_output") for name in outputs):
        return 0
    shapes = input_shapes(inputs)
    if hasattr(inputs, "data_shape"):
        shapes = {name: (batch_size, *shape[1:]) for name, shape in shapes.items()}
    blocks = non_local_scores(operations(symbol, shapes), itemsize)
    if not blocks:
        return 0
    if training:
        needed = sum(b.kept for b in blocks) + max(b.passing for b in blocks)
    else:
        needed = max(b.inference for b in blocks)
    free = available_memory(ctx) if limit is None else limit
    if free is None or needed <= free:
        return needed
    worst = max(blocks, key=lambda b: b.kept)
    samples, positions, others = worst.shape
    advice = "a smaller batch or input, fewer Non-local blocks or later stages"
    if positions == others:
        advice = (
            "sub_sample (block='nl:sub_sample=true'), which divides this by about 4 on images and "
            f"clips, {advice}"
        )
    raise MemoryProblem(
        f"{len(blocks)} Non-local block{'s' * (len(blocks) > 1)} need at least "
        f"{needed / 2**30:.2f} GiB to {'train' if training else 'run'}, {free / 2**30:.2f} GiB are "
        f"free. The largest, {worst.name}, compares {positions} with {others} positions for each "
        f"of {samples} sample{'s' * (samples > 1)}: {worst.kept / 2**30:.2f} GiB. "
        f"What helps: {advice}, or block='gc', whose memory does not grow like this."
    )


class MemoryGuard:
    """Runs :func:`check_memory` once for each new kind of array that a graph is to compute.

    Parameters
    ----------
    symbol
        Its input is ``data``.
    """

    def __init__(self, symbol: mx.sym.Symbol) -> None:
        self._symbol = symbol
        self._known: set[tuple] = set()

    def __call__(self, x: mx.nd.NDArray) -> None:
        """Check the NDArray ``x``, to be computed now, with or without a gradient.

        Raises
        ------
        MemoryProblem
            If its Non-local scores do not fit.
        """
        training = mx.autograd.is_recording()
        key = (x.shape, x.dtype, x.ctx, training)
        if key not in self._known:
            item = np.dtype(x.dtype).itemsize
            shapes = {"data": x.shape}
            check_memory(self._symbol, shapes, training=training, itemsize=item, ctx=x.ctx)
            self._known.add(key)
