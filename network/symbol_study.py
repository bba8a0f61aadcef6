"""What studies need (``docs/res4-stability.md``, ``docs/understanding.md``), and no other network.

``report``
    The video form of the GloRe unit as a public reproduction on CUB-200-2011 changed it, which
    reported that training failed with it: the graph convolution mixes states first and relates
    nodes then, with neither shortcut nor relu, there are as many states as input channels, and the
    last batch normalisation starts like any other, with gamma 1.
``resnet18_v1_slim``
    A narrow network for its runs, tests and quick trials; no published one.
``local39``, ``local39_wide``, ``LOCAL41_3D``
    Networks whose cells see few pixels: 39 columns (in 3D 41) of an image of 64. What they cannot
    learn of distant figures (:mod:`dataset.relations`) a block must have brought in. The wide one
    has more parameters than the narrow one with any block.
"""

import dataclasses

from mxnet_compat import mx

from .specs import RESNET18_V1, VIDEO_BN, Spec, Stem
from .symbol_glore import FLAVOURS, Flavour, Step, Widths, default_sizes


def _reason(nodes: mx.sym.Symbol, relate: Step, mix: Step, name: str) -> mx.sym.Symbol:
    return relate(mix(nodes))


def _sizes(num_in: Widths) -> tuple[int, int]:
    return num_in if isinstance(num_in, int) else sum(num_in), default_sizes(num_in)[1]


FLAVOURS["report"] = Flavour(_reason, "last", sizes=_sizes)

LOCAL = Spec(
    name="local39",
    blocks=(1, 1, 1, 1),
    num_mid=(16, 16, 16, 16),
    num_out=(32, 32, 32, 32),
    strides=((1, 1),) * 4,
    stem=Stem(32, (3, 3), (2, 2), (3, 3), (2, 2)),
    data_shape=(3, 64, 64),
    num_classes=2,
    unit_defaults=((3, (1,)), (4, (1,))),
)
LOCAL_3D = dataclasses.replace(
    LOCAL,
    name="LOCAL41_3D",
    strides=((2, 1, 1), *((1, 1, 1),) * 3),
    stem=Stem(32, (3, 5, 5), (1, 2, 2), (1, 3, 3), (1, 2, 2)),
    temporal=((3,),) * 4,
    data_shape=(3, 8, 64, 64),
    unit={"flavour": "video"},
    bn=VIDEO_BN,
)

STUDY_ROWS = (
    LOCAL,
    dataclasses.replace(
        LOCAL,
        name="local39_wide",
        num_mid=(18,) * 4,
        num_out=(36,) * 4,
        stem=LOCAL.stem._replace(width=36),
    ),
    LOCAL_3D,
    dataclasses.replace(
        RESNET18_V1,
        name="resnet18_v1_slim",
        num_mid=(16, 32, 64, 128),
        num_out=(16, 32, 64, 128),
        stem=RESNET18_V1.stem._replace(width=16),
    ),
)
