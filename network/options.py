"""Options of the network: which one, what is changed in it, and what it starts from."""

import dataclasses
from typing import Any, Optional

from glore_options import Options, number, option, width

from .symbol_context import CONTEXT_KINDS
from .symbol_glore import FLAVOURS, UNIT_SETTINGS


@dataclasses.dataclass
class ArchitectureOptions(Options):
    """Which network, and its overrides: those of :func:`network.builder.get_symbol`."""

    title = "network"

    network: Optional[str] = option(None, "see docs/networks.md", aliases=("--net-type",))
    glore: Optional[str] = option(
        None,
        "GloRe units: '2-3' (that many in conv3 and conv4), '3:1,3;4:1,3,5', 'c4', each with "
        f"settings ({', '.join(UNIT_SETTINGS)}) as in '2-3:num_node=16', or none (default: the "
        "network's own)",
        metavar="UNITS",
    )
    block: Optional[str] = option(
        None,
        f"blocks of the kinds {', '.join(CONTEXT_KINDS)}, glore with places and settings: 'gc', "
        "'gc@c3-c5/inside:ratio=1/4,nl@4:5:mode=dot_product', or none (default: the network's own)",
        metavar="BLOCKS",
    )
    num_node: Optional[int] = option(
        None, "nodes of each GloRe unit", kind=width, aliases=("--nodes",)
    )
    num_state: Optional[int] = option(None, "states of each GloRe unit", kind=width)
    normalize: Optional[bool] = option(None, "GloRe units divide by the number of positions")
    glore_flavour: Optional[str] = option(
        None,
        "form of the GloRe units: video starts as the identity; released is that of the ImageNet "
        "networks; report is a public reproduction's, which trains worse than no unit (default: "
        "the network's own)",
        choices=tuple(FLAVOURS),
    )
    dropout: Optional[float] = option(
        None,
        "before the classifier (default: the network's own, 0.5 in 3D and none in 2D)",
        kind=number(float, 0.0, 0.999),
    )

    def overrides(self) -> dict[str, Any]:
        """Return the keywords for ``get_symbol`` that are asked for."""
        names = (field.name for field in dataclasses.fields(ArchitectureOptions))
        given = {name: getattr(self, name) for name in names if name != "network"}
        return {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass
class NetworkOptions(ArchitectureOptions):
    """Which network, its overrides, and what its weights start from."""

    pretrained: str = option(
        "",
        "start from these weights: an MXNet prefix or .params, a PyTorch .pth, or the name of a "
        "released network; without a value gluoncv's for this network; a 2D network's kernels are "
        "inflated for a 3D one",
        metavar="FILE|NAME",
        const="zoo",
    )
    pretrained_classes: Optional[str] = option(
        None,
        "mapping table of --pretrained, rows 'label<TAB>name': classes of the same name keep their "
        "part of the classifier (default: the classes that its manifest names)",
        metavar="FILE",
    )
    fresh_units: bool = option(
        False, "units and context blocks that --pretrained lacks start afresh"
    )
    fine_tune: bool = option(False, "all layers but the classifier learn at half the learning rate")
