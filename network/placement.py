"""What goes into or behind residual blocks, where, with which settings: the text and its checks.

::

    block = item[,item ...] | none
    item  = KIND[@PLACES][/PLACEMENT][:SETTING=VALUE[,SETTING=VALUE ...]]
    glore = PLACES[:SETTING=VALUE ...] | [glore][@PLACES][:SETTING=VALUE ...] | none

``gc``, ``gc@c3-c5/inside:ratio=1/4``, ``nl@4:5:mode=dot_product,sub_sample=true``,
``gc,glore@2-3:num_node=16``. KIND is a row of ``CONTEXT_KINDS``, or ``glore``. PLACES are stages
(``c4``, ``c3-c5``, ``all``: every residual block in them) or residual blocks (``3:1,3;4:1,3,5``),
and for GloRe units also numbers of units in conv3 and conv4 (``2-3``). PLACEMENT is ``inside``
(before the shortcut sum; what whole stages mean) or ``after`` (behind the residual block). A
setting is one that the kind has: ``CONTEXT_KINDS``, ``UNIT_SETTINGS``.

Library users may give mappings and :class:`network.specs.Context` tuples instead of text;
:func:`as_text` writes them as text.
"""

import dataclasses
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Optional, Union

from glore_common import UsageError, closest_first

from .settings import Setting, check_whole, one_of
from .specs import PLACEMENTS, Context, Positions, Spec
from .symbol_context import CONTEXT_KINDS
from .symbol_glore import UNIT_SETTINGS

GLORE = "glore"
STAGES = (2, 3, 4, 5)
# A comma followed by a letter parts two items, unless a setting follows; in places a digit does.
_BETWEEN_ITEMS = re.compile(r"\s*,\s*(?=[A-Za-z])(?!\w+\s*=)")
# Groups: kind, places, placement, settings; of units: places, settings.
_ITEM = re.compile(r"([A-Za-z]+)(?:@([^/=]+?))?(?:/(\w+))?(?::(\w+\s*=.*))?")
_UNITS = re.compile(r"(?:glore(?:@|(?=:)|$))?([^/=]*?)(?::(\w+\s*=.*))?")
_HEAD = re.compile(r"([A-Za-z]+)(?::(\w+\s*=.*))?")
_BLOCKS = re.compile(r"\d:\d+(,\d+)*(;\d:\d+(,\d+)*)*")


def units_of(spec: Spec, value: Any) -> Spec:
    """Return a row with the GloRe units that the override ``glore`` asks for.

    Parameters
    ----------
    spec
    value
        Text, ``{stage: residual blocks}``, or None for no units.

    Raises
    ------
    UsageError
        For text that is not understood, places that the network has not, or a wrong setting.
    """
    if value is None or value == "none":
        return dataclasses.replace(spec, glore=())
    if not isinstance(value, str):
        if not hasattr(value, "items"):
            raise UsageError(
                "glore must be a mapping from stage to block numbers, such as {3: (1, 3), "
                f"4: (1, 3, 5)}}, a string such as '2-3', or None, not {value!r}."
            )
        return dataclasses.replace(spec, glore=_positions(spec, "glore", value))
    match = _UNITS.fullmatch(value.strip())
    if not match or not value.strip():
        raise _not_understood(value)
    return _with_units(spec, *match.groups(default=""))


def head_of(spec: Spec, value: Any) -> Spec:
    """Return a segmentation row with the context block that the override ``context`` asks for.

    Parameters
    ----------
    spec
    value
        A kind of block with settings if need be (``'glore'``, ``'gc:ratio=1/4'``), or None.

    Raises
    ------
    UsageError
        For another kind of network, text that is not understood, or a wrong setting.
    """
    if spec.task != "segmentation":
        raise UsageError(f"context: {spec.name} does not segment; give block or glore instead.")
    if value is None or value == "none":
        return dataclasses.replace(spec, head=spec.head._replace(kind=None, settings={}))
    match = _HEAD.fullmatch(str(value).strip())
    kind = match[1].lower() if match else ""
    known = [*CONTEXT_KINDS, GLORE]
    if kind not in known:
        raise UsageError(
            f"context={value!r} is not one of: {', '.join(closest_first(str(value), known))}, "
            "none; with settings if need be, as in 'gc:ratio=1/4'."
        )
    settings = UNIT_SETTINGS if kind == GLORE else CONTEXT_KINDS[kind].settings
    given = _settings(f"context: {kind}", match[2] or "" if match else "", settings)
    return dataclasses.replace(spec, head=spec.head._replace(kind=kind, settings=given))


def blocks_of(spec: Spec, value: Any) -> Spec:
    """Return a row with the context blocks (and GloRe units) that the override ``block`` asks for.

    Parameters
    ----------
    spec
    value
        Text, a Context, a sequence of both, or None for no context blocks.

    Raises
    ------
    UsageError
        For text that is not understood, an unknown kind, places that the network has not, or a
        wrong setting.
    """
    if value is None or value == "none":
        return dataclasses.replace(spec, context=())
    several = isinstance(value, (list, tuple)) and not isinstance(value, Context)
    contexts: list[Context] = []
    for given in list(value) if several else [value]:
        if isinstance(given, Context):
            contexts.append(_checked(spec, given))
            continue
        if not isinstance(given, str):
            raise UsageError(f"block: {given!r} is neither a kind of block nor a Context.")
        for item in _items(given):
            kind, places, placement, settings = item.groups(default="")
            if kind.lower() != GLORE:
                contexts.append(_context(spec, kind.lower(), places, placement, settings))
            elif placement:
                raise UsageError("block: a GloRe unit sits after a block; it takes no placement.")
            else:
                spec = _with_units(spec, places, settings)
    kinds = [context.kind for context in contexts]
    if len(set(kinds)) != len(kinds):
        raise UsageError(f"block names a kind twice: {kinds}.")
    return dataclasses.replace(spec, context=tuple(contexts))


def as_text(value: Any) -> str:
    """Return text that means what a value of the overrides ``glore`` or ``block`` means.

    Parameters
    ----------
    value
        Text, a Context, a sequence of both, a mapping of stages, or None.
    """
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Context):
        return _context_text(value)
    if hasattr(value, "items"):
        return _places_text(value) or "none"
    return ",".join(as_text(item) for item in value) or "none"


def storable(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides of ``get_symbol`` as JSON can hold them, with the same meaning."""
    return {
        name: as_text(value) if name in ("glore", "block") else value
        for name, value in overrides.items()
    }


def _not_understood(text: str) -> UsageError:
    return UsageError(
        f"glore={text!r} is not understood. Give the number of units in stages 3 and 4 ('2-3', "
        "'0-3'), positions ('3:1,3;4:1,3,5', 'c4'), each with settings if need be "
        "('2-3:num_node=16'), or 'none'."
    )


def _known(kind: str) -> Mapping[str, Setting]:
    """Return the settings of a kind of context block, which is checked."""
    known = [*CONTEXT_KINDS, GLORE]
    if kind not in CONTEXT_KINDS:
        raise UsageError(
            f"block: {kind!r} is not one of: {', '.join(closest_first(str(kind), known))}."
        )
    return CONTEXT_KINDS[kind].settings


def _items(text: str) -> list[re.Match[str]]:
    """Return the items of 'gc@c3-c5,nl@4:5/after:mode=gaussian'."""
    parts = _BETWEEN_ITEMS.split(text.strip())
    items = [match for match in map(_ITEM.fullmatch, parts) if match]
    if len(items) < len(parts):
        wrong = next(part for part in parts if not _ITEM.fullmatch(part))
        raise UsageError(
            f"block={text!r} is not understood at {wrong!r}. Give kinds of blocks, each with "
            "positions, placement and settings if need be: 'gc', 'gc,nl', "
            "'gc@c3-c5/inside:ratio=1/4,nl@4:5:mode=dot_product'."
        )
    return items


def _context(spec: Spec, kind: str, places: str, placement: str, settings: str) -> Context:
    values = _settings(f"block: {kind}", settings, _known(kind))
    positions: Any = places or None
    return _checked(spec, Context(kind, values, positions, placement or None))


def _settings(label: str, text: str, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the checked settings of 'ratio=1/4,mode=gaussian'."""
    found: dict[str, Any] = {}
    for part in filter(None, re.split(r"\s*,\s*", text.strip())):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise UsageError(f"{label}: {part!r} is no setting; write NAME=VALUE.")
        if name in found:
            raise UsageError(f"{label} names {name} twice.")
        _check_name(label, name, known)
        found[name] = known[name].of_text(f"{label}: {name}", value)
    return found


def _check_name(label: str, name: str, known: Mapping[str, Setting]) -> None:
    if name not in known:
        takes = f"it takes {', '.join(closest_first(name, known))}" if known else "it takes none"
        raise UsageError(f"{label} has no setting {name!r}; {takes}.")


def _positions(spec: Spec, label: str, value: Mapping[Any, Any]) -> Positions:
    """Check a mapping {stage: residual blocks} and return it as sorted pairs."""
    pairs = []
    for stage, blocks in sorted(value.items(), key=lambda item: str(item[0])):
        if stage not in STAGES or isinstance(stage, bool):
            raise UsageError(f"{label}: stage {stage!r} is not one of 2, 3, 4, 5 (conv2 to conv5).")
        if isinstance(blocks, (str, bytes)) or not hasattr(blocks, "__iter__"):
            raise UsageError(
                f"{label}: stage {stage} needs a sequence of block numbers, such as (1, 3), "
                f"not {blocks!r}."
            )
        blocks = [check_whole(f"{label}: a block number of stage {stage}", b) for b in blocks]
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


def _blocks(label: str, text: str) -> Optional[dict[int, list[int]]]:
    """Return '3:1,3;4:1,3,5' as a mapping, or None when the text has another form."""
    if not _BLOCKS.fullmatch(text):
        return None
    parts = [part.split(":") for part in text.split(";")]
    if len({stage for stage, _ in parts}) != len(parts):
        raise UsageError(f"{label}={text!r} names a stage twice.")
    return {int(stage): [int(block) for block in blocks.split(",")] for stage, blocks in parts}


def _stages(spec: Spec, text: str) -> Optional[Positions]:
    """Return every residual block of 'c4', 'c3-c5' or 'all', or None for another form."""
    stages = re.fullmatch(r"c([2-5])(?:-c([2-5]))?", text)
    if text != "all" and not stages:
        return None
    first, last = (stages[1], stages[2] or stages[1]) if stages else (2, 5)
    if int(first) > int(last):
        raise UsageError(f"block positions {text!r} name no block.")
    return spec.every_block(range(int(first), int(last) + 1))


def _with_units(spec: Spec, places: str, settings: str) -> Spec:
    """Return a row with GloRe units; without places where they are, or sit by default."""
    unit = {**spec.unit, **_settings("glore", settings, UNIT_SETTINGS)}
    glore = _unit_places(spec, places) if places else spec.glore or spec.default_units()
    return dataclasses.replace(spec, glore=glore, unit=unit)


def _unit_places(spec: Spec, text: str) -> Positions:
    every = _stages(spec, text)
    if every is not None:
        return every
    counts = re.fullmatch(r"(\d+)-(\d+)", text)
    if not counts:
        given = _blocks("glore", text)
        if given is None:
            raise _not_understood(text)
        return _positions(spec, "glore", given)
    pairs = []
    for stage, count in zip((3, 4), map(int, counts.groups())):
        if count > spec.blocks[stage - 2]:
            raise UsageError(
                f"glore={text!r}: {spec.name} has {spec.blocks[stage - 2]} blocks in "
                f"stage {stage}, too few for {count} units."
            )
        if count:
            pairs.append((stage, spec.default_positions(stage, count)))
    return tuple(pairs)


def _context_places(spec: Spec, value: Any) -> tuple[Positions, Optional[str]]:
    """Return (positions, placement that they imply or None) of a context block."""
    if isinstance(value, str):
        every = _stages(spec, value)
        if every is not None:
            return every, "inside"
        given = _blocks("block positions", value)
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


def _checked(spec: Spec, context: Context) -> Context:
    """Return a Context with checked settings and explicit positions."""
    known, label = _known(context.kind), f"block: {context.kind}"
    for name in context.settings:
        _check_name(label, name, known)
    settings = {n: known[n].check(f"{label}: {n}", v) for n, v in context.settings.items()}
    if context.positions is None:
        positions, implied = spec.default_context_positions(context.kind), None
    else:
        positions, implied = _context_places(spec, context.positions)
    placement = context.placement or implied
    if placement is not None:
        one_of(PLACEMENTS)("block: placement", placement)
    return Context(context.kind, settings, positions, placement)


def _places_text(value: Union[str, Mapping, Positions]) -> str:
    if isinstance(value, str):
        return value
    pairs = value.items() if isinstance(value, Mapping) else value
    return ";".join(
        f"{stage}:{','.join(str(block) for block in sorted(blocks))}"
        for stage, blocks in sorted(pairs)
        if blocks
    )


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        plain = Fraction(value).limit_denominator(4096)
        return str(plain) if float(plain) == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _context_text(context: Context) -> str:
    places = "" if context.positions is None else f"@{_places_text(context.positions)}"
    placement = f"/{context.placement}" if context.placement else ""
    settings = ",".join(f"{name}={_value_text(v)}" for name, v in context.settings.items())
    return f"{context.kind}{places}{placement}" + (f":{settings}" if settings else "")
