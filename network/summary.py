"""Parameters and multiply-adds of a network, counted from its graph and its inferred shapes.

``python -m network.summary [NAME ...]`` prints a table in Markdown.
"""

import argparse
import dataclasses
import json
import math
import sys

from glore_common import UsageError, run_main
from mxnet_compat import mx

from .specs import PUBLISHED_TOP1
from .symbol_builder import get_spec, get_symbol, list_networks


@dataclasses.dataclass(frozen=True)
class Count:
    """Cost of one forward pass of one sample.

    Attributes
    ----------
    params : int
        Learnt parameters.
    stats : int
        Running statistics of batch normalisations.
    macs_of : dict of str to int
        Multiply-adds per node, in graph order, of convolutions, fully connected layers and
        matrix products (biases, normalisation, activations and pooling are not counted).
    """

    params: int
    stats: int
    macs_of: dict[str, int]

    @property
    def params_with_stats(self):
        """Learnt parameters and running statistics: what a checkpoint holds."""
        return self.params + self.stats

    @property
    def macs(self):
        """Multiply-adds of the whole network."""
        return sum(self.macs_of.values())


def _input_shapes(inputs):
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
    shapes = _input_shapes(inputs)
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


def _is_true(text):
    return text in ("1", "True", "true")


def node_macs(node, inputs, output):
    """Return the multiply-adds of one graph node.

    Parameters
    ----------
    node : dict
        A node of the graph's JSON: ``op``, ``attrs``.
    inputs : list of tuple of int
        Shapes that it reads.
    output : tuple of int
        Shape that it writes.
    """
    if node["op"] == "Convolution":
        # The weight is (filters, channels / groups, *kernel).
        return math.prod(output) * math.prod(inputs[1][1:])
    if node["op"] == "FullyConnected":
        return math.prod(output) * inputs[1][1]
    # (b, m, k) x (b, k, n): k is the last axis of the left factor unless it is transposed.
    left = inputs[0]
    inner = left[-2] if _is_true(node.get("attrs", {}).get("transpose_a", "False")) else left[-1]
    return math.prod(output) * inner


COUNTED = ("Convolution", "FullyConnected", "batch_dot")


def count(symbol, inputs):
    """Count parameters and multiply-adds of a graph.

    Parameters
    ----------
    symbol : Symbol
        Any graph, with a softmax at its end or not.
    inputs : InputConf, or mapping of str to tuple of int
        Input shapes, see :func:`infer`. Multiply-adds are those of the whole batch.

    Returns
    -------
    Count

    Raises
    ------
    UsageError
        As :func:`infer`.
    """
    shapes = infer(symbol, inputs)
    # Inputs are what the caller gave a shape, and the label, which no layer learns.
    given = set(_input_shapes(inputs))
    params = sum(
        math.prod(shapes[name])
        for name in symbol.list_arguments()
        if name not in given and not name.endswith("_label")
    )
    stats = sum(math.prod(shapes[name]) for name in symbol.list_auxiliary_states())
    nodes = json.loads(symbol.tojson())["nodes"]

    def shape_of(index):
        node = nodes[index]
        return shapes[node["name"] if node["op"] == "null" else f"{node['name']}_output"]

    macs_of = {}
    for index, node in enumerate(nodes):
        if node["op"] in COUNTED:
            # Only the first two inputs matter, and both have one output each: a value or weight.
            sources = [shape_of(source) for source, _, _ in node["inputs"][:2]]
            macs_of[node["name"]] = node_macs(node, sources, shape_of(index))
    return Count(params, stats, macs_of)


def table(names):
    """Return a Markdown table of networks at their default input, one row per name."""
    rows = [
        "| network | input | parameters, M | multiply-adds, G | published top-1, % |",
        "|---|---|---:|---:|---:|",
    ]
    for name in names:
        name = get_spec(name).name
        symbol, input_conf = get_symbol(name)
        counted = count(symbol, input_conf)
        shape = " x ".join(map(str, input_conf.data_shape[1:]))
        published = PUBLISHED_TOP1.get(name, "")
        rows.append(
            f"| `{name}` | {shape} | {counted.params / 1e6:.2f} | {counted.macs / 1e9:.2f} | "
            f"{published} |"
        )
    return "\n".join(rows)


def main(argv=None):
    """Print the table of the networks named on the command line, or of all."""
    parser = argparse.ArgumentParser(prog="python -m network.summary", description=table.__doc__)
    parser.add_argument("networks", nargs="*", metavar="NAME", help="default: all")
    print(table(parser.parse_args(argv).networks or list_networks()))


if __name__ == "__main__":
    sys.exit(run_main(main))
