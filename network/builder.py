"""``get_symbol``: from a network's name and a few checked overrides to its Symbol."""

import dataclasses
import numbers
import re
from fractions import Fraction

from glore_common import UsageError, closest_first
from mxnet_compat import mx

from . import symbol_dpn, symbol_resnet
from .specs import CONTEXT_KINDS, LEGACY_DPN_BN, PLACEMENTS, ROWS, Context
from .symbol_context import MODES
from .symbol_glore import FLAVOURS

GLORE_KIND = "glore"
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
        given = _explicit_positions("glore", value)
        if given is None:
            raise UsageError(
                f"glore={value!r} is not understood. Give the number of units in stages 3 and 4 "
                "('2-3', '0-3'), or positions ('3:1,3;4:1,3,5'), or 'none'."
            )
        value = given
    if not hasattr(value, "items"):
        raise UsageError(
            "glore must be a mapping from stage to block numbers, such as {3: (1, 3), "
            f"4: (1, 3, 5)}}, a string such as '2-3', or None, not {value!r}."
        )
    return _positions(spec, "glore", value)


def _set_glore(spec, value):
    return {"glore": _parse_glore(spec, value)}


def _ratio(value):
    """Return a ratio given as a number or as text such as '1/16' as a float."""
    number = value
    if isinstance(value, str):
        try:
            number = float(Fraction(value.strip()))
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                f"block: ratio must be a number or a fraction such as '1/16', not {value!r}."
            ) from None
    return _real("block: ratio", number, 1e-4, 8)


def _placement(value):
    if value not in PLACEMENTS:
        raise UsageError(
            f"block: placement {value!r} is not one of: {', '.join(PLACEMENTS)} (the shortcut sum)."
        )
    return value


def _explicit_positions(label, text):
    """Return '3:1,3;4:1,3,5' as a mapping, or None when the text has another form."""
    if not re.fullmatch(r"\d:\d+(,\d+)*(;\d:\d+(,\d+)*)*", text):
        return None
    parts = [part.split(":") for part in text.split(";")]
    if len({stage for stage, _ in parts}) != len(parts):
        raise UsageError(f"{label}={text!r} names a stage twice.")
    return {int(stage): [int(block) for block in blocks.split(",")] for stage, blocks in parts}


def _context_positions(spec, value):
    """Return (positions, placement that they imply or None) of context blocks.

    Text names whole stages ('c4', 'c3-c5', 'all': in every block, before the sum) or blocks
    ('3:1,3;4:5').
    """
    if isinstance(value, str):
        stages = re.fullmatch(r"c([2-5])(?:-c([2-5]))?", value)
        if value == "all" or stages:
            first, last = (2, 5) if value == "all" else (stages[1], stages[2] or stages[1])
            if int(first) > int(last):
                raise UsageError(f"block positions {value!r} name no block.")
            return spec.every_block(range(int(first), int(last) + 1)), "inside"
        given = _explicit_positions("block positions", value)
        if given is None:
            raise UsageError(
                f"block positions {value!r} are not understood. Give stages ('c3-c5', 'c4', 'all') "
                "or blocks ('3:1,3;4:5')."
            )
        value = given
    if not hasattr(value, "items"):
        try:
            value = dict(value)
        except (TypeError, ValueError):
            raise UsageError(
                "block positions must be text such as 'c3-c5' or a mapping from stage to block "
                f"numbers, such as {{4: (5,)}}, not {value!r}."
            ) from None
    pairs = _positions(spec, "block", value)
    if not pairs:
        raise UsageError("block positions name no block; leave block out to have none.")
    return pairs, None


def _parse_block(text):
    """Return [(kind, positions or None, placement or None)] of 'gc@c3-c5,nl@4:5/after'."""
    items = []
    # A comma followed by a letter parts two kinds; within positions a digit follows.
    for item in re.split(r"\s*,\s*(?=[A-Za-z])", text.strip()):
        match = re.fullmatch(r"([A-Za-z]+)(?:@([^/]+))?(?:/(\w+))?", item)
        if not match:
            raise UsageError(
                f"block={text!r} is not understood at {item!r}. Give kinds of blocks, each with "
                "positions and placement if need be: 'gc', 'gc,nl', 'gc@c3-c5,nl@4:5/after'."
            )
        items.append((match[1].lower(), match[2], match[3]))
    return items


def _check_kind(kind):
    known = [*CONTEXT_KINDS, GLORE_KIND]
    if kind not in known:
        raise UsageError(
            f"block: {kind!r} is not one of: {', '.join(closest_first(str(kind), known))}."
        )


def _complete(spec, context, implied=None):
    """Return a Context with checked settings and explicit positions."""
    _check_kind(context.kind)
    kind = CONTEXT_KINDS[context.kind]
    if context.ratio is not None:
        if kind.ratio is None:
            raise UsageError(f"block: {context.kind} has no hidden layer and takes no ratio.")
        context = context._replace(ratio=_ratio(context.ratio))
    if context.positions is None:
        positions = spec.default_context_positions(context.kind)
    else:
        positions, implied = _context_positions(spec, context.positions)
    placement = context.placement or implied
    if placement is not None:
        _placement(placement)
    _one_mode(context.mode)
    _flag("nl_sub_sample", context.sub_sample)
    return context._replace(positions=positions, placement=placement)


def _one_mode(value):
    if value not in MODES:
        raise UsageError(
            f"nl_mode {value!r} is not one of: {', '.join(closest_first(str(value), MODES))}."
        )
    return value


def _set_context(spec, value):
    if value is None or value == "none":
        return {"context": ()}
    several = isinstance(value, (list, tuple)) and not isinstance(value, Context)
    given = list(value) if several else [value]
    contexts, units = [], spec.glore
    for item in given:
        if isinstance(item, Context):
            contexts.append(_complete(spec, item))
            continue
        if not isinstance(item, str):
            raise UsageError(f"block: {item!r} is neither a kind of block nor a Context.")
        for kind, positions, placement in _parse_block(item):
            _check_kind(kind)
            if kind != GLORE_KIND:
                context = Context(kind, positions=positions, placement=placement)
                contexts.append(_complete(spec, context))
            elif placement is not None:
                raise UsageError("block: a GloRe unit sits after a block; it takes no placement.")
            elif positions is None:
                units = units or spec.default_units()
            elif re.match(r"c|all", positions):
                units = _context_positions(spec, positions)[0]
            else:
                units = _parse_glore(spec, positions)
    if len({context.kind for context in contexts}) != len(contexts):
        raise UsageError(f"block names a kind twice: {[context.kind for context in contexts]}.")
    return {"context": tuple(contexts), "glore": units}


def _set_ratio(spec, value):
    ratio = _ratio(value)
    if not any(CONTEXT_KINDS[context.kind].ratio for context in spec.context):
        raise UsageError("block_ratio: none of the network's blocks has a hidden layer.")
    return {
        "context": tuple(
            context._replace(ratio=ratio) if CONTEXT_KINDS[context.kind].ratio else context
            for context in spec.context
        )
    }


def _set_positions(spec, value):
    positions, implied = _context_positions(spec, value)
    return {
        "context": tuple(
            context._replace(positions=positions, placement=context.placement or implied)
            for context in spec.context
        )
    }


def _set_placement(spec, value):
    contexts = (context._replace(placement=_placement(value)) for context in spec.context)
    return {"context": tuple(contexts)}


def _set_non_local(spec, field, value):
    if not any(context.kind == "nl" for context in spec.context):
        raise UsageError(f"nl_{field}: the network has no Non-local block; give block='nl' too.")
    return {
        "context": tuple(
            context._replace(**{field: value}) if context.kind == "nl" else context
            for context in spec.context
        )
    }


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


# Applied in this order: glore and block before what needs units or blocks, legacy_names before the
# BN constants.
OVERRIDES = {
    "glore": _set_glore,
    "block": _set_context,
    "block_ratio": _set_ratio,
    "block_positions": _set_positions,
    "block_placement": _set_placement,
    "nl_mode": lambda spec, value: _set_non_local(spec, "mode", _one_mode(value)),
    "nl_sub_sample": lambda spec, value: _set_non_local(
        spec, "sub_sample", _flag("nl_sub_sample", value)
    ),
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
NEED_BLOCKS = ("block_ratio", "block_positions", "block_placement")


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
            if option in NEED_BLOCKS and not spec.context:
                raise UsageError(
                    f"{option}: {row.name} has no context blocks that it could act on; give block "
                    "as well, for instance 'gc' (GloRe units are placed with glore='3:1;4:5')."
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
            Context blocks instead of the row's own. Text names kinds, ``'gc'``, ``'gc,nl'``, of
            gc, se, snl, nl, each with positions and placement if need be:
            ``'gc@c3-c5,nl@4:5/after'``. ``glore`` is a kind too: it adds units as ``glore`` does.
            Without positions gc sits in every block of conv3 to conv5, se in every block, snl and
            nl behind the last block but one of conv4, units as in ResNet-50.
        block_ratio : float or str
            Of all context blocks with a hidden layer: ``1 / 4``, ``'1/16'``.
        block_positions : str or dict
            Of all context blocks: every block of stages, before the shortcut sum (``'c3-c5'``,
            ``'all'``), or ``'3:1,3;4:5'``, ``{4: (5,)}``.
        block_placement : {'inside', 'after'}
            Of all context blocks: before the shortcut sum, or behind the residual block. Blocks
            behind precede a GloRe unit that sits there too.
        nl_mode : str
            Of Non-local blocks: see :func:`NL_Block`.
        nl_sub_sample : bool
            Non-local blocks gather from pooled positions.
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
        glore_flavour : {'released', 'video', 'report'}
            Which form of the unit; see :func:`GloRe_Unit`.
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
