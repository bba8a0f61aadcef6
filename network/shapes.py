"""Shapes of every value of a graph, and its nodes with them."""

import json
from typing import NamedTuple

from glore_common import UsageError
from mxnet_compat import mx


def input_shapes(inputs):
    """Return the input shapes that an InputConf (one sample) or a mapping stands for."""
    if hasattr(inputs, "data_shape"):
        return {"data": (1, *inputs.data_shape)}
    if hasattr(inputs, "items"):
        return {name: tuple(shape) for name, shape in inputs.items()}
    raise UsageError(
        "Shapes are given as an InputConf or as a mapping from input name to shape with the batch "
        f"axis, not as {inputs!r}."
    )


def infer(symbol, inputs):
    """Infer the shape of every value of a graph.

    Parameters
    ----------
    symbol : Symbol
        Any graph.
    inputs : InputConf, or mapping of str to tuple of int
        Input shapes; a mapping includes the batch axis, an InputConf stands for one sample.

    Returns
    -------
    dict of str to tuple of int
        Shapes by output name (``{node}_output``) or variable name.

    Raises
    ------
    UsageError
        When the shapes do not fit the graph or do not determine all of it.
    """
    shapes = input_shapes(inputs)
    unknown = sorted(set(shapes) - set(symbol.list_inputs()))
    if unknown:
        raise UsageError(f"The graph has no input named {', '.join(unknown)}.")
    internals = symbol.get_internals()
    try:
        _, outputs, _ = internals.infer_shape_partial(**shapes)
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"The input shapes {shapes} do not fit the graph: {reason}") from error
    # An unknown shape is () or holds zeros.
    if outputs is None or not all(shape and 0 not in shape for shape in outputs):
        raise UsageError(f"The input shapes {shapes} do not determine the shapes of the graph.")
    return dict(zip(internals.list_outputs(), outputs))


class Node(NamedTuple):
    """An operation of a graph.

    Attributes
    ----------
    name, op : str
    attrs : dict of str to str
    inputs : tuple of str
        Names of the nodes and variables that it reads.
    shapes : tuple of tuple of int
        Shapes of what it reads.
    shape : tuple of int
        Shape of what it computes (of the first output, where it has more).
    """

    name: str
    op: str
    attrs: dict
    inputs: tuple
    shapes: tuple
    shape: tuple


def operations(symbol, inputs):
    """Return the operations of a graph in the order in which they run.

    Parameters
    ----------
    symbol : Symbol
    inputs : InputConf, or mapping of str to tuple of int
        See :func:`infer`.

    Returns
    -------
    list of Node

    Raises
    ------
    UsageError
        As :func:`infer`.
    """
    shapes = infer(symbol, inputs)
    nodes = json.loads(symbol.tojson())["nodes"]

    def shape_of(index):
        name = nodes[index]["name"]
        if nodes[index]["op"] == "null":
            return shapes[name]
        # Operations with several outputs number them.
        return shapes.get(f"{name}_output", shapes.get(f"{name}_output0", ()))

    found = []
    for index, node in enumerate(nodes):
        if node["op"] == "null":
            continue
        sources = [source for source, _, _ in node["inputs"]]
        found.append(
            Node(
                node["name"],
                node["op"],
                node.get("attrs", {}),
                tuple(nodes[source]["name"] for source in sources),
                tuple(shape_of(source) for source in sources),
                shape_of(index),
            )
        )
    return found
