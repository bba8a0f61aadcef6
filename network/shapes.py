"""Shapes of every value of a graph, and its nodes with them."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoint.params import infer_shapes
from glore_common import UsageError
from mxnet_compat import mx

Shape = tuple[int, ...]


def input_shapes(inputs: Any) -> dict[str, Shape]:
    """Return the input shapes that an InputConf (one sample) or a mapping stands for."""
    if hasattr(inputs, "data_shape"):
        return getattr(inputs, "shapes", {"data": (1, *inputs.data_shape)})
    if isinstance(inputs, Mapping):
        return {name: tuple(shape) for name, shape in inputs.items()}
    raise UsageError(
        "Shapes are given as an InputConf or as a mapping from input name to shape with the batch "
        f"axis, not as {inputs!r}."
    )


def value_shapes(symbol: mx.sym.Symbol, inputs: Any) -> dict[str, Shape]:
    """Return the shape of every value of a graph.

    Parameters
    ----------
    symbol
        Any graph.
    inputs : InputConf, or mapping of str to tuple of int
        Input shapes; a mapping includes the batch axis, an InputConf stands for one sample.

    Returns
    -------
    dict
        Shapes by output name (``{node}_output``) or variable name.

    Raises
    ------
    UsageError
        When the shapes do not fit the graph or do not determine all of it.
    """
    shapes = dict(infer_shapes(symbol, input_shapes(inputs)))
    unknown = [name for name, shape in shapes.items() if not shape or 0 in shape]
    if unknown:
        raise UsageError(
            f"the shape of {unknown[0]} does not follow from {input_shapes(inputs)}; give the "
            "shape of every input of the network"
        )
    return shapes


class Node(NamedTuple):
    """An operation of a graph.

    Attributes
    ----------
    name, op
    attrs
    inputs
        Names of the nodes and variables that it reads.
    shapes
        Shapes of what it reads.
    shape
        Shape of what it computes (of the first output, where it has more).
    """

    name: str
    op: str
    attrs: dict[str, str]
    inputs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    shape: Shape


def operations(symbol: mx.sym.Symbol, inputs: Any) -> list[Node]:
    """Return the operations of a graph in the order in which they run.

    Parameters
    ----------
    symbol
    inputs : InputConf, or mapping of str to tuple of int
        See :func:`value_shapes`, which also says what is raised.
    """
    shapes = value_shapes(symbol, inputs)
    nodes = json.loads(symbol.tojson())["nodes"]

    def shape_of(index: int) -> Shape:
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
