"""A network with its weights and with what its checkpoint says of it: how jobs open a checkpoint.

What is not asked for is taken from the checkpoint's manifest, then from the graph beside the
weights, then from the names and shapes of the weights themselves. :attr:`Model.origin` says which.
"""

import dataclasses
import json
import logging
import os
from typing import Any, Callable, Optional

import numpy as np

from checkpoint import graph
from checkpoint.manifest import facts_of, read_manifest
from checkpoint.params import CheckpointError, check, check_finite, infer_shapes, param_shapes
from checkpoint.paths import Files, find, split_key, stem_of
from checkpoint.released import locate
from checkpoint.safetensors_file import is_safetensors, read_safetensors
from glore_common import UsageError, command
from mxnet_compat import mx
from network.block import SymbolNet, build_block
from network.builder import InputConf, get_spec, get_symbol, logits, resolve
from network.detector import Detector
from network.identify import identify_network
from network.inference import FusedNet
from network.onnx_graph import OnnxNet, to_onnx
from network.pretrained import read_source
from network.quantization import Int8
from network.specs import MEAN, STD
from train.scoring import predictor

LOGGER = logging.getLogger("glore")
DEFAULT_CROP_SIZE = 224
# Under which files of other forms (.safetensors, .onnx) hold :meth:`ModelFacts.as_dict`, as JSON.
FACTS = "glore"


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint says of its network, so that nothing has to be guessed when it is used.

    Attributes
    ----------
    task
        'video', 'image', 'segmentation' or 'detection'.
    network
        Name of the row; None for a graph of its own.
    overrides
        Keywords of ``get_symbol``.
    num_classes
        Width of the classifier.
    class_names
        In the order of the classes, where they are known.
    data_shape
        Of one input: (3, h, w) or (3, frames, h, w). Detection: (3, shorter side that images are
        resized to, longest one).
    mean, std
        RGB on the scale 0..1: the network reads (pixel - mean) / std.
    resize
        Shorter side before a centre crop.
    frame_interval
        Frames from one of a clip to the next, in validation.
    trained_size
        Side of the input in training, where ``resize`` belongs to it.
    palette
        Segmentation: RGB of each class in pictures.
    """

    task: str
    network: Optional[str]
    overrides: dict[str, Any]
    num_classes: int
    class_names: Optional[list[str]]
    data_shape: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Optional[int] = None
    frame_interval: Optional[int] = None
    trained_size: Optional[int] = None
    palette: Optional[list[list[int]]] = None

    def as_dict(self) -> dict[str, Any]:
        """Return what a manifest holds under ``model``."""
        inputs = {
            "data_shape": list(self.data_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "frame_interval": self.frame_interval,
        }
        return {
            "task": self.task,
            "network": self.network,
            "overrides": self.overrides,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "input": inputs,
            **({} if self.palette is None else {"palette": self.palette}),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str) -> "ModelFacts":
        """Return the facts of :meth:`as_dict`.

        Raises
        ------
        CheckpointError
            If something is missing; ``where`` names the manifest.
        """
        try:
            inputs = content["input"]
            return cls(
                content["task"],
                content["network"],
                dict(content["overrides"]),
                int(content["num_classes"]),
                content["class_names"],
                tuple(inputs["data_shape"]),
                tuple(inputs["mean"]),
                tuple(inputs["std"]),
                inputs["resize"],
                inputs["frame_interval"],
                inputs["data_shape"][-1],
                content.get("palette"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where} does not describe its network as this version expects ({error!r})"
            ) from error


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights.

    Attributes
    ----------
    symbol
        Ends in a SoftmaxOutput.
    arg_params, aux_params
        Name to array.
    facts
        What is known of it.
    path
        The file that the weights were read from.
    options
        The training's options by group; empty where there is no manifest.
    origin
        Where the facts come from, for the log.
    """

    symbol: mx.sym.Symbol
    arg_params: dict
    aux_params: dict
    facts: ModelFacts
    path: str
    options: dict[str, dict[str, Any]]
    origin: str

    def takes(self, data_shape: tuple[int, ...]) -> bool:
        """Return whether the weights fit the graph for inputs of this shape."""
        try:
            args, auxs = param_shapes(logits(self.symbol), {"data": (1, *data_shape)})
        except UsageError:
            return False
        params = {**self.arg_params, **self.aux_params}
        return all(tuple(params[name].shape) == shape for name, shape in {**args, **auxs}.items())

    def detector(self, contexts: list) -> Detector:
        """Return a network of ``task`` 'detection' as a block for prediction."""
        return Detector(
            self.symbol,
            resolve(self.facts.network, **self.facts.overrides),
            contexts,
            params=(self.arg_params, self.aux_params),
            training=False,
        )

    def block(self, contexts: list, output: Optional[str] = None) -> SymbolNet:
        """Return the network as a block for prediction.

        It gives logits (n, classes, …), or what the node ``output`` computes.
        """
        return build_block(
            self.symbol,
            InputConf(self.facts.data_shape, self.facts.mean, self.facts.std),
            ctx=contexts,
            params=(self.arg_params, self.aux_params),
            output=output or logits(self.symbol).name,
            training=False,
        )

    def fused(self, contexts: list, int8: Optional[Int8] = None) -> FusedNet:
        """Return the network in the form that predicts fast on CPUs, in float32 or INT8."""
        params = {**self.arg_params, **self.aux_params}
        output = logits(self.symbol).name
        return FusedNet(self.symbol, params, self.facts.data_shape, contexts, output, int8)

    def onnx(self) -> Any:
        """Return the network as an ONNX model (``onnx.ModelProto``) that says what this knows."""
        return to_onnx(
            self.symbol,
            self.arg_params,
            self.aux_params,
            self.facts.data_shape,
            self.metadata(),
            self.facts.network or "network",
        )

    def metadata(self) -> dict[str, str]:
        """Return what an exported file says: the facts, as JSON under :data:`FACTS`, and where
        the weights come from."""
        facts = json.dumps(self.facts.as_dict(), ensure_ascii=False)
        return {FACTS: facts, "source": os.path.basename(self.path)}

    def predictor(
        self, contexts: list, backend: str = "mxnet"
    ) -> Callable[[mx.nd.NDArray], np.ndarray]:
        """Return a function from a batch (n, …), an NDArray, to logits (n, classes).

        Parameters
        ----------
        contexts
            That MXNet runs on.
        backend
            'mxnet': on CPUs the fused form of the network (:mod:`network.inference`); 'plain':
            the network as it is; 'int8': on CPUs, see :mod:`jobs.quantize`; 'onnx', which runs on
            the CPU.

        Raises
        ------
        CheckpointError
            INT8: if the checkpoint's ranges are missing, damaged or another's.
        UsageError
            INT8: if it is to run on a GPU.
        """
        on_cpu = all(each.device_type == "cpu" for each in contexts)
        if backend == "int8" and not on_cpu:
            raise UsageError("--int8 is for CPUs: give --gpus '' too")
        if backend == "int8":
            return predictor(self.fused(contexts, read_int8(self.path)), contexts)
        if backend == "mxnet" and on_cpu:
            return predictor(self.fused(contexts), contexts)
        if backend != "onnx":
            return predictor(self.block(contexts), contexts)
        net = OnnxNet(self.onnx().SerializeToString())
        return lambda data: net.run(data.asnumpy())


def int8_path(weights: str) -> str:
    """Return where ``quantize.py`` writes what it finds for a file of weights."""
    return f"{os.path.splitext(weights)[0]}_int8.json"


def read_int8(weights: str) -> Int8:
    """Return what ``quantize.py`` has found for a file of weights.

    Raises
    ------
    CheckpointError
        If there is nothing, if it is damaged, or if it was found for other weights.
    """
    path = int8_path(weights)
    again = f"make it anew: {command('quantize')} {weights} FILES"
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        known = content["weights"]
        ranges = {
            name: (float(low), float(high)) for name, (low, high) in content["ranges"].items()
        }
        found = Int8(ranges, tuple(map(str, content["floats"])))
        if not np.isfinite(list(ranges.values())).all():
            raise ValueError("a range is not finite")
    except FileNotFoundError:
        raise CheckpointError(
            f"{weights} has no INT8 form, {path}; make it with samples of what it is used on: "
            f"{command('quantize')} {weights} FILES"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); {again}") from error
    if known != facts_of(weights):
        raise CheckpointError(f"{path} was made for other weights than {weights} holds; {again}")
    return found


def _classes_of(arg_params: dict, where: str) -> int:
    """Return the number of classes that a file's classifier has."""
    for name in ("classifier_bias", "fc6_bias", "mask_score_conv_bias"):
        if name in arg_params:
            return len(arg_params[name])
    raise CheckpointError(f"{where} has no classifier: it holds no classifier_bias")


def facts_of_row(network: str, overrides: dict[str, Any], num_classes: int) -> ModelFacts:
    """Return what the table says of a network."""
    _, conf = get_symbol(network, num_classes, **overrides)
    task = "video" if len(conf.data_shape) == 4 else "image"
    spec = get_spec(network)
    if spec.task != "classification":
        task = spec.task
    name = spec.name
    return ModelFacts(
        task, name, overrides, num_classes, None, conf.data_shape, conf.mean, conf.std
    )


def _from_table(text: str, epoch: Optional[int], facts: ModelFacts, options, origin) -> Model:
    """Return the weights of ``text`` in this project's own graph of the network in ``facts``."""
    overrides = {**facts.overrides, "crop_size": facts.data_shape[-2:]}
    if facts.task == "video":
        overrides["clip_length"] = facts.data_shape[1]
    symbol, conf = get_symbol(facts.network, facts.num_classes, **overrides)
    arg_params, aux_params, path = read_source(text, symbol, epoch)
    check(symbol, arg_params, aux_params, conf.shapes, where=path)
    check_finite({**arg_params, **aux_params}, path)
    return Model(symbol, arg_params, aux_params, facts, path, options, origin)


def _from_graph(text: str, files: Files, epoch: Optional[int], crop_size: Optional[int]) -> Model:
    """Return the weights of ``text`` in the graph beside them."""
    side = crop_size or DEFAULT_CROP_SIZE
    shape = (3, side, side)
    graph.try_unknown(files.symbol, {"data": (1, *shape)})
    symbol, arg_params, aux_params = graph.load(text, epoch)
    check_finite({**arg_params, **aux_params}, files.params)
    origin = "the graph beside the weights; mean and std are GloRe's"
    wider = graph.as_float32(symbol)
    if wider is not None:
        symbol, origin = wider, f"{origin}; computed in float32, not float16"
    if wider is not None or any(v.dtype == np.float16 for v in arg_params.values()):
        arg_params, aux_params = (
            {name: value.astype("float32") for name, value in params.items()}
            for params in (arg_params, aux_params)
        )
    try:
        # Whatever its classifier is called.
        classes = infer_shapes(logits(symbol), {"data": (1, *shape)})[-1][1][-1]
    except (UsageError, IndexError):
        classes = _classes_of(arg_params, files.params)
    facts = ModelFacts("image", None, {}, classes, None, shape, MEAN, STD)
    return Model(symbol, arg_params, aux_params, facts, files.params, {}, origin)


def _is_video(path: str) -> bool:
    """Return whether a graph has 3D convolutions, and so reads clips.

    How many frames it takes no graph says: its network must be found to know its input.
    """
    inner = graph.read_symbol(path).get_internals()
    kernels = [node.attr("kernel") for node in inner]
    return any(kernel is not None and kernel.count(",") == 2 for kernel in kernels)


def _described(path: str) -> Optional[dict[str, Any]]:
    """Return what the metadata of a ``.safetensors`` file say of its network, if anything."""
    if not is_safetensors(path):
        return None
    text = read_safetensors(path)[1].get(FACTS)
    try:
        content = None if text is None else json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata are damaged: {error}") from error
    # A graph of another program has no row: its names must show what it is.
    return content if content and content.get("network") else None


def open_model(
    weights: str,
    epoch: Optional[int] = None,
    network: Optional[str] = None,
    overrides: Optional[dict[str, Any]] = None,
    crop_size: Optional[int] = None,
    clip_length: Optional[int] = None,
) -> Model:
    """Read a checkpoint, and find out what network it is of.

    Parameters
    ----------
    weights
        ``TASK_ep`` or another prefix (its newest epoch), ``.params``, ``.pth``, ``.safetensors``,
        or the name of a released network.
    epoch
        Of a prefix.
    network
        Its row; by default what the manifest says, else the graph beside the weights, else what
        names and shapes show.
    overrides
        Keywords of ``get_symbol``, beside those of the manifest unless ``network`` is given.
    crop_size, clip_length
        Of the input, instead of the training's.

    Raises
    ------
    CheckpointError
        If it cannot be read, or does not fit.
    UsageError
        If overrides are given for a graph that cannot be changed, or nothing tells the network.
    """
    text = locate(weights)
    overrides = dict(overrides or {})
    # A file of another kind (.pth) has no others beside it.
    file = split_key(text)[0]
    foreign = os.path.isfile(file) and stem_of(file) == file
    files = Files(text) if foreign else find(text, epoch)
    path = text if foreign else files.params
    manifest = None
    if not foreign and os.path.exists(files.manifest):
        manifest = read_manifest(files.stem)
    options: dict[str, dict[str, Any]] = {}
    if manifest is not None and manifest.format > 1:
        options = manifest.options
    if network is None and manifest is not None and "input" in manifest.model:
        facts = ModelFacts.from_dict(manifest.model, files.manifest)
        facts = dataclasses.replace(facts, overrides={**facts.overrides, **overrides})
        origin = f"{os.path.basename(files.manifest)}, its manifest"
    elif network is None and foreign and _described(path) is not None:
        facts = ModelFacts.from_dict(_described(path), path)
        facts = dataclasses.replace(facts, overrides={**facts.overrides, **overrides})
        origin = f"the metadata of {os.path.basename(path)}"
    elif network is not None:
        arg_params, _, _ = read_source(text, get_symbol(network, **overrides)[0], epoch)
        facts = facts_of_row(network, overrides, _classes_of(arg_params, path))
        origin = f"the table's row of {facts.network}"
    elif not foreign and os.path.exists(files.symbol) and not _is_video(files.symbol):
        if overrides:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in overrides)
            raise UsageError(
                f"{flags} changes a network of this project: give --network too, or leave it out "
                "to use the graph beside the weights"
            )
        return _from_graph(text, files, epoch, crop_size)
    else:
        facts = _identified(text, epoch, overrides)
        origin = f"names and shapes of its parameters, which are those of {facts.network}"
    shape = facts.data_shape
    if crop_size is not None:
        shape = (*shape[:-2], crop_size, crop_size)
    if clip_length is not None and len(shape) == 4:
        shape = (shape[0], clip_length, *shape[2:])
    facts = dataclasses.replace(facts, data_shape=shape)
    return _from_table(text, epoch, facts, options, origin)


def _identified(text: str, epoch: Optional[int], overrides: dict[str, Any]) -> ModelFacts:
    """Return the facts of the network that a file's names and shapes are those of."""
    arg_params, aux_params, path = read_source(text, None, epoch)
    shapes = {name: np.shape(value) for name, value in {**arg_params, **aux_params}.items()}
    try:
        found = identify_network(shapes, where=path)
    except CheckpointError as error:
        raise UsageError(
            f"{path} has neither a manifest nor a graph beside it, and its network is not "
            f"recognised ({error}): name its network with --network"
        ) from error
    return facts_of_row(found.name, {**found.overrides, **overrides}, found.num_classes)
