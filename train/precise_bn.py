"""Precise BatchNorm: tune gammas and betas alone, then re-estimate the running statistics.

The original project (facebookresearch/GloRe) documents this to follow each logged epoch: 400
batches that update only BatchNorm's gammas and betas, then 100 that are only passed forward to
estimate the running statistics anew. (Its code froze the wrong group and trained the weights;
what is documented is done here.)

MXNet moves the running statistics in BatchNorm's *backward* on a CPU, with oneDNN and without it
(1.9.1, measured), and in its forward on a GPU. A forward pass in training mode therefore leaves
them as they are on a CPU. The estimate here does not use them: the network's graph gets the batch
mean m and variance v of every BatchNorm's input as outputs, and the statistics become those of
all the batches taken together: E[m], and E[v + m^2] - E[m]^2 (biased, as MXNet's own).
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from glore_common import GloReError
from mxnet_compat import mx

_OPERATORS = ("BatchNorm", "_contrib_SyncBatchNorm")


@dataclasses.dataclass(frozen=True)
class BatchNormNode:
    """A BatchNorm of a graph: the full names of its parameters and its input.

    Attributes
    ----------
    name, gamma, beta, mean, var
        Names of the node and its parameters.
    axis
        The channel axis.
    data
        What it normalises.
    """

    name: str
    gamma: str
    beta: str
    mean: str
    var: str
    axis: int
    data: mx.sym.Symbol


def batch_norms(symbol: mx.sym.Symbol) -> list[BatchNormNode]:
    """Return the BatchNorms of a graph, without those on frozen statistics."""
    internals = symbol.get_internals()
    found = []
    for node in json.loads(symbol.tojson())["nodes"]:
        attributes = node.get("attrs", {})
        if node["op"] not in _OPERATORS:
            continue
        if attributes.get("use_global_stats", "False") in ("True", "1"):
            continue
        inputs = internals[f"{node['name']}_output"].get_children()
        found.append(
            BatchNormNode(
                node["name"],
                gamma=inputs[1].name,
                beta=inputs[2].name,
                mean=inputs[3].name,
                var=inputs[4].name,
                axis=int(attributes.get("axis", 1)),
                data=inputs[0],
            )
        )
    return found


def traced(block: mx.gluon.HybridBlock) -> tuple[mx.sym.Symbol, mx.sym.Symbol]:
    """Return (input symbol, output symbol) of a hybrid block with one input."""
    data = mx.sym.Variable("data")
    try:
        return data, block(data)
    except Exception as error:
        raise GloReError(
            "precise BatchNorm needs a network that MXNet can trace into a graph (a hybrid block "
            f"or a SymbolBlock with one input): {error}"
        ) from error


@contextlib.contextmanager
def only_trainable(block: mx.gluon.Block, names: Collection[str]) -> Iterator[None]:
    """Freeze all parameters of ``block`` but those called ``names``, within a ``with`` block."""
    frozen = [
        (parameter, parameter.grad_req)
        for name, parameter in block.collect_params().items()
        if name not in names and parameter.grad_req != "null"
    ]
    try:
        for parameter, _ in frozen:
            parameter.grad_req = "null"
        yield
    finally:
        for parameter, request in frozen:
            parameter.grad_req = request


def affine_names(block: mx.gluon.HybridBlock) -> set[str]:
    """Return the names of all BatchNorm gammas and betas of a block."""
    nodes = batch_norms(traced(block)[1])
    return {name for node in nodes for name in (node.gamma, node.beta)}


def estimate_statistics(
    block: mx.gluon.HybridBlock,
    contexts: list[mx.Context],
    batches: Iterable[mx.nd.NDArray],
    dtype: str = "float32",
) -> int:
    """Set every BatchNorm's running statistics to those of the given batches.

    Parameters
    ----------
    block
        The network; its other parameters are only read.
    contexts
        Each batch is split over these devices; all of them get the same statistics.
    batches
        Input batches.
    dtype
        Type that the network takes.

    Returns
    -------
    int
        The number of batches. Without BatchNorm or without batches nothing is changed.
    """
    data, output = traced(block)
    nodes = batch_norms(output)
    if not nodes:
        return 0
    heads = []
    for node in nodes:
        values = mx.sym.Cast(node.data, dtype="float32")
        mean = values.mean(axis=node.axis, exclude=True, keepdims=True)
        spread = mx.sym.square(mx.sym.broadcast_sub(values, mean))
        heads += [mean.reshape((-1,)), spread.mean(axis=node.axis, exclude=True)]
    parameters = block.collect_params()
    probe = mx.sym.Group(heads)
    # Called on the network's own arrays; a SymbolBlock would want to own its parameters.
    run, inputs = mx.nd.CachedOp(probe), probe.list_inputs()

    def statistics(part: mx.nd.NDArray) -> list:
        context = part.context
        values = {name: parameters[name].data(context) for name in inputs if name in parameters}
        return run(*(part if name == data.name else values[name] for name in inputs))

    weight = count = 0
    means: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    for batch in batches:
        parts = mx.gluon.utils.split_and_load(batch.astype(dtype), contexts, even_split=False)
        with mx.autograd.train_mode():
            results = [statistics(part) for part in parts]
        for part, result in zip(parts, results):
            values = [value.asnumpy().astype(np.float64) for value in result]
            share = part.shape[0]
            mean, var = values[0::2], values[1::2]
            if not means:
                means = [np.zeros_like(value) for value in mean]
                squares = [np.zeros_like(value) for value in mean]
            for index in range(len(nodes)):
                means[index] += share * mean[index]
                squares[index] += share * (var[index] + mean[index] ** 2)
            weight += share
        count += 1
    if not weight:
        return 0
    for node, total, square in zip(nodes, means, squares):
        centre = total / weight
        spread = np.maximum(square / weight - centre**2, 0)
        parameters[node.mean].set_data(mx.nd.array(centre, dtype=parameters[node.mean].dtype))
        parameters[node.var].set_data(mx.nd.array(spread, dtype=parameters[node.var].dtype))
    return count
