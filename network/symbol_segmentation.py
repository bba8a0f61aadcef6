"""The head of a fully convolutional network: from a backbone's map to a class for each pixel.

Reduction to fewer channels, one context block, classifier, and bilinear up-sampling to the input,
after the segmentation networks of GloRe (Chen et al., CVPR 2019, section 4.4; the closest open
recipe is PaddleSeg's): 2048 -> 512 channels, a GloRe unit of 128 states and 64 nodes, dropout. An
auxiliary head on conv4 helps training.

The up-sampling does not align corners: pixels are squares, and the centres of the outer ones of
both maps do not coincide (align_corners=False; MXNet's default is the other).
"""

from typing import TYPE_CHECKING, Any

from mxnet_compat import mx

from .symbol_basic import BN_AC, Conv_BN_AC
from .symbol_context import CONTEXT_KINDS
from .symbol_glore import GloRe_Unit

if TYPE_CHECKING:
    from .specs import Spec

# Pixels of this label are neither learnt nor counted.
IGNORED = 255


def head_unit_settings(width: int) -> dict[str, Any]:
    """Return what the GloRe unit of a head is built with where nothing else is said.

    The nodes' states are divided by the number of positions: whole images have four times those of
    the crops that are trained on.
    """
    return {
        "num_state": width // 4,
        "num_node": width // 8,
        "flavour": "video",
        "normalize": True,
    }


def _classified(
    data: mx.sym.Symbol, image: mx.sym.Symbol, *, spec: "Spec", num_classes: int, prefix: str
) -> mx.sym.Symbol:
    """Classify each position and each pixel: (n, c, *map) -> (n, num_classes, h, w)."""
    if spec.dropout > 0:
        data = mx.sym.Dropout(data=data, p=spec.dropout, name=f"{prefix}dropout")
    out = mx.sym.Convolution(
        data=data, num_filter=num_classes, kernel=(1, 1), name=f"{prefix}classifier"
    )
    # To the size of the image, whatever it is: (n, k, *map), (n, 3, h, w) -> (n, k, h, w)
    out = mx.sym.contrib.BilinearResize2D(
        out, image, mode="like", align_corners=False, name=f"{prefix}upsampled"
    )
    return mx.sym.SoftmaxOutput(
        data=out,
        multi_output=True,
        use_ignore=True,
        ignore_label=IGNORED,
        normalization="valid",
        name=f"{prefix}softmax",
    )


def pixel_head(stages: list[mx.sym.Symbol], *, spec: "Spec", num_classes: int) -> mx.sym.Symbol:
    """Put a head on a backbone.

    Parameters
    ----------
    stages
        The maps behind conv2 to conv5.
    spec
        The network's row.
    num_classes

    Returns
    -------
    Symbol
        Ends in ``softmax``: (n, num_classes, h, w), and in ``aux_softmax`` of the same shape where
        the row has an auxiliary head.
    """
    head = spec.head
    image = stages[-1].get_internals()["data"]
    out = Conv_BN_AC(
        stages[-1], num_filter=head.width, kernel=(1, 1), name="head_reduction", bn=spec.bn
    )
    if head.kind == "glore":
        settings = {**head_unit_settings(head.width), **head.settings}
        out = GloRe_Unit(out, num_in=head.width, name="head_extra", bn=spec.bn, **settings)
    elif head.kind is not None:
        kind = CONTEXT_KINDS[head.kind]
        defaults = {name: row.default for name, row in kind.settings.items()}
        out = kind.build(
            out,
            num_in=head.width,
            name=f"head_{head.kind}",
            ndim=2,
            **{**defaults, **head.settings},
        )
    main = _classified(out, image, spec=spec, num_classes=num_classes, prefix="")
    if not head.auxiliary:
        return main
    # Behind a pre-activation stage there is no normalisation yet.
    out = stages[-2] if spec.post_activation else BN_AC(stages[-2], name="aux_tail", bn=spec.bn)
    out = Conv_BN_AC(
        out,
        num_filter=head.auxiliary,
        kernel=(3, 3),
        pad=(1, 1),
        name="aux_reduction",
        bn=spec.bn,
    )
    auxiliary = _classified(out, image, spec=spec, num_classes=num_classes, prefix="aux_")
    return mx.sym.Group([main, auxiliary])
