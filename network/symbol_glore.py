"""The global reasoning unit (Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019,
arXiv 1811.12814, section 3; facebookresearch/GloRe), in 1D, 2D and 3D.

Positions are projected onto a few nodes of a fully connected graph, a graph convolution lets the
nodes exchange information, and the result is projected back and added to the input. There are two
published forms of it, which differ in their layers and so in their parameters, and a third that
is known to train badly:

``released``
    The MXNet graphs for ImageNet: each of the five convolutions is BN → relu → convolution
    without bias, nothing follows the last one.
``video``
    The PyTorch networks for Kinetics: plain convolutions (the first three with bias), a relu
    inside the graph convolution only, and a batch normalisation, the "blocker", at the end, whose
    gamma starts at 0, so that a fresh unit is the identity.
``report``
    The video form as a public reproduction on CUB-200-2011 changed it, which reported that training
    failed with it (``docs/res4-stability.md``): the graph convolution mixes states first and
    relates nodes then, with neither shortcut nor relu, there are as many states as input channels,
    and the last batch normalisation starts like any other, with gamma 1.
"""

from glore_common import UsageError
from mxnet_compat import mx

from .symbol_basic import AC, BN, RELEASED_BN, BN_AC_Conv, Conv

FLAVOURS = ("released", "video", "report")


def _check(num_in, num_mid, name, ndim, flavour, num_state, num_node, stride):
    if flavour not in FLAVOURS:
        raise UsageError(f"{name}: flavour {flavour!r} is not one of {', '.join(FLAVOURS)}.")
    if ndim not in (1, 2, 3):
        raise UsageError(f"{name}: ndim {ndim!r} is not 1, 2 or 3.")
    widths = {"num_mid": num_mid, "num_state": num_state, "num_node": num_node}
    for index, width in enumerate(num_in if isinstance(num_in, (tuple, list)) else [num_in]):
        widths[f"num_in[{index}]"] = width
    for label, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UsageError(f"{name}: {label} must be a positive integer, not {width!r}.")
    if stride is not None:
        whole = all(isinstance(step, int) and step >= 1 for step in stride)
        if len(stride) != ndim or not whole:
            raise UsageError(
                f"{name}: stride {stride!r} must hold {ndim} positive integers, one per axis."
            )


def GloRe_Unit(
    data,
    num_in,
    num_mid,
    name,
    ndim=2,
    flavour="released",
    normalize=False,
    num_state=None,
    num_node=None,
    stride=None,
    bn=RELEASED_BN,
):
    """Global reasoning unit.

    Parameters
    ----------
    data : Symbol, or pair of Symbol
        (n, num_in, *spatial). A dual-path network passes its residual and dense maps: the unit
        reads both and adds an output to each.
    num_in : int, or pair of int
        Channels of ``data``.
    num_mid : int
        Default sizes follow from it: 2 · num_mid states (but for ``report``) and num_mid nodes.
    name : str
        Prefix of all nodes and parameters.
    ndim : {1, 2, 3}
        Spatial rank.
    flavour : {'released', 'video', 'report'}
        Which form to build; see the head of this file.
    normalize : bool
        Divide the node states by the number of positions they are summed over, so that they do
        not depend on the size of the map.
    num_state, num_node : int, optional
        Channels of a node's state, and number of nodes.
    stride : tuple of int, optional
        Sum over average-pooled positions only (one factor per axis; a remainder at the border
        that fills no window is left out). States are computed from the pooled input. The
        projection is computed once, at full resolution: pooled, it gathers the states; as it is,
        it spreads the result, so that the output has the size of the input. (Upstream's stride
        spreads with the pooled map, which then does not fit the input. In the video flavour
        pooling the projection equals projecting the pooled input.)
    bn : BNConf
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
    report = flavour == "report"
    if num_state is None:
        num_state = 2 * num_mid
        if report:
            num_state = sum(num_in) if isinstance(num_in, (tuple, list)) else num_in
    num_node = num_mid if num_node is None else num_node
    _check(num_in, num_mid, name, ndim, flavour, num_state, num_node, stride)
    dual = isinstance(data, (tuple, list))
    ones = (1,) * ndim
    released = flavour == "released"

    def convolve(value, num_filter, kernel, tag, bias=False):
        if released:
            return BN_AC_Conv(value, num_filter, kernel, f"{name}_{tag}", bn=bn)
        return Conv(value, num_filter, kernel, f"{name}_{tag}", no_bias=not bias)

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
        pool(whole, "pooling") if strided else whole, num_state, ones, "conv-state", bias=True
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
    if report:
        reasoned = relate(mix(nodes))
    else:
        relation = mx.sym.add_n(nodes, relate(nodes), name=f"{name}_GCN-G_sum")
        reasoned = mix(relation if released else AC(relation, f"{name}_GCN-GHW"))

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

    # Parameters called blocker start at 0 (network/initializer.py).
    norm = "last" if report else "blocker"

    def tail(value, width, conv, norm, total):
        # (n, S, *spatial) -> (n, width, *spatial)
        extended = convolve(out, width, ones, conv)
        if not released:
            extended = BN(extended, f"{name}_{norm}", bn)
        return mx.sym.add_n(value, extended, name=f"{name}_{total}")

    if not dual:
        return tail(data, num_in, "fc-2", norm, "sum")
    return [
        tail(
            value,
            width,
            f"conv-tail-{path}" if released else f"{path}_fc-2",
            f"{path}_{norm}",
            f"sum-{path}",
        )
        for value, width, path in zip(data, num_in, ("res", "den"))
    ]
