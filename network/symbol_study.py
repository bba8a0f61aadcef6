"""What the study of failing training needs (``docs/res4-stability.md``), and no other network.

``report``
    The video form of the GloRe unit as a public reproduction on CUB-200-2011 changed it, which
    reported that training failed with it: the graph convolution mixes states first and relates
    nodes then, with neither shortcut nor relu, there are as many states as input channels, and the
    last batch normalisation starts like any other, with gamma 1.
``resnet18_v1_slim``
    A narrow network for its runs, tests and quick trials; no published one.
"""

import dataclasses

from mxnet_compat import mx

from .specs import RESNET18_V1
from .symbol_glore import FLAVOURS, Flavour, Step, Widths, default_sizes


def _reason(nodes: mx.sym.Symbol, relate: Step, mix: Step, name: str) -> mx.sym.Symbol:
    return relate(mix(nodes))


def _sizes(num_in: Widths) -> tuple[int, int]:
    return num_in if isinstance(num_in, int) else sum(num_in), default_sizes(num_in)[1]


FLAVOURS["report"] = Flavour(_reason, "last", sizes=_sizes)

STUDY_ROWS = (
    dataclasses.replace(
        RESNET18_V1,
        name="resnet18_v1_slim",
        num_mid=(16, 32, 64, 128),
        num_out=(16, 32, 64, 128),
        stem=RESNET18_V1.stem._replace(width=16),
    ),
)
