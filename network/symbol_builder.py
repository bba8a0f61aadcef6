"""``get_symbol``: from a network's name and a few checked overrides to its Symbol."""

import dataclasses
import numbers
import re

from glore_common import UsageError, closest_first
from mxnet_compat import mx

from . import symbol_dpn, symbol_resnet
from .specs import LEGACY_DPN_BN, ROWS, Context
from .symbol_glore import FLAVOURS

CONTEXT_KINDS = ("se",)
STAGES = (2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class InputConf:
    """What a network expects to be fed.

    Attributes
    ----------
    data_shape : tuple of int
        (channels, h, w) or (channels, frames, h, w), without the batch axis.
    mean, std : tuple of float
        Per RGB channel, for pixels on the scale 0..1: the network reads (pixel - mean) / std.
    """

    data_shape: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def list_networks():
    """Return the names of all networks, in the order of the table (aliases are left out)."""
    return [row.name for row in ROWS]


def get_spec(name):
    """Return the row of a network.

    Parameters
    ----------
    name : str
        A name or alias, in any letter case.

    Raises
    ------
    UsageError
        When there is no such network; the message lists all, the nearest first.
    """
    rows = {known.lower(): row for row in ROWS for known in (row.name, *row.aliases)}
    if not isinstance(name, str) or name.lower() not in rows:
        known = [known for row in ROWS for known in (row.name, *row.aliases)]
        raise UsageError(
            f"Unknown network {name!r}. Did you mean {closest_first(str(name), known)[0]}? "
            f"Known networks, nearest first: {', '.join(closest_first(str(name), known))}."
        )
    return rows[name.lower()]


def _whole(label, value, low=1):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise UsageError(f"{label} must be an integer of at least {low}, not {value!r}.")
    return int(value)


def _real(label, value, low, high):
    """Check low <= value < high."""
    right = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not right or not low <= value < high:
        raise UsageError(f"{label} must be a number from {low:g} to below {high:g}, not {value!r}.")
    return float(value)


def _flag(label, value):
    if not isinstance(value, bool):
        raise UsageError(f"{label} must be True or False, not {value!r}.")
    return value


def _positions(spec, label, value):
    """Check a mapping {stage: positions} and return it as sorted pairs."""
    pairs = []
    for stage, blocks in sorted(value.items(), key=lambda item: str(item[0])):
        if stage not in STAGES or isinstance(stage, bool):
            raise UsageError(f"{label}: stage {stage!r} is not one of 2, 3, 4, 5 (conv2 to conv5).")
        if isinstance(blocks, (str, bytes)) or not hasattr(blocks, "__iter__"):
            raise UsageError(
                f"{label}: stage {stage} needs a sequence of block numbers, such as (1, 3), "
                f"not {blocks!r}."
            )
        blocks = [_whole(f"{label}: a block number of stage {stage}", block) for block in blocks]
        last = spec.blocks[stage - 2]
        for block in blocks:
            if block > last:
                raise UsageError(
                    f"{label}: {spec.name} has no block {block} in stage {stage}, "
                    f"its last one is {last}."
                )
        if len(set(blocks)) != len(blocks):
            raise UsageError(f"{label}: stage {stage} names a block twice: {blocks}.")
        if blocks:
            pairs.append((int(stage), tuple(sorted(blocks))))
    return tuple(pairs)


def _parse_glore(spec, value):
    if value is None or value == "none":
        return ()
    if isinstance(value, str):
        counts = re.fullmatch(r"(\d+)-(\d+)", value)
        if counts:
            pairs = []
            for stage, count in zip((3, 4), map(int, counts.groups())):
                if count > spec.blocks[stage - 2]:
                    raise UsageError(
                        f"glore={value!r}: {spec.name} has {spec.blocks[stage - 2]} blocks in "
                        f"stage {stage}, too few for {count} units."
                    )
                if count:
                    pairs.append((stage, spec.default_positions(stage, count)))
            return tuple(pairs)
        if not re.fullmatch(r"\d:\d+(,\d+)*(;\d:\d+(,\d+)*)*", value):
            raise UsageError(
                f"glore={value!r} is not understood. Give the number of units in stages 3 and 4 "
                "('2-3', '0-3'), or positions ('3:1,3;4:1,3,5'), or 'none'."
            )
        parts = [part.split(":") for part in value.split(";")]
        if len({stage for stage, _ in parts}) != len(parts):
            raise UsageError(f"glore={value!r} names a stage twice.")
        value = {int(stage): [int(block) for block in blocks.split(",")] for stage, blocks in parts}
    if not hasattr(value, "items"):
        raise UsageError(
            "glore must be a mapping from stage to block numbers, such as {3: (1, 3), "
            f"4: (1, 3, 5)}}, a string such as '2-3', or None, not {value!r}."
        )
    return _positions(spec, "glore", value)


def _set_glore(spec, value):
    return {"glore": _parse_glore(spec, value)}


def _set_context(spec, value):
    if value is None or value == "none":
        return {"context": ()}
    given = [value] if isinstance(value, (str, Context)) else list(value)
    contexts = []
    for item in given:
        context = Context(item) if isinstance(item, str) else item
        if not isinstance(context, Context):
            raise UsageError(f"block: {item!r} is neither a kind of block nor a Context.")
        if context.kind not in CONTEXT_KINDS:
            raise UsageError(
                f"block: {context.kind!r} is not one of: "
                f"{', '.join(closest_first(str(context.kind), CONTEXT_KINDS))}."
            )
        _real("block: ratio", context.ratio, 1e-4, 8)
        if context.positions is not None:
            context = context._replace(positions=_positions(spec, "block", dict(context.positions)))
        contexts.append(context)
    if len({context.kind for context in contexts}) != len(contexts):
        raise UsageError(f"block names a kind twice: {[context.kind for context in contexts]}.")
    return {"context": tuple(contexts)}


def _set_clip_length(spec, value):
    if spec.ndim != 3:
        raise UsageError(f"clip_length: {spec.name} reads single images, it has no clip length.")
    frames = _whole("clip_length", value)
    return {"data_shape": (spec.data_shape[0], frames) + spec.data_shape[2:]}


def _set_crop_size(spec, value):
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise UsageError(f"crop_size must be one integer or (height, width), not {value!r}.")
    size = tuple(_whole("crop_size", side) for side in pair)
    return {"data_shape": spec.data_shape[:-2] + size}


def _set_legacy_names(spec, value):
    if _flag("legacy_names", value) and spec.family != "dpn":
        raise UsageError(f"legacy_names: {spec.name} has no other names, only the DPN rows have.")
    return {"legacy_names": value, "bn": LEGACY_DPN_BN if value else spec.bn}


def _set_flavour(spec, value):
    if value not in FLAVOURS:
        raise UsageError(
            f"glore_flavour {value!r} is not one of: "
            f"{', '.join(closest_first(str(value), FLAVOURS))}."
        )
    return {"glore_flavour": value}


# Applied in this order: glore before what needs units, legacy_names before the BN constants.
OVERRIDES = {
    "glore": _set_glore,
    "block": _set_context,
    "clip_length": _set_clip_length,
    "crop_size": _set_crop_size,
    "dropout": lambda spec, value: {"dropout": _real("dropout", value, 0, 1)},
    "normalize": lambda spec, value: {"normalize": _flag("normalize", value)},
    "num_node": lambda spec, value: {"num_node": _whole("num_node", value)},
    "num_state": lambda spec, value: {"num_state": _whole("num_state", value)},
    "glore_flavour": _set_flavour,
    "fixed_pool": lambda spec, value: {"fixed_pool": _flag("fixed_pool", value)},
    "legacy_names": _set_legacy_names,
    "bn_eps": lambda spec, value: {"bn": spec.bn._replace(eps=_real("bn_eps", value, 1e-8, 1))},
    "bn_momentum": lambda spec, value: {
        "bn": spec.bn._replace(momentum=_real("bn_momentum", value, 0, 1))
    },
}
NEED_UNITS = ("normalize", "num_node", "num_state", "glore_flavour")


def _check_size(spec, default_map):
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


def _head(before_pool, spec, default_map, num_classes):
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


def resolve(name, **overrides):
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
            if option in NEED_UNITS and not spec.glore:
                raise UsageError(
                    f"{option}: {row.name} has no GloRe units that it could act on; "
                    "give glore as well, for instance '2-3'."
                )
            spec = dataclasses.replace(spec, **apply(spec, overrides[option]))
    _check_size(spec, row.final_map(row.data_shape[1:]))
    return spec


def get_symbol(name, num_classes=None, **overrides):
    """Build a network.

    Parameters
    ----------
    name : str
        One of :func:`list_networks`, or an alias, in any letter case.
    num_classes : int, optional
        Width of the classifier; by default that of the published network (400 or 1000).
    **overrides
        Checked; an unknown one is an error that names the nearest:

        glore : dict, str or None
            GloRe units as ``{stage: block numbers}``, as counts for stages 3 and 4 (``'2-3'``), as
            ``'3:1,3;4:1,3,5'``, or None for no units.
        block : str, Context, sequence of them, or None
            Blocks inside the residual blocks: ``'se'``.
        clip_length : int
            Frames (3D networks).
        crop_size : int or (int, int)
            Pixels, or (height, width).
        dropout : float
            Probability before the classifier, from 0 to below 1.
        normalize : bool
            GloRe units divide by the number of positions.
        num_node, num_state : int
            Sizes of every GloRe unit, instead of those that follow from the stage's width.
        glore_flavour : {'released', 'video'}
            Which form of the unit.
        fixed_pool : bool
            The released graphs' last pooling, for the default input size only.
        legacy_names : bool
            Names and BN constants of the DPN release (its classifier is called ``fc6``).
        bn_eps, bn_momentum : float
            Constants of all batch normalisations.

    Returns
    -------
    (Symbol, InputConf)
        The Symbol takes ``data`` (n, *data_shape) and ``softmax_label`` (n,) and gives class
        probabilities (n, num_classes).

    Raises
    ------
    UsageError
        For an unknown network or option, a value out of range, or an input that is too small.
    """
    row, spec = get_spec(name), resolve(name, **overrides)
    classes = spec.num_classes if num_classes is None else _whole("num_classes", num_classes)
    builder = symbol_dpn if spec.family == "dpn" else symbol_resnet
    default_map = row.final_map(row.data_shape[1:])
    symbol = _head(builder.get_before_pool(spec), spec, default_map, classes)
    return symbol, InputConf(spec.data_shape, spec.mean, spec.std)


def logits(symbol):
    """Return the classifier's output of a network: what the softmax at its end reads.

    Parameters
    ----------
    symbol : Symbol
        From :func:`get_symbol`, or loaded from a checkpoint that ends in ``SoftmaxOutput``.

    Raises
    ------
    UsageError
        When the graph does not end in a ``SoftmaxOutput``.
    """
    if len(symbol.list_outputs()) != 1 or not symbol.list_outputs()[0].endswith("softmax_output"):
        raise UsageError(
            f"The graph ends in {', '.join(symbol.list_outputs())}, not in a SoftmaxOutput named "
            "'softmax': it has no logits to take."
        )
    return symbol.get_children()[0]
