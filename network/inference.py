"""A form of a network that predicts fast on a CPU: same function, other nodes and parameters.

oneDNN is fast where convolutions follow one another in its own memory layout, with sum, shift and
relu done while a convolution's result is in a register. MXNet 1.9.1 keeps to that for few operators
(https://github.com/apache/mxnet/tree/v1.9.x/src/operator/subgraph/mkldnn), so :func:`optimize`
leaves it no others:

* A BatchNorm behind a convolution becomes part of its weights.
* Pre-activation networks normalise the running sum of the blocks, which is no convolution.
  relu(s·x + b) is s·relu(x + b/s) where the scale s is positive: s goes into the weights of the
  convolution that follows, and the shift b/s into the bias of the one that made x, whose other
  readers are corrected for it. What is left is a relu. Channels whose scale is not positive, or too
  small, go a way of their own: a convolution that picks them, and another that adds what they make.
* The units' 1-D convolutions become fully connected layers, or part of the convolution behind.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from checkpoint.params import numpy_of
from mxnet_compat import mx

from .block import output_of
from .memory import MemoryGuard
from .quantization import Int8, calibrate, joined, quantize
from .rewriting import Graph, Node, Shape, Value

# A channel is shifted by no more than this many times what it is anyway, so that sums keep their
# digits ...
MOST_SHIFT = 8.0
# ... and at most this share of the channels may go their own way.
MOST_PICKED = 1 / 4
# Up to this many channels a convolution with a diagonal matrix is faster than MXNet's BatchNorm on
# 5-D data, which leaves oneDNN's layout.
MOST_DIAGONAL = 64
# Channels of oneDNN's blocks: of another number it computes in the plain layout, and the map that
# is read must be reordered to it, which takes longer than the convolution.
BLOCK = 16


class _Optimizer:
    """Rewrites one graph; each method that is not private is a pass over it."""

    def __init__(
        self,
        symbol: mx.sym.Symbol,
        params: Mapping[str, np.ndarray],
        input_shapes: Mapping[str, Shape],
    ) -> None:
        self.graph = Graph(symbol, input_shapes)
        self.params = dict(params)
        self.variables = {node.name: node for node in self.graph.nodes() if node.op == "null"}

    # --- small things -----------------------------------------------------------------------------

    def _value(self, node: Node, place: int) -> np.ndarray:
        return self.params[node.inputs[place].node.name]

    def _variable(self, name: str, value: np.ndarray) -> Value:
        """Return the variable of this name, made if there is none, with a new value."""
        self.params[name] = np.ascontiguousarray(value, dtype="float32")
        if name not in self.variables:
            self.variables[name] = Node("null", name)
        return Value(self.variables[name])

    def _affine(self, norm: Node) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and shift of a BatchNorm, in float64."""
        gamma, beta, mean, var = (self._value(norm, i).astype("float64") for i in range(1, 5))
        if norm.attrs.get("fix_gamma", "True") in ("True", "1", "true"):
            gamma = np.ones_like(gamma)
        scale = gamma / np.sqrt(var + float(norm.attrs.get("eps", 1e-3)))
        return scale, beta - mean * scale

    def _weigh(self, conv: Node, weight: np.ndarray) -> None:
        conv.inputs[1] = self._variable(f"{conv.name}_optimized_weight", weight)

    def _add_bias(self, conv: Node, bias: np.ndarray) -> None:
        """Add to the bias of a convolution or fully connected layer."""
        if len(conv.inputs) > 2:
            bias = bias + self._value(conv, 2)
        conv.inputs[2:] = [self._variable(f"{conv.name}_optimized_bias", bias)]
        conv.attrs["no_bias"] = "False"

    def _is_output(self, node: Node) -> bool:
        return any(head.node is node for head in self.graph.heads)

    def _only_reader(self, node: Node, readers: Mapping[Node, list[Node]]) -> Optional[Node]:
        found = readers[node]
        return found[0] if len(found) == 1 and not self._is_output(node) else None

    # --- passes -----------------------------------------------------------------------------------

    def simplify(self) -> None:
        """Take out what does nothing in prediction; name sums as oneDNN's passes know them."""
        for node in self.graph.nodes():
            if node.op == "Dropout":
                self.graph.exchange(node, node.inputs[0])
            elif node.op == "add_n" and len(node.inputs) == 2:
                node.op, node.attrs = "elemwise_add", {}

    def fold_norms(self) -> None:
        """Make BatchNorms part of the convolution that only they read."""
        readers = self.graph.readers()
        for norm in self.graph.nodes():
            if not _is_norm(norm):
                continue
            conv = norm.inputs[0].node
            if conv.op != "Convolution" or self._only_reader(conv, readers) is not norm:
                continue
            scale, shift = self._affine(norm)
            weight = self._value(conv, 1)
            if len(conv.inputs) > 2:
                shift = shift + (scale - 1) * self._value(conv, 2)
            self._weigh(conv, weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)))
            self._add_bias(conv, shift)
            self.graph.exchange(norm, Value(conv))

    def fold_units(self) -> None:
        """Turn the graph convolutions of GloRe units into fully connected layers, or nothing."""
        readers = self.graph.readers()
        for conv in self.graph.nodes():
            if conv.op != "Convolution" or conv.numbers("kernel") != (1,):
                continue
            reader = self._only_reader(conv, readers)
            before = conv.inputs[0].node
            if _is_swap(before) and reader is not None and _is_swap(reader):
                self._relate(conv, before.inputs[0], reader, readers)
            elif reader is not None and reader.op == "batch_dot" and len(conv.inputs) == 2:
                self._mix(conv, reader, readers)

    def _relate(
        self, conv: Node, data: Value, back: Node, readers: Mapping[Node, list[Node]]
    ) -> None:
        # (n, S, N) -> (n, N, S) -> conv -> (n, N, S) -> (n, S, N) is a layer on the last axis.
        weight = self._value(conv, 1)[:, :, 0]
        total = self._only_reader(back, readers)
        shortcut = (
            total is not None and total.op == "elemwise_add" and data in total.inputs
        )  # (W + 1) x is W x + x
        if shortcut:
            weight = weight + np.eye(len(weight))
        attrs = {"num_hidden": str(len(weight)), "flatten": "False"}
        attrs["no_bias"] = str(len(conv.inputs) == 2)
        layer = Node("FullyConnected", conv.name, attrs, [data, *conv.inputs[1:]])
        self._weigh(layer, weight)
        self.graph.exchange(total if shortcut and total is not None else back, Value(layer))

    def _mix(self, conv: Node, product: Node, readers: Mapping[Node, list[Node]]) -> None:
        # W (H V) B = W H (V B): the matrix of the states goes into that of the layer behind.
        if product.inputs[0] != (conv, 0) or product.flag("transpose_a"):
            return
        reader: Optional[Node] = self._only_reader(product, readers)
        if reader is None or reader.op not in ("reshape_like", "Reshape"):
            return
        last = self._only_reader(reader, readers)
        if last is None or not _is_pointwise(last) or last.inputs[0] != (reader, 0):
            return
        weight = self._value(last, 1)
        flat = weight.reshape(len(weight), -1).astype("float64") @ self._value(conv, 1)[:, :, 0]
        if flat.size > weight.size:
            return
        self._weigh(last, flat.reshape(len(weight), -1, *weight.shape[2:]))
        self.graph.exchange(conv, conv.inputs[0])

    def lift_lines(self) -> None:
        """Compute what is left of 1-D convolutions in 2-D, which is what oneDNN fuses."""
        for conv in self.graph.nodes():
            if conv.op != "Convolution" or len(conv.numbers("kernel")) != 1:
                continue
            source = conv.inputs[0]
            name = conv.name
            lift = {"shape": "(0, 0, 0, 1)"}
            flat = Node("Reshape", f"{name}_2d-in", dict(lift), [source])
            attrs = dict(conv.attrs)
            for key, other in (("kernel", 1), ("stride", 1), ("dilate", 1), ("pad", 0)):
                if key in attrs or key == "kernel":
                    attrs[key] = str((*conv.numbers(key), other))
            attrs.pop("layout", None)
            new = Node("Convolution", name, attrs, [Value(flat), *conv.inputs[1:]])
            new.shape = (*conv.shape, 1) if conv.shape else ()
            self._weigh(new, self._value(conv, 1)[..., None])
            back = Node("Reshape", f"{name}_2d-out", {"shape": "(0, 0, 0)"}, [Value(new)])
            back.attrs["shape"] = "(0, 0, -1)"
            back.shape = conv.shape
            self.graph.exchange(conv, Value(back))

    def shift_sums(self) -> None:
        """Do without the BatchNorms of running sums."""
        readers = self.graph.readers()
        order = self.graph.nodes()
        chosen = self._choose(order, readers)
        carried: dict[Node, np.ndarray] = {}  # what a node's first output has too much
        for node in order:
            extra = self._compensate(node, carried)
            norm = chosen.get(node)
            if norm is not None or (extra is not None and node.op == "elemwise_add"):
                maker = self._maker(node, readers)
                if maker is not None:
                    wanted = np.zeros(node.shape[1]) if norm is None else self._shift_of(norm)
                    self._add_bias(maker, wanted if extra is None else wanted - extra)
                    extra = wanted
            if extra is not None:
                carried[node] = extra
            if norm is not None:
                self._absorb(norm, readers)

    def _choose(
        self, order: Sequence[Node], readers: Mapping[Node, list[Node]]
    ) -> dict[Node, Node]:
        """Return, by the node whose values are normalised, the BatchNorm to do without."""
        chosen: dict[Node, Node] = {}
        for norm in order:
            if not _is_norm(norm):
                continue
            node = norm.inputs[0].node
            convs = self._convolutions(norm, readers)
            if not convs or not self._shiftable(node, readers):
                continue
            if self._maker(node, readers) is None or not self._few_picked(norm, convs):
                continue
            # Of several, that whose convolution is not strided has more to do.
            rival = chosen.get(node)
            if rival is None or _is_strided(self._convolutions(rival, readers)[0]):
                chosen[node] = norm
        return chosen

    def _convolutions(self, norm: Node, readers: Mapping[Node, list[Node]]) -> list[Node]:
        """Return the convolutions that read relu(norm); none if something else does."""
        relu = self._only_reader(norm, readers)
        if relu is None or not _is_relu(relu) or self._is_output(relu):
            return []
        convs = readers[relu]
        return convs if all(conv.op == "Convolution" for conv in convs) else []

    def _few_picked(self, norm: Node, convs: Sequence[Node]) -> bool:
        picked = int((~self._positive(norm)).sum())
        grouped = any(conv.attrs.get("num_group", "1") != "1" for conv in convs)
        return not picked if grouped else picked <= MOST_PICKED * len(self._value(norm, 1))

    def _maker(self, node: Node, readers: Mapping[Node, list[Node]]) -> Optional[Node]:
        """Return a convolution whose bias shifts the values of ``node`` and no others."""
        if node.op == "Convolution":
            return node
        if node.op != "elemwise_add":
            return None
        parts = [value.node for value in node.inputs]
        for part in parts:
            if self._only_reader(part, readers) is node:
                maker = self._maker(part, readers)
                if maker is not None:
                    return maker
        return None

    def _shiftable(self, node: Node, readers: Mapping[Node, list[Node]]) -> bool:
        """Return whether all that read a node's values can be corrected for a shift of them."""
        if self._is_output(node) or not readers[node]:
            return False
        for reader in readers[node]:
            if _is_norm(reader):
                continue
            if reader.op == "Convolution" and not any(reader.numbers("pad")):
                continue
            if reader.op == "elemwise_add" and (
                self._maker(reader, readers) is not None or self._shiftable(reader, readers)
            ):
                continue
            return False
        return True

    def _compensate(self, node: Node, carried: Mapping[Node, np.ndarray]) -> Optional[np.ndarray]:
        """Correct a node for the shifts of what it reads; return what its output has too much."""
        extras = [carried[value.node] for value in node.inputs if value.node in carried]
        if not extras:
            return None
        if node.op == "elemwise_add":
            return np.sum(extras, axis=0)
        if _is_norm(node):
            name = f"{node.name}_optimized_mean"
            node.inputs[3] = self._variable(name, self._value(node, 3) + extras[0])
        elif node.op == "Convolution":
            weight = self._value(node, 1).astype("float64")
            # (o, i / groups, *kernel) -> (groups, o / groups, i / groups)
            groups = int(node.attrs.get("num_group", 1))
            taps = weight.reshape(*weight.shape[:2], -1).sum(2)
            taps = taps.reshape(groups, -1, taps.shape[1])
            parts = extras[0].reshape(groups, -1)
            self._add_bias(node, -np.einsum("goi,gi->go", taps, parts).reshape(-1))
        return None

    def _positive(self, norm: Node) -> np.ndarray:
        """Return for which channels the scale may go behind the relu."""
        scale, shift = self._affine(norm)
        mean, var = self._value(norm, 3), self._value(norm, 4)
        size = np.abs(mean) + np.sqrt(var + float(norm.attrs.get("eps", 1e-3)))
        return (scale > 0) & (np.abs(shift) <= MOST_SHIFT * size * np.abs(scale))

    def _shift_of(self, norm: Node) -> np.ndarray:
        scale, shift = self._affine(norm)
        good = self._positive(norm)
        return np.where(good, shift / np.where(good, scale, 1), 0)

    def _absorb(self, norm: Node, readers: Mapping[Node, list[Node]]) -> None:
        """Replace relu(norm(x)), x being shifted already, by relu(x)."""
        good = self._positive(norm)
        scale, shift = self._affine(norm)
        (relu,) = readers[norm]
        source = norm.inputs[0]
        picked = np.flatnonzero(~good)
        ndim = len(norm.shape)
        ones = (1,) * (ndim - 2)
        convs = readers[relu]
        relu.inputs = [source]
        if len(picked):
            # Zeros fill the last block.
            count = -(-len(picked) // BLOCK) * BLOCK
            choice, offset = np.zeros((count, len(good))), np.zeros(count)
            choice[np.arange(len(picked)), picked] = scale[picked]
            offset[: len(picked)] = shift[picked]
            attrs = {"kernel": str(ones), "num_filter": str(count), "no_bias": "False"}
            pick = Node("Convolution", f"{norm.name}_pick", attrs, [source])
            pick.inputs += [
                self._variable(f"{norm.name}_pick_weight", choice.reshape(*choice.shape, *ones)),
                self._variable(f"{norm.name}_pick_bias", offset),
            ]
            others = Node("Activation", f"{norm.name}_picked", dict(relu.attrs), [Value(pick)])
        for conv in convs:
            weight = self._value(conv, 1).astype("float64")
            if len(picked):
                own = Node("Convolution", f"{conv.name}_picked", dict(conv.attrs), [Value(others)])
                own.attrs["no_bias"] = "True"
                wide = np.zeros((len(weight), count, *weight.shape[2:]))
                wide[:, : len(picked)] = weight[:, picked]
                own.inputs.append(self._variable(f"{conv.name}_picked_weight", wide))
                total = Node("elemwise_add", f"{conv.name}_whole", {}, [Value(own)])
                self.graph.exchange(conv, Value(total))
                total.inputs.append(Value(conv))
            factor = np.where(good, scale, 0)
            groups = int(conv.attrs.get("num_group", 1))
            # Input channels of each output channel, by its group.
            factors = np.repeat(factor.reshape(groups, -1), len(weight) // groups, axis=0)
            self._weigh(conv, weight * factors.reshape(*weight.shape[:2], *ones))

    def convert_norms(self) -> None:
        """Compute the BatchNorms that are left as convolutions, where that is faster."""
        readers = self.graph.readers()
        for norm in self.graph.nodes():
            if not _is_norm(norm) or len(norm.shape) < 4:
                continue
            self._subsample(norm, readers)
            channels, ndim = norm.shape[1], len(norm.shape)
            ones = (1,) * (ndim - 2)
            scale, shift = self._affine(norm)
            if ndim == 4:
                weight = scale.reshape(-1, 1, *ones)
            elif channels <= MOST_DIAGONAL:
                weight = np.diag(scale).reshape(channels, channels, *ones)
            else:
                continue
            groups = channels // weight.shape[1]
            attrs = {"kernel": str(ones), "num_filter": str(channels), "num_group": str(groups)}
            conv = Node("Convolution", f"{norm.name}_scale", attrs, norm.inputs[:1])
            conv.inputs += [
                self._variable(f"{norm.name}_scale_weight", weight),
                self._variable(f"{norm.name}_scale_bias", shift),
            ]
            self.graph.exchange(norm, Value(conv))

    def _subsample(self, norm: Node, readers: Mapping[Node, list[Node]]) -> None:
        """Normalise only the positions that a strided pointwise convolution reads."""
        convs = self._convolutions(norm, readers)
        if (
            len(convs) != 1
            or not _is_strided(convs[0])
            or not _is_pointwise(convs[0], strided=True)
        ):
            return
        attrs = {"kernel": str((1,) * (len(norm.shape) - 2)), "pool_type": "max"}
        attrs["stride"] = convs[0].attrs["stride"]
        convs[0].attrs["stride"] = attrs["kernel"]
        sample = Node("Pooling", f"{norm.name}_sample", attrs, norm.inputs[:1])
        norm.inputs[0] = Value(sample)


def _is_norm(node: Node) -> bool:
    return node.op == "BatchNorm" and int(node.attrs.get("axis", 1)) == 1


def _is_relu(node: Node) -> bool:
    return node.op == "Activation" and node.attrs.get("act_type") == "relu"


def _is_swap(node: Node) -> bool:
    return node.op == "transpose" and node.numbers("axes") == (0, 2, 1)


def _is_strided(conv: Node) -> bool:
    return any(step != 1 for step in conv.numbers("stride"))


def _is_pointwise(node: Node, strided: bool = False) -> bool:
    """Return whether a node is a convolution of one group whose kernel is a point."""
    return (
        node.op == "Convolution"
        and set(node.numbers("kernel")) == {1}
        and not any(node.numbers("pad"))
        and (strided or not _is_strided(node))
        and node.attrs.get("num_group", "1") == "1"
    )


def optimize(
    symbol: mx.sym.Symbol,
    arg_params: Mapping[str, Any],
    aux_params: Mapping[str, Any],
    input_shapes: Mapping[str, Shape],
) -> tuple[mx.sym.Symbol, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return an equal network that predicts fast on a CPU.

    Parameters
    ----------
    symbol
        For instance :func:`network.builder.logits` of a network. Outputs keep their names where
        their node is kept, parameters do not.
    arg_params, aux_params
        Name to array.
    input_shapes
        Such as ``{"data": (1, 3, 8, 224, 224)}``. Only the numbers of dimensions matter: other
        sizes run as well.

    Returns
    -------
    symbol, arg_params, aux_params
        Of operators of MXNet only; :func:`fuse` is what joins them.
    """
    params = {n: numpy_of(v, n) for n, v in {**arg_params, **aux_params}.items()}
    work = _Optimizer(symbol, params, input_shapes)
    work.simplify()
    work.fold_norms()
    work.fold_units()
    work.lift_lines()
    work.shift_sums()
    work.convert_norms()
    new = work.graph.symbol()
    return (
        new,
        {name: work.params[name] for name in new.list_arguments() if name in work.params},
        {name: work.params[name] for name in new.list_auxiliary_states()},
    )


def fuse(symbol: mx.sym.Symbol) -> mx.sym.Symbol:
    """Return a graph whose nodes are joined to those of oneDNN, for prediction only."""
    return symbol.get_backend_symbol("MKLDNN")


def for_one_sample(symbol: mx.sym.Symbol, input_shapes: Mapping[str, Shape]) -> mx.sym.Symbol:
    """Return a graph for batches of one sample, whose units use oneDNN's products of matrices.

    MXNet 1.9.1 computes ``batch_dot`` with OpenBLAS, at a third of the speed. With one sample the
    projection of a GloRe unit is a fully connected layer, and the way back a pointwise
    convolution, both with weights that were just computed. (:func:`fuse` must come first: its
    nodes keep weights of their own.)

    Parameters
    ----------
    symbol
        From :func:`fuse`.
    input_shapes
        See :func:`optimize`.
    """
    graph = Graph(symbol, input_shapes)
    for product in graph.nodes():
        if product.op != "batch_dot" or product.flag("transpose_a"):
            continue
        left, flat = (value.node for value in product.inputs)
        if not _is_flattened(flat) or len(left.shape) != 3:
            continue
        rows, nodes = left.shape[1], flat.shape[1]
        source = flat.inputs[0]
        if product.flag("transpose_b"):
            # (1, S, L) x (1, N, L)^T: (S, L) x (N, L)^T -> (S, N) -> (1, S, N)
            inputs = [
                Value(
                    Node(
                        "Reshape",
                        f"{product.name}_{width}",
                        {"shape": f"({width}, -1)"},
                        # Of the map itself: MXNet 1.9.1 cannot reshape twice what oneDNN computed.
                        part.inputs[:1] if _is_flattened(part) else [Value(part)],
                    )
                )
                for part, width in ((left, rows), (flat, nodes))
            ]
            attrs = {"num_hidden": str(nodes), "no_bias": "True"}
            layer = Node("FullyConnected", f"{product.name}_layer", attrs, inputs)
            split = {"shape": f"(1, {rows}, {nodes})"}
            new = Node("Reshape", product.name, split, [Value(layer)])
        else:
            # (1, S, N) x (1, N, L): pointwise, S filters of N channels, on (1, N, *map)
            ones = (1,) * (len(source.node.shape) - 2)
            shape = {"shape": str((rows, nodes, *ones))}
            weight = Node("Reshape", f"{product.name}_weight", shape, product.inputs[:1])
            attrs = {"kernel": str(ones), "num_filter": str(rows), "no_bias": "True"}
            inputs = [source, Value(weight)]
            conv = Node("Convolution", f"{product.name}_layer", attrs, inputs)
            new = Node("Reshape", product.name, {"shape": f"(1, {rows}, -1)"}, [Value(conv)])
            for reader in graph.readers()[product]:
                if reader.op == "reshape_like" and reader.inputs[0] == (product, 0):
                    graph.exchange(reader, Value(conv))
        graph.exchange(product, Value(new))
    return graph.symbol()


def _is_flattened(node: Node) -> bool:
    """Return whether a node is a map (n, c, *spatial) as (n, c, L)."""
    return (
        node.op == "Reshape"
        and node.numbers("shape") == (0, 0, -1)
        and len(node.inputs[0].node.shape) > 3
    )


@contextlib.contextmanager
def _shared_memory() -> Iterator[None]:
    """Have arrays of one size share memory in the plans that MXNet makes in the block.

    :mod:`mxnet_compat` forbids it because plain graphs with GloRe units fail at small maps; what
    :func:`optimize` leaves of them does not.
    """
    name = "NNVM_EXEC_MATCH_RANGE"
    before = os.environ[name]
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ[name] = before


def _give_back() -> None:
    """Return what was freed to the system: glibc, as :mod:`mxnet_compat` sets it up, keeps it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _optimized(
    plain: mx.sym.Symbol, params: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> tuple[mx.sym.Symbol, dict[str, mx.nd.NDArray], dict[str, mx.nd.NDArray]]:
    """Return :func:`optimize`'s graph and NDArrays of those of ``params`` that it has."""
    names = set(plain.list_inputs())
    arrays = {name: value for name, value in params.items() if name in names}
    graph, args, auxs = optimize(plain, arrays, {}, shapes)
    return graph, *({name: mx.nd.array(v) for name, v in part.items()} for part in (args, auxs))


def calibrated(
    symbol: mx.sym.Symbol,
    params: Mapping[str, Any],
    data_shape: Shape,
    batches: Iterable[mx.nd.NDArray],
    output: str = "classifier",
    mode: str = "naive",
) -> Int8:
    """Return what :class:`FusedNet` needs to compute a network in INT8.

    Parameters
    ----------
    symbol, params, data_shape, output
        As of :class:`FusedNet`.
    batches, mode
        As of :func:`network.quantization.calibrate`.
    """
    graph, args, auxs = _optimized(output_of(symbol, output), params, {"data": (1, *data_shape)})
    return calibrate(joined(graph), args, auxs, batches, mode)


class FusedNet(mx.gluon.Block):
    """A network that predicts on a CPU, as a block: data (n, …) to one of its outputs.

    Clips go through one by one: a clip alone keeps all cores busy, several at a time only need
    more memory and leave the caches.

    Parameters
    ----------
    symbol
        The plain network; its input is ``data``.
    params
        Its arguments and auxiliary states, by name.
    data_shape
        Of one sample; other sizes of as many dimensions run as well.
    contexts
        Devices, all of them CPUs.
    output
        Name of the node whose output the block computes.
    int8
        From :func:`calibrated`: compute convolutions in INT8.
    """

    def __init__(
        self,
        symbol: mx.sym.Symbol,
        params: Mapping[str, Any],
        data_shape: Shape,
        contexts: Sequence[mx.Context],
        output: str = "classifier",
        int8: Optional[Int8] = None,
    ) -> None:
        super().__init__()
        plain = output_of(symbol, output)
        shapes = {"data": (1, *data_shape)}
        graph, args, auxs = _optimized(plain, params, shapes)
        self.output, self.optimized = output, graph
        if int8 is None:
            graph = fuse(graph)
        else:
            graph, args, auxs = quantize(joined(graph), args, auxs, int8)
        self._singly = len(data_shape) == 4
        if self._singly:
            graph = for_one_sample(graph, shapes)
        self._guard = MemoryGuard(plain)
        self.net = mx.gluon.SymbolBlock(graph, mx.sym.var("data", dtype="float32"))
        parameters = self.net.collect_params()
        values = {**args, **auxs}
        del args, auxs
        while values:  # they are needed once, and as large as the network
            name, value = values.popitem()
            if name not in parameters:  # of what an INT8 graph has folded away
                continue
            parameter = parameters[name]
            parameter.shape, parameter.dtype = value.shape, value.dtype
            parameter.grad_req = "null"
            parameter.initialize(init=mx.init.Constant(0), ctx=list(contexts))
            parameter.set_data(value)
        # The plan of a call, its memory and oneDNN's primitives are kept until the size changes.
        self.net.hybridize(static_alloc=True, static_shape=True)
        self._planned: dict[mx.Context, Shape] = {}  # the size of the last call
        _give_back()

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        """Compute the output.

        Raises
        ------
        MemoryProblem
            If the scores of Non-local blocks do not fit.
        """
        parts = [x[i : i + 1] for i in range(len(x))] if self._singly and len(x) > 1 else [x]
        self._guard(parts[0])
        results = [self._one(part) for part in parts]
        return mx.nd.concat(*results, dim=0) if len(results) > 1 else results[0]

    def _one(self, part: mx.nd.NDArray) -> mx.nd.NDArray:
        new = self._planned.get(part.context) != part.shape
        with _shared_memory() if new else contextlib.nullcontext():
            result = self.net(part)
        self._planned[part.context] = part.shape
        # With static memory a result lasts until the next call only.
        return result.copy()
