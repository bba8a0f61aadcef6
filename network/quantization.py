"""INT8 forms of a graph: which ranges its layers' numbers have, and the graph that computes so.

oneDNN multiplies 8-bit whole numbers several times as fast as floats where a processor has VNNI. A
layer's inputs and outputs are rounded to 255 steps over a range that is known beforehand: from
samples that the plain graph computes (calibration). MXNet keeps weights as floats and rounds them
when a network is first used, so that an INT8 network is no smaller on disk; what is kept of one is
its :class:`Int8`. (https://mxnet.apache.org/versions/1.9.1/api/python/docs/tutorials/performance/
backend/mkldnn/mkldnn_quantization.html)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from checkpoint.params import CheckpointError
from glore_common import GloReError
from mxnet_compat import mx

from .rewriting import Graph

MODES = ("naive", "entropy")
# MXNet's name of the passes that join nodes to those of oneDNN with an INT8 form.
BACKEND = "MKLDNN_QUANTIZE"
LAYERS = ("_sg_mkldnn_conv", "_sg_mkldnn_fully_connected")


@dataclasses.dataclass(frozen=True)
class Int8:
    """What makes an INT8 network of a plain one.

    Attributes
    ----------
    ranges
        Least and largest number of each output that is rounded, by its name in the graph.
    floats
        Layers that stay in float32.
    """

    ranges: Mapping[str, tuple[float, float]]
    floats: tuple[str, ...] = ()


def joined(graph: mx.sym.Symbol) -> mx.sym.Symbol:
    """Return a graph of :func:`network.inference.optimize` with the nodes that can be INT8."""
    changed = Graph(graph)
    for node in changed.nodes():
        if node.op == "Activation" and node.attrs["act_type"] == "sigmoid":
            # MXNet has no INT8 form of it, and complains of each.
            node.op, node.attrs = "sigmoid", {}
    return changed.symbol().get_backend_symbol(BACKEND)


def layers_of(graph: mx.sym.Symbol) -> dict[str, str]:
    """Return the nodes of a joined graph that are computed in INT8, by the layer's own name."""
    found = {}
    for node in Graph(graph).nodes():
        if node.op in LAYERS:
            weight = next(v.node.name for v in node.inputs if v.node.name.endswith("weight"))
            found[weight.removesuffix("_weight").removesuffix("_optimized")] = node.name
    return found


def _rounded(
    graph: mx.sym.Symbol, args: Mapping, auxs: Mapping, floats: Iterable[str], mode: str
) -> tuple:
    """Return MXNet's (graph, parameters, states, collector of ranges), not calibrated."""
    from mxnet.contrib.quantization import quantize_graph

    nodes = layers_of(graph)
    unknown = sorted(set(floats) - set(nodes))
    if unknown:
        raise CheckpointError(f"the network has no layers {', '.join(unknown)} to leave in float")
    return quantize_graph(
        graph,
        args,
        auxs,
        excluded_sym_names=[nodes[name] for name in floats],
        calib_mode=mode,
        quantized_dtype="auto",
        quantize_mode="smart",
        quantize_granularity="tensor-wise",
    )


def calibrate(
    graph: mx.sym.Symbol,
    args: Mapping[str, mx.nd.NDArray],
    auxs: Mapping[str, mx.nd.NDArray],
    batches: Iterable[mx.nd.NDArray],
    mode: str = "naive",
) -> Int8:
    """Find the ranges of a graph's outputs on samples.

    Parameters
    ----------
    graph
        From :func:`joined`.
    args, auxs
        Its parameters.
    batches
        Data (n, …).
    mode
        'naive': from the least to the largest number; 'entropy': the range whose rounded numbers
        are distributed most like the floats (Kullback-Leibler divergence), which cuts outliers off.

    Raises
    ------
    GloReError
        If there are no samples, or if they give numbers that are not finite.
    """
    from mxnet.contrib import quantization

    collector = _rounded(graph, args, auxs, (), mode)[-1]
    # Of all outputs: which are rounded depends on the layers that stay in float32.
    params = {*args, *auxs}
    outputs = [name for name in graph.get_internals().list_outputs() if name not in params]
    collector.include_layer = {*collector.include_layer, *outputs}
    executor, shape = None, ()
    for data in batches:
        if data.shape != shape:
            shape = data.shape
            executor = graph.simple_bind(mx.cpu(), grad_req="null", data=data.shape)
            executor.copy_params_from(args, auxs)
            executor.set_monitor_callback(collector.collect, monitor_all=True)
        executor.forward(is_train=False, data=data)
        mx.nd.waitall()
    if executor is None:
        raise GloReError("there are no samples to calibrate with")
    if mode == "entropy":
        found = quantization._get_optimal_thresholds(collector.hist_dict, "auto")
    else:
        found = collector.min_max_dict
    ranges = {name: (_number(low), _number(high)) for name, (low, high) in found.items()}
    if not np.isfinite(list(ranges.values())).all():
        raise GloReError("the samples give numbers that are not finite")
    return Int8(ranges)


def _number(value: Any) -> float:
    """Return a number that MXNet gives as such or as an array of one."""
    return float(np.ravel(value)[0])


def quantize(
    graph: mx.sym.Symbol,
    args: Mapping[str, mx.nd.NDArray],
    auxs: Mapping[str, mx.nd.NDArray],
    int8: Int8,
) -> tuple[mx.sym.Symbol, dict[str, Any], dict[str, Any]]:
    """Return the INT8 graph, its parameters and its states.

    Parameters
    ----------
    graph
        From :func:`joined`.
    args, auxs
        Its parameters.
    int8

    Raises
    ------
    CheckpointError
        If the ranges are another graph's.
    """
    from mxnet.contrib.quantization import calib_graph

    result, _, _, collector = _rounded(graph, args, auxs, int8.floats, "naive")
    missing = sorted(set(collector.include_layer) - set(int8.ranges))
    if missing:
        raise CheckpointError(
            f"there are no ranges for {len(missing)} of the network's outputs, such as "
            f"{missing[0]}: they were found for another network, or by another version"
        )
    collector.min_max_dict = dict(int8.ranges)
    result, params, states = calib_graph(
        result, args, auxs, collector, calib_mode="naive", quantized_dtype="auto", logger=None
    )
    return result.get_backend_symbol(BACKEND), dict(params), dict(states)
