"""The global reasoning unit (Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019,
arXiv 1811.12814, section 3; facebookresearch/GloRe), in 1D, 2D and 3D.

Positions are projected onto a few nodes of a fully connected graph, a graph convolution lets the
nodes exchange information, and the result is projected back and added to the input. There are two
published forms of it, which differ in their layers and so in their parameters:

``released``
    The MXNet graphs for ImageNet: each of the five convolutions is BN → relu → convolution
    without bias, nothing follows the last one.
``video``
    The PyTorch networks for Kinetics: plain convolutions (the first three with bias), a relu
    inside the graph convolution only, and a batch normalisation, the "blocker", at the end, whose
    gamma starts at 0, so that a fresh unit is the identity.

A third, which is known to train badly, is in :mod:`network.symbol_study`.
"""

from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional, Union

from glore_common import UsageError
from glore_options import boolean
from mxnet_compat import mx

from .settings import Setting, check_flag, check_whole, one_of
from .symbol_basic import AC, BN, RELEASED_BN, BN_AC_Conv, BNConf, Conv

# One map, or the residual and the dense map of a dual path network.
Maps = Union[mx.sym.Symbol, Sequence[mx.sym.Symbol]]
Widths = Union[int, Sequence[int]]
Step = Callable[[mx.sym.Symbol], mx.sym.Symbol]


def default_sizes(num_in: Widths) -> tuple[int, int]:
    """Return (states, nodes) of a unit that says neither: a half and a quarter of the width.

    Of a dual path network's maps the residual one's width counts.
    """
    num_mid = (num_in if isinstance(num_in, int) else num_in[0]) // 4
    return 2 * num_mid, num_mid


class Flavour(NamedTuple):
    """A form of the unit.

    Attributes
    ----------
    reason
        ``reason(nodes, relate, mix, name)``: the graph convolution, (n, S, N) to the same. What
        relates the nodes and what mixes the states are functions of such an array.
    last_norm
        Name of the batch normalisation at the end, where there is one. One called blocker starts
        at 0 (network/initializer.py).
    pre_activation
        Whether each convolution is BN → relu → convolution without bias.
    sizes
        Default (states, nodes) from the width of the input.
    """

    reason: Callable[[mx.sym.Symbol, Step, Step, str], mx.sym.Symbol]
    last_norm: Optional[str] = None
    pre_activation: bool = False
    sizes: Callable[[Widths], tuple[int, int]] = default_sizes


def _reason(nodes: mx.sym.Symbol, relate: Step, mix: Step, name: str) -> mx.sym.Symbol:
    return mix(mx.sym.add_n(nodes, relate(nodes), name=f"{name}_GCN-G_sum"))


def _reason_relu(nodes: mx.sym.Symbol, relate: Step, mix: Step, name: str) -> mx.sym.Symbol:
    relation = mx.sym.add_n(nodes, relate(nodes), name=f"{name}_GCN-G_sum")
    return mix(AC(relation, name=f"{name}_GCN-GHW"))


FLAVOURS = {
    "released": Flavour(_reason, pre_activation=True),
    "video": Flavour(_reason_relu, "blocker"),
}
# What a unit in a network can be given beside its place: by text (``glore@4:5:num_node=16``) and
# as overrides of ``get_symbol``. A keyword of GloRe_Unit that is named here can be set everywhere.
UNIT_SETTINGS = {
    "num_node": Setting(None, check_whole, int),
    "num_state": Setting(None, check_whole, int),
    "normalize": Setting(False, check_flag, boolean),
    "flavour": Setting("released", one_of(FLAVOURS)),
}


def _check_sizes(name: str, sizes: dict[str, Any]) -> None:
    for label, width in sizes.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UsageError(f"{name}: {label} must be a positive integer, not {width!r}.")


def _check_stride(name: str, stride: Sequence[int], ndim: int) -> None:
    right = all(isinstance(step, int) and step >= 1 for step in stride)
    if len(stride) != ndim or not right:
        raise UsageError(
            f"{name}: stride {stride!r} must hold {ndim} positive integers, one per axis."
        )


def GloRe_Unit(
    data: Maps,
    *,
    num_in: Widths,
    name: str,
    ndim: int = 2,
    flavour: str = "released",
    normalize: bool = False,
    num_state: Optional[int] = None,
    num_node: Optional[int] = None,
    stride: Optional[tuple[int, ...]] = None,
    bn: BNConf = RELEASED_BN,
) -> Maps:
    """Global reasoning unit.

    Parameters
    ----------
    data
        (n, num_in, *spatial). A dual-path network passes its residual and dense maps: the unit
        reads both and adds an output to each.
    num_in
        Channels of ``data``.
    name
        Prefix of all nodes and parameters.
    ndim : {1, 2, 3}
        Spatial rank.
    flavour : {'released', 'video', 'report'}
        Which form to build; see the head of this file.
    normalize
        Divide the node states by the number of positions they are summed over, so that they do
        not depend on the size of the map.
    num_state, num_node
        Channels of a node's state, and number of nodes; by default a half and a quarter of the
        input's channels, rounded down (:func:`default_sizes`; ``report`` has as many states as
        channels).
    stride
        Sum over average-pooled positions only (one factor per axis; a remainder at the border
        that fills no window is left out). States are computed from the pooled input. The
        projection is computed once, at full resolution: pooled, it gathers the states; as it is,
        it spreads the result, so that the output has the size of the input. (Upstream's stride
        spreads with the pooled map, which then does not fit the input. In the video flavour
        pooling the projection equals projecting the pooled input.)
    bn
        Constants of the batch normalisations.

    Returns
    -------
    Symbol, or list of two Symbol
        As ``data``, with the same shapes.

    Raises
    ------
    UsageError
        For an unknown flavour or rank, or a size that is no positive integer.

    Notes
    -----
    With S states, N nodes and L positions: V = X Bᵀ, an (S, N) matrix per sample; G = relation of
    nodes (N x N) with a shortcut, then H = mixing of states (S x S); output = H(G(V)) B.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"{name}: flavour {flavour!r} is not one of {', '.join(FLAVOURS)}.")
    if ndim not in (1, 2, 3):
        raise UsageError(f"{name}: ndim {ndim!r} is not 1, 2 or 3.")
    if stride is not None:
        _check_stride(name, stride, ndim)
    dual = not isinstance(data, mx.sym.Symbol)
    widths = num_in if isinstance(num_in, (tuple, list)) else [num_in]
    _check_sizes(name, {f"num_in[{index}]": width for index, width in enumerate(widths)})
    form = FLAVOURS[flavour]
    default_state, default_node = form.sizes(num_in)
    num_state = default_state if num_state is None else num_state
    num_node = default_node if num_node is None else num_node
    _check_sizes(name, {"num_state": num_state, "num_node": num_node})
    ones = (1,) * ndim

    def convolve(value, num_filter, kernel, tag, bias=False):
        conv = {"num_filter": num_filter, "kernel": kernel, "name": f"{name}_{tag}"}
        if form.pre_activation:
            return BN_AC_Conv(value, bn=bn, **conv)
        return Conv(value, no_bias=not bias, **conv)

    def pool(value, tag):
        return mx.sym.Pooling(
            data=value, pool_type="avg", kernel=stride, stride=stride, name=f"{name}_{tag}"
        )

    def flatten(value, tag):
        # (n, c, *spatial) -> (n, c, L)
        return mx.sym.Reshape(data=value, shape=(0, 0, -1), name=f"{name}_{tag}-reshape")

    def scale(value, tag):
        # Both factors of the projection are divided by the square root of L: their product is
        # divided by L without leaving the range of float16 on the way.
        if not normalize:
            return value
        return mx.sym.contrib.div_sqrt_dim(value, name=f"{name}_{tag}-scale")

    whole = mx.sym.Concat(*data, dim=1, name=f"{name}_cat-input") if dual else data
    strided = stride is not None and tuple(stride) != ones
    state = convolve(
        pool(whole, "pooling") if strided else whole,
        num_state,
        ones,
        "conv-state",
        bias=True,
    )
    state_flat = flatten(state, "conv-state")
    spread_map = convolve(whole, num_node, ones, "conv-proj", bias=True)
    spread = flatten(spread_map, "conv-proj")
    gather = flatten(pool(spread_map, "conv-proj-pooling"), "gather") if strided else spread

    # Projection. (n, S, L) x (n, N, L)^T -> (n, S, N)
    nodes = mx.sym.batch_dot(
        lhs=scale(state_flat, "conv-state"),
        rhs=scale(gather, "conv-proj"),
        transpose_b=True,
        name=f"{name}_proj",
    )

    def relate(value):
        # Relation of the nodes: (n, S, N) -> (n, N, S) -> conv -> (n, N, S) -> (n, S, N)
        value = mx.sym.transpose(value, axes=(0, 2, 1), name=f"{name}_GCN-G-permute1")
        value = convolve(value, num_node, 1, "GCN-G", bias=True)
        return mx.sym.transpose(value, axes=(0, 2, 1), name=f"{name}_GCN-G-permute2")

    def mix(value):
        # Mixing of the states: (n, S, N) -> (n, S, N)
        return convolve(value, num_state, 1, "GCN-GHW")

    # Reasoning: (n, S, N) -> (n, S, N)
    reasoned = form.reason(nodes, relate, mix, name)

    # Reverse projection. (n, S, N) x (n, N, L) -> (n, S, L) -> (n, S, *spatial)
    out = mx.sym.batch_dot(lhs=reasoned, rhs=spread, name=f"{name}_reverse-proj")
    if strided:
        out = mx.sym.reshape_like(
            out,
            spread_map,
            lhs_begin=2,
            lhs_end=3,
            rhs_begin=2,
            rhs_end=2 + ndim,
            name=f"{name}_reverse-proj-reshape",
        )
    else:
        out = mx.sym.reshape_like(out, state, name=f"{name}_reverse-proj-reshape")

    def tail(value, width, conv, norm, total):
        # (n, S, *spatial) -> (n, width, *spatial)
        extended = convolve(out, width, ones, conv)
        if form.last_norm:
            extended = BN(extended, name=f"{name}_{norm}", bn=bn)
        return mx.sym.add_n(value, extended, name=f"{name}_{total}")

    if not dual:
        return tail(data, num_in, "fc-2", form.last_norm, "sum")
    return [
        tail(
            value,
            width,
            f"conv-tail-{path}" if form.pre_activation else f"{path}_fc-2",
            f"{path}_{form.last_norm}",
            f"sum-{path}",
        )
        for value, width, path in zip(data, widths, ("res", "den"))
    ]
