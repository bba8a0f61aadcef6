"""Mask R-CNN's parts: feature pyramid, proposals, and the heads for boxes and masks.

Mask R-CNN (He et al., ICCV 2017) on a feature pyramid (Lin et al., CVPR 2017), in the form in which
GCNet (Cao et al., 2019; project xvjiarui/GCNet, on mmdetection 1) trains it; gluoncv's form differs
in what :class:`Detection` names.

A network is one Symbol of three parts that share no node: the trunk reads ``data`` and gives the
pyramid and the proposals' scores and shifts; the heads read what is pooled from the pyramid,
``box_features`` and ``mask_features``. What stands between (anchors, proposals, suppression,
pooling) has no parameters and is no part of the graph: :mod:`network.detector` does it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from mxnet_compat import mx

from .boxes import RATIOS
from .symbol_basic import BN_AC, Conv

if TYPE_CHECKING:
    from .specs import Spec

LEVELS = (2, 3, 4, 5)
STRIDES = (4, 8, 16, 32, 64)
PYRAMID = tuple(f"p{level}" for level in (*LEVELS, 6))
# Nodes whose outputs are those of the heads, and the input that each reads.
BOX_HEAD = ("box_score", "box_delta")
MASK_HEAD = ("mask_score_conv",)
BOX_INPUT, MASK_INPUT = "box_features", "mask_features"
# Pooled cells of a mask; its head doubles them.
MASK_CELLS = 14
POOLED_TWICE = 14


class Detection(NamedTuple):
    """Widths and forms of a detector's parts.

    Attributes
    ----------
    width
        Channels of the pyramid.
    rpn
        Of the layer that proposals are read from.
    hidden
        Of the box head's two layers.
    mask, mask_convs
        Channels and number of the mask head's convolutions.
    anchor_scale
        Side of a square anchor over the stride of its level.
    box_cells
        Side of the grid that a box is pooled to. 14: averaged to 7, as gluoncv does.
    p6
        The last level is every second cell of p5 (``subsample``), or a convolution of what p5 is
        made of (``conv``, gluoncv's).
    rounded_anchors
        See :func:`network.boxes.base_anchors`.
    most_growth
        See :func:`network.boxes.decode`.
    """

    width: int = 256
    rpn: int = 256
    hidden: int = 1024
    mask: int = 256
    mask_convs: int = 4
    anchor_scale: float = 8.0
    box_cells: int = 7
    p6: str = "subsample"
    rounded_anchors: bool = False
    most_growth: float = 4.135166556742356


# What gluoncv's mask_rcnn_fpn_* have otherwise.
GLUONCV: dict[str, Any] = {
    "rpn": 1024,
    "box_cells": 14,
    "p6": "conv",
    "rounded_anchors": True,
    "most_growth": 4.42,
}
STYLES: dict[str, dict[str, Any]] = {"gcnet": {}, "gluoncv": GLUONCV}


def pyramid(stages: list[mx.sym.Symbol], *, spec: "Spec") -> list[mx.sym.Symbol]:
    """Return the maps p2 to p6, each (n, width, h / stride, w / stride), of c2 to c5."""
    head = spec.detector
    maps: list[mx.sym.Symbol] = []
    above = deepest = None
    for level, stage in zip(reversed(LEVELS), reversed(stages)):
        if not spec.post_activation and level < max(LEVELS):
            # Behind a pre-activation stage there is no normalisation yet.
            stage = BN_AC(stage, name=f"c{level}_tail", bn=spec.bn)
        out = Conv(
            stage, num_filter=head.width, kernel=(1, 1), name=f"p{level}_lateral", no_bias=False
        )
        if above is None:
            deepest = out
        else:
            # (n, width, h / 2s, w / 2s) -> (n, width, h / s, w / s), each cell twice each way
            larger = mx.sym.UpSampling(
                above, scale=2, sample_type="nearest", name=f"p{level}_enlarged"
            )
            larger = mx.sym.slice_like(larger, out, axes=(2, 3), name=f"p{level}_cut")
            out = mx.sym.add_n(out, larger, name=f"p{level}_sum")
        above = out
        maps.append(
            Conv(
                out,
                num_filter=head.width,
                kernel=(3, 3),
                pad=(1, 1),
                name=f"p{level}",
                no_bias=False,
            )
        )
    maps.reverse()
    if head.p6 == "conv":
        last = Conv(
            deepest,
            num_filter=head.width,
            kernel=(3, 3),
            pad=(1, 1),
            stride=(2, 2),
            name="p6",
            no_bias=False,
        )
    else:
        last = mx.sym.Pooling(
            maps[-1], kernel=(1, 1), stride=(2, 2), pool_type="max", name="p6_pool"
        )
    return [*maps, last]


def proposals(maps: list[mx.sym.Symbol], *, spec: "Spec") -> list[mx.sym.Symbol]:
    """Return ``rpn_scores`` (n, T) and ``rpn_deltas`` (n, T, 4) of the T anchors of all levels.

    The layers are the same for all levels. Anchors stand in the order of
    :func:`network.boxes.anchors_of`, level after level.
    """
    head = spec.detector
    layers = {"conv": head.rpn, "score": len(RATIOS), "delta": 4 * len(RATIOS)}
    shared = {
        name: {kind: mx.sym.Variable(f"rpn_{name}_conv_{kind}") for kind in ("weight", "bias")}
        for name in layers
    }

    def layer(data, name, level, kernel):
        return mx.sym.Convolution(
            data,
            num_filter=layers[name],
            kernel=kernel,
            pad=(kernel[0] // 2,) * 2,
            name=f"rpn_{name}_{level}",
            **shared[name],
        )

    scores: list[mx.sym.Symbol] = []
    deltas: list[mx.sym.Symbol] = []
    for level, data in zip(PYRAMID, maps):
        out = layer(data, "conv", level, (3, 3))
        out = mx.sym.Activation(out, act_type="relu", name=f"rpn_relu_{level}")
        for name, shape, found in (("score", (0, -1), scores), ("delta", (0, -1, 4), deltas)):
            each = layer(out, name, level, (1, 1))
            # (n, 3 k, h, w) -> (n, h, w, 3 k) -> (n, h * w * 3) or (n, h * w * 3, 4)
            each = mx.sym.transpose(each, axes=(0, 2, 3, 1), name=f"rpn_{name}_{level}_last")
            found.append(mx.sym.Reshape(each, shape=shape, name=f"rpn_{name}_{level}_flat"))
    return [
        mx.sym.concat(*scores, dim=1, name="rpn_scores"),
        mx.sym.concat(*deltas, dim=1, name="rpn_deltas"),
    ]


def box_head(*, spec: "Spec", num_classes: int) -> list[mx.sym.Symbol]:
    """Return the scores (R, 1 + classes), background first, and shifts (R, 4 classes) of boxes.

    It reads ``box_features`` (R, width, cells, cells).
    """
    head = spec.detector
    out = mx.sym.Variable(BOX_INPUT)
    if head.box_cells == POOLED_TWICE:
        # (R, width, 14, 14) -> (R, width, 7, 7)
        out = mx.sym.Pooling(
            out,
            kernel=(3, 3),
            pad=(1, 1),
            stride=(2, 2),
            pool_type="avg",
            name="box_pool",
        )
    out = mx.sym.Flatten(out, name="box_flat")
    for number in (1, 2):
        out = mx.sym.FullyConnected(out, num_hidden=head.hidden, name=f"box_fc{number}")
        out = mx.sym.Activation(out, act_type="relu", name=f"box_relu{number}")
    return [
        mx.sym.FullyConnected(out, num_hidden=1 + num_classes, name="box_score"),
        mx.sym.FullyConnected(out, num_hidden=4 * num_classes, name="box_delta"),
    ]


def mask_head(*, spec: "Spec", num_classes: int) -> mx.sym.Symbol:
    """Return the masks' logits (M, classes, 28, 28) of ``mask_features`` (M, width, 14, 14)."""
    head = spec.detector
    out = mx.sym.Variable(MASK_INPUT)
    for number in range(1, head.mask_convs + 1):
        out = Conv(
            out,
            num_filter=head.mask,
            kernel=(3, 3),
            pad=(1, 1),
            name=f"mask_{number}",
            no_bias=False,
        )
        out = mx.sym.Activation(out, act_type="relu", name=f"mask_{number}_relu")
    # (M, mask, 14, 14) -> (M, mask, 28, 28)
    out = mx.sym.Deconvolution(
        out, num_filter=head.mask, kernel=(2, 2), stride=(2, 2), no_bias=False, name="mask_larger"
    )
    out = mx.sym.Activation(out, act_type="relu", name="mask_larger_relu")
    return Conv(out, num_filter=num_classes, kernel=(1, 1), name="mask_score", no_bias=False)


def detector(stages: list[mx.sym.Symbol], *, spec: "Spec", num_classes: int) -> mx.sym.Symbol:
    """Return the whole network on a backbone's maps c2 to c5: the outputs of all its parts."""
    maps = pyramid(stages, spec=spec)
    return mx.sym.Group(
        [
            *maps,
            *proposals(maps, spec=spec),
            *box_head(spec=spec, num_classes=num_classes),
            mask_head(spec=spec, num_classes=num_classes),
        ]
    )


def trunk_nodes(spec: "Spec") -> tuple[str, ...]:
    """Return the nodes whose outputs the trunk gives: p2 to p6, scores and shifts."""
    last = "p6_conv" if spec.detector.p6 == "conv" else "p6_pool"
    return (*(f"p{level}_conv" for level in LEVELS), last, "rpn_scores", "rpn_deltas")


def head_shapes(spec: "Spec") -> dict[str, tuple[int, ...]]:
    """Return the shapes of what the heads read, for one box each."""
    head = spec.detector
    return {
        BOX_INPUT: (1, head.width, head.box_cells, head.box_cells),
        MASK_INPUT: (1, head.width, MASK_CELLS, MASK_CELLS),
    }
