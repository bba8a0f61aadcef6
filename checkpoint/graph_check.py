"""Whether a graph from elsewhere may be given to MXNet, which trusts what a file says.

An output that is not there is a segmentation fault in MXNet 1.9.1, a group of 0 channels a division
by zero, a chain of a million nodes a stack that overflows when it is freed (all measured). So every
number of a graph is looked at here. What a graph with operators that this project does not use does
is tried in a process of its own, which may die (:func:`try_graph`).
"""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

from .params import CheckpointError

LARGEST_FILE = 64 * 2**20
MOST_NODES, DEEPEST = 100_000, 20_000
LARGEST = 2**31 - 1
# Outputs of the operators that have more than one.
OUTPUTS = {"BatchNorm": 3, "LayerNorm": 3, "Dropout": 2, "RNN": 4}
# Attributes that are one or several whole numbers, and their smallest value.
WHOLE = {
    **{"num_filter": 1, "num_group": 1, "num_hidden": 1, "num_outputs": 1, "num_args": 1},
    **{"kernel": 0, "stride": 1, "dilate": 1, "pad": 0, "adj": 0},
}
# What the networks of this project consist of; their attributes are all checked above, or harmless.
OWN_OPERATORS = {
    *("null", "Convolution", "BatchNorm", "Activation", "Pooling", "FullyConnected", "Dropout"),
    *(
        "add_n",
        "ElementWiseSum",
        "elemwise_add",
        "_Plus",
        "_plus",
        "broadcast_add",
        "broadcast_mul",
    ),
    *("Reshape", "reshape_like", "batch_dot", "transpose", "Flatten", "slice_axis", "Concat"),
    *("softmax", "SoftmaxOutput", "LayerNorm", "_contrib_div_sqrt_dim", "identity"),
}
TRIAL_SECONDS = 300.0
# MXNet's numbers of types, as variables have them.
FLOAT32, FLOAT16 = "0", "2"


def parse_graph(path: str) -> dict[str, Any]:
    """Return the content of a ``-symbol.json`` file once all of it has been checked.

    Raises
    ------
    CheckpointError
        If it cannot be read, or holds what MXNet cannot take.
    """
    try:
        if os.path.getsize(path) > LARGEST_FILE:
            raise CheckpointError(f"{path} is larger than any graph ({LARGEST_FILE >> 20} MiB)")
        with open(path, encoding="utf-8") as stream:
            graph = json.loads(stream.read())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or no JSON: {error}") from error
    try:
        problem = _problem(graph)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no graph of MXNet") from error
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}")
    return graph


def attributes(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node's attributes, which older files call otherwise."""
    found: dict[str, Any] = {}
    for key in ("param", "attr", "attrs"):
        found.update(node.get(key) or {})
    return found


def _problem(graph: dict[str, Any]) -> str:
    """Return what is wrong with a graph, or nothing."""
    nodes = graph["nodes"]
    if not isinstance(nodes, list) or not 0 < len(nodes) <= MOST_NODES:
        return f"it has no nodes, or more than {MOST_NODES:,}"
    depths: list[int] = []
    for place, node in enumerate(nodes):
        if not isinstance(node["op"], str) or not isinstance(node["name"], str):
            return f"node {place} has no operator or no name"
        if "\0" in node["name"]:
            return f"the name of node {place} holds a zero byte"
        for entry in node["inputs"]:
            if not _is_entry(entry, nodes, place):
                return f"{node['name']} refers to an output that is not there: {entry}"
        depths.append(1 + max((depths[entry[0]] for entry in node["inputs"]), default=0))
        wrong = _wrong_attribute(node)
        if wrong:
            return f"{node['name']}: {wrong}"
    if max(depths) > DEEPEST:
        return f"it is a chain of more than {DEEPEST:,} nodes"
    heads = graph["heads"]
    if not heads or not all(_is_entry(entry, nodes, len(nodes)) for entry in heads):
        return "its outputs refer to nodes that are not there"
    for place in graph["arg_nodes"]:
        if not _is_whole(place) or not 0 <= place < len(nodes) or nodes[place]["op"] != "null":
            return "its arguments refer to nodes that are not there"
    return ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_entry(entry: Any, nodes: list, before: int) -> bool:
    """Return whether [node, output, version] is an output of a node that comes before."""
    if not 2 <= len(entry) <= 3 or not all(_is_whole(number) for number in entry):
        return False
    place, output = entry[0], entry[1]
    if not 0 <= place < before or (len(entry) == 3 and not 0 <= entry[2] <= LARGEST):
        return False
    node = nodes[place]
    if node["op"] == "null":
        return output == 0
    count = OUTPUTS.get(node["op"], 1)
    given = str(attributes(node).get("num_outputs", ""))
    if given.isdigit():
        count = max(count, int(given))
    return 0 <= output < count


def _wrong_attribute(node: dict[str, Any]) -> str:
    """Return what is wrong with a node's attributes, or nothing."""
    given = attributes(node)
    for key, value in given.items():
        if not isinstance(value, str):
            return f"{key} is {value!r}, not text"
        if len(value) > 10_000 or "\0" in value:
            return f"{key} is no value of an attribute"
    for name, least in WHOLE.items():
        text = given.get(name)
        if text is None:
            continue
        # () and None leave it to the operator.
        numbers = [int(number) for number in re.findall(r"-?\d+", text[:200])]
        if any(not least <= number <= LARGEST for number in numbers):
            return f"{name} {text} is out of range: {least} or more"
        if not re.fullmatch(r"[\[(]?[-\d,\sL]*[\])]?|None", text):
            return f"{name} {text!r} is no whole number"
    groups, filters = given.get("num_group", "1"), given.get("num_filter", "")
    if groups.isdigit() and filters.isdigit() and int(filters) % int(groups):
        return f"{filters} filters cannot be divided into {groups} groups"
    if node["op"] in ("Convolution", "Pooling", "Deconvolution"):
        kernel = [int(number) for number in re.findall(r"\d+", given.get("kernel", "")[:200])]
        if not kernel and given.get("global_pool", "").lower() not in ("true", "1"):
            return "it has no kernel"
        everywhere = given.get("global_pool", "").lower() in ("true", "1")
        if len(kernel) > 3 or (min(kernel, default=1) < 1 and not everywhere):
            return f"kernel {given.get('kernel')} is out of range"
    return ""


def is_known(graph: dict[str, Any]) -> bool:
    """Return whether a graph has no operators but those of this project's networks."""
    return all(node["op"] in OWN_OPERATORS for node in graph["nodes"])


def try_graph(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Build and run a graph once on zeros in a process of its own, which may die.

    Parameters
    ----------
    path
        Of the ``-symbol.json`` file.
    shapes
        Of the inputs with their batch axis.

    Raises
    ------
    CheckpointError
        If it does not run, or ends the process.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    package = __name__.split(".")
    for _ in package[:-2]:
        root = os.path.dirname(root)
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, os.path.abspath(path), json.dumps(shapes)],
            cwd=root,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{path}: its graph did not run within {TRIAL_SECONDS:g} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CheckpointError(f"{path}: its graph ends MXNet with {name}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise CheckpointError(f"{path}: MXNet cannot run its graph: {lines[-1][:300]}")


def make_float32(graph: dict[str, Any]) -> bool:
    """Let a graph compute in float32 what it does in float16; return whether it did anything so.

    MXNet has no float16 on a CPU.
    """
    changed = False
    for node in graph["nodes"]:
        for key in ("param", "attr", "attrs"):
            given = node.get(key) or {}
            if given.get("dtype") == "float16":
                given["dtype"] = "float32"
                changed = True
            if given.get("__dtype__") == FLOAT16:
                given["__dtype__"] = FLOAT32
                changed = True
    return changed


def main(argv: list[str]) -> int:
    """Run the graph of a file on zeros; see :func:`try_graph`."""
    from mxnet_compat import mx

    path, shapes = argv[0], {name: tuple(shape) for name, shape in json.loads(argv[1]).items()}
    graph = parse_graph(path)
    make_float32(graph)
    symbol = mx.sym.load_json(json.dumps(graph))
    executor = symbol.simple_bind(mx.cpu(), "null", **shapes)
    for output in executor.forward():
        output.wait_to_read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
