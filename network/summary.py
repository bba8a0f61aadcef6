"""Parameters, multiply-adds and memory of a network, from its graph and its inferred shapes.

::

    python -m network.summary                              # all networks, a table in Markdown
    python -m network.summary resnet50_w-gc                # one network, layer by layer
    python -m network.summary resnet50 --input 3,320,320 --block gc:ratio=1/4
    python -m network.summary --compare resnet50 resnet50_w-gc resnet50+nl@4:5
    python -m network.summary TINY_GLORE --graph net.svg   # a picture (.dot: Graphviz's text)
"""

import argparse
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Optional

from checkpoint.params import is_label
from glore_common import GloReError, UsageError, atomic_path, module_command, run_main, write_text
from mxnet_compat import mx

from .builder import InputConf, get_spec, get_symbol, list_networks
from .memory import activation_bytes
from .picture import FORMS, draw_graph
from .shapes import Node, input_shapes, operations, value_shapes
from .specs import PUBLISHED_TOP1, Positions, Spec
from .symbol_context import CONTEXT_KINDS


@dataclasses.dataclass(frozen=True)
class Count:
    """Cost of one forward pass of one sample.

    Attributes
    ----------
    params
        Learnt parameters.
    stats
        Running statistics of batch normalisations.
    macs_of
        Multiply-adds per node, in graph order, of convolutions, fully connected layers and
        matrix products (biases, normalisation, activations and pooling are not counted).
    """

    params: int
    stats: int
    macs_of: dict[str, int]

    @property
    def params_with_stats(self) -> int:
        """Learnt parameters and running statistics: what a checkpoint holds."""
        return self.params + self.stats

    @property
    def macs(self) -> int:
        """Multiply-adds of the whole network."""
        return sum(self.macs_of.values())


def _is_true(text: str) -> bool:
    return text in ("1", "True", "true")


def node_macs(node: Node) -> int:
    """Return the multiply-adds of one operation: a :class:`network.shapes.Node` of ``COUNTED``."""
    if node.op == "Convolution":
        # The weight is (filters, channels / groups, *kernel).
        return math.prod(node.shape) * math.prod(node.shapes[1][1:])
    if node.op == "FullyConnected":
        return math.prod(node.shape) * node.shapes[1][1]
    # (b, m, k) x (b, k, n): k is the last axis of the left factor unless it is transposed.
    left = node.shapes[0]
    inner = left[-2] if _is_true(node.attrs.get("transpose_a", "False")) else left[-1]
    return math.prod(node.shape) * inner


COUNTED = ("Convolution", "FullyConnected", "batch_dot")


def count(symbol: mx.sym.Symbol, inputs: Any) -> Count:
    """Count parameters and multiply-adds of a graph.

    Parameters
    ----------
    symbol
        Any graph, with a softmax at its end or not.
    inputs : InputConf, or mapping of str to tuple of int
        Input shapes, see :func:`value_shapes`. Multiply-adds are those of the whole batch.

    Returns
    -------
    Count

    Raises
    ------
    UsageError
        As :func:`value_shapes`.
    """
    learnt, stats = _sizes(symbol, inputs)
    macs_of = {
        node.name: node_macs(node) for node in operations(symbol, inputs) if node.op in COUNTED
    }
    return Count(sum(learnt.values()), sum(stats.values()), macs_of)


def _sizes(symbol: mx.sym.Symbol, inputs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return {parameter: numbers in it} of what is learnt, and of running statistics."""
    shapes = value_shapes(symbol, inputs)
    # Inputs are what the caller gave a shape, and the label, which no layer learns.
    given = set(input_shapes(inputs))
    learnt = [n for n in symbol.list_arguments() if n not in given and not is_label(n)]
    return (
        {name: math.prod(shapes[name]) for name in learnt},
        {name: math.prod(shapes[name]) for name in symbol.list_auxiliary_states()},
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Cost of a stage, or of a block inserted into one: see :func:`parts`."""

    params: int = 0
    macs: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(self.params + other.params, self.macs + other.macs)


INSERTED = re.compile(rf"^(conv[2-5]_(?:B|x__)\d+_(?:extra|{'|'.join(CONTEXT_KINDS)}))(?:_|$)")


def part_of(name: str) -> tuple[str, Optional[str]]:
    """Return (stage, inserted block or None) that a node or parameter belongs to, by its name."""
    stage = re.match(r"conv[2-5](?=_)", name)
    block = INSERTED.match(name)
    if stage:
        return stage[0], block[1] if block else None
    return ("stem" if re.match(r"(conv1|pool1)", name) else "head"), None


def parts(symbol: mx.sym.Symbol, inputs: Any) -> tuple[dict[str, Part], dict[str, Part]]:
    """Return what each stage costs, and each GloRe unit and context block.

    Parameters
    ----------
    symbol
        A network of the table.
    inputs : InputConf, or mapping of str to tuple of int

    Returns
    -------
    stages, blocks : dict of str to Part
        By stage (``stem``, ``conv2`` to ``conv5`` with all that is in them, ``head``), and by name
        of the inserted block (``conv4_B05_nl``).
    """
    stages: defaultdict[str, Part] = defaultdict(Part)
    blocks: defaultdict[str, Part] = defaultdict(Part)
    learnt, _ = _sizes(symbol, inputs)
    costs = [(name, Part(params=size)) for name, size in learnt.items()]
    costs += [(name, Part(macs=macs)) for name, macs in count(symbol, inputs).macs_of.items()]
    for name, cost in costs:
        stage, block = part_of(name)
        stages[stage] += cost
        if block:
            blocks[block] += cost
    return {stage: stages[stage] for stage in sorted(stages, key=_stage_order)}, dict(blocks)


def _stage_order(stage: str) -> int:
    return {"stem": 1, "head": 6}.get(stage) or int(stage[-1])


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Return a Markdown table; all columns but the first ``left`` are flush right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|"]
        + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    )


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _count_of(positions: Optional[Positions], spec: Spec) -> int:
    return sum(len(blocks) for _, blocks in positions or spec.every_block((2, 3, 4, 5)))


def inserted_in(spec: Spec) -> str:
    """Return what a row has in and behind its residual blocks: '16 SE, 3 GloRe'."""
    found = [f"{_count_of(c.positions, spec)} {c.kind.upper()}" for c in spec.context]
    if spec.glore:
        found.append(f"{_count_of(spec.glore, spec)} GloRe")
    return ", ".join(found)


def table(names: Iterable[str]) -> str:
    """Return a Markdown table of networks at their default input, one row per name.

    With all of :func:`list_networks` it is the table in ``docs/networks.md``.
    """
    rows = []
    for name in names:
        spec = get_spec(name)
        symbol, input_conf = get_symbol(name)
        counted = count(symbol, input_conf)
        rows.append(
            (
                f"`{spec.name}`",
                _by(input_conf.data_shape[1:]),
                inserted_in(spec),
                f"{counted.params / 1e6:.2f}",
                f"{counted.params_with_stats / 1e6:.2f}",
                f"{counted.macs / 1e9:.2f}",
                PUBLISHED_TOP1.get(spec.name, ""),
            )
        )
    header = (
        "network",
        "input",
        "units and blocks",
        "parameters, M",
        "with running statistics, M",
        "multiply-adds, G",
        "published top-1, %",
    )
    return markdown(header, rows, left=3)


def layer_table(symbol: mx.sym.Symbol, inputs: Any) -> str:
    """Return a Markdown table of all operations: output shape, parameters, multiply-adds."""
    learnt, _ = _sizes(symbol, inputs)
    rows = []
    for node in operations(symbol, inputs):
        # A parameter belongs to the first operation that reads it.
        params = sum(learnt.pop(name, 0) for name in node.inputs)
        macs = node_macs(node) if node.op in COUNTED else 0
        costs = (f"{number:,}" if number else "" for number in (params, macs))
        rows.append((node.name, node.op, _by(node.shape), *costs))
    return markdown(("node", "operation", "output", "parameters", "multiply-adds"), rows, left=3)


def _mega(number: int) -> str:
    return f"{number / 1e6:.3f}"


def report(name: str, symbol: mx.sym.Symbol, input_conf: InputConf) -> str:
    """Return all about one network: its layers, stages, inserted blocks and memory, in Markdown."""
    counted = count(symbol, input_conf)
    stages, blocks = parts(symbol, input_conf)
    header = ("parameters, M", "multiply-adds, M")
    memory = activation_bytes(symbol, input_conf)
    lines = [
        f"# {name}, input {_by(input_conf.data_shape)}",
        layer_table(symbol, input_conf),
        markdown(
            ("stage", *header),
            [(stage, _mega(c.params), _mega(c.macs)) for stage, c in stages.items()],
        ),
    ]
    if blocks:
        total = sum(blocks.values(), Part())
        rows = [(block, _mega(c.params), _mega(c.macs)) for block, c in blocks.items()]
        rows.append(("all inserted blocks", _mega(total.params), _mega(total.macs)))
        lines.append(markdown(("inserted block", *header), rows))
    lines.append(
        f"Parameters: {counted.params:,}, and {counted.stats:,} running statistics. "
        f"Multiply-adds: {counted.macs:,}.\n"
        f"Activations of one sample in float32: {memory.training / 2**20:.1f} MiB computed in all "
        f"(what training keeps is at most this), {memory.inference / 2**20:.1f} MiB alive at once "
        "in inference"
        + (
            f"; {memory.scores / 2**20:.1f} MiB are Non-local scores, which grow with the square "
            "of the positions."
            if memory.scores
            else "."
        )
    )
    return "\n\n".join(lines)


def build_variant(text: str) -> tuple[mx.sym.Symbol, InputConf]:
    """Build a network given as NAME or NAME+BLOCK.

    Parameters
    ----------
    text
        ``'resnet50'``, ``'resnet50+gc'``, ``'resnet50+nl@4:5'``: what follows the plus is the
        override ``block`` of :func:`get_symbol`.

    Returns
    -------
    (Symbol, InputConf)
    """
    name, plus, block = text.partition("+")
    return get_symbol(name, block=block) if plus else get_symbol(name)


def compare(names: Sequence[str], data_shape: Optional[tuple[int, ...]] = None) -> str:
    """Return a Markdown table of networks, a column each: total cost and that of each part.

    Parameters
    ----------
    names
        See :func:`build_variant`; what is added is told against the first.
    data_shape
        Input for all of them, instead of each one's own.
    """
    columns: list[dict[str, str]] = []
    first: Optional[Count] = None
    for name in names:
        symbol, input_conf = build_variant(name)
        input_conf = with_shape(input_conf, data_shape)
        counted, (stages, blocks) = count(symbol, input_conf), parts(symbol, input_conf)
        memory = activation_bytes(symbol, input_conf)
        inserted = sum(blocks.values(), Part())
        first = base = first or counted
        columns.append(
            {
                "input": _by(input_conf.data_shape[1:]),
                "parameters, M": f"{counted.params / 1e6:.2f}",
                "added to the first, M": f"{(counted.params - base.params) / 1e6:+.3f}",
                "multiply-adds, G": f"{counted.macs / 1e9:.2f}",
                "added to the first, G": f"{(counted.macs - base.macs) / 1e9:+.3f}",
                "inserted blocks": f"{len(blocks)}",
                "parameters of inserted blocks, M": f"{inserted.params / 1e6:.3f}",
                "multiply-adds of inserted blocks, G": f"{inserted.macs / 1e9:.3f}",
                **{f"multiply-adds of {s}, G": f"{c.macs / 1e9:.3f}" for s, c in stages.items()},
                "activations, training, MiB": f"{memory.training / 2**20:.1f}",
                "activations, inference, MiB": f"{memory.inference / 2**20:.1f}",
                "of them Non-local scores, MiB": f"{memory.scores / 2**20:.1f}",
            }
        )
    rows = [(label, *(column[label] for column in columns)) for label in columns[0]]
    return markdown(("", *(f"`{name}`" for name in names)), rows)


def with_shape(input_conf: InputConf, data_shape: Optional[tuple[int, ...]]) -> InputConf:
    """Return an InputConf with another ``data_shape`` (of the same length), or as it is for None.

    Raises
    ------
    UsageError
        When the network reads something of another rank.
    """
    if data_shape is None:
        return input_conf
    if len(data_shape) != len(input_conf.data_shape) or data_shape[0] != 3:
        raise UsageError(
            f"--input {','.join(map(str, data_shape))}: this network reads "
            f"{'3,frames,height,width' if len(input_conf.data_shape) == 4 else '3,height,width'}."
        )
    return InputConf(tuple(data_shape), input_conf.mean, input_conf.std)


def to_dot(symbol: mx.sym.Symbol, inputs: Any) -> str:
    """Return a picture of a graph as Graphviz's DOT text.

    Inserted blocks are framed; nodes carry their operation and output shape, parameters are left
    out.
    """
    nodes = operations(symbol, inputs)
    known = {node.name for node in nodes} | set(input_shapes(inputs))
    lines = ["digraph network {", "  node [shape=box, fontname=Helvetica, fontsize=10];"]
    clusters: defaultdict[Optional[str], list[str]] = defaultdict(list)
    for node in nodes:
        label = f'  "{node.name}" [label="{node.name}\\n{node.op} {_by(node.shape)}"];'
        clusters[part_of(node.name)[1]].append(label)
    for cluster, labels in clusters.items():
        if cluster is None:
            lines += labels
        else:
            lines += [f'  subgraph "cluster_{cluster}" {{', f'  label="{cluster}";', *labels, "  }"]
    for node in nodes:
        lines += [f'  "{source}" -> "{node.name}";' for source in node.inputs if source in known]
    return "\n".join([*lines, "}", ""])


def draw(symbol: mx.sym.Symbol, inputs: Any, path: str) -> None:
    """Write a picture of a graph to a file, in the form that its ending names.

    Parameters
    ----------
    symbol, inputs
        As for :func:`to_dot`.
    path
        ``.dot`` and ``.gv`` hold :func:`to_dot`'s text; other forms (``.svg``, ``.png``, ``.pdf``)
        are drawn by Graphviz's program ``dot``, or by Matplotlib where it is not installed.

    Raises
    ------
    GloReError
        If the program fails.
    UsageError
        If the path has no ending that is known.
    """
    ending = os.path.splitext(path)[1]
    if ending in (".dot", ".gv"):
        write_text(path, to_dot(symbol, inputs))
    elif shutil.which("dot") is not None and ending:
        with atomic_path(path) as temporary:
            done = subprocess.run(
                ["dot", f"-T{ending[1:]}", "-o", temporary],
                input=to_dot(symbol, inputs),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise GloReError(f"Graphviz cannot draw {path}: {done.stderr.strip()}")
    elif ending.lower() in FORMS:
        nodes = operations(symbol, inputs)
        inserted = [node.name for node in nodes if part_of(node.name)[1] is not None]
        draw_graph(nodes, list(input_shapes(inputs)), inserted, path)
    else:
        raise UsageError(
            f"{path} does not say by its ending how to draw: give {', '.join(FORMS)} or .dot"
        )


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the shape of '3,224,224' or '3,8,224,224', for argparse."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 3,height,width or 3,frames,height,width")
    return shape


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print tables of the networks named on the command line."""
    parser = argparse.ArgumentParser(
        prog=module_command("network.summary"),
        description="Without NAME, or with several: a table of networks, one row each. With one "
        "NAME: its layers, stages, inserted blocks and memory. All in Markdown.",
    )
    parser.add_argument("networks", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="the table of all networks that docs/networks.md holds (as without NAME)",
    )
    parser.add_argument(
        "--study", action="store_true", help="all: those of the project's studies too"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="NAME",
        help="networks side by side; NAME+BLOCK puts blocks in, such as resnet50+gc or "
        "resnet50+nl@4:5",
    )
    parser.add_argument("--input", type=parse_shape, help="3,height,width or 3,frames,height,width")
    parser.add_argument("--num-classes", type=int, help="width of the classifier of one NAME")
    parser.add_argument("--glore", help="GloRe units of one NAME: '2-3', '4:5:num_node=16' or none")
    parser.add_argument("--block", help="blocks of one NAME: 'gc:ratio=1/4,nl@4:5' or none")
    parser.add_argument(
        "--graph",
        metavar="FILE",
        help="draw one NAME: .svg, .png, … with Graphviz, or its text as .dot",
    )
    args = parser.parse_args(argv)
    overrides = {
        option: getattr(args, option)
        for option in ("glore", "block")
        if getattr(args, option) is not None
    }
    single = len(args.networks) == 1 and not args.compare
    if not single and (overrides or args.graph or args.num_classes is not None):
        raise UsageError("These options are for one NAME; --compare takes NAME+BLOCK.")
    if (args.markdown or args.study) and (args.networks or args.compare):
        raise UsageError("--markdown and --study are for the table of all networks.")
    if args.compare:
        if args.networks:
            raise UsageError("Give the networks either before or after --compare, not both.")
        print(compare(args.compare, args.input))
    elif not single:
        if args.input is not None:
            raise UsageError("--input is for one NAME or --compare.")
        print(table(args.networks or list_networks(study=args.study)))
    else:
        symbol, input_conf = get_symbol(args.networks[0], args.num_classes, **overrides)
        input_conf = with_shape(input_conf, args.input)
        if args.graph:
            draw(symbol, input_conf, args.graph)
        print(report(get_spec(args.networks[0]).name, symbol, input_conf))


if __name__ == "__main__":
    sys.exit(run_main(main))
