"""Residual networks in 2D and 3D, from one loop over stages.

Pre-activation: He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016);
post-activation: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016). Grouped
convolutions as in ResNeXt (Xie et al., CVPR 2017). The stride is carried by the 3x3 convolution.
Layout and names are those of facebookresearch/GloRe: the MXNet graphs for ImageNet and the PyTorch
networks for Kinetics, where convolution ``m1`` may reach over time.
"""

from typing import TYPE_CHECKING, Any

from mxnet_compat import mx

from .symbol_basic import AC, BN, BN_AC, BN_AC_Conv, Conv, Conv_BN_AC
from .symbol_context import context_blocks
from .symbol_glore import GloRe_Unit

if TYPE_CHECKING:
    from .specs import Spec


def half(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return the padding that keeps the size of a map under an odd ``kernel`` of stride 1."""
    return tuple(size // 2 for size in kernel)


def spread(kernel: tuple[int, ...], dilation: int) -> dict[str, Any]:
    """Return ``pad`` and ``dilate`` of a kernel whose points are ``dilation`` apart in the plane.

    Time, the first of three axes, is left as it is.
    """
    in_time = (1,) * (len(kernel) - 2)
    dilate = in_time + tuple(dilation if size > 1 else 1 for size in kernel[-2:])
    return {
        "dilate": dilate,
        "pad": tuple(size // 2 * step for size, step in zip(kernel, dilate)),
    }


def Residual_Unit(
    data: mx.sym.Symbol, *, spec: "Spec", stage: int, block: int, num_in: int, name: str
) -> mx.sym.Symbol:
    """One residual block: a bottleneck (1x1, 3x3, 1x1) or a basic one (3x3, 3x3).

    Parameters
    ----------
    data
        (n, num_in, *spatial).
    spec
        The network's row: kind of block, widths, groups, strides, temporal kernels.
    stage, block
        Which block of the row, 1-based.
    num_in
        Channels of ``data``.
    name
        Prefix of nodes and parameters.

    Returns
    -------
    Symbol
        (n, width of the stage, *spatial'), strided in a stage's first block.
    """
    num_mid, num_out = spec.num_mid[stage - 2], spec.num_out[stage - 2]
    stride = spec.strides[stage - 2] if block == 1 else (1,) * spec.ndim
    dilation = spec.dilation(stage, block)
    # Kernels over (time,) height and width; the first convolution of a block may reach over time.
    reach = (spec.temporal[stage - 2][block - 1],) if spec.ndim == 3 else ()
    still = (1,) * len(reach)
    one, time_one = still + (1, 1), reach + (1, 1)
    three, time_three = still + (3, 3), reach + (3, 3)

    ordered = Conv_BN_AC if spec.post_activation else BN_AC_Conv

    def layer(width, kernel, tag, stride, num_group):
        return {
            "num_filter": width,
            "kernel": kernel,
            "name": f"{name}_{tag}",
            **spread(kernel, dilation),
            "stride": stride,
            "num_group": num_group,
        }

    def conv(value, width, kernel, tag, stride=None, num_group=1):
        return ordered(value, bn=spec.bn, **layer(width, kernel, tag, stride, num_group))

    def conv_to_sum(value, width, kernel, tag, stride=None, num_group=1):
        if not spec.post_activation:
            return conv(value, width, kernel, tag, stride, num_group)
        out = Conv(value, **layer(width, kernel, tag, stride, num_group))
        return BN(out, name=f"{name}_{tag}", bn=spec.bn)

    if spec.bottleneck:
        out = conv(data, num_mid, time_one, "conv-m1")
        out = conv(out, num_mid, three, "conv-m2", stride, spec.groups)
        out = conv_to_sum(out, num_out, one, "conv-m3")
    else:
        out = conv(data, num_out, time_three, "conv-m1", stride)
        out = conv_to_sum(out, num_out, three, "conv-m2", num_group=spec.groups)
    inside = spec.contexts_of(stage, block, inside=True)
    out = context_blocks(out, inside, num_in=num_out, name=name, ndim=spec.ndim)
    if num_in != num_out or any(step != 1 for step in stride):
        data = conv_to_sum(data, num_out, one, "conv-w1", stride)
    total = mx.sym.add_n(data, out, name=f"{name}_sum")
    return AC(total, name=name) if spec.post_activation else total


def stem(
    data: mx.sym.Symbol, *, spec: "Spec", conv_name: str = "conv1", bn_name: str = "conv1"
) -> mx.sym.Symbol:
    """First convolution and pooling: (n, 3, *input) -> (n, stem width, *input / stem strides)."""
    kernel = spec.stem.kernel
    out = Conv(
        data,
        num_filter=spec.stem.width,
        kernel=kernel,
        name=conv_name,
        pad=half(kernel),
        stride=spec.stem.stride,
    )
    return mx.sym.Pooling(
        data=BN_AC(out, name=bn_name, bn=spec.bn),
        pool_type="max",
        kernel=spec.stem.pool_kernel,
        pad=half(spec.stem.pool_kernel),
        stride=spec.stem.pool_stride,
        name="pool1",
    )


def get_stages(spec: "Spec") -> list[mx.sym.Symbol]:
    """Return the maps behind conv2 to conv5, the last one with the last rectifier.

    Each is (n, 3, *input) -> (n, width of the stage, *map). Pre-activation networks have no
    normalisation or rectifier behind conv2 to conv4: the next block begins with them.
    """
    out = stem(mx.sym.Variable("data"), spec=spec)
    num_in = spec.stem.width
    stages = []
    for stage, num_blocks in enumerate(spec.blocks, 2):
        positions = spec.units_of(stage)
        for block in range(1, num_blocks + 1):
            name = f"conv{stage}_B{block:02d}"
            out = Residual_Unit(out, spec=spec, stage=stage, block=block, num_in=num_in, name=name)
            num_in = spec.num_out[stage - 2]
            behind = spec.contexts_of(stage, block, inside=False)
            out = context_blocks(out, behind, num_in=num_in, name=name, ndim=spec.ndim)
            if block in positions:
                unit = f"{name}_extra"
                out = GloRe_Unit(out, num_in=num_in, name=unit, **spec.unit_arguments())
        stages.append(out)
    if not spec.post_activation:
        stages[-1] = BN_AC(out, name="tail", bn=spec.bn)
    return stages
