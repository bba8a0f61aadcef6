"""A graph whose nodes can be taken out, put in and exchanged."""

import dataclasses
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

from checkpoint.params import infer_shapes
from mxnet_compat import mx

Shape = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Node:
    """An operation, or a variable (``op`` is 'null').

    Attributes
    ----------
    op, name
    attrs
        As in the graph's JSON: all values are text.
    inputs
        What it reads.
    shape
        Of its first output; () where it does not follow from the shapes given, and for nodes that
        were put in.
    after
        Nodes that must run before it though it does not read them.
    parts
        Graphs that it consists of, as JSON has them.
    """

    op: str
    name: str
    attrs: dict[str, str] = dataclasses.field(default_factory=dict)
    inputs: list["Value"] = dataclasses.field(default_factory=list)
    shape: Shape = ()
    after: list["Node"] = dataclasses.field(default_factory=list)
    parts: list[Any] = dataclasses.field(default_factory=list)

    def numbers(self, attribute: str, default: Shape = ()) -> Shape:
        """Return an attribute that is a tuple of whole numbers."""
        text = self.attrs.get(attribute, "").strip("()[] ")
        return tuple(int(part) for part in text.split(",") if part.strip()) or default

    def flag(self, attribute: str) -> bool:
        """Return an attribute that is a truth value, False where it is not set."""
        return self.attrs.get(attribute, "False") in ("True", "true", "1")


class Value(NamedTuple):
    """An output of a node."""

    node: Node
    output: int = 0


class Graph:
    """The nodes of a Symbol.

    Parameters
    ----------
    symbol
    input_shapes
        Shape of each input with its batch axis: the nodes then know their shapes.

    Raises
    ------
    UsageError
        If the graph does not take inputs of these shapes.
    """

    def __init__(
        self, symbol: mx.sym.Symbol, input_shapes: Optional[Mapping[str, Shape]] = None
    ) -> None:
        content = json.loads(symbol.tojson())
        self._attrs = content["attrs"]
        nodes: list[Node] = []
        for item in content["nodes"]:
            inputs = [Value(nodes[source], output) for source, output, _ in item["inputs"]]
            node = Node(item["op"], item["name"], dict(item.get("attrs", {})), inputs)
            node.parts = item.get("subgraphs", [])
            node.after = [nodes[other] for other in item.get("control_deps", ())]
            nodes.append(node)
        self.heads = [Value(nodes[node], output) for node, output, _ in content["heads"]]
        if input_shapes is not None:
            # Nodes may have one name; their outputs stand in the order of the nodes.
            found: defaultdict[str, deque] = defaultdict(deque)
            for name, shape in infer_shapes(symbol, input_shapes):
                found[name].append(shape)
            for node in nodes:
                for name in output_names(node):
                    if found.get(name):
                        node.shape = found[name].popleft()
                        break

    def nodes(self) -> list[Node]:
        """Return the nodes that the outputs need, each behind what it reads."""
        order: dict[Node, None] = {}
        stack = [(value.node, False) for value in reversed(self.heads)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.setdefault(node)
            elif node not in order:
                stack.append((node, True))
                stack += [(other, False) for other in reversed(node.after)]
                stack += [(value.node, False) for value in reversed(node.inputs)]
        return list(order)

    def readers(self) -> dict[Node, list[Node]]:
        """Return who reads each node: once for each time it is read, the outputs not among them."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes()}
        for node in list(found):
            for value in node.inputs:
                found[value.node].append(node)
        return found

    def exchange(self, old: Node, new: Value) -> None:
        """Let everybody that reads the first output of ``old`` read ``new`` instead.

        What ``new`` itself is made of keeps reading ``old``.
        """
        spared = ancestors(new.node)
        for node in self.nodes():
            if node not in spared:
                node.inputs = [new if value == (old, 0) else value for value in node.inputs]
        self.heads = [new if value == (old, 0) else value for value in self.heads]

    def symbol(self) -> mx.sym.Symbol:
        """Return the graph as a Symbol."""
        nodes = self.nodes()
        place = {node: index for index, node in enumerate(nodes)}
        items: list[dict[str, Any]] = []
        for node in nodes:
            inputs = [[place[value.node], value.output, 0] for value in node.inputs]
            item: dict[str, Any] = {"op": node.op, "name": node.name, "inputs": inputs}
            if node.attrs:
                item["attrs"] = node.attrs
            if node.parts:
                item["subgraphs"] = node.parts
            if node.after:
                item["control_deps"] = [place[other] for other in node.after]
            items.append(item)
        content = {
            "nodes": items,
            "arg_nodes": [index for index, node in enumerate(nodes) if node.op == "null"],
            "heads": [[place[value.node], value.output, 0] for value in self.heads],
            "attrs": self._attrs,
        }
        return mx.sym.load_json(json.dumps(content))


def output_names(node: Node) -> tuple[str, ...]:
    """Return what MXNet may call the first output of a node."""
    return (node.name,) if node.op == "null" else (f"{node.name}_output", f"{node.name}_output0")


def ancestors(node: Node) -> set[Node]:
    """Return a node and all that it is made of."""
    found, stack = {node}, [node]
    while stack:
        for value in stack.pop().inputs:
            if value.node not in found:
                found.add(value.node)
                stack.append(value.node)
    return found


def count_operations(symbol: mx.sym.Symbol) -> dict[str, int]:
    """Return how many nodes of each kind a graph has, variables left out."""
    counts: defaultdict[str, int] = defaultdict(int)
    for node in Graph(symbol).nodes():
        if node.op != "null":
            counts[node.op] += 1
    return dict(counts)


def nodes_of(nodes: Iterable[Node], op: str) -> list[Node]:
    """Return the nodes of one kind."""
    return [node for node in nodes if node.op == op]
