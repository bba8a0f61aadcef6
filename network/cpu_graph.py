"""A form of a graph that can be trained on a CPU, and without detours.

**BatchNorm.** MXNet 1.9.1 with oneDNN raises ``Check failed: !is_view`` in the backward pass of a
BatchNorm whose input has not four dimensions, whenever oneDNN hands over a blocked memory layout,
that is at channel counts which are multiples of 8 (https://github.com/apache/mxnet/issues/20858,
https://github.com/apache/mxnet/issues/19150). A BatchNorm on the same numbers seen as a 4-D array
is the same function and is not affected. Builders therefore make the plain graph, which GPUs,
inference and export want, and ``block.py`` trains this form of it on a CPU.

With fewer axes than four oneDNN's own kernel for the backward pass in a blocked layout is its slow
reference: in the units of the released networks, behind 1-D convolutions, it took a fifth of a
training step. What such a convolution reads is copied, so that its gradient is plain again.

**A factor for each channel** (squeeze-and-excitation). The gradient of ``broadcast_mul`` with
respect to the factors is a sum over the map, and MXNet 1.9.1 is slow at it on a CPU. As one product
of an Lx1 and a 1x1 matrix per channel it is a matrix product forwards and backwards.

**The mean over a clip** (squeeze-and-excitation, the classifier's pooling). MXNet 1.9.1 has no fast
gradient of a global ``Pooling`` over three axes: with squeeze-and-excitation in a 3D ResNet-50 it
was half of a training step. ``mean`` over one long axis is the same function.

**Bilinear up-sampling** (segmentation). The gradient of ``BilinearResize2D`` is computed by one
thread: for a small network it took five times as long as all the rest. Rows and columns are
weighted sums of rows and columns, so the same numbers come out of two matrix products, whose
matrices the graph makes of the sizes it meets.
"""

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from checkpoint.params import infer_shapes
from glore_common import GloReError, UsageError
from mxnet_compat import mx

Shape = tuple[int, ...]
# Of a graph as JSON: [node, output, version].
Entry = list[int]


class GraphError(GloReError):
    """A graph that cannot be rewritten or given shapes; the message names the node."""


def _four_dimensional(ndim: int) -> str:
    """Return the Reshape target that makes 4-D data of ``ndim``-D data, axes 0 and 1 kept."""
    # (n, c) -> (n, c, 1, 1); (n, c, l) -> (n, c, l, 1); (n, c, t, h, w) -> (n, c, t, h*w)
    return "(0, 0, 1, 1)" if ndim == 2 else "(0, 0, 0, -1)"


def _shapes_of(
    symbol: mx.sym.Symbol, nodes: list[dict[str, Any]], input_shapes: Mapping[str, Shape]
) -> list[Shape]:
    """Return the shape of each node's first output; () where it does not follow."""
    try:
        shapes = infer_shapes(symbol, input_shapes)
    except UsageError as error:
        raise GraphError(str(error)) from error
    # Nodes may have one name; their outputs stand in the order of the nodes.
    found: defaultdict[str, deque] = defaultdict(deque)
    for name, shape in shapes:
        found[name].append(shape)
    first = []
    for node in nodes:
        names = (node["name"],) if node["op"] == "null" else _output_names(node["name"])
        queue = next((found[name] for name in names if found.get(name)), None)
        first.append(queue.popleft() if queue else ())
    return first


def _output_names(name: str) -> tuple[str, str]:
    """Return what the first output of an operator's node may be called."""
    return f"{name}_output", f"{name}_output0"


class _Rebuilt:
    """The nodes of a new graph, to which those of an old one are added in their order."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.place: dict[int, int] = {}  # node of the old graph -> of the new one
        # (node, output) of the old graph -> entry of the new one
        self.moved: dict[tuple[int, int], Entry] = {}

    def entry(self, old: Entry) -> Entry:
        """Return the entry (node, output, version) that stands for one of the old graph."""
        node, output, version = old
        return self.moved.get((node, output)) or [self.place[node], output, version]

    def add(self, op: str, name: str, inputs: list[Entry], attrs: Any = None) -> Entry:
        """Add a node; return the entry of its first output."""
        node = {"op": op, "name": name, "inputs": inputs}
        self.nodes.append(dict(node, attrs=attrs) if attrs else node)
        return [len(self.nodes) - 1, 0, 0]

    def keep(self, index: int, node: dict[str, Any]) -> None:
        """Add node ``index`` of the old graph as it is, its inputs being new ones already."""
        self.place[index] = len(self.nodes)
        self.nodes.append(node)

    def normalise(self, index: int, node: dict[str, Any], target: str) -> None:
        """Add a BatchNorm between reshapes to and from ``target``."""
        name, data = node["name"], node["inputs"][0]
        flat = self.add("Reshape", f"{name}_to-4d", [data], {"shape": target})
        self.nodes.append(dict(node, name=f"{name}_4d", inputs=[flat, *node["inputs"][1:]]))
        # Outputs 1 and 2 (mean and variance) have one dimension and stay those of the BatchNorm.
        self.place[index] = len(self.nodes) - 1
        self.moved[index, 0] = self.add("reshape_like", name, [[self.place[index], 0, 0], data])

    def plain(self, index: int, node: dict[str, Any]) -> None:
        """Add a convolution behind a copy of its input."""
        whole = {"axis": "0", "begin": "0", "end": "None"}
        copy = self.add("slice_axis", f"{node['name']}_plain", node["inputs"][:1], whole)
        self.keep(index, dict(node, inputs=[copy, *node["inputs"][1:]]))

    def scale(self, index: int, node: dict[str, Any]) -> None:
        """Add a product of a map and a factor per channel as a product of matrices."""
        name, (data, factor) = node["name"], node["inputs"]
        # (n, c, *spatial) x (n, c, 1, …): (n·c, L, 1) x (n·c, 1, 1) -> (n·c, L, 1)
        merge = "(-3, -1, 1)"
        columns = self.add("Reshape", f"{name}_columns", [data], {"shape": merge})
        factors = self.add("Reshape", f"{name}_factors", [factor], {"shape": merge})
        product = self.add("batch_dot", f"{name}_product", [columns, factors])
        self.place[index] = self.add("reshape_like", name, [product, data])[0]

    def average(self, index: int, node: dict[str, Any]) -> None:
        """Add a global average pooling of (n, c, t, h, w) as a mean over one axis."""
        name = node["name"]
        flat = self.add("Reshape", f"{name}_flat", node["inputs"], {"shape": "(0, 0, -1)"})
        mean = self.add("mean", f"{name}_mean", [flat], {"axis": "2"})
        self.place[index] = self.add("Reshape", name, [mean], {"shape": "(0, 0, 1, 1, 1)"})[0]

    def enlarge(self, index: int, node: dict[str, Any]) -> None:
        """Add a bilinear resize to the size of the second input as two products of matrices."""
        name, (data, like) = node["name"], node["inputs"]
        # (n, c, h, w) -> (n, c, w, h) x (h, H) -> (n, c, w, H) -> (n, c, H, w) x (w, W)
        swap = {"axes": "(0, 1, 3, 2)"}
        turned = self.add("transpose", f"{name}_turned", [data], swap)
        rows = self._weights(f"{name}_rows", data, like, 2)
        taller = self.add("dot", f"{name}_taller", [turned, rows])
        back = self.add("transpose", f"{name}_back", [taller], swap)
        columns = self._weights(f"{name}_columns", data, like, 3)
        self.place[index] = self.add("dot", name, [back, columns])[0]

    def _weights(self, name: str, data: Entry, like: Entry, axis: int) -> Entry:
        """Add the matrix (size of data, size of like) of the shares along one axis."""

        def then(op: str, tag: str, *inputs: Entry, **attrs: Any) -> Entry:
            texts = {key: str(value) for key, value in attrs.items()}
            return self.add(op, f"{name}_{tag}", list(inputs), texts)

        source = then("_contrib_arange_like", "from", data, axis=axis)
        target = then("_contrib_arange_like", "to", like, axis=axis)
        last = then("max", "last", source)
        ratio = then(
            "broadcast_div",
            "ratio",
            then("_plus_scalar", "size", last, scalar=1),
            then("_plus_scalar", "new-size", then("max", "new-last", target), scalar=1),
        )
        # Centres of the new pixels on the old axis: (i + 1/2) h / H - 1/2, within the old centres.
        centre = then("_plus_scalar", "centre", target, scalar=0.5)
        place = then("broadcast_mul", "scaled", centre, ratio)
        place = then(
            "_maximum_scalar", "low", then("_plus_scalar", "at", place, scalar=-0.5), scalar=0
        )
        place = then("broadcast_minimum", "place", place, last)
        # The share of an old pixel falls from 1 at its centre to 0 at its neighbours'.
        away = then(
            "broadcast_sub",
            "away",
            then("Reshape", "old", source, shape="(-1, 1)"),
            then("Reshape", "new", place, shape="(1, -1)"),
        )
        share = then("_rminus_scalar", "near", then("abs", "distance", away), scalar=1)
        return then("BlockGrad", "share", then("_maximum_scalar", "cut", share, scalar=0))


def for_cpu_training(symbol: mx.sym.Symbol, input_shapes: Mapping[str, Shape]) -> mx.sym.Symbol:
    """Return an equal graph that feeds every BatchNorm a 4-D array, and is fast at the rest.

    A BatchNorm ``x`` on data that is not 4-D becomes Reshape ``x_to-4d``, BatchNorm ``x_4d`` and
    reshape_like ``x``: the result keeps the name of the node that it replaces, and so do internal
    outputs. A ``broadcast_mul`` of (n, c, *spatial) and (n, c, 1, …) becomes a batch_dot between
    reshapes, a global average ``Pooling`` of a clip a ``mean``, a ``BilinearResize2D`` like another
    array two products of matrices. Names and order
    of arguments, auxiliary states and outputs are those of ``symbol``; attributes are kept. Where
    there is nothing to do the graph itself is returned.

    Parameters
    ----------
    symbol
    input_shapes
        Of the inputs with the batch axis, such as ``{"data": (1, 3, 8, 224, 224)}``. Only the
        number of dimensions that follows from them matters: other sizes run as well.

    Raises
    ------
    GraphError
        If the shapes do not fit the graph, do not say how many dimensions a BatchNorm has, or if
        a BatchNorm that must be wrapped normalises another axis than 1.
    """
    graph = json.loads(symbol.tojson())
    shapes = _shapes_of(symbol, graph["nodes"], input_shapes)
    new = _Rebuilt()
    for index, old in enumerate(graph["nodes"]):
        node = dict(old, inputs=[new.entry(entry) for entry in old["inputs"]])
        if "control_deps" in node:
            node["control_deps"] = [new.place[other] for other in node["control_deps"]]
        target = _wrap_target(node, shapes[index]) if node["op"] == "BatchNorm" else None
        if target is not None:
            new.normalise(index, node, target)
        elif _follows_norm_of_lines(old, graph["nodes"], shapes):
            new.plain(index, node)
        elif _scales_channels(old, shapes):
            new.scale(index, node)
        elif _averages_clips(old, shapes[index]):
            new.average(index, node)
        elif _enlarges(old):
            new.enlarge(index, node)
        else:
            new.keep(index, node)
    if len(new.nodes) == len(graph["nodes"]):
        return symbol
    rebuilt = {
        "nodes": new.nodes,
        "arg_nodes": [index for index, node in enumerate(new.nodes) if node["op"] == "null"],
        "heads": [new.entry(entry) for entry in graph["heads"]],
        "attrs": graph["attrs"],
    }
    return mx.sym.load_json(json.dumps(rebuilt))


def _follows_norm_of_lines(
    node: dict[str, Any], nodes: Sequence[dict[str, Any]], shapes: Sequence[Shape]
) -> bool:
    """Return whether a node of the old graph is a 1-D convolution behind BatchNorm (and relu)."""
    if node["op"] != "Convolution" or len(shapes[node["inputs"][0][0]]) != 3:
        return False
    source = nodes[node["inputs"][0][0]]
    if source["op"] == "Activation":
        source = nodes[source["inputs"][0][0]]
    return source["op"] == "BatchNorm"


def _scales_channels(node: dict[str, Any], shapes: Sequence[Shape]) -> bool:
    """Return whether a node of the old graph multiplies (n, c, *spatial) by (n, c, 1, …)."""
    if node["op"] != "broadcast_mul" or any(output for _, output, _ in node["inputs"]):
        return False
    data, factor = (shapes[source] for source, _, _ in node["inputs"])
    return len(data) > 2 and factor == data[:2] + (1,) * (len(data) - 2) and 0 not in factor


def _averages_clips(node: dict[str, Any], shape: Shape) -> bool:
    """Return whether a node is the average of (n, c, t, h, w) over the last three axes."""
    attrs = node.get("attrs", {})
    return (
        node["op"] == "Pooling"
        and len(shape) == 5
        and attrs.get("global_pool") in ("True", "1")
        and attrs.get("pool_type") == "avg"
    )


def _enlarges(node: dict[str, Any]) -> bool:
    """Return whether a node resizes its first input to the size of the second, bilinearly.

    Only where pixels are squares (``align_corners=False``).
    """
    attrs = node.get("attrs", {})
    return (
        node["op"] == "_contrib_BilinearResize2D"
        and attrs.get("mode") == "like"
        and attrs.get("align_corners") in ("False", "0")
    )


def _wrap_target(node: dict[str, Any], shape: Shape) -> Optional[str]:
    """Return the 4-D Reshape target for a BatchNorm node, or None when it can stay as it is."""
    if not shape:
        raise GraphError(
            f"BatchNorm {node['name']}: the number of dimensions of its input does not follow "
            "from the input shapes given; give the shape of every input."
        )
    if len(shape) == 4:
        return None
    axis = int(node.get("attrs", {}).get("axis", 1))
    if axis not in (1, 1 - len(shape)):
        raise GraphError(
            f"BatchNorm {node['name']} normalises axis {axis} of {len(shape)}-D data; on a CPU "
            "only axis 1 can be trained."
        )
    return _four_dimensional(len(shape))
