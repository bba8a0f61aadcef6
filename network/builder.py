"""``get_symbol``: from a network's name and a few checked overrides to its Symbol."""

import dataclasses
from typing import Any, Callable, Optional

from glore_common import UsageError, closest_first
from mxnet_compat import mx

from . import symbol_dpn, symbol_resnet
from .placement import blocks_of, head_of, units_of
from .settings import check_flag, check_real, check_whole
from .specs import BOX_ROWS, LEGACY_DPN_BN, PIXEL_ROWS, ROWS, Spec
from .symbol_detection import STYLES, detector, head_shapes
from .symbol_glore import UNIT_SETTINGS
from .symbol_segmentation import pixel_head
from .symbol_study import STUDY_ROWS

ALL_ROWS = ROWS + STUDY_ROWS
PIXELS, BOXES = "fcn_", "mask_rcnn_"
OTHER_ROWS = PIXEL_ROWS + BOX_ROWS


@dataclasses.dataclass(frozen=True)
class InputConf:
    """What a network expects to be fed.

    Attributes
    ----------
    data_shape
        (channels, h, w) or (channels, frames, h, w), without the batch axis.
    mean, std
        Per RGB channel, for pixels on the scale 0..1: the network reads (pixel - mean) / std.
    name
        Of the input's variable.
    others
        Names and shapes, with the batch axis, of further inputs: those of a detector's heads.
    """

    data_shape: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str = "data"
    others: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of each input, with the batch axis."""
        return {self.name: (1, *self.data_shape), **dict(self.others)}


def list_networks(study: bool = False, task: str = "classification") -> list[str]:
    """Return the names of all networks, in the order of the table (aliases are left out).

    Parameters
    ----------
    study
        Also those that only a study of the project needs (:mod:`network.symbol_study`).
    task
        Networks of which task. For segmentation any 2D network NAME can be had as ``fcn_NAME``,
        for detection as ``mask_rcnn_NAME``; the lists have the published ones and the demo's.
    """
    if task == "detection":
        return [row.name for row in BOX_ROWS]
    if task == "segmentation":
        return [row.name for row in PIXEL_ROWS]
    return [row.name for row in (ALL_ROWS if study else ROWS)]


def get_spec(name: str) -> Spec:
    """Return the row of a network.

    Parameters
    ----------
    name
        A name or alias, in any letter case. ``fcn_`` before that of a 2D network: that backbone
        with a head for segmentation; ``mask_rcnn_``: with those of a detector.

    Raises
    ------
    UsageError
        When there is no such network; the message names the nearest of all, and lists those of
        :func:`list_networks`, the nearest first.
    """
    rows = {
        known.lower(): row for row in ALL_ROWS + OTHER_ROWS for known in (row.name, *row.aliases)
    }
    if isinstance(name, str) and name.lower() not in rows:
        for prefix in (PIXELS, BOXES):
            if not name.lower().startswith(prefix):
                continue
            backbone = get_spec(name[len(prefix) :])
            if backbone.ndim != 2 or backbone.task != "classification":
                raise UsageError(
                    f"{name}: {backbone.name} is no 2D network that classifies images."
                )
            return backbone.for_pixels() if prefix == PIXELS else backbone.for_boxes()
    if not isinstance(name, str) or name.lower() not in rows:
        every, known = (
            [known for row in table for known in (row.name, *row.aliases)]
            for table in (ALL_ROWS + OTHER_ROWS, ROWS + OTHER_ROWS)
        )
        raise UsageError(
            f"Unknown network {name!r}. Did you mean {closest_first(str(name), every)[0]}? "
            f"Known networks, nearest first: {', '.join(closest_first(str(name), known))}."
        )
    return rows[name.lower()]


def _set_clip_length(spec: Spec, value: Any) -> Spec:
    if spec.ndim != 3:
        raise UsageError(f"clip_length: {spec.name} reads single images, it has no clip length.")
    frames = check_whole("clip_length", value)
    return dataclasses.replace(spec, data_shape=(3, frames, *spec.data_shape[2:]))


def _set_crop_size(spec: Spec, value: Any) -> Spec:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise UsageError(f"crop_size must be one integer or (height, width), not {value!r}.")
    size = tuple(check_whole("crop_size", side) for side in pair)
    return dataclasses.replace(spec, data_shape=spec.data_shape[:-2] + size)


def _set_legacy_names(spec: Spec, value: Any) -> Spec:
    if check_flag("legacy_names", value) and spec.family != "dpn":
        raise UsageError(f"legacy_names: {spec.name} has no other names, only the DPN rows have.")
    return dataclasses.replace(spec, legacy_names=value, bn=LEGACY_DPN_BN if value else spec.bn)


def _set_bn(constant: str, low: float) -> Callable[[Spec, Any], Spec]:
    def apply(spec: Spec, value: Any) -> Spec:
        number = check_real(f"bn_{constant}", value, low, 1)
        return dataclasses.replace(spec, bn=spec.bn._replace(**{constant: number}))

    return apply


def _set_unit(override: str, setting: str) -> Callable[[Spec, Any], Spec]:
    def apply(spec: Spec, value: Any) -> Spec:
        if not spec.glore:
            raise UsageError(
                f"{override}: {spec.name} has no GloRe units that it could act on; "
                "give glore as well, for instance '2-3'."
            )
        checked = UNIT_SETTINGS[setting].check(override, value)
        return dataclasses.replace(spec, unit={**spec.unit, setting: checked})

    return apply


def _set_output_stride(spec: Spec, value: Any) -> Spec:
    if spec.ndim != 2 or value not in (8, 16, 32):
        raise UsageError(f"output_stride: 2D networks have 8, 16 or 32, not {value!r}.")
    return spec.with_output_stride(value)


def _set_style(spec: Spec, value: Any) -> Spec:
    if spec.task != "detection":
        raise UsageError(f"style: {spec.name} is no detector, only mask_rcnn_ networks are.")
    if value not in STYLES:
        raise UsageError(f"style: {' or '.join(STYLES)}, not {value!r}.")
    return dataclasses.replace(spec, detector=spec.detector._replace(**STYLES[value]))


def _set_auxiliary(spec: Spec, value: Any) -> Spec:
    if spec.task != "segmentation":
        raise UsageError(f"auxiliary: {spec.name} has no auxiliary head, only fcn_ networks have.")
    width = spec.head.auxiliary if check_flag("auxiliary", value) else 0
    return dataclasses.replace(spec, head=spec.head._replace(auxiliary=width))


# The override that sets all units' setting of this name.
UNIT_OVERRIDES = {
    "glore_flavour" if setting == "flavour" else setting: setting for setting in UNIT_SETTINGS
}
# Applied in this order: glore and block before what needs units, legacy_names before the BN
# constants.
OVERRIDES: dict[str, Callable[[Spec, Any], Spec]] = {
    "glore": units_of,
    "block": blocks_of,
    "context": head_of,
    "output_stride": _set_output_stride,
    "auxiliary": _set_auxiliary,
    "style": _set_style,
    "clip_length": _set_clip_length,
    "crop_size": _set_crop_size,
    "dropout": lambda spec, value: dataclasses.replace(
        spec, dropout=check_real("dropout", value, 0, 1)
    ),
    **{override: _set_unit(override, setting) for override, setting in UNIT_OVERRIDES.items()},
    "fixed_pool": lambda spec, value: dataclasses.replace(
        spec, fixed_pool=check_flag("fixed_pool", value)
    ),
    "legacy_names": _set_legacy_names,
    "bn_eps": _set_bn("eps", 1e-8),
    "bn_momentum": _set_bn("momentum", 0),
}


def _check_size(spec: Spec, default_map: tuple[int, ...]) -> None:
    size, least = spec.data_shape[1:], spec.total_stride()
    axes = ("height", "width") if spec.ndim == 2 else ("frames", "height", "width")
    for axis, given, needed in zip(axes, size, least):
        if given < needed:
            raise UsageError(
                f"{spec.name}: an input of {' x '.join(map(str, size))} is too small: its {axis} "
                f"must be at least {needed}, by which the network's strides divide it."
            )
    if spec.fixed_pool and spec.final_map(size) != default_map:
        raise UsageError(
            f"{spec.name}: fixed_pool averages over a window of {' x '.join(map(str, default_map))}"
            f", but an input of {' x '.join(map(str, size))} ends in a map of "
            f"{' x '.join(map(str, spec.final_map(size)))}. Leave fixed_pool out."
        )


def _head(
    before_pool: mx.sym.Symbol, spec: Spec, default_map: tuple[int, ...], num_classes: int
) -> mx.sym.Symbol:
    """Pooling to softmax: (n, c, *map) -> (n, num_classes)."""
    if spec.fixed_pool:
        out = mx.sym.Pooling(
            data=before_pool,
            pool_type="avg",
            kernel=default_map,
            stride=(1,) * spec.ndim,
            name="global-pool",
        )
    else:
        out = mx.sym.Pooling(
            data=before_pool,
            pool_type="avg",
            kernel=(1,) * spec.ndim,
            global_pool=True,
            name="global-pool",
        )
    out = mx.sym.Flatten(data=out, name="flatten")
    if spec.dropout > 0:
        out = mx.sym.Dropout(data=out, p=spec.dropout, name="dropout")
    name = "fc6" if spec.legacy_names else "classifier"
    out = mx.sym.FullyConnected(data=out, num_hidden=num_classes, name=name)
    return mx.sym.SoftmaxOutput(data=out, name="softmax")


def resolve(name: str, **overrides: Any) -> Spec:
    """Return a network's row with overrides applied and checked; see :func:`get_symbol`."""
    row = spec = get_spec(name)
    for given in overrides:
        if given not in OVERRIDES:
            raise UsageError(
                f"Unknown option {given!r}. Did you mean {closest_first(given, OVERRIDES)[0]}? "
                f"Known options: {', '.join(OVERRIDES)}."
            )
    for option, apply in OVERRIDES.items():
        if option in overrides:
            spec = apply(spec, overrides[option])
    _check_size(spec, row.final_map(row.data_shape[1:]))
    return spec


def get_symbol(
    name: str, num_classes: Optional[int] = None, **overrides: Any
) -> tuple[mx.sym.Symbol, InputConf]:
    """Build a network.

    Parameters
    ----------
    name
        One of :func:`list_networks`, or an alias, in any letter case.
    num_classes
        Width of the classifier; by default that of the published network (400 or 1000).
    **overrides
        Checked; an unknown one is an error that names the nearest:

        glore : dict, str or None
            GloRe units as ``{stage: block numbers}``, as counts for stages 3 and 4 (``'2-3'``), as
            ``'3:1,3;4:1,3,5'`` or ``'c4'``, with settings (``'2-3:num_node=16'``), or None for no
            units.
        block : str, Context, sequence of them, or None
            Context blocks instead of the row's own, each with places, placement and settings if
            need be: ``'gc'``, ``'gc@c3-c5/inside:ratio=1/4,nl@4:5:mode=dot_product'``
            (:mod:`network.placement`; kinds and settings are the rows of ``CONTEXT_KINDS``).
            ``glore`` is a kind too: it adds units as ``glore`` does. Without places gc sits in
            every block of conv3 to conv5, se in every block, snl and nl behind the last block but
            one of conv4, units as in ResNet-50. What sits behind a residual block precedes a GloRe
            unit that sits there too.
        context : str or None
            Segmentation: the block before the classifier, with its settings: ``'glore'``,
            ``'glore:num_node=32,normalize=false'``, ``'gc:ratio=1/4'``, or none.
        output_stride : {8, 16, 32}
            2D networks: how much smaller than the input the last map is; the strides beyond it
            become dilations, the weights stay those of the network.
        auxiliary
            Segmentation: whether there is an auxiliary head on conv4, for training.
        style : {'gcnet', 'gluoncv'}
            Detection: pyramid, anchors and heads as GCNet or as gluoncv has them.
        clip_length
            Frames (3D networks).
        crop_size : int or (int, int)
            Pixels, or (height, width).
        dropout
            Probability before the classifier, from 0 to below 1.
        normalize
            GloRe units divide by the number of positions.
        num_node, num_state
            Sizes of every GloRe unit, instead of those that follow from the stage's width.
        glore_flavour : {'released', 'video', 'report'}
            Which form of the unit; see :func:`GloRe_Unit`.
        fixed_pool
            The released graphs' last pooling, for the default input size only.
        legacy_names
            Names and BN constants of the DPN release (its classifier is called ``fc6``).
        bn_eps, bn_momentum
            Constants of all batch normalisations.

    Returns
    -------
    (Symbol, InputConf)
        The Symbol takes ``data`` (n, *data_shape) and ``softmax_label`` (n,) and gives class
        probabilities (n, num_classes). Of a segmentation network (n, num_classes, h, w), from
        labels (n, h, w); an auxiliary head is a second output. A detector's inputs and outputs
        are those of its parts (:mod:`network.symbol_detection`).

    Raises
    ------
    UsageError
        For an unknown network or option, a value out of range, or an input that is too small.
    """
    row, spec = get_spec(name), resolve(name, **overrides)
    classes = spec.num_classes if num_classes is None else check_whole("num_classes", num_classes)
    stages = (symbol_dpn if spec.family == "dpn" else symbol_resnet).get_stages(spec)
    if spec.task == "detection":
        symbol = detector(stages, spec=spec, num_classes=classes)
    elif spec.task == "segmentation":
        symbol = pixel_head(stages, spec=spec, num_classes=classes)
    else:
        default_map = row.final_map(row.data_shape[1:])
        symbol = _head(stages[-1], spec, default_map, classes)
    others = head_shapes(spec) if spec.task == "detection" else {}
    return symbol, InputConf(spec.data_shape, spec.mean, spec.std, others=tuple(others.items()))


def logits(symbol: mx.sym.Symbol) -> mx.sym.Symbol:
    """Return the classifier's output of a network: what the softmax at its end reads.

    Parameters
    ----------
    symbol
        From :func:`get_symbol`, or loaded from a checkpoint that ends in ``SoftmaxOutput``. Of
        several outputs the first one counts: the others are for training.

    Raises
    ------
    UsageError
        When the graph does not end in a ``SoftmaxOutput``.
    """
    return all_logits(symbol)[0]


def all_logits(symbol: mx.sym.Symbol) -> list[mx.sym.Symbol]:
    """Return what each softmax at the end of a network reads: that of :func:`logits` first.

    Raises
    ------
    UsageError
        When the graph does not end in ``SoftmaxOutput``.
    """
    if "rpn_scores_output" in symbol.list_outputs():
        raise UsageError("A detector has no logits of an image: it gives boxes and masks.")
    if not all(name.endswith("softmax_output") for name in symbol.list_outputs()):
        raise UsageError(
            f"The graph ends in {', '.join(symbol.list_outputs())}, not in a SoftmaxOutput named "
            "'softmax': it has no logits to take."
        )
    return [symbol[number].get_children()[0] for number in range(len(symbol.list_outputs()))]
