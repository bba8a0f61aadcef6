"""Dual path networks (Chen et al., NeurIPS 2017, arXiv 1707.01629; cypw/DPNs), with GloRe units.

A block reads the concatenation of a residual map and a growing dense map; its output is split, the
first part is added to the residual map, the rest appended to the dense one.

Two naming schemes: with ``legacy_names`` the nodes and parameters of the networks released by the
DPN paper's author; otherwise the same block names (``conv3_x__1_c1x1-a``) with the suffixes that
GloRe's released graphs use (``_bn``, ``_relu``, ``_conv``) and their ``conv1``, ``tail`` and
``classifier``. The GloRe release of DPN-98 and DPN-131 has not been seen; the unit's names
(``conv3_x__4_extra``, ``_cat-input``, ``_conv-tail-res``, ``_conv-tail-den``) are those of a third
party's copy of its code.
"""

from typing import TYPE_CHECKING, Optional, Union

from mxnet_compat import mx

from .symbol_basic import AC, BN, BN_AC, Conv
from .symbol_context import context_blocks
from .symbol_glore import GloRe_Unit
from .symbol_resnet import spread, stem

if TYPE_CHECKING:
    from .specs import Spec


def _bn_ac_conv(
    data: mx.sym.Symbol,
    *,
    num_filter: int,
    kernel: tuple[int, ...],
    name: str,
    spec: "Spec",
    stride: Optional[tuple[int, ...]] = None,
    dilation: int = 1,
    num_group: int = 1,
) -> mx.sym.Symbol:
    if spec.legacy_names:
        bn_name, ac_name, conv_name = f"{name}__bn_", f"{name}__ac_", f"{name}_"
    else:
        bn_name = ac_name = conv_name = name
    return Conv(
        AC(BN(data, name=bn_name, bn=spec.bn), name=ac_name),
        num_filter=num_filter,
        kernel=kernel,
        name=conv_name,
        stride=stride,
        **spread(kernel, dilation),
        num_group=num_group,
    )


def _split(data: mx.sym.Symbol, size: int, name: str) -> list[mx.sym.Symbol]:
    """Cut (n, c, h, w) into (n, size, h, w) and (n, c - size, h, w)."""
    return [
        mx.sym.slice_axis(data=data, axis=1, begin=0, end=size, name=f"{name}-split1"),
        mx.sym.slice_axis(data=data, axis=1, begin=size, end=None, name=f"{name}-split2"),
    ]


def Dual_Path_Unit(
    data: Union[mx.sym.Symbol, list[mx.sym.Symbol]],
    *,
    spec: "Spec",
    stage: int,
    block: int,
    name: str,
) -> list[mx.sym.Symbol]:
    """One dual path block.

    Parameters
    ----------
    data
        (n, c, h, w) after the stem; later the residual and the dense map.
    spec
        The network's row.
    stage, block
        Which block of the row, 1-based.
    name
        Prefix of nodes and parameters.

    Returns
    -------
    list of two Symbol
        Residual map (n, width of the stage, h', w') and dense map (n, 2 · growth + block · growth,
        h', w').
    """
    num_mid, num_out = spec.num_mid[stage - 2], spec.num_out[stage - 2]
    growth = spec.growth[stage - 2]
    stride = spec.strides[stage - 2] if block == 1 else (1, 1)
    whole = data
    if isinstance(data, list):
        whole = mx.sym.Concat(*data, dim=1, name=f"{name}_cat-input")
    if block == 1:
        # The name tells the stride of the published network, also where a dilation replaces it.
        adapter = f"{name}_c1x1-w(s/{spec.published_stride(stage)[0]})"
        out = _bn_ac_conv(
            whole,
            num_filter=num_out + 2 * growth,
            kernel=(1, 1),
            name=adapter,
            spec=spec,
            stride=stride,
        )
        residual, dense = _split(out, num_out, adapter)
    else:
        residual, dense = data
    out = _bn_ac_conv(whole, num_filter=num_mid, kernel=(1, 1), name=f"{name}_c1x1-a", spec=spec)
    out = _bn_ac_conv(
        out,
        num_filter=num_mid,
        kernel=(3, 3),
        name=f"{name}_c3x3-b",
        spec=spec,
        stride=stride,
        dilation=spec.dilation(stage, block),
        num_group=spec.groups,
    )
    width = num_out + growth
    out = _bn_ac_conv(out, num_filter=width, kernel=(1, 1), name=f"{name}_c1x1-c", spec=spec)
    inside = spec.contexts_of(stage, block, inside=True)
    out = context_blocks(out, inside, num_in=width, name=name, ndim=spec.ndim)
    more_residual, more_dense = _split(out, num_out, f"{name}_c1x1-c")
    return [
        mx.sym.add_n(residual, more_residual, name=f"{name}_sum"),
        mx.sym.Concat(dense, more_dense, dim=1, name=f"{name}_cat"),
    ]


def get_stages(spec: "Spec") -> list[mx.sym.Symbol]:
    """Return the maps behind conv2 to conv5: (n, 3, h, w) -> (n, c, h', w').

    Residual and dense map are concatenated; the last one has the last rectifier.
    """
    conv, bn, tail = "conv1", "conv1", "tail"
    if spec.legacy_names:
        conv, bn, tail = "conv1_x_1_", "conv1_x_1__relu-sp_", "conv5_x_x__relu-sp_"
    out = stem(mx.sym.Variable("data"), spec=spec, conv_name=conv, bn_name=bn)
    stages = []
    for stage, num_blocks in enumerate(spec.blocks, 2):
        positions = spec.units_of(stage)
        num_out, growth = spec.num_out[stage - 2], spec.growth[stage - 2]
        for block in range(1, num_blocks + 1):
            name = f"conv{stage}_x__{block}"
            out = Dual_Path_Unit(out, spec=spec, stage=stage, block=block, name=name)
            widths = (num_out, (2 + block) * growth)
            behind = spec.contexts_of(stage, block, inside=False)
            if behind:
                # The block sees both maps as one, (n, sum of widths, h, w).
                whole = mx.sym.Concat(*out, dim=1, name=f"{name}_cat-context")
                whole = context_blocks(whole, behind, num_in=sum(widths), name=name, ndim=spec.ndim)
                out = _split(whole, num_out, f"{name}_context")
            if block in positions:
                unit = f"{name}_extra"
                out = GloRe_Unit(out, num_in=widths, name=unit, **spec.unit_arguments())
        # For those who read it; a node that nobody reads is no part of the graph.
        stages.append(mx.sym.Concat(*out, dim=1, name=f"conv{stage}_x_x_cat-final"))
    stages[-1] = BN_AC(stages[-1], name=tail, bn=spec.bn)
    return stages
