"""Residual networks in 2D and 3D, from one loop over stages.

Pre-activation: He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016);
post-activation: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016). Grouped
convolutions as in ResNeXt (Xie et al., CVPR 2017). The stride is carried by the 3x3 convolution.
Layout and names are those of facebookresearch/GloRe: the MXNet graphs for ImageNet and the PyTorch
networks for Kinetics, where convolution ``m1`` may reach over time.
"""

from mxnet_compat import mx

from .symbol_basic import AC, BN, BN_AC, BN_AC_Conv, Conv, Conv_BN_AC
from .symbol_context import build_context
from .symbol_glore import GloRe_Unit


def half(kernel):
    """Return the padding that keeps the size of a map under an odd ``kernel`` of stride 1."""
    return tuple(size // 2 for size in kernel)


def context_blocks(data, contexts, num_in, name, ndim):
    """Apply context blocks, one after the other.

    Parameters
    ----------
    data : Symbol
        (n, num_in, *spatial): the residual branch before the shortcut sum, or a block's output.
    contexts : sequence of Context
        From :meth:`Spec.contexts_of`.
    num_in : int
        Channels.
    name : str
        The residual block's name; a context block's is ``{name}_{kind}``.
    ndim : int
        Spatial rank.

    Returns
    -------
    Symbol
        As ``data``.
    """
    for context in contexts:
        data = build_context(context, data, num_in, f"{name}_{context.kind}", ndim)
    return data


def Residual_Unit(data, spec, stage, block, num_in, name):
    """One residual block: a bottleneck (1x1, 3x3, 1x1) or a basic one (3x3, 3x3).

    Parameters
    ----------
    data : Symbol
        (n, num_in, *spatial).
    spec : Spec
        The network's row: kind of block, widths, groups, strides, temporal kernels.
    stage, block : int
        Which block of the row, 1-based.
    num_in : int
        Channels of ``data``.
    name : str
        Prefix of nodes and parameters.

    Returns
    -------
    Symbol
        (n, width of the stage, *spatial'), strided in a stage's first block.
    """
    num_mid, num_out = spec.num_mid[stage - 2], spec.num_out[stage - 2]
    stride = spec.strides[stage - 2] if block == 1 else (1,) * spec.ndim
    one, time_one, three, time_three = (1, 1), (1, 1), (3, 3), (3, 3)
    if spec.ndim == 3:
        reach = spec.temporal[stage - 2][block - 1]
        one, time_one, three, time_three = (1, 1, 1), (reach, 1, 1), (1, 3, 3), (reach, 3, 3)

    ordered = Conv_BN_AC if spec.post_activation else BN_AC_Conv

    def conv(value, width, kernel, tag, stride=None, num_group=1):
        return ordered(
            value, width, kernel, f"{name}_{tag}", half(kernel), stride, num_group, bn=spec.bn
        )

    def conv_to_sum(value, width, kernel, tag, stride=None, num_group=1):
        if not spec.post_activation:
            return conv(value, width, kernel, tag, stride, num_group)
        out = Conv(value, width, kernel, f"{name}_{tag}", half(kernel), stride, num_group)
        return BN(out, f"{name}_{tag}", spec.bn)

    if spec.bottleneck:
        out = conv(data, num_mid, time_one, "conv-m1")
        out = conv(out, num_mid, three, "conv-m2", stride, spec.groups)
        out = conv_to_sum(out, num_out, one, "conv-m3")
    else:
        out = conv(data, num_out, time_three, "conv-m1", stride)
        out = conv_to_sum(out, num_out, three, "conv-m2", num_group=spec.groups)
    inside = spec.contexts_of(stage, block, inside=True)
    out = context_blocks(out, inside, num_out, name, spec.ndim)
    if num_in != num_out or any(step != 1 for step in stride):
        data = conv_to_sum(data, num_out, one, "conv-w1", stride)
    total = mx.sym.add_n(data, out, name=f"{name}_sum")
    return AC(total, name) if spec.post_activation else total


def stem(data, spec, conv_name="conv1", bn_name="conv1"):
    """First convolution and pooling: (n, 3, *input) -> (n, stem width, *input / stem strides)."""
    kernel = spec.stem.kernel
    out = Conv(data, spec.stem.width, kernel, conv_name, half(kernel), spec.stem.stride)
    return mx.sym.Pooling(
        data=BN_AC(out, bn_name, spec.bn),
        pool_type="max",
        kernel=spec.stem.pool_kernel,
        pad=half(spec.stem.pool_kernel),
        stride=spec.stem.pool_stride,
        name="pool1",
    )


def get_before_pool(spec):
    """Return all of a network up to the last rectifier: (n, 3, *input) -> (n, c, *map)."""
    out = stem(mx.sym.Variable("data"), spec)
    num_in = spec.stem.width
    for stage, num_blocks in enumerate(spec.blocks, 2):
        positions = spec.units_of(stage)
        for block in range(1, num_blocks + 1):
            name = f"conv{stage}_B{block:02d}"
            out = Residual_Unit(out, spec, stage, block, num_in, name)
            num_in = spec.num_out[stage - 2]
            behind = spec.contexts_of(stage, block, inside=False)
            out = context_blocks(out, behind, num_in, name, spec.ndim)
            if block in positions:
                out = GloRe_Unit(out, num_in, num_in // 4, f"{name}_extra", **spec.unit_arguments())
    return out if spec.post_activation else BN_AC(out, "tail", spec.bn)
