"""The table of networks: one frozen row per network, read by all builders.

Widths, depths and strides: He et al. 2016 (ResNet), Xie et al. 2017 (ResNeXt), Chen et al. 2017
(DPN), Chen et al. 2019 (GloRe, both the ImageNet and the Kinetics networks).

Where the GloRe units sit (1-based: a unit follows that block)
--------------------------------------------------------------
* ResNet-50, 2D and 3D: conv3 1, 3 and conv4 1, 3, 5, as released. ResNet-34 has the same numbers
  of blocks and takes the same positions.
* ResNet-101 in 3D: conv3 1, 3 and conv4 6, 12, 18, as released. ResNet-101 in 2D and ResNeXt-101
  are as deep and take the same ones; theirs are **not published**.
* ResNet-200: conv3 12, 18 and conv4 16, 24, 32, after a third party's port of the released
  network. ResNet-152 has as many blocks in conv4 and takes the same ones there.
* DPN-131: **not published**; conv3 4, 7 after a third party's copy of the DPN code. Its conv4, and
  DPN-92 and DPN-98 but for DPN-92's conv3 (4 blocks: as ResNet-50), are spread evenly.
* ResNet-18 is no published GloRe network: its stages have 2 blocks, and the rule of ResNet-50
  (after the odd ones but the last) leaves one unit per stage.

Parameters and multiply-adds of a network without dense paths depend on how many units a stage has,
not on where they sit. In a dual path network a unit grows with the dense map it reads: earlier
ones are cheaper. The figures recalled from the paper for DPN-98 and DPN-131 with units (67.7 M,
85.5 M) are below what any positions give with this unit (67.97 M, 85.66 M at least), so they
settle nothing. A released checkpoint shows its own positions in its parameter names.

Where the context blocks sit
----------------------------
* ``_w-gc`` and ``_GC``: in every block of conv3 to conv5, before the shortcut sum (GCNet).
* ``_0-1``: one behind the last block but one of conv4 (GCNet). ``_NL5``, ``_SNL5``, ``_GC5``:
  behind every other block of conv3 and conv4 (Wang et al. 2018).
* ``resnet50_w-nl_0-3``: the GloRe paper compares with Non-local blocks on conv4 and does not say
  where; they sit where its units do, so that the comparison is one of blocks, not of places.

GCNet and Wang et al. use post-activation networks; these rows have this project's pre-activation
ones.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

from checkpoint.released import RELEASED

from .symbol_basic import BNConf
from .symbol_context import CONTEXT_KINDS
from .symbol_detection import STYLES, Detection
from .symbol_glore import UNIT_SETTINGS

# {stage: residual blocks} as pairs.
Positions = tuple[tuple[int, tuple[int, ...]], ...]

# RGB on the scale 0..1; the released networks were trained on (pixel - mean) * 0.0167.
MEAN = (124 / 255, 117 / 255, 104 / 255)
STD = (1 / (0.0167 * 255),) * 3

# What the PyTorch networks for Kinetics use: eps 1e-4, momentum 0.1 in PyTorch's sense.
VIDEO_BN = BNConf(1e-4, 0.9)
# What the DPN release was trained with: MXNet's defaults.
LEGACY_DPN_BN = BNConf(1e-3, 0.9)


class Stem(NamedTuple):
    """First convolution and max pooling; one entry per spatial axis."""

    width: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pool_kernel: tuple[int, ...]
    pool_stride: tuple[int, ...]


PLACEMENTS = ("inside", "after")
TASKS = ("classification", "segmentation", "detection")


class Context(NamedTuple):
    """A context block (:mod:`network.symbol_context`) in or behind residual blocks.

    Attributes
    ----------
    kind
        One of ``CONTEXT_KINDS``, which has the defaults.
    settings
        What its builder is given otherwise than the kind's defaults: ``{"ratio": 1 / 4}``.
    positions
        Which residual blocks, 1-based. In a row None means every block; given to ``get_symbol``,
        None means the kind's default.
    placement : {'inside', 'after'}, optional
        After the last convolution, before the shortcut sum; or after the residual block.
    """

    kind: str
    settings: Mapping[str, Any] = {}
    positions: Optional[Positions] = None
    placement: Optional[str] = None

    def all_settings(self) -> dict[str, Any]:
        """Return the settings, the kind's defaults among them."""
        defaults = {name: row.default for name, row in CONTEXT_KINDS[self.kind].settings.items()}
        return {**defaults, **self.settings}

    @property
    def inside(self) -> bool:
        """Whether the block sits before the shortcut sum."""
        return (self.placement or CONTEXT_KINDS[self.kind].placement) == "inside"

    def applies_to(self, stage: int, block: int) -> bool:
        """Tell whether it sits in (or behind) residual block ``block`` of conv``stage``."""
        return self.positions is None or block in dict(self.positions).get(stage, ())


class PixelHead(NamedTuple):
    """What makes a class for each pixel of a backbone's map (network/symbol_segmentation.py).

    Attributes
    ----------
    width
        Channels that the map is reduced to, and of the context block.
    kind
        ``glore`` or one of ``CONTEXT_KINDS``; None for a plain FCN.
    settings
        What the context block is built with otherwise than by default.
    auxiliary
        Channels of the auxiliary head on conv4; 0 for none.
    """

    width: int = 512
    kind: Optional[str] = None
    settings: Mapping[str, Any] = {}
    auxiliary: int = 256


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network. Tuples of four belong to the stages conv2 to conv5.

    Attributes
    ----------
    name
        As published; looked up without regard to letter case.
    blocks, num_mid, num_out
        Blocks per stage, width of the 3x3 convolution, width of the stage.
    strides
        Stride of each stage's first block, per axis.
    dilations
        Of each stage's 3x3 convolutions in the plane: of its first block, and of the others.
    stem
        What precedes conv2.
    data_shape
        Default input without the batch axis: (3, h, w) or (3, t, h, w).
    num_classes
        Classes of the data set that the network was published for.
    task : {'classification', 'segmentation', 'detection'}
        What the network makes of an input: a class, a class for each pixel, or objects.
    family : {'resnet', 'dpn'}
        Which builder.
    bottleneck
        1x1, 3x3, 1x1 blocks; else 3x3, 3x3.
    groups
        Groups of the 3x3 convolutions.
    temporal
        3D: reach over time of each block's first convolution.
    growth
        Dual path networks: channels that each block adds to the dense map.
    glore : tuple of (stage, positions)
        GloRe units of this row.
    unit_defaults : tuple of (stage, positions)
        Where units sit when a stage is asked for as many as given here.
    context
        Context blocks in or behind the residual blocks.
    unit
        What every GloRe unit is built with otherwise than ``UNIT_SETTINGS`` says.
    head
        Of a segmentation network.
    detector
        Pyramid and heads of a detector.
    dropout
        Probability, before the classifier.
    bn
        Constants of all batch normalisations.
    fixed_pool
        Average over a window of the default map's size, as the released graphs do, not globally.
    legacy_names
        Names of the DPN release.
    post_activation
        Blocks of convolution, batch normalisation, rectifier with a rectifier after the sum (He et
        al., CVPR 2016), and not the pre-activation order.
    mean, std
        Of the input, RGB on the scale 0..1.
    aliases
        Other names of the row.
    """

    name: str
    blocks: tuple[int, int, int, int]
    num_mid: tuple[int, int, int, int]
    num_out: tuple[int, int, int, int]
    strides: tuple[tuple[int, ...], ...]
    stem: Stem
    data_shape: tuple[int, ...]
    num_classes: int
    task: str = "classification"
    family: str = "resnet"
    dilations: tuple[tuple[int, int], ...] = ((1, 1),) * 4
    bottleneck: bool = True
    groups: int = 1
    temporal: tuple[tuple[int, ...], ...] = ()
    growth: tuple[int, ...] = ()
    glore: Positions = ()
    unit_defaults: Positions = ()
    context: tuple[Context, ...] = ()
    unit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: PixelHead = PixelHead()
    detector: Detection = Detection()
    dropout: float = 0.0
    bn: BNConf = BNConf()
    fixed_pool: bool = False
    legacy_names: bool = False
    post_activation: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    aliases: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        """Spatial rank of the maps: 2, or 3 with time."""
        return len(self.data_shape) - 1

    def dilation(self, stage: int, block: int) -> int:
        """Return the dilation of the 3x3 convolutions in block ``block`` of conv``stage``."""
        return self.dilations[stage - 2][min(block, 2) - 1]

    def published_stride(self, stage: int) -> tuple[int, ...]:
        """Return the stride of a stage's first block where no dilation takes its place."""
        first, others = self.dilations[stage - 2]
        return tuple(step * others // first for step in self.strides[stage - 2])

    def with_output_stride(self, stride: int) -> "Spec":
        """Return a 2D row whose last map is smaller than the input by ``stride`` and no more.

        The strides beyond it become dilations of what follows, so that kernels see what they saw: a
        stage's first block, which had the stride, keeps the dilation of the stage before.
        """
        reached = self.stem.stride[0] * self.stem.pool_stride[0]
        spread, strides, dilations = 1, [], []
        for stage in (2, 3, 4, 5):
            step = self.published_stride(stage)[0]
            first = spread
            if reached * step > stride:
                spread, step = spread * step, 1
            reached *= step
            strides.append((step,) * self.ndim)
            dilations.append((first, spread))
        return dataclasses.replace(self, strides=tuple(strides), dilations=tuple(dilations))

    def for_pixels(self, kind: Optional[str] = None) -> "Spec":
        """Return the row ``fcn_NAME`` that segments: output stride 8, context block ``kind``."""
        row = dataclasses.replace(
            self,
            name=f"fcn_{self.name}" + (f"_w-{kind}" if kind else ""),
            task="segmentation",
            data_shape=(3, 512, 1024),
            num_classes=19,
            head=PixelHead(kind=kind),
            dropout=0.1,
            aliases=(),
        )
        return row.with_output_stride(8)

    def for_boxes(self, style: str = "gcnet") -> "Spec":
        """Return the row ``mask_rcnn_NAME`` that finds objects; ``style`` is one of ``STYLES``."""
        return dataclasses.replace(
            self,
            name=f"mask_rcnn_{self.name}",
            task="detection",
            data_shape=(3, 800, 1333),
            num_classes=80,
            detector=Detection(**STYLES[style]),
            aliases=(),
        )

    def total_stride(self) -> tuple[int, ...]:
        """Return, per axis of the input, the product of all strides."""
        steps = [self.stem.stride, self.stem.pool_stride, *self.strides]
        total = [1] * self.ndim
        for step in steps:
            total = [value * factor for value, factor in zip(total, step)]
        return tuple(total)

    def receptive_field(self) -> tuple[int, ...]:
        """Return, per axis, how many pixels (frames) a cell of the last map sees.

        That of the residual blocks alone: GloRe units and context blocks see the whole map.
        """
        layers = [
            (self.stem.kernel, self.stem.stride),
            (self.stem.pool_kernel, self.stem.pool_stride),
        ]
        ones = (1,) * self.ndim
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = self.strides[stage] if block == 0 else ones
                reach = (self.temporal[stage][block],) if self.ndim == 3 else ()
                still = (1,) * len(reach)
                if self.bottleneck:
                    layers += [((*reach, 1, 1), ones), ((*still, 3, 3), stride)]
                else:
                    layers += [((*reach, 3, 3), stride), ((*still, 3, 3), ones)]
        field, jump = list(ones), list(ones)
        for kernel, stride in layers:
            field = [seen + (k - 1) * step for seen, k, step in zip(field, kernel, jump)]
            jump = [step * s for step, s in zip(jump, stride)]
        return tuple(field)

    def final_map(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the last map for an input of ``size`` (each stride rounds up)."""
        for step in (self.stem.stride, self.stem.pool_stride, *self.strides):
            size = tuple(-(-value // factor) for value, factor in zip(size, step))
        return size

    def units_of(self, stage: int) -> tuple[int, ...]:
        """Return after which blocks of conv``stage`` a GloRe unit sits."""
        return dict(self.glore).get(stage, ())

    def contexts_of(self, stage: int, block: int, inside: bool) -> tuple[Context, ...]:
        """Return the context blocks in (``inside``) or behind block ``block`` of conv``stage``."""
        return tuple(
            context
            for context in self.context
            if context.inside == inside and context.applies_to(stage, block)
        )

    def every_block(self, stages: Iterable[int]) -> Positions:
        """Return the positions of all blocks of these stages."""
        return tuple((stage, tuple(range(1, self.blocks[stage - 2] + 1))) for stage in stages)

    def default_context_positions(self, kind: str) -> Positions:
        """Return where blocks of a kind of ``CONTEXT_KINDS`` sit when nothing is said."""
        stages = CONTEXT_KINDS[kind].stages
        if stages is None:
            return ((4, (max(1, self.blocks[2] - 1),)),)
        return self.every_block(stages)

    def default_units(self) -> Positions:
        """Return where GloRe units sit when nothing is said: two in conv3, three in conv4.

        As published where a row says so; at most one in two blocks elsewhere.
        """
        published = dict(self.unit_defaults)
        counts = {
            stage: min(count, max(1, self.blocks[stage - 2] // 2))
            for stage, count in ((3, 2), (4, 3))
        }
        return tuple(
            (stage, published.get(stage) or self.default_positions(stage, count))
            for stage, count in counts.items()
        )

    def default_positions(self, stage: int, count: int) -> tuple[int, ...]:
        """Return where ``count`` units sit in conv``stage``: as published, else spread evenly."""
        published = dict(self.unit_defaults).get(stage, ())
        if count == len(published):
            return published
        num_blocks = self.blocks[stage - 2]
        return tuple(-(-num_blocks * index // (count + 1)) for index in range(1, count + 1))

    def unit_settings(self) -> dict[str, Any]:
        """Return the settings of the network's GloRe units, the defaults among them."""
        return {**{name: row.default for name, row in UNIT_SETTINGS.items()}, **self.unit}

    def unit_arguments(self) -> dict[str, Any]:
        """Return what every GloRe unit of the network is built with."""
        return {"ndim": self.ndim, "bn": self.bn, **self.unit_settings()}

    def with_units(
        self, name: str, counts: tuple[int, int], aliases: tuple[str, ...] = ()
    ) -> "Spec":
        """Return a row of another name with (units in conv3, units in conv4) placed by default."""
        glore = tuple(
            (stage, self.default_positions(stage, count))
            for stage, count in zip((3, 4), counts)
            if count
        )
        return dataclasses.replace(self, name=name, glore=glore, aliases=aliases)

    def with_context(self, name: str, *contexts: Context) -> "Spec":
        """Return a row of another name with these context blocks."""
        return dataclasses.replace(self, name=name, context=contexts, aliases=())


BOTTLENECK_OUT = (256, 512, 1024, 2048)
UNITS_R50 = ((3, (1, 3)), (4, (1, 3, 5)))
UNITS_R101 = ((3, (1, 3)), (4, (6, 12, 18)))
UNITS_R200 = ((3, (12, 18)), (4, (16, 24, 32)))

IMAGE: dict[str, Any] = {
    "strides": ((1, 1), (2, 2), (2, 2), (2, 2)),
    "data_shape": (3, 224, 224),
    "num_classes": 1000,
}


def _image_stem(width: int) -> Stem:
    return Stem(width, (7, 7), (2, 2), (3, 3), (2, 2))


def _resnet(
    name: str, blocks: tuple[int, int, int, int], unit_defaults: Positions, **fields: Any
) -> Spec:
    row: dict[str, Any] = {
        "num_mid": (64, 128, 256, 512),
        "num_out": BOTTLENECK_OUT,
        "stem": _image_stem(64),
        **IMAGE,
        **fields,
    }
    return Spec(name=name, blocks=blocks, unit_defaults=unit_defaults, **row)


BASIC: dict[str, Any] = {"bottleneck": False, "num_out": (64, 128, 256, 512)}

RESNET18 = _resnet("resnet18", (2, 2, 2, 2), ((3, (1,)), (4, (1,))), **BASIC)
RESNET34 = _resnet("resnet34", (3, 4, 6, 3), UNITS_R50, **BASIC)
RESNET50 = _resnet("resnet50", (3, 4, 6, 3), UNITS_R50)
SE_RESNET50 = RESNET50.with_context("resnet50_w-se", Context("se", {"ratio": 1 / 16}))
RESNET101 = _resnet("resnet101", (3, 4, 23, 3), UNITS_R101)
RESNET152 = _resnet("resnet152", (3, 8, 36, 3), ((4, (16, 24, 32)),))
RESNET200 = _resnet("resnet200", (3, 24, 36, 3), UNITS_R200)
RESNEXT101 = _resnet(
    "resnext101-32x4d", (3, 4, 23, 3), UNITS_R101, num_mid=(128, 256, 512, 1024), groups=32
)

# The original, post-activation networks (He et al., CVPR 2016), layer for layer those of gluoncv's
# model zoo, whose weights fit (checkpoint/gluoncv_names.py). The constants are theirs.
POST_ACTIVATION: dict[str, Any] = {
    "post_activation": True,
    "bn": BNConf(1e-5, 0.9),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
RESNET18_V1 = dataclasses.replace(RESNET18, name="resnet18_v1", **POST_ACTIVATION)
RESNET34_V1 = dataclasses.replace(RESNET34, name="resnet34_v1", **POST_ACTIVATION)
# With the stride in the 3x3 convolution: gluoncv's v1b, torchvision's and timm's resnet50.
RESNET50_V1B = dataclasses.replace(RESNET50, name="resnet50_v1b", **POST_ACTIVATION)
RESNET101_V1B = dataclasses.replace(RESNET101, name="resnet101_v1b", **POST_ACTIVATION)


def _dpn(
    name: str,
    stem_width: int,
    mid: int,
    groups: int,
    blocks: tuple[int, int, int, int],
    growth: tuple[int, ...],
    unit_defaults: Positions,
) -> Spec:
    return Spec(
        name=name,
        family="dpn",
        blocks=blocks,
        num_mid=(mid, 2 * mid, 4 * mid, 8 * mid),
        num_out=BOTTLENECK_OUT,
        stem=_image_stem(stem_width),
        groups=groups,
        growth=growth,
        unit_defaults=unit_defaults,
        **IMAGE,
    )


DPN92 = _dpn("dpn92", 64, 96, 32, (3, 4, 20, 3), (16, 32, 24, 128), ((3, (1, 3)),))
DPN98 = _dpn("dpn98", 96, 160, 40, (3, 6, 20, 3), (16, 32, 32, 128), ())
DPN131 = _dpn("dpn131", 128, 160, 40, (4, 8, 28, 3), (16, 32, 32, 128), ((3, (4, 7)),))


def _odd(count: int) -> tuple[int, ...]:
    """Reach over time of a stage whose odd blocks see three frames: 3, 1, 3, …"""
    return tuple(3 if block % 2 else 1 for block in range(1, count + 1))


def _video_stem(width: int) -> Stem:
    return Stem(width, (3, 5, 5), (1, 2, 2), (1, 3, 3), (1, 2, 2))


def _resnet_3d(name: str, blocks: tuple[int, int, int, int], unit_defaults: Positions) -> Spec:
    return Spec(
        name=name,
        blocks=blocks,
        num_mid=(64, 128, 256, 512),
        num_out=BOTTLENECK_OUT,
        strides=((1, 1, 1), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
        stem=_video_stem(32),
        temporal=((3,) * blocks[0], _odd(blocks[1]), _odd(blocks[2]), (1, 3, 1)),
        data_shape=(3, 8, 224, 224),
        num_classes=400,
        unit_defaults=unit_defaults,
        unit={"flavour": "video"},
        dropout=0.5,
        bn=VIDEO_BN,
    )


RESNET50_3D = _resnet_3d("RESNET50_3D", (3, 4, 6, 3), UNITS_R50)
RESNET101_3D = _resnet_3d("RESNET101_3D", (3, 4, 23, 3), UNITS_R101)

# The slow-only network of the Kinetics comparison in GCNet, as recalled from the SlowFast paper
# (Feichtenhofer et al., ICCV 2019, table 1, slow pathway; not verified here): temporal kernels in
# conv4 and conv5 only, time never strided, 8 frames at interval 8. Built from this project's
# pre-activation blocks, where the original is post-activation.
SLOWONLY = dataclasses.replace(
    RESNET50_3D,
    name="RESNET50_SLOWONLY",
    strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)),
    stem=Stem(64, (1, 7, 7), (1, 2, 2), (1, 3, 3), (1, 2, 2)),
    temporal=((1,) * 3, (1,) * 4, (3,) * 6, (3,) * 3),
)

# GCNet's single block: after the last block but one of conv4.
SINGLE = ((4, (5,)),)
# Five Non-local blocks (Wang et al. 2018, section 4): behind every other block of conv3 and conv4.
FIVE = ((3, (2, 4)), (4, (2, 4, 6)))


def _context_rows() -> tuple[Spec, ...]:
    """Rows of the context blocks' papers; where blocks sit is explained at the head of the file."""
    stages = (3, 4, 5)
    every = RESNET50.every_block(stages)
    return (
        RESNET50.with_context("resnet50_w-nl_0-1", Context("nl", {"ratio": 1 / 2}, SINGLE)),
        RESNET50.with_context(
            "resnet50_w-nl_0-3", Context("nl", {"ratio": 1 / 2}, ((4, (1, 3, 5)),))
        ),
        RESNET50.with_context("resnet50_w-snl_0-1", Context("snl", {}, SINGLE)),
        RESNET50.with_context(
            "resnet50_w-gc_0-1", Context("gc", {"ratio": 1 / 16}, SINGLE, "after")
        ),
        RESNET50.with_context("resnet50_w-gc", Context("gc", {"ratio": 1 / 16}, every)),
        SLOWONLY,
        SLOWONLY.with_context("RESNET50_SLOWONLY_NL5", Context("nl", {"ratio": 1 / 2}, FIVE)),
        SLOWONLY.with_context("RESNET50_SLOWONLY_SNL5", Context("snl", {}, FIVE)),
        SLOWONLY.with_context(
            "RESNET50_SLOWONLY_GC5", Context("gc", {"ratio": 1 / 4}, FIVE, "after")
        ),
        SLOWONLY.with_context("RESNET50_SLOWONLY_GC", Context("gc", {"ratio": 1 / 4}, every)),
    )


# For tests and quick trials; no published network. The same code path and stem as RESNET50_3D with
# few, narrow blocks, for clips of 8 x 64 x 64. What it needs to learn motion within a few epochs
# is the full width of the stem (16 filters there were too few) and little depth.
TINY_3D = dataclasses.replace(
    RESNET50_3D,
    name="TINY_3D",
    blocks=(1, 1, 1, 1),
    num_mid=(16, 32, 32, 32),
    num_out=(64, 96, 128, 128),
    temporal=((3,), (3,), (3,), (3,)),
    data_shape=(3, 8, 64, 64),
    num_classes=8,
    unit_defaults=((3, (1,)), (4, (1,))),
    dropout=0.0,
)

ROWS = (
    RESNET50_3D.with_units("RESNET50_GLORE", (2, 3), ("RESNET50_3D_GCN_X5",)),
    RESNET101_3D.with_units("RESNET101_GLORE", (2, 3), ("RESNET101_3D_GCN_X5",)),
    RESNET50_3D,
    RESNET101_3D,
    TINY_3D.with_units("TINY_GLORE", (1, 1)),
    TINY_3D,
    RESNET18,
    RESNET18.with_units("resnet18_w-glore_1-1", (1, 1)),
    RESNET34,
    RESNET34.with_units("resnet34_w-glore_0-3", (0, 3)),
    RESNET34.with_units("resnet34_w-glore_2-3", (2, 3)),
    RESNET18_V1,
    RESNET34_V1,
    RESNET50_V1B,
    RESNET101_V1B,
    RESNET50,
    RESNET50.with_units("resnet50_w-glore_0-3", (0, 3)),
    RESNET50.with_units("resnet50_w-glore_2-3", (2, 3)),
    SE_RESNET50,
    SE_RESNET50.with_units("resnet50_w-se_w-glore_0-3", (0, 3)),
    RESNET101,
    RESNET101.with_units("resnet101_w-glore_0-3", (0, 3)),
    RESNET101.with_units("resnet101_w-glore_2-3", (2, 3)),
    RESNET152,
    RESNET152.with_units("resnet152_w-glore_0-3", (0, 3)),
    RESNET152.with_units("resnet152_w-glore_2-3", (2, 3)),
    RESNET200,
    RESNET200.with_units("resnet200_w-glore_0-3", (0, 3)),
    RESNET200.with_units("resnet200_w-glore_2-3", (2, 3)),
    RESNEXT101,
    RESNEXT101.with_units("resnext101-32x4d_w-glore_2-3", (2, 3)),
    DPN92,
    DPN92.with_units("dpn92_w-glore_2-3", (2, 3)),
    DPN98,
    DPN98.with_units("dpn98_w-glore_2-3", (2, 3)),
    DPN131,
    DPN131.with_units("dpn131_w-glore_2-3", (2, 3)),
    *_context_rows(),
)

# For the demo and for tests; no published network. What it sees ends 37 pixels from a pixel, so
# that a plain FCN cannot know what the rest of an image holds.
TINY_2D = _resnet(
    "tiny",
    (1, 1, 1, 1),
    (),
    num_mid=(16, 16, 32, 32),
    num_out=(32, 64, 96, 128),
    **{**POST_ACTIVATION, "mean": MEAN, "std": STD, "stem": _image_stem(16)},
)
TINY_FCN = dataclasses.replace(
    TINY_2D.for_pixels(), head=PixelHead(64, auxiliary=32), data_shape=(3, 96, 128), num_classes=6
)

# Fully convolutional networks for semantic segmentation. Any other 2D row NAME is there as well, as
# ``fcn_NAME`` (:func:`network.builder.get_spec`).
PIXEL_ROWS = (
    RESNET50.for_pixels(),
    RESNET50.for_pixels("glore"),
    RESNET50.for_pixels("gc"),
    RESNET101.for_pixels(),
    RESNET101.for_pixels("glore"),
    TINY_FCN,
    dataclasses.replace(
        TINY_FCN, name="fcn_tiny_w-glore", head=TINY_FCN.head._replace(kind="glore")
    ),
)

# Detectors: Mask R-CNN as GCNet trains it. Any other 2D row NAME is there as well, as
# ``mask_rcnn_NAME``.
GC_R16 = Context("gc", {"ratio": 1 / 16}, RESNET50_V1B.every_block((3, 4, 5)))
GC_R16_101 = Context("gc", {"ratio": 1 / 16}, RESNET101_V1B.every_block((3, 4, 5)))
TINY_DETECTOR = dataclasses.replace(
    TINY_2D.for_boxes(),
    data_shape=(3, 160, 192),
    num_classes=3,
    detector=Detection(width=32, rpn=32, hidden=128, mask=32, mask_convs=2, anchor_scale=4.0),
)
BOX_ROWS = (
    RESNET50_V1B.for_boxes(),
    RESNET50_V1B.with_context("resnet50_v1b_w-gc", GC_R16).for_boxes(),
    RESNET101_V1B.for_boxes(),
    RESNET101_V1B.with_context("resnet101_v1b_w-gc", GC_R16_101).for_boxes(),
    TINY_DETECTOR,
    TINY_DETECTOR.with_context(
        "mask_rcnn_tiny_w-gc",
        Context("gc", {"ratio": 1 / 4}, TINY_2D.every_block((3, 4, 5))),
    ),
)

# Top-1 accuracy in per cent as the GloRe project's README states it (facebookresearch/GloRe):
# ImageNet-1k, and for the video networks single clips of Kinetics-400.
PUBLISHED_TOP1 = {
    "RESNET50_GLORE": 68.0,
    "RESNET101_GLORE": 69.2,
    **RELEASED,
}
