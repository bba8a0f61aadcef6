"""Networks as MXNet symbols: see ``symbol_builder.get_symbol``."""

from .symbol_builder import InputConf, get_symbol, list_networks, logits
from .symbol_glore import GloRe_Unit

__all__ = ["GloRe_Unit", "InputConf", "get_symbol", "list_networks", "logits"]
