"""What GloRe units and context blocks of a network compute for an input, by node of its Symbol.

A network is one Symbol, so that whatever it computes on the way is an output of
``symbol.get_internals()``. :func:`inserted_blocks` finds the units and blocks in a graph by the
names and operators of their nodes, whichever builder or release it comes from;
:func:`compute` evaluates nodes; :func:`views` puts both together.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from checkpoint.params import numpy_of, param_shapes
from glore_common import UsageError
from mxnet_compat import mx

from .block import output_of
from .memory import check_memory
from .symbol_context import AFFINITY


class Inserted(NamedTuple):
    """A GloRe unit or context block in a graph.

    Attributes
    ----------
    name
        Prefix of its nodes: ``conv4_B03_extra``, ``conv4_B05_nl``.
    kind
        'glore', or one of ``CONTEXT_KINDS``.
    weights
        Node of its map: of projection weights (n, N, *spatial), attention (n, L, L') or
        (n, 1, L), or factors of channels (n, c, …).
    data
        Node that the block reads, and that its output is added to (or multiplied with).
    added
        Node of what is added to (or multiplied with) it.
    nodes
        GloRe: node of the states (n, S, N) that the positions are gathered in.
    relation
        GloRe: parameter (N, N, 1), the learnt relation of the nodes.
    is_distribution
        Whether what a map says of one position sums to 1.
    """

    name: str
    kind: str
    weights: str
    data: str
    added: str
    nodes: Optional[str] = None
    relation: Optional[str] = None
    is_distribution: bool = False


class View(NamedTuple):
    """What an inserted block computed for a batch.

    Attributes
    ----------
    block
    weights
        GloRe: (n, N, L), signed and of any size. Non-local: (n, L, L'), rows are queries. GC, SNL:
        (n, 1, L). SE: (n, c).
    shape
        Spatial shape of the L positions.
    key_shape
        Of the L' positions that Non-local gathers from; ``shape`` unless it sub-samples.
    data
        (n, c, L): input.
    added
        (n, c, L), (n, c, 1) or (n, c): what is added to it, or the factors of SE.
    nodes
        GloRe: (n, S, N).
    relation
        GloRe: (N, N).
    """

    block: Inserted
    weights: np.ndarray
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    data: np.ndarray
    added: np.ndarray
    nodes: Optional[np.ndarray] = None
    relation: Optional[np.ndarray] = None


class _Graph:
    """Nodes of a Symbol by name."""

    def __init__(self, symbol: mx.sym.Symbol) -> None:
        self.nodes = json.loads(symbol.tojson())["nodes"]
        self.by_name = {node["name"]: node for node in self.nodes}

    def has(self, name: str, op: Optional[str] = None) -> bool:
        node = self.by_name.get(name)
        return node is not None and op in (None, node["op"])

    def inputs(self, name: str) -> list[str]:
        return [self.nodes[entry[0]]["name"] for entry in self.by_name[name]["inputs"]]

    def first(self, *names: str) -> Optional[str]:
        return next((name for name in names if name in self.by_name), None)


def inserted_blocks(symbol: mx.sym.Symbol) -> list[Inserted]:
    """Return the GloRe units and context blocks of a network, from its input to its output.

    Parameters
    ----------
    symbol
        Of this project, or a released graph.
    """
    graph, found = _Graph(symbol), []
    for node in graph.nodes:
        block = _at(graph, node)
        if block is not None:
            found.append(block)
    return found


def _at(graph: _Graph, node: Mapping[str, Any]) -> Optional[Inserted]:
    """Return the block that a node is the map of, or None."""
    name, op = node["name"], node["op"]

    def block(prefix, kind, *fusions, **facts):
        fusion = graph.first(*(f"{prefix}_{fusion}" for fusion in fusions))
        if fusion is None:
            return None
        data, added = graph.inputs(fusion)[:2]
        return Inserted(prefix, kind, name, data, added, **facts)

    if op == "Convolution" and name.endswith("_conv-proj_conv"):
        prefix = name[: -len("_conv-proj_conv")]
        relation = next(
            (entry for entry in graph.inputs(f"{prefix}_GCN-G_conv") if entry.endswith("_weight")),
            None,
        )
        # Of a dual path network's two outputs the residual one.
        return block(prefix, "glore", "sum", "sum-res", nodes=f"{prefix}_proj", relation=relation)
    if name.endswith("_attention") and graph.has(name[: -len("_attention")] + AFFINITY):
        return block(name[: -len("_attention")], "nl", "sum", is_distribution=op == "softmax")
    if op == "softmax" and name.endswith("_mask"):
        prefix = name[: -len("_mask")]
        kind = "gc" if graph.has(f"{prefix}_add-1_conv") or graph.has(f"{prefix}_mul") else "snl"
        return block(prefix, kind, "add", "mul", is_distribution=True)
    if op == "Activation" and node.get("attrs", {}).get("act_type") == "sigmoid":
        prefix = name[: -len("_sigmoid")]
        prefix = prefix[: -len("_mul")] if prefix.endswith("_mul") else prefix
        if graph.has(f"{prefix}_mul", "broadcast_mul") and not graph.has(f"{prefix}_mask"):
            return block(prefix, "se", "mul")
    return None


def compute(
    symbol: mx.sym.Symbol,
    params: Mapping[str, Any],
    data: np.ndarray,
    nodes: Sequence[str],
    ctx: Optional[mx.Context] = None,
) -> dict[str, np.ndarray]:
    """Evaluate nodes of a network, in evaluation mode.

    Parameters
    ----------
    symbol
        Its input is ``data``.
    params
        Arguments and auxiliary states by name; what the nodes do not need is left out.
    data
        (n, *input).
    nodes
        Names; a parameter's is as good as an operator's.
    ctx
        Where it is computed; on the CPU by default.

    Returns
    -------
    dict
        Name to array.

    Raises
    ------
    UsageError
        If there is no such node, a parameter is missing, or the network does not take the data.
    MemoryProblem
        If Non-local blocks do not fit (:mod:`network.memory`).
    """
    ctx = ctx or mx.cpu()
    wanted = [name for name in dict.fromkeys(nodes) if name not in params]
    values = {name: numpy_of(params[name], name) for name in nodes if name in params}
    if not wanted:
        return values
    group = mx.sym.Group([output_of(symbol, name) for name in wanted])
    shapes = param_shapes(group, {"data": np.shape(data)})
    check_memory(group, {"data": np.shape(data)}, training=False, ctx=ctx)
    names = [*group.list_arguments(), *group.list_auxiliary_states()]
    missing = [name for name in names if name != "data" and name not in params]
    if missing:
        raise UsageError(f"the weights lack {', '.join(missing[:4])}")
    for name, shape in {**shapes[0], **shapes[1]}.items():
        if np.shape(params[name]) != shape:
            raise UsageError(
                f"the network does not take data of shape {np.shape(data)}: {name} would be "
                f"{shape}, it is {np.shape(params[name])}"
            )

    def array(name):
        return mx.nd.array(data if name == "data" else numpy_of(params[name], name), ctx=ctx)

    executor = group.bind(
        ctx,
        {name: array(name) for name in group.list_arguments()},
        grad_req="null",
        aux_states={name: array(name) for name in group.list_auxiliary_states()},
    )
    results = executor.forward(is_train=False)
    return {**values, **{name: out.asnumpy() for name, out in zip(wanted, results)}}


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:2], -1)


def wanted_nodes(symbol: mx.sym.Symbol, blocks: Iterable[Inserted]) -> list[str]:
    """Return the nodes that :func:`view_of` needs of these blocks."""
    known = set(symbol.get_internals().list_outputs())
    wanted = []
    for block in blocks:
        nodes = (block.weights, block.data, block.added, block.nodes, block.relation)
        wanted += [name for name in nodes if name is not None]
        if f"{_pooled_keys(block)}_output" in known:
            wanted.append(_pooled_keys(block))
    return wanted


def _pooled_keys(block: Inserted) -> str:
    return f"{block.name}_g-pool"


def view_of(block: Inserted, arrays: Mapping[str, np.ndarray]) -> View:
    """Return what a block computed.

    Parameters
    ----------
    block
    arrays
        What :func:`compute` makes of :func:`wanted_nodes`.
    """
    source, weights = arrays[block.data], arrays[block.weights].astype("float64")
    added = arrays[block.added].astype("float64")
    data, shape = _flat(source.astype("float64")), source.shape[2:]
    if block.kind == "se":
        weights, added = (part.reshape(len(part), -1) for part in (weights, added))
        return View(block, weights, shape, shape, data, added)
    if block.kind == "glore":
        return View(
            block,
            _flat(weights),
            weights.shape[2:],
            weights.shape[2:],
            data,
            _flat(added),
            arrays[block.nodes].astype("float64"),
            arrays[block.relation][..., 0].astype("float64"),
        )
    pooled = arrays.get(_pooled_keys(block))
    if not block.is_distribution:
        # The node holds half of the division by L'.
        weights = weights / np.sqrt(weights.shape[-1])
    key_shape = shape if pooled is None else pooled.shape[2:]
    return View(block, weights, shape, key_shape, data, _flat(added))


def views(
    symbol: mx.sym.Symbol,
    params: Mapping[str, Any],
    data: np.ndarray,
    ctx: Optional[mx.Context] = None,
) -> list[View]:
    """Return what a network's units and blocks compute for a batch.

    The parameters are those of :func:`compute`. Weights of Non-local's dot product and
    concatenation are complete: divided by L'.
    """
    blocks = inserted_blocks(symbol)
    arrays = compute(symbol, params, data, wanted_nodes(symbol, blocks), ctx)
    return [view_of(block, arrays) for block in blocks]
