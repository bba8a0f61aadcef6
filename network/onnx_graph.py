"""Networks as ONNX models, and ONNX models run by onnxruntime.

The graph is written from the Symbol with ``onnx.helper``. MXNet's own exporter (``mx.onnx``) stamps
its files with the newest version that is installed, needs an onnx below 1.19, and fails on
LayerNorm and on dense layers behind a pooling. Operator set and file version are pinned here, so
that a file does not depend on who wrote it and older runtimes open it; 17 is the first operator set
with LayerNormalization. The batch axis is free, the others are those of ``data_shape``: the number
of positions is a constant of GloRe units and Non-local blocks.

Needs the packages onnx and onnxruntime (the extra ``onnx``), which are imported when they are used.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional, Union

import numpy as np

from checkpoint.params import check, numpy_of
from glore_common import GloReError, UsageError, atomic_path
from mxnet_compat import mx

from .builder import logits
from .shapes import Node, operations

OPSET, IR_VERSION = 17, 8
INPUT, LOGITS, PROBABILITIES = "data", "logits", "probabilities"
PRODUCER = "glore-mxnet"


class OnnxError(GloReError):
    """A network that cannot be written as ONNX, or a file that cannot be run."""


def _onnx() -> Any:
    """Import onnx."""
    try:
        import onnx
    except ImportError as error:
        raise OnnxError(
            f"ONNX files need the package onnx ({error}): pip install 'glore-mxnet[onnx]', or the "
            "lines of requirements.txt under `onnx`"
        ) from error
    return onnx


def _numbers(text: str) -> list[int]:
    """Return the whole numbers of ``(3, 3)``; None among them is refused."""
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _flag(attrs: Mapping[str, str], name: str, default: bool) -> bool:
    return attrs.get(name, str(default)).lower() in ("true", "1")


class _Writer:
    """Collects the nodes and constants of an ONNX graph.

    A value is called as in MXNet: by its parameter, or by the node that computes it.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.onnx = _onnx()
        self.params = params
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        # Name in MXNet to name here, where they differ.
        self.names: dict[str, str] = {}

    def value(self, name: str) -> str:
        """Return the name of an input of a node; a parameter becomes a constant."""
        if name in self.params and name not in self.constants:
            self.constant(name, numpy_of(self.params[name], name).astype(np.float32))
        return self.names.get(name, name)

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a constant."""
        self.constants[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node; returns the name of its output, which is its own."""
        self.nodes.append(
            self.onnx.helper.make_node(op, list(inputs), [output], name=output, **attributes)
        )
        return output


# --- operators ------------------------------------------------------------------------------------


def _spatial(node: Node) -> dict[str, Any]:
    """Return kernel, strides and pads of a convolution or pooling."""
    kernel = _numbers(node.attrs["kernel"])
    stride = _numbers(node.attrs.get("stride", "")) or [1] * len(kernel)
    pad = _numbers(node.attrs.get("pad", "")) or [0] * len(kernel)
    return {"kernel_shape": kernel, "strides": stride, "pads": [*pad, *pad]}


def _convolution(writer: _Writer, node: Node, inputs: list[str]) -> None:
    attributes = _spatial(node)
    dilate = _numbers(node.attrs.get("dilate", ""))
    if dilate:
        attributes["dilations"] = dilate
    group = int(node.attrs.get("num_group", 1))
    writer.add("Conv", inputs, node.name, group=group, **attributes)


def _batch_norm(writer: _Writer, node: Node, inputs: list[str]) -> None:
    axis = int(node.attrs.get("axis", 1))
    if axis != 1:
        raise OnnxError(f"BatchNorm {node.name} normalises axis {axis}; ONNX has axis 1 only")
    if _flag(node.attrs, "fix_gamma", True):
        ones = np.ones(node.shapes[1], np.float32)
        inputs[1] = writer.constant(f"{node.name}_gamma-fixed", ones)
    epsilon = float(node.attrs.get("eps", 1e-3))
    writer.add("BatchNormalization", inputs, node.name, epsilon=epsilon)


def _activation(writer: _Writer, node: Node, inputs: list[str]) -> None:
    kinds = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
    kind = node.attrs["act_type"]
    if kind not in kinds:
        raise OnnxError(f"{node.name}: the activation {kind} is not supported")
    writer.add(kinds[kind], inputs, node.name)


def _pooling(writer: _Writer, node: Node, inputs: list[str]) -> None:
    kind = node.attrs.get("pool_type", "max")
    if kind not in ("max", "avg"):
        raise OnnxError(f"{node.name}: {kind} pooling is not supported")
    op = {"max": "MaxPool", "avg": "AveragePool"}[kind]
    if _flag(node.attrs, "global_pool", False):
        writer.add(f"Global{op}", inputs, node.name)
        return
    if node.attrs.get("pooling_convention", "valid") != "valid":
        raise OnnxError(f"{node.name}: only the pooling convention 'valid' is supported")
    attributes = _spatial(node)
    if kind == "avg":
        attributes["count_include_pad"] = int(_flag(node.attrs, "count_include_pad", True))
    writer.add(op, inputs, node.name, **attributes)


def _reshape(writer: _Writer, node: Node, inputs: list[str]) -> None:
    shape = _numbers(node.attrs["shape"])
    if min(shape) < -1 or shape[:1] != [0]:
        raise OnnxError(f"{node.name}: a reshape to {tuple(shape)} is not supported")
    target = writer.constant(f"{node.name}_shape", np.array(shape, np.int64))
    writer.add("Reshape", [inputs[0], target], node.name)


def _reshape_like(writer: _Writer, node: Node, inputs: list[str]) -> None:
    # The batch axis is free, what follows is what MXNet inferred.
    target = writer.constant(f"{node.name}_shape", np.array([0, *node.shape[1:]], np.int64))
    writer.add("Reshape", [inputs[0], target], node.name)


def _batch_dot(writer: _Writer, node: Node, inputs: list[str]) -> None:
    factors = list(inputs)
    for place, side in enumerate("ab"):
        if _flag(node.attrs, f"transpose_{side}", False):
            turned = f"{node.name}_transposed-{side}"
            factors[place] = writer.add("Transpose", [inputs[place]], turned, perm=[0, 2, 1])
    writer.add("MatMul", factors, node.name)


def _dense(writer: _Writer, node: Node, inputs: list[str]) -> None:
    data = inputs[0]
    if len(node.shapes[0]) > 2:
        if not _flag(node.attrs, "flatten", True):
            raise OnnxError(f"{node.name}: a dense layer over the last axis is not supported")
        data = writer.add("Flatten", [data], f"{node.name}_flat", axis=1)
    writer.add("Gemm", [data, *inputs[1:]], node.name, transB=1)


def _layer_norm(writer: _Writer, node: Node, inputs: list[str]) -> None:
    shape = node.shapes[0]
    axis = int(node.attrs.get("axis", -1)) % len(shape)
    # ONNX normalises over an axis and all that follow.
    if math.prod(shape[axis + 1 :]) != 1:
        raise OnnxError(f"LayerNorm {node.name} over axis {axis} of {shape} is not supported")
    for place, name in ((1, "gamma"), (2, "beta")):
        array = numpy_of(writer.params[node.inputs[place]], name).astype(np.float32)
        shaped = array.reshape(shape[axis:])
        inputs[place] = writer.constant(f"{node.name}_{name}-shaped", shaped)
        del writer.constants[node.inputs[place]]
    epsilon = float(node.attrs.get("eps", 1e-5))
    writer.add("LayerNormalization", inputs, node.name, axis=axis, epsilon=epsilon)


def _div_sqrt_dim(writer: _Writer, node: Node, inputs: list[str]) -> None:
    root = np.array(math.sqrt(node.shapes[0][-1]), np.float32)
    writer.add("Div", [inputs[0], writer.constant(f"{node.name}_root", root)], node.name)


def _slice_axis(writer: _Writer, node: Node, inputs: list[str]) -> None:
    axis, begin = int(node.attrs["axis"]), int(node.attrs["begin"])
    end = node.attrs["end"]
    last = np.iinfo(np.int64).max if end == "None" else int(end)
    bounds = [
        writer.constant(f"{node.name}_{tag}", np.array([number], np.int64))
        for tag, number in (("begin", begin), ("end", last), ("axis", axis))
    ]
    writer.add("Slice", [inputs[0], *bounds], node.name)


def _plain(op: str, **kinds: tuple[str, Callable[[str], Any], Any]) -> Callable[..., None]:
    """Return a writer of a node with the attributes {ours: (MXNet's, how to read it, default)}."""

    def write(writer: _Writer, node: Node, inputs: list[str]) -> None:
        attributes = {
            ours: read(node.attrs[theirs]) if theirs in node.attrs else default
            for ours, (theirs, read, default) in kinds.items()
        }
        writer.add(op, inputs, node.name, **attributes)

    return write


# All that the networks and blocks of this project use, and the names of earlier MXNet versions.
OPERATORS: dict[str, Callable[[_Writer, Node, list[str]], None]] = {
    "Convolution": _convolution,
    "BatchNorm": _batch_norm,
    "Activation": _activation,
    "Pooling": _pooling,
    "Reshape": _reshape,
    "reshape_like": _reshape_like,
    "batch_dot": _batch_dot,
    "FullyConnected": _dense,
    "LayerNorm": _layer_norm,
    "_contrib_div_sqrt_dim": _div_sqrt_dim,
    "slice_axis": _slice_axis,
    "add_n": _plain("Sum"),
    "ElementWiseSum": _plain("Sum"),
    "elemwise_add": _plain("Add"),
    "_Plus": _plain("Add"),
    "broadcast_add": _plain("Add"),
    "broadcast_mul": _plain("Mul"),
    "transpose": _plain("Transpose", perm=("axes", _numbers, None)),
    "softmax": _plain("Softmax", axis=("axis", int, -1)),
    "Concat": _plain("Concat", axis=("dim", int, 1)),
    "Flatten": _plain("Flatten"),
    "Dropout": _plain("Identity"),
}


# --- writing --------------------------------------------------------------------------------------


def to_onnx(
    symbol: mx.sym.Symbol,
    arg_params: Mapping[str, Any],
    aux_params: Mapping[str, Any],
    data_shape: Sequence[int],
    metadata: Optional[Mapping[str, str]] = None,
    name: str = "network",
) -> Any:
    """Return a network as an ONNX model.

    Parameters
    ----------
    symbol
        Ends in a SoftmaxOutput.
    arg_params, aux_params
        Name to array; all of the network's, and no others.
    data_shape
        (3, h, w) or (3, frames, h, w).
    metadata
        Texts by name, for the file.
    name
        Of the graph.

    Returns
    -------
    onnx.ModelProto
        Input ``data`` (batch, \\*data_shape); outputs ``logits`` and ``probabilities`` (batch,
        classes). All float32.

    Raises
    ------
    OnnxError
        If the graph has an operator that is not known here, or onnx is not installed.
    CheckpointError
        If the parameters do not fit.
    UsageError
        If the network does not take inputs of this shape.
    """
    onnx = _onnx()
    graph = logits(symbol)
    inputs = {INPUT: (1, *data_shape)}
    check(graph, arg_params, aux_params, inputs)
    nodes = operations(graph, inputs)
    names = [node.name for node in nodes]
    if len(set(names)) != len(names):
        raise OnnxError("two nodes of the graph have one name; ONNX needs different ones")
    writer = _Writer({**arg_params, **aux_params})
    # What the last node computes is the output.
    writer.names[nodes[-1].name] = LOGITS
    for node in nodes:
        if node.op not in OPERATORS:
            raise OnnxError(f"{node.name}: the operator {node.op} has no counterpart here")
        values = [writer.value(name) for name in node.inputs]
        OPERATORS[node.op](
            writer, node._replace(name=writer.names.get(node.name, node.name)), values
        )
    writer.add("Softmax", [LOGITS], PROBABILITIES, axis=-1)
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    classes = nodes[-1].shape[-1]
    made = helper.make_graph(
        writer.nodes,
        name,
        [helper.make_tensor_value_info(INPUT, number, ["batch", *data_shape])],
        [
            helper.make_tensor_value_info(name, number, ["batch", classes])
            for name in (LOGITS, PROBABILITIES)
        ],
        list(writer.constants.values()),
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    if metadata:
        helper.set_model_props(model, dict(metadata))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker has a class of its own for each kind of mistake
        raise OnnxError(f"the ONNX graph is not valid: {error}") from error
    return model


def write_onnx(path: str, model: Any) -> None:
    """Write an ONNX model, which appears whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(model.SerializeToString())


# --- running --------------------------------------------------------------------------------------


class OnnxNet:
    """An ONNX model of :func:`to_onnx`, run by onnxruntime.

    Parameters
    ----------
    model
        Path of the file, or its content.
    threads
        Of one operator; 0: as onnxruntime chooses.

    Raises
    ------
    OnnxError
        If onnxruntime is not installed, or does not open the file.
    """

    def __init__(self, model: Union[str, bytes], threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise OnnxError(
                f"running ONNX models needs the package onnxruntime ({error}): pip install "
                "'glore-mxnet[onnx]', or the lines of requirements.txt under `onnx`"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        where = model if isinstance(model, str) else "the model"
        if isinstance(model, str) and not os.path.isfile(model):
            raise OnnxError(f"{model} does not exist")
        try:
            self.session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            self.input = self.session.get_inputs()[0]
        except Exception as error:  # onnxruntime's own classes have no common base
            raise OnnxError(f"{where} is no ONNX model that onnxruntime opens: {error}") from error
        self.data_shape = tuple(self.input.shape[1:])

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of the network, by name."""
        return self.session.get_modelmeta().custom_metadata_map

    def run(self, data: np.ndarray, output: str = LOGITS) -> np.ndarray:
        """Return an output (n, classes) for ``data`` (n, \\*data_shape).

        Raises
        ------
        UsageError
            If the data have another shape.
        """
        if tuple(data.shape[1:]) != self.data_shape:
            raise UsageError(
                f"the ONNX model takes inputs of {self.data_shape}, not {tuple(data.shape[1:])}: "
                "export it for that size"
            )
        values = np.ascontiguousarray(data, np.float32)
        return self.session.run([output], {self.input.name: values})[0]


def difference(net: OnnxNet, block: mx.gluon.Block, data: np.ndarray) -> float:
    """Return how far the logits of two forms of a network are apart, of the largest logit.

    Raises
    ------
    OnnxError
        If outputs are not finite, or do not depend on the input: they would then prove nothing.
    """
    ours = block(mx.nd.array(data)).asnumpy().astype(np.float64)
    theirs = net.run(data).astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise OnnxError("the network's outputs are not finite: the comparison says nothing")
    if len(data) > 1 and np.ptp(ours, axis=0).max() == 0:
        raise OnnxError("the network gives the same for every input: the comparison says nothing")
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())
