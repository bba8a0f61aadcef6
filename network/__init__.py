"""Networks as MXNet symbols (``symbol_builder.get_symbol``), and their units as Gluon blocks."""

from .builder import InputConf, get_symbol, list_networks, logits
from .gluon_blocks import GCBlock, GloRe, NonLocal, SEBlock, SNLBlock
from .specs import Context
from .symbol_context import GC_Block, NL_Block, SE_Block, SNL_Block, context_block
from .symbol_glore import GloRe_Unit

__all__ = [
    "Context",
    "GCBlock",
    "GC_Block",
    "GloRe",
    "GloRe_Unit",
    "InputConf",
    "NL_Block",
    "NonLocal",
    "SEBlock",
    "SE_Block",
    "SNLBlock",
    "SNL_Block",
    "context_block",
    "get_symbol",
    "list_networks",
    "logits",
]
