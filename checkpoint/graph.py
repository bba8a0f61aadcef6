"""A graph with its parameters, in MXNet's own form.

That of the released ImageNet weights and of ``Module`` users: a graph ``PREFIX-symbol.json`` and
parameters ``PREFIX-0012.params`` whose names begin with ``arg:`` or ``aux:``.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from glore_common import write_text
from mxnet_compat import mx

from .graph_check import is_known, make_float32, parse_graph, try_graph
from .params import CheckpointError, check, read_params, split, write_params
from .paths import SYMBOL, epoch_files, find


def read_symbol(path: str) -> mx.sym.Symbol:
    """Return the graph in a ``-symbol.json`` file.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated or no graph of MXNet.
    """
    graph = parse_graph(path)
    try:
        return mx.sym.load_json(json.dumps(graph))
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} is not understood by MXNet: {reason}") from error


class Normalisation(NamedTuple):
    """What a BatchNorm of a graph does beside its parameters."""

    fix_gamma: bool
    eps: float
    var: str


def normalisations(symbol: mx.sym.Symbol) -> dict[str, Normalisation]:
    """Return {name of its gamma: a BatchNorm's constants} of a graph, with MXNet's defaults."""
    nodes = json.loads(symbol.tojson())["nodes"]
    found = {}
    for node in nodes:
        if "BatchNorm" in node["op"]:
            attributes = node.get("attrs", {})
            _, gamma, _, _, var = (nodes[entry[0]]["name"] for entry in node["inputs"][:5])
            fixed = attributes.get("fix_gamma", "True") in ("True", "1")
            found[gamma] = Normalisation(fixed, float(attributes.get("eps", 1e-3)), var)
    return found


def as_float32(symbol: mx.sym.Symbol) -> Optional[mx.sym.Symbol]:
    """Return a graph that computes in float32 what ``symbol`` does in float16; None: nothing."""
    content = json.loads(symbol.tojson())
    return mx.sym.load_json(json.dumps(content)) if make_float32(content) else None


def write_symbol(path: str, symbol: mx.sym.Symbol) -> None:
    """Write a graph, unless the file holds it already."""
    text = symbol.tojson()
    if os.path.exists(path):
        with open(path, encoding="utf-8") as stream:
            if stream.read() == text:
                return
    write_text(path, text)


def save(
    prefix: str,
    epoch: int,
    symbol: mx.sym.Symbol,
    arg_params: Mapping[str, Any],
    aux_params: Optional[Mapping[str, Any]] = None,
) -> str:
    """Write a checkpoint in MXNet's own form; each file appears whole or not at all.

    Parameters
    ----------
    prefix
        Path without ``-symbol.json``; its folder is made.
    epoch
        Number in the name of the parameters' file.
    symbol
        The plain network, whose parameters must all be there, and no others.
    arg_params
        Name to NDArray or NumPy array; all parameters when ``aux_params`` is not given.
    aux_params
        The auxiliary states.

    Returns
    -------
    str
        Path of the parameters.

    Raises
    ------
    CheckpointError
        If names do not fit the symbol.
    """
    if aux_params is None:
        arg_params, aux_params = split(arg_params, "the parameters", symbol)
    check(symbol, arg_params, aux_params, None)
    write_symbol(prefix + SYMBOL, symbol)
    arrays = {f"arg:{name}": value for name, value in arg_params.items()}
    arrays.update({f"aux:{name}": value for name, value in aux_params.items()})
    path = epoch_files(prefix, epoch).params
    write_params(path, arrays)
    return path


def try_unknown(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Try a graph in a process of its own, unless it has this project's operators only.

    Raises
    ------
    CheckpointError
        If it does not run.
    """
    if not is_known(parse_graph(path)):
        try_graph(path, shapes)


def load(prefix: str, epoch: Optional[int] = None) -> tuple[mx.sym.Symbol, dict, dict]:
    """Load a checkpoint with its own graph.

    Parameters
    ----------
    prefix, epoch
        See :func:`checkpoint.paths.find`.

    Returns
    -------
    symbol, arg_params, aux_params
        The graph; name to NDArray on the CPU.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the parameters' names are not those of the graph.
    """
    files = find(prefix, epoch)
    symbol = read_symbol(files.symbol)
    arg_params, aux_params = split(read_params(files.params), files.params, symbol)
    check(symbol, arg_params, aux_params, None, where=files.params)
    return symbol, _ndarrays(arg_params), _ndarrays(aux_params)


def _ndarrays(params: Mapping[str, Any]) -> dict[str, mx.nd.NDArray]:
    return {
        name: mx.nd.array(value, ctx=mx.cpu(), dtype=value.dtype) for name, value in params.items()
    }
