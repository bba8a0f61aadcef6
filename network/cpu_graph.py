"""A form of a graph whose BatchNorms can be trained on a CPU.

MXNet 1.9.1 with oneDNN raises ``Check failed: !is_view`` in the backward pass of a BatchNorm whose
input has not four dimensions, whenever oneDNN hands over a blocked memory layout, that is at
channel counts which are multiples of 8 (https://github.com/apache/mxnet/issues/20858,
https://github.com/apache/mxnet/issues/19150). A BatchNorm on the same numbers seen as a 4-D array
is the same function and is not affected. Builders therefore make the plain graph, which GPUs,
inference and export want, and ``block.py`` trains this form of it on a CPU.
"""

import json
from collections import defaultdict, deque

from glore_common import GloReError
from mxnet_compat import mx


class GraphError(GloReError):
    """A graph that cannot be rewritten or given shapes; the message names the node."""


def _four_dimensional(ndim):
    """Return the Reshape target that makes 4-D data of ``ndim``-D data, axes 0 and 1 kept."""
    # (n, c) -> (n, c, 1, 1); (n, c, l) -> (n, c, l, 1); (n, c, t, h, w) -> (n, c, t, h*w)
    return "(0, 0, 1, 1)" if ndim == 2 else "(0, 0, 0, -1)"


def _output_shapes(symbol, input_shapes):
    """Return {output name: shapes} of all internal outputs, in the order of the nodes."""
    internals = symbol.get_internals()
    try:
        _, shapes, _ = internals.infer_shape_partial(**input_shapes)
    except mx.MXNetError as error:
        raise GraphError(
            f"the graph does not take inputs of shapes {input_shapes}: {error}"
        ) from error
    found = defaultdict(deque)
    for name, shape in zip(internals.list_outputs(), shapes):
        found[name].append(shape)
    return found


def for_cpu_training(symbol, **input_shapes):
    """Return an equal graph that feeds every BatchNorm a 4-D array.

    A BatchNorm ``x`` on data that is not 4-D becomes Reshape ``x_to-4d``, BatchNorm ``x_4d`` and
    reshape_like ``x``: the result keeps the name of the node that it replaces, and so do internal
    outputs. Names and order of arguments, auxiliary states and outputs are those of ``symbol``;
    attributes are kept. Where all BatchNorms are 4-D the graph is returned unchanged.

    Parameters
    ----------
    symbol : mx.sym.Symbol
    **input_shapes : tuple of int
        Shapes of the inputs with the batch axis, such as ``data=(1, 3, 8, 224, 224)``. Only the
        number of dimensions that follows from them matters: other sizes run as well.

    Raises
    ------
    GraphError
        If the shapes do not fit the graph, do not say how many dimensions a BatchNorm has, or if
        a BatchNorm that must be wrapped normalises another axis than 1.
    """
    shapes = _output_shapes(symbol, input_shapes)
    graph = json.loads(symbol.tojson())
    nodes = []
    # moved[(node, output)] of the old graph -> [node, output, version] of the new one
    moved = {}

    def new_entry(entry):
        node, output, version = entry
        return moved.get((node, output)) or [place[node], output, version]

    place = {}
    changed = False
    for index, node in enumerate(graph["nodes"]):
        node = dict(node, inputs=[new_entry(entry) for entry in node["inputs"]])
        if "control_deps" in node:
            node["control_deps"] = [place[other] for other in node["control_deps"]]
        target = None
        if node["op"] == "BatchNorm":
            target = _wrap_target(node, shapes[f"{node['name']}_output"])
        if target is None:
            place[index] = len(nodes)
            nodes.append(node)
            continue
        changed = True
        name, data = node["name"], node["inputs"][0]
        first = len(nodes)
        flat = {"op": "Reshape", "name": f"{name}_to-4d", "attrs": {"shape": target}}
        nodes.append(dict(flat, inputs=[data]))
        nodes.append(dict(node, name=f"{name}_4d", inputs=[[first, 0, 0], *node["inputs"][1:]]))
        back = {"op": "reshape_like", "name": name, "inputs": [[first + 1, 0, 0], data]}
        nodes.append(back)
        # Outputs 1 and 2 (mean and variance) have one dimension and stay those of the BatchNorm.
        place[index] = first + 1
        moved[index, 0] = [first + 2, 0, 0]
    if not changed:
        return symbol
    rebuilt = {
        "nodes": nodes,
        "arg_nodes": [index for index, node in enumerate(nodes) if node["op"] == "null"],
        "heads": [new_entry(entry) for entry in graph["heads"]],
        "attrs": graph["attrs"],
    }
    return mx.sym.load_json(json.dumps(rebuilt))


def _wrap_target(node, shapes):
    """Return the 4-D Reshape target for a BatchNorm node, or None when it can stay as it is."""
    shape = shapes.popleft() if shapes else ()
    if not shape:
        raise GraphError(
            f"BatchNorm {node['name']}: the number of dimensions of its input does not follow "
            "from the input shapes given; give the shape of every input."
        )
    if len(shape) == 4:
        return None
    axis = int(node.get("attrs", {}).get("axis", 1))
    if axis not in (1, 1 - len(shape)):
        raise GraphError(
            f"BatchNorm {node['name']} normalises axis {axis} of {len(shape)}-D data; on a CPU "
            "only axis 1 can be trained."
        )
    return _four_dimensional(len(shape))
