"""Which network a checkpoint holds, found from its parameters' names and shapes.

Depths, widths, groups, context blocks and the positions and sizes of GloRe units are read from
names such as ``conv4_B03_extra_conv-state_conv_weight`` (facebookresearch/GloRe) and
``conv4_x__3_c3x3-b__conv_weight`` (the DPN release, cypw/DPNs). Each figure is what most
parameters say, so that a few damaged ones do not hide what the rest is. What no shape tells
(constants of batch normalisations, dropout, the last pooling) comes from the checkpoint's graph.
"""

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from checkpoint.params import CheckpointError, listing
from mxnet_compat import mx

from .builder import ALL_ROWS, resolve
from .placement import STAGES
from .specs import Context, Spec
from .symbol_context import CONTEXT_KINDS
from .symbol_glore import FLAVOURS

BLOCK = re.compile(r"(?:^|_)conv([2-5])_(x__|B)0*([1-9]\d*)_(.+)$")
# m1, m2, m3 and w1 of a residual block; a, b, c and w of a dual path one.
BRANCH = re.compile(r"(?:conv-([mw]\d)|c\dx\d-([abcw])(?:\(s/\d\))?)_*(bn|conv|weight)?_")
ROLES = {"a": "m1", "b": "m2", "c": "m3", "w": "w1"}
FED_BY = {"m2": "m1", "m3": "m2"}
Shapes = dict[str, tuple[int, ...]]
LEAVES = ("weight", "bias", "gamma", "beta", "moving_mean", "moving_var")


class UnknownNetwork(CheckpointError):
    """Parameters of no network of the table; the message says what they are and what is near."""


@dataclasses.dataclass(frozen=True)
class Identified:
    """A network found in a checkpoint.

    Attributes
    ----------
    name
        Row of the table of networks.
    num_classes
    overrides
        What else ``get_symbol`` needs to build exactly this network.
    found
        What was read from names and shapes, for display.
    """

    name: str
    num_classes: int
    overrides: dict[str, Any]
    found: dict[str, Any]


class _Votes:
    """Collects what parameters say about a figure."""

    def __init__(self) -> None:
        self.counts: defaultdict[Any, Counter] = defaultdict(Counter)

    def add(self, key: Any, value: Any) -> None:
        self.counts[key][value] += 1

    def get(self, key: Any, default: Any = None) -> Any:
        """Return what most say; of equals, what was said first."""
        counter = self.counts.get(key)
        return counter.most_common(1)[0][0] if counter else default


@dataclasses.dataclass
class _Survey:
    """What the names and shapes of one checkpoint say, before it is compared with the rows."""

    blocks: dict[int, int]
    votes: _Votes
    units: dict[int, set[int]]
    context: dict[str, dict[int, set[int]]]
    is_dpn: bool
    legacy_names: bool
    unit_flavour: str
    post_activation: bool
    last_dense: Optional[str]


def leaf(name: str) -> Optional[str]:
    """Return the last part of a parameter's name (``weight``, ``moving_mean``, …) or None."""
    return next((end for end in LEAVES if name.endswith(end)), None)


def _survey_unit(votes: _Votes, stage: int, rest: str, shape: tuple[int, ...]) -> None:
    """Count what a GloRe unit's convolution says about its sizes."""
    if not rest.endswith("weight"):
        return
    if re.match(r"(conv-state|GCN-GHW)_", rest):
        votes.add(("num_state", stage), shape[0])
    elif re.match(r"(conv-proj|GCN-G)_", rest):
        votes.add(("num_node", stage), shape[0])


def _is_post_activation(names: Iterable[str]) -> bool:
    """Return whether nothing says that normalisations come first: no tail, no dual path names."""
    for name in names:
        match = BLOCK.search(name)
        branch = match and BRANCH.match(match[4])
        if (branch and branch[2] is not None) or (not match and re.search(r"(^|_)tail_", name)):
            return False
    return True


def _survey_branch(
    votes: _Votes,
    stage: int,
    block: int,
    role: str,
    name: str,
    shape: tuple[int, ...],
    post_activation: bool,
) -> None:
    """Count what a convolution or batch normalisation of a block says about widths."""
    if not name.endswith("weight") and post_activation:
        votes.add(("out", stage, role), shape[0])
        return
    if not name.endswith("weight"):
        # A batch normalisation stands before its convolution and has that one's input width.
        votes.add(("in", stage, block, role), shape[0])
        if role in FED_BY:
            votes.add(("out", stage, FED_BY[role]), shape[0])
        return
    if len(shape) < 3:
        return
    votes.add("ndim", len(shape) - 2)
    votes.add(("out", stage, role), shape[0])
    votes.add(("per_group", stage, role), shape[1])
    votes.add(("reach", stage, block, role), shape[2])
    if role != "m2":
        votes.add(("in", stage, block, role), shape[1])


def _survey_context(votes: _Votes, rest: str, name: str, shape: tuple[int, ...]) -> Optional[str]:
    """Count what a context block's parameter says; return which kind of block it is, or None."""
    kind = rest.partition("_")[0]
    if not name.endswith("weight") or len(shape) < 2 or math.prod(shape[2:]) != 1:
        return kind if kind in CONTEXT_KINDS else None
    low, high = sorted(shape[:2])
    if low > 1 and low != high:
        # Two layers (dense, or 1x1 convolutions), to fewer channels and back. The builder rounds
        # down: rather a plain share such as 1/16 than the exact quotient.
        plain = 1 / round(high / low)
        ratio = plain if int(high * plain) == low else low / high + 1e-9
        # What has a name of its own is taken for squeeze-and-excitation: the released networks
        # have no other, and theirs have not been seen.
        kind = kind if kind in CONTEXT_KINDS else "se"
        votes.add(("ratio", kind), ratio)
    return kind if kind in CONTEXT_KINDS else None


def _survey(shapes: Shapes) -> _Survey:
    votes = _Votes()
    blocks: dict[int, int] = {}
    units: dict[int, set[int]] = defaultdict(set)
    context: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    is_dpn = legacy = False
    post_activation = _is_post_activation(shapes)
    unit_flavour = "released"
    last_dense = None
    for name, shape in shapes.items():
        match = BLOCK.search(name)
        if match is None:
            if len(shape) == 2:
                last_dense = name
            if re.search(r"(^|_)conv1_", name):
                votes.add("stem", shape[0])
            continue
        stage, block, rest = int(match[1]), int(match[3]), match[4]
        branch = BRANCH.match(rest)
        if rest.startswith("extra"):
            units[stage].add(block)
            for name_of_flavour, flavour in FLAVOURS.items():
                if flavour.last_norm and f"_{flavour.last_norm}_bn_" in rest:
                    unit_flavour = name_of_flavour
            _survey_unit(votes, stage, rest.partition("_")[2], shape)
        elif branch is not None:
            is_dpn = is_dpn or branch[2] is not None
            legacy = legacy or "__bn__bn_" in rest
            role = branch[1] or ROLES[branch[2]]
            _survey_branch(votes, stage, block, role, name, shape, post_activation)
            votes.add(("role", role), True)
        else:
            kind = _survey_context(votes, rest, name, shape)
            if kind is not None:
                context[kind][stage].add(block)
        blocks[stage] = max(blocks.get(stage, 0), block)
    return _Survey(
        blocks, votes, units, context, is_dpn, legacy, unit_flavour, post_activation, last_dense
    )


def _dpn_widths(survey: _Survey, stage: int) -> tuple[Optional[int], Optional[int]]:
    """Return (width, growth) of a dual path stage.

    Block b from the second on reads width + (b + 1) · growth channels; the last convolution makes
    width + growth.
    """
    votes, growths = survey.votes, Counter[int]()
    widths = [
        votes.get(("in", stage, block, "m1")) for block in range(2, survey.blocks.get(stage, 0) + 1)
    ]
    growths.update(b - a for a, b in zip(widths, widths[1:]) if a and b and b > a)
    last, adapter = votes.get(("out", stage, "m3")), votes.get(("out", stage, "w1"))
    if last and adapter and adapter > last:
        growths[adapter - last] += 1
    if not growths or last is None:
        return None, None
    growth = growths.most_common(1)[0][0]
    return last - growth, growth


def _describe(survey: _Survey) -> dict[str, Any]:
    """Return the figures of a survey that rows have too, by the names of Spec's fields."""
    votes = survey.votes
    found: dict[str, Any] = {
        "family": "dpn" if survey.is_dpn else "resnet",
        "ndim": votes.get("ndim"),
        "stem": votes.get("stem"),
        "blocks": tuple(survey.blocks.get(stage, 0) for stage in STAGES),
        "bottleneck": votes.get(("role", "m3"), False),
        "post_activation": survey.post_activation,
    }
    last = "m3" if found["bottleneck"] else "m2"
    mid = tuple(
        votes.get(("out", stage, "m2" if found["bottleneck"] else "m1")) for stage in STAGES
    )
    found["num_mid"] = mid
    if survey.is_dpn:
        widths = [_dpn_widths(survey, stage) for stage in STAGES]
        found["num_out"] = tuple(width for width, _ in widths)
        found["growth"] = tuple(growth for _, growth in widths)
    else:
        found["num_out"] = tuple(votes.get(("out", stage, last)) for stage in STAGES)
        found["growth"] = ()
    groups = Counter(
        width // per_group
        for width, per_group in (
            (width, votes.get(("per_group", stage, "m2"))) for stage, width in zip(STAGES, mid)
        )
        if width and per_group
    )
    found["groups"] = groups.most_common(1)[0][0] if groups else None
    if found["ndim"] == 3:
        found["temporal"] = tuple(
            tuple(
                votes.get(("reach", stage, block, "m1"))
                for block in range(1, survey.blocks.get(stage, 0) + 1)
            )
            for stage in STAGES
        )
    return found


def _row_figure(row: Spec, field: str) -> Any:
    return row.stem.width if field == "stem" else getattr(row, field)


def _differences(row: Spec, found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {field: (found, the row's)} of what a row's bare network has otherwise."""
    return {
        field: (value, _row_figure(row, field))
        for field, value in found.items()
        if value != _row_figure(row, field)
    }


def _figure(field: str, value: Any) -> str:
    return f"{field} {value}"


def _context_of(survey: _Survey, kind: str, symbol: Optional[mx.sym.Symbol]) -> Context:
    """Return the context blocks of one kind; what no shape tells is read from the graph."""
    positions = tuple(
        (stage, tuple(sorted(at))) for stage, at in sorted(survey.context[kind].items())
    )
    ratio = survey.votes.get(("ratio", kind))
    has_ratio = ratio is not None and "ratio" in CONTEXT_KINDS[kind].settings
    context = Context(kind, {"ratio": ratio} if has_ratio else {}, positions)
    if symbol is None:
        return context
    nodes = json.loads(symbol.tojson())["nodes"]
    own = [node for node in nodes if re.search(rf"_(B|x__)\d+_{kind}_", node["name"])]
    sources = {nodes[entry[0]]["name"] for node in own for entry in node["inputs"]}
    behind = any(re.search(r"_(B|x__)\d+_sum$", name) for name in sources)
    context = context._replace(placement="after" if behind else "inside")
    names = "\n".join(f"{node['op']} {node['name']}" for node in own) + "\n"
    settings = {**context.settings, **CONTEXT_KINDS[kind].settings_of_graph(names)}
    return context._replace(settings=settings)


def _canonical(contexts: Iterable[Context], row: Spec) -> list[tuple]:
    """Return context blocks in a form in which equal ones are equal."""
    return sorted(
        (
            context.kind,
            context.positions or row.every_block(STAGES),
            context.inside,
            [
                (name, round(value, 6) if isinstance(value, float) else value)
                for name, value in sorted(context.all_settings().items())
            ],
        )
        for context in contexts
    )


def _structure(survey: _Survey, row: Spec, symbol: Optional[mx.sym.Symbol]) -> dict[str, Any]:
    """Return the overrides (and so the units, blocks and names) that ``row`` needs."""
    overrides: dict[str, Any] = {}
    glore = tuple((stage, tuple(sorted(at))) for stage, at in sorted(survey.units.items()))
    contexts = tuple(_context_of(survey, kind, symbol) for kind in sorted(survey.context))
    if _canonical(contexts, row) != _canonical(row.context, row):
        overrides["block"] = contexts or None
    if glore != row.glore:
        overrides["glore"] = dict(glore) or None
    if glore and survey.unit_flavour != row.unit_settings()["flavour"]:
        overrides["glore_flavour"] = survey.unit_flavour
    if survey.is_dpn and survey.legacy_names:
        overrides["legacy_names"] = True
    return overrides


def _unit_sizes(survey: _Survey, row: Spec) -> dict[str, int]:
    """Return the overrides num_state and num_node of the units, when they are not the defaults."""
    overrides = {}
    default_sizes = FLAVOURS[survey.unit_flavour].sizes
    for index, key in enumerate(("num_state", "num_node")):
        sizes = {stage: survey.votes.get((key, stage)) for stage in sorted(survey.units)}
        default = {stage: default_sizes(row.num_out[stage - 2])[index] for stage in sizes}
        if sizes == default:
            continue
        if len(set(sizes.values())) != 1 or None in sizes.values():
            raise UnknownNetwork(
                f"its GloRe units have {key} {sizes} by stage: neither the sizes that follow "
                f"from the stages' widths ({default}) nor one size for all, which is what the "
                "networks here can have"
            )
        overrides[key] = next(iter(sizes.values()))
    return overrides


def _number(text: Optional[str], default: float) -> float:
    """Return a number as graphs spell it, such as ``1e-05``, or the operator's default."""
    return default if text is None else float(text)


def _constants(symbol: mx.sym.Symbol, spec: Spec) -> dict[str, Any]:
    """Return the overrides that bring a row to the constants of a checkpoint's graph."""
    votes, overrides = _Votes(), dict[str, Any]()
    normalize, dropout = False, 0.0
    pooling: Optional[dict[str, str]] = None
    for node in json.loads(symbol.tojson())["nodes"]:
        attrs = node.get("attrs", {})
        if node["op"] == "BatchNorm":
            # The defaults of MXNet's operator.
            votes.add("eps", _number(attrs.get("eps"), 1e-3))
            votes.add("momentum", _number(attrs.get("momentum"), 0.9))
        elif node["op"] == "Pooling" and attrs.get("pool_type") == "avg":
            # SE blocks pool too; the network's own pooling is the last.
            pooling = attrs
        elif node["op"] == "Dropout":
            dropout = _number(attrs.get("p"), 0.5)
        elif node["op"] == "_contrib_div_sqrt_dim" and "_extra_" in node["name"]:
            normalize = True
    if votes.get("eps", spec.bn.eps) != spec.bn.eps:
        overrides["bn_eps"] = votes.get("eps")
    if votes.get("momentum", spec.bn.momentum) != spec.bn.momentum:
        overrides["bn_momentum"] = votes.get("momentum")
    if dropout != spec.dropout:
        overrides["dropout"] = dropout
    if normalize != spec.unit_settings()["normalize"] and spec.glore:
        overrides["normalize"] = normalize
    if pooling is not None and pooling.get("global_pool") not in ("True", "1", "true"):
        kernel = tuple(int(size) for size in re.findall(r"\d+", pooling.get("kernel", "")))
        default_map = spec.final_map(spec.data_shape[1:])
        if kernel == default_map:
            overrides["fixed_pool"] = True
        elif len(kernel) == spec.ndim:
            # A global pooling is the same at the input size that ends in such a map.
            size = [k * step for k, step in zip(kernel, spec.total_stride())]
            overrides["crop_size"] = tuple(size[-2:])
            if spec.ndim == 3:
                overrides["clip_length"] = size[0]
    return overrides


def identify_network(
    shapes: Mapping[str, tuple[int, ...]],
    symbol: Optional[mx.sym.Symbol] = None,
    where: str = "the checkpoint",
) -> Identified:
    """Find the row of the table, and the overrides, that build a checkpoint's network.

    Parameters
    ----------
    shapes
        Name of every parameter, auxiliary states among them, to its shape.
    symbol
        The checkpoint's own graph, for what shapes do not tell.
    where
        What messages call the checkpoint.

    Returns
    -------
    Identified
        ``get_symbol(name, num_classes, **overrides)`` then has exactly these parameters, but for
        single ones that contradict the rest.

    Raises
    ------
    UnknownNetwork
        If it is none of the table's networks: what it is, and which row is nearest.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items() if shape}
    survey = _survey(shapes)
    if not survey.blocks:
        raise UnknownNetwork(
            f"{where} holds no network of this project: none of its {len(shapes)} parameters is "
            "called like one in a block (conv2_B01_…, conv2_x__1_…); it begins with "
            f"{listing(list(shapes)[:4])}"
        )
    found = _describe(survey)
    bare = [row for row in ALL_ROWS if not row.glore and not row.context]
    nearest = min(bare, key=lambda row: len(_differences(row, found)))
    different = _differences(nearest, found)
    if not nearest.bottleneck:
        # The table's widths of basic blocks are those of the stage.
        different.pop("num_mid", None)
    if different:
        raise UnknownNetwork(
            f"{where} holds no network of the table. Found: "
            f"{', '.join(_figure(field, value) for field, value in found.items())}. Nearest is "
            f"{nearest.name}, which has "
            f"{', '.join(_figure(field, theirs) for field, (_, theirs) in different.items())}"
        )
    # The row with the fewest overrides: a published one if the units sit where it has them.
    rows = [row for row in ALL_ROWS if not _differences(row, found).keys() - {"num_mid"}]
    name, overrides = min(
        ((row.name, _structure(survey, row, symbol)) for row in rows), key=lambda pair: len(pair[1])
    )
    try:
        overrides.update(_unit_sizes(survey, nearest))
    except UnknownNetwork as error:
        raise UnknownNetwork(f"{where}: {error}") from error
    if symbol is not None:
        overrides.update(_constants(symbol, resolve(name, **overrides)))
    found["GloRe units"] = {stage: tuple(sorted(at)) for stage, at in survey.units.items()}
    for kind, at in sorted(survey.context.items()):
        found[f"{kind} blocks"] = sum(map(len, at.values()))
    return Identified(name, _num_classes(shapes, survey, symbol), overrides, found)


def _num_classes(shapes: Shapes, survey: _Survey, symbol: Optional[mx.sym.Symbol]) -> int:
    """Return the width of the last dense layer, as most of weight, bias and graph say."""
    votes = _Votes()
    if survey.last_dense is not None:
        votes.add("classes", shapes[survey.last_dense][0])
        bias = shapes.get(re.sub("weight$", "bias", survey.last_dense))
        if bias:
            votes.add("classes", bias[0])
    if symbol is not None:
        dense = [n for n in json.loads(symbol.tojson())["nodes"] if n["op"] == "FullyConnected"]
        if dense:
            votes.add("classes", int(dense[-1]["attrs"]["num_hidden"]))
    if votes.get("classes") is None:
        raise UnknownNetwork("there is no classifier (a layer with a 2-D weight) at its end")
    return votes.get("classes")
