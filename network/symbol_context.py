"""Context blocks in 1D, 2D and 3D: global context, Non-local, squeeze-and-excitation.

The view is that of GCNet (Cao et al., 2019, arXiv 1904.11492, sections 3 and 4; project
xvjiarui/GCNet): a block gathers a context from all positions, transforms it, and fuses it with
every position.

=========================  ============================  ===========================  ==========
block                      context                       transform                    fusion
=========================  ============================  ===========================  ==========
:func:`GC_Block`           one attention map             1x1, LayerNorm, relu, 1x1    sum
:func:`SNL_Block`          one attention map             1x1                          sum
:func:`SE_Block`           average                       1x1, relu, 1x1               product
:func:`NL_Block`           an attention map a position   1x1                          sum
=========================  ============================  ===========================  ==========

The first three are settings of :func:`context_block`. The simplified Non-local block (SNL) is
GCNet's; squeeze-and-excitation is Hu et al., CVPR 2018, arXiv 1709.01507; the Non-local block is
Wang et al., CVPR 2018, arXiv 1711.07971, section 3.

How parameters start is said by name in :mod:`network.initializer`: the last layer of a transform
at zero, so that the blocks that add are the identity at first. (A product with the sigmoid of
zero halves its input, as GCNet's does. SE's dense layers are drawn like any other's.)

A new block is a function here and a row of :data:`CONTEXT_KINDS`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Union

from glore_common import UsageError
from glore_options import boolean
from mxnet_compat import mx

from .settings import Setting, check_flag, check_ratio, one_of
from .symbol_basic import AC, Conv

if TYPE_CHECKING:
    from .specs import Context

POOLINGS = ("att", "avg")
FUSIONS = ("mul", "add")
TRANSFORMS = ("bottleneck", "1x1")
MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
# What the node of every position's scores of all positions is called: it is what needs memory.
AFFINITY = "_affinity"


def _one_of(name: str, label: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UsageError(f"{name}: {label} {value!r} is not one of: {', '.join(known)}.")


def _check(name: str, num_in: int, ndim: int) -> None:
    if ndim not in (1, 2, 3):
        raise UsageError(f"{name}: ndim {ndim!r} is not 1, 2 or 3.")
    if not isinstance(num_in, int) or isinstance(num_in, bool) or num_in < 1:
        raise UsageError(f"{name}: num_in must be a positive integer, not {num_in!r}.")


def _hidden(name: str, num_in: int, ratio: float) -> int:
    """Return the width of a hidden layer: ``ratio`` of ``num_in`` channels, rounded down."""
    if not ratio > 0:
        raise UsageError(f"{name}: ratio must be above 0, not {ratio!r}.")
    # The small term keeps 96 channels at a ratio of 1/3 from becoming 31.
    num_mid = int(num_in * ratio + 1e-6)
    if num_mid < 1:
        raise UsageError(
            f"{name}: a ratio of {ratio:g} leaves no hidden unit for {num_in} channels."
        )
    return num_mid


def _flatten(data: mx.sym.Symbol, name: str) -> mx.sym.Symbol:
    # (n, c, *spatial) -> (n, c, L)
    return mx.sym.Reshape(data=data, shape=(0, 0, -1), name=name)


def _gather(data: mx.sym.Symbol, name: str, pooling: str, ndim: int) -> mx.sym.Symbol:
    """Context of a map: (n, c, *spatial) -> (n, c, 1, …)."""
    if pooling == "avg":
        return mx.sym.Pooling(
            data=data, pool_type="avg", kernel=(1,) * ndim, global_pool=True, name=f"{name}_pool"
        )
    mask = Conv(data, num_filter=1, kernel=(1,) * ndim, name=f"{name}_mask", no_bias=False)
    mask = _flatten(mask, f"{name}_mask-flat")
    mask = mx.sym.softmax(data=mask, axis=-1, name=f"{name}_mask")
    # (n, c, L) x (n, 1, L)^T -> (n, c, 1) -> (n, c, 1, …)
    out = mx.sym.batch_dot(
        lhs=_flatten(data, f"{name}_data-flat"), rhs=mask, transpose_b=True, name=f"{name}_gather"
    )
    return mx.sym.Reshape(data=out, shape=(0, 0) + (1,) * ndim, name=f"{name}_context")


def context_block(
    data: mx.sym.Symbol,
    *,
    num_in: int,
    name: str,
    ndim: int = 2,
    ratio: float = 1 / 16,
    pooling: str = "att",
    fusion: Union[str, Sequence[str]] = ("add",),
    transform: str = "bottleneck",
    layer_norm: bool = True,
    dense: bool = False,
) -> mx.sym.Symbol:
    """Gather one context for the whole map, transform it, and fuse it with every position.

    Parameters
    ----------
    data
        (n, num_in, *spatial).
    num_in
        Channels of ``data``.
    name
        Prefix of nodes and parameters: ``{name}_mask_conv_*``; then for each fusion (``add`` here,
        the same with ``mul``) ``{name}_add-1_conv_*``, ``{name}_add-ln_gamma`` and ``_beta``,
        ``{name}_add-2_conv_*``; with the transform '1x1' ``{name}_add_conv_*`` alone. All
        convolutions have a bias.
    ratio
        Width of the bottleneck as a share of ``num_in``.
    pooling : {'att', 'avg'}
        Weights that a 1x1 convolution and a softmax over all positions give, or the average.
    fusion
        'add': data + t. 'mul': data · sigmoid(t). Both: the product first, then the sum; each has
        its own transform of the one context.
    transform : {'bottleneck', '1x1'}
        Two layers with a relu between, or one layer without a change of width.
    layer_norm
        Normalise the bottleneck's channels before the relu (eps 1e-5).
    ndim : {1, 2, 3}
        Spatial rank.
    dense
        Fully connected layers named ``{name}_fc1``, ``{name}_fc2`` in place of the 1x1
        convolutions, as in the released SE networks: the same function of weights without the
        trailing axes of length 1. For one fusion with a bottleneck.

    Returns
    -------
    Symbol
        (n, num_in, *spatial).

    Raises
    ------
    UsageError
        For an unknown setting, or a bottleneck without a channel.
    """
    fusion = (fusion,) if isinstance(fusion, str) else tuple(fusion)
    _check(name, num_in, ndim)
    _one_of(name, "pooling", pooling, POOLINGS)
    _one_of(name, "transform", transform, TRANSFORMS)
    for kind in fusion:
        _one_of(name, "fusion", kind, FUSIONS)
    if not fusion or len(set(fusion)) != len(fusion):
        raise UsageError(f"{name}: fusion {fusion!r} must name 'add', 'mul' or each once.")
    if dense and (len(fusion) > 1 or transform != "bottleneck"):
        raise UsageError(f"{name}: dense layers are for one fusion with a bottleneck.")
    num_mid = _hidden(name, num_in, ratio) if transform == "bottleneck" else None
    ones = (1,) * ndim

    def layer(value, width, branch, tag):
        if dense:
            return mx.sym.FullyConnected(data=value, num_hidden=width, name=f"{name}_fc{tag[1:]}")
        return Conv(value, num_filter=width, kernel=ones, name=branch + tag, no_bias=False)

    def transformed(context, branch):
        # (n, num_in, 1, …) -> (n, num_mid, 1, …) -> (n, num_in, 1, …); dense without the ones
        if transform == "1x1":
            return layer(context, num_in, branch, "")
        out = layer(context, num_mid, branch, "-1")
        if layer_norm:
            # Over axis 1, without a Reshape: on a CPU MXNet 1.9.1 cannot reshape a 3D convolution's
            # output (n, num_mid, 1, 1, 1) when num_mid is a multiple of 8 ("could not create a
            # primitive descriptor for a reorder primitive", measured).
            out = mx.sym.LayerNorm(data=out, axis=1, eps=1e-5, name=f"{branch}-ln")
        return layer(AC(out, name=branch), num_in, branch, "-2")

    def fused(value, context, kind):
        branch = name if dense else f"{name}_{kind}"
        out = transformed(context, branch)
        if kind == "mul":
            out = AC(out, name=branch, act_type="sigmoid")
        if dense:
            out = mx.sym.Reshape(data=out, shape=(0, 0) + ones, name=f"{name}_expand")
        fuse = mx.sym.broadcast_mul if kind == "mul" else mx.sym.broadcast_add
        return fuse(value, out, name=f"{name}_{kind}")

    context = _gather(data, name, pooling, ndim)
    out = data
    for kind in FUSIONS:
        if kind in fusion:
            out = fused(out, context, kind)
    return out


def GC_Block(
    data: mx.sym.Symbol,
    *,
    num_in: int,
    name: str,
    ndim: int = 2,
    ratio: float = 1 / 16,
    pooling: str = "att",
    fusion: Union[str, Sequence[str]] = ("add",),
) -> mx.sym.Symbol:
    """Global context block: attention, bottleneck with LayerNorm, sum; see :func:`context_block`.

    ``pooling`` and ``fusion`` are those of GCNet's ablations.
    """
    return context_block(
        data, num_in=num_in, name=name, ndim=ndim, ratio=ratio, pooling=pooling, fusion=fusion
    )


def SNL_Block(data: mx.sym.Symbol, *, num_in: int, name: str, ndim: int = 2) -> mx.sym.Symbol:
    """Simplified Non-local block: attention, one 1x1 layer, sum; see :func:`context_block`."""
    return context_block(data, num_in=num_in, name=name, ndim=ndim, transform="1x1")


def SE_Block(
    data: mx.sym.Symbol,
    *,
    num_in: int,
    name: str,
    ndim: int = 2,
    ratio: float = 1 / 16,
    dense: bool = True,
) -> mx.sym.Symbol:
    """Squeeze-and-excitation: scale every channel by a factor computed from all averages.

    See :func:`context_block`, of which this is the setting average, bottleneck without LayerNorm,
    product. By default layers and names are those of GloRe's author, as he released them with
    OctConv (facebookresearch/OctConv): ``{name}_fc1_weight`` (num_in · ratio, num_in), ``_bias``,
    ``{name}_fc2_weight``, ``_bias``. The SE networks released with GloRe have not been seen; that
    they use the same names is an assumption. ``dense=False`` has the 1x1 convolutions
    ``{name}_mul-1_conv``, ``{name}_mul-2_conv`` of the other blocks.
    """
    return context_block(
        data,
        num_in=num_in,
        name=name,
        ndim=ndim,
        ratio=ratio,
        pooling="avg",
        fusion=("mul",),
        layer_norm=False,
        dense=dense,
    )


def NL_Block(
    data: mx.sym.Symbol,
    *,
    num_in: int,
    name: str,
    ndim: int = 2,
    ratio: float = 1 / 2,
    mode: str = "embedded_gaussian",
    sub_sample: bool = False,
) -> mx.sym.Symbol:
    """Non-local block: every position gathers its own context from all positions.

    Parameters
    ----------
    data
        (n, num_in, *spatial), with L positions.
    num_in
        Channels of ``data``.
    name
        Prefix of nodes and parameters ``{name}_{theta,phi,g,out}_conv_*`` (with bias);
        concatenation adds ``{name}_{theta,phi}-score_conv_weight``, the two halves of its
        w_f.
    mode
        How position j counts for position i. 'embedded_gaussian': softmax over j of θ(i)·φ(j);
        'gaussian': softmax over j of x(i)·x(j), without θ and φ; 'dot_product': θ(i)·φ(j) / L';
        'concatenation': relu(w_f [θ(i), φ(j)]) / L'.
    ratio
        θ, φ and g have ``ratio`` · num_in channels.
    sub_sample
        Gather from max-pooled positions: windows of 2, 2 x 2 or 1 x 2 x 2 (not along time), a
        remainder at the border left out. L' is then about L / 2, L / 4 or L / 4, else L.
    ndim : {1, 2, 3}
        Spatial rank.

    Returns
    -------
    Symbol
        (n, num_in, *spatial): data + out(context).

    Raises
    ------
    UsageError
        For an unknown mode, or a ratio that leaves no channel.

    Notes
    -----
    The (n, L, L') scores are kept for the backward pass: memory is quadratic in the positions.
    :func:`network.memory.check_memory` tells how much that is.
    """
    _check(name, num_in, ndim)
    _one_of(name, "mode", mode, MODES)
    num_mid = _hidden(name, num_in, ratio)
    ones = (1,) * ndim
    window = (1, 2, 2) if ndim == 3 else (2,) * ndim

    def embed(tag):
        return Conv(data, num_filter=num_mid, kernel=ones, name=f"{name}_{tag}", no_bias=False)

    def sampled(value, tag):
        if not sub_sample:
            return value
        return mx.sym.Pooling(
            data=value, pool_type="max", kernel=window, stride=window, name=f"{name}_{tag}-pool"
        )

    def flat(value, tag):
        return _flatten(value, f"{name}_{tag}-flat")

    def scored(value, tag):
        return Conv(value, num_filter=1, kernel=ones, name=f"{name}_{tag}-score")

    source = _flatten(sampled(embed("g"), "g"), f"{name}_g-flat")
    gaussian = mode == "gaussian"
    theta = data if gaussian else embed("theta")
    phi = sampled(data if gaussian else embed("phi"), "phi")
    if mode == "concatenation":
        # (n, 1, L) -> (n, L, 1); with (n, 1, L') -> (n, L, L')
        left = flat(scored(theta, "theta"), "theta")
        left = mx.sym.transpose(left, axes=(0, 2, 1), name=f"{name}_theta-permute")
        right = flat(scored(phi, "phi"), "phi")
        weights = mx.sym.broadcast_add(left, right, name=f"{name}{AFFINITY}")
        weights = AC(weights, name=f"{name}{AFFINITY}")
    else:
        # (n, C', L)^T x (n, C', L') -> (n, L, L')
        weights = mx.sym.batch_dot(
            lhs=flat(theta, "theta"),
            rhs=flat(phi, "phi"),
            transpose_a=True,
            name=f"{name}{AFFINITY}",
        )
    if mode.endswith("gaussian"):
        weights = mx.sym.softmax(data=weights, axis=-1, name=f"{name}_attention")
    else:
        # Both factors are divided by the square root of L': by L' in all, in float16 as well.
        weights = mx.sym.contrib.div_sqrt_dim(weights, name=f"{name}_attention")
        source = mx.sym.contrib.div_sqrt_dim(source, name=f"{name}_g-scale")
    # (n, C', L') x (n, L, L')^T -> (n, C', L) -> (n, C', *spatial)
    out = mx.sym.batch_dot(lhs=source, rhs=weights, transpose_b=True, name=f"{name}_gather")
    out = mx.sym.reshape_like(
        out, data, lhs_begin=2, lhs_end=3, rhs_begin=2, rhs_end=2 + ndim, name=f"{name}_context"
    )
    out = Conv(out, num_filter=num_in, kernel=ones, name=f"{name}_out", no_bias=False)
    return mx.sym.add_n(data, out, name=f"{name}_sum")


def _non_local_settings(nodes: str) -> dict[str, Any]:
    """Return what the lines ``operator name`` of a Non-local block's nodes say of its settings."""
    if "_theta-score_conv\n" in nodes:
        mode = "concatenation"
    elif "_theta_conv\n" not in nodes:
        mode = "gaussian"
    else:
        softmax = re.search(r"^softmax .*_attention$", nodes, re.MULTILINE)
        mode = "embedded_gaussian" if softmax else "dot_product"
    return {"mode": mode, "sub_sample": "_g-pool\n" in nodes}


class ContextKind(NamedTuple):
    """A kind of context block, and what it is built with where nothing else is said.

    Attributes
    ----------
    build
        The function that makes it: (data, num_in=, name=, ndim=, and the settings by name).
    placement : {'inside', 'after'}
        Where in a residual block it sits: after the last convolution, before the shortcut sum; or
        after the residual block.
    stages
        The stages all of whose residual blocks have one; None: a single one, after the last but
        one of conv4.
    settings
        By keyword of ``build``. One called ``ratio`` is the width of the hidden layer as a share
        of the channels.
    settings_of_graph
        Returns the settings that no shape tells from the nodes, one line ``operator name`` each.
    """

    build: Callable[..., mx.sym.Symbol]
    placement: str
    stages: Optional[tuple[int, ...]]
    settings: Mapping[str, Setting]
    settings_of_graph: Callable[[str], dict[str, Any]] = lambda nodes: {}


# Ratios and stages of SE are those of Hu et al. 2018, of GC and of the single block GCNet's (Cao
# et al. 2019); half the channels in a Non-local block is Wang et al. 2018.
CONTEXT_KINDS = {
    "gc": ContextKind(GC_Block, "inside", (3, 4, 5), {"ratio": Setting(1 / 16, check_ratio)}),
    "se": ContextKind(SE_Block, "inside", (2, 3, 4, 5), {"ratio": Setting(1 / 16, check_ratio)}),
    "snl": ContextKind(SNL_Block, "after", None, {}),
    "nl": ContextKind(
        NL_Block,
        "after",
        None,
        {
            "ratio": Setting(1 / 2, check_ratio),
            "mode": Setting("embedded_gaussian", one_of(MODES)),
            "sub_sample": Setting(False, check_flag, boolean),
        },
        _non_local_settings,
    ),
}


def context_blocks(
    data: mx.sym.Symbol, contexts: Iterable["Context"], *, num_in: int, name: str, ndim: int
) -> mx.sym.Symbol:
    """Apply context blocks, one after the other.

    Parameters
    ----------
    data
        (n, num_in, *spatial): the residual branch before the shortcut sum, or what a residual
        block makes.
    contexts
        From :meth:`network.specs.Spec.contexts_of`.
    num_in
        Channels.
    name
        The residual block's name; a context block's is ``{name}_{kind}``.
    ndim
        Spatial rank.

    Returns
    -------
    Symbol
        As ``data``.
    """
    for context in contexts:
        data = CONTEXT_KINDS[context.kind].build(
            data,
            num_in=num_in,
            name=f"{name}_{context.kind}",
            ndim=ndim,
            **context.all_settings(),
        )
    return data
