"""The BatchNorms of a graph: of each device, of all devices together, or with frozen statistics."""

import json
import re
from collections.abc import Sequence
from typing import Optional

from glore_common import UsageError
from mxnet_compat import mx

KINDS = ("local", "sync", "frozen")
_KEPT = ("eps", "momentum", "fix_gamma", "use_global_stats", "output_mean_var")


def with_batch_norm(
    symbol: mx.sym.Symbol,
    kind: str,
    contexts: Sequence[mx.Context],
    frozen: Optional[str] = None,
) -> mx.sym.Symbol:
    """Return a graph with its BatchNorms replaced; parameters and names stay.

    Parameters
    ----------
    symbol
        With plain ``BatchNorm`` nodes.
    kind : {'local', 'sync', 'frozen'}
        ``sync``: MXNet's ``SyncBatchNorm`` takes mean and variance over the devices of this
        process (not of other workers). ``frozen``: the running statistics are used in training
        as well, and stay as they are.
    contexts
        The devices.
    frozen
        Regular expression of the beginning of names: these BatchNorms are frozen in any case.

    Raises
    ------
    UsageError
        For another kind; for ``sync`` on several devices of a CPU, where MXNet 1.9.1 blocks for
        ever as soon as a graph has two SyncBatchNorms (measured); or for a BatchNorm over an axis
        that SyncBatchNorm does not take.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of BatchNorm {kind!r}; known are {', '.join(KINDS)}")
    if kind == "sync" and len(contexts) == 1:
        kind = "local"
    if kind == "local" and frozen is None:
        return symbol
    if kind == "sync" and any(context.device_type != "gpu" for context in contexts):
        raise UsageError(
            "synchronised BatchNorm is for GPUs: MXNet 1.9.1 blocks for ever on several devices of "
            "a CPU"
        )
    graph = json.loads(symbol.tojson())
    for node in graph["nodes"]:
        if node["op"] != "BatchNorm":
            continue
        attributes = node.setdefault("attrs", {})
        if kind == "frozen" or (frozen is not None and re.match(frozen, node["name"])):
            attributes["use_global_stats"] = "True"
            continue
        if kind == "local":
            continue
        if int(attributes.get("axis", 1)) != 1:
            raise UsageError(f"BatchNorm {node['name']} cannot be synchronised: its axis is not 1")
        kept = {name: attributes[name] for name in _KEPT if name in attributes}
        # The key is what the devices find one another by.
        node["op"] = "_contrib_SyncBatchNorm"
        node["attrs"] = {**kept, "ndev": str(len(contexts)), "key": node["name"]}
    return mx.sym.load_json(json.dumps(graph))
