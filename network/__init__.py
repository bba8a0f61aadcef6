"""Networks as MXNet symbols (:func:`get_symbol`), and their units as Gluon blocks.

Words: a *residual block* is one of a stage's (``conv4_B05``), a *context block* or *GloRe unit* is
put into or behind one, a *Gluon block* is MXNet's; a *context* is a context block unless ``mx.``
stands before it.
"""

from .builder import InputConf, get_spec, get_symbol, list_networks, logits
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
    "get_spec",
    "get_symbol",
    "list_networks",
    "logits",
]
