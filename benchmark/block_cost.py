"""What each block costs: parameters, multiply-adds, and time measured side by side.

::

    python -m benchmark.block_cost resnet50 --input 3,224,224
    python -m benchmark.block_cost RESNET50_3D --input 3,8,112,112 --rounds 5
    python -m benchmark.block_cost mask_rcnn_resnet50_v1b --input 3,800,1333 --memory --blocks gc

Of a detector the trunk is measured: backbone, pyramid and proposals' layers.

All networks are built first and then run in turn, round after round, so that whatever else the
machine does falls on all of them alike; a ratio is the median over the rounds of the time divided
by that of the network without blocks in the same round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Optional

from glore_common import progress, run_main
from glore_options import positive_int
from mxnet_compat import mx
from network.block import build_block, output_of
from network.builder import InputConf, get_spec
from network.memory import activation_bytes
from network.summary import build_variant, count, markdown, parse_shape, with_shape
from network.symbol_detection import trunk_nodes

# What is measured of each network, and its input.
Variants = Sequence[tuple[mx.sym.Symbol, InputConf]]


def blocks_for(network: str) -> list[str]:
    """Return what is measured by default in a network: whole stages, and single places of it.

    ``gc``, ``gc@4:5/after``, ``se``, ``snl``, ``nl``, ``nl@4:1,3,5``, ``glore@0-3`` and
    ``glore@2-3`` in a ResNet-50; fewer places where conv3 and conv4 have fewer residual blocks.
    """
    spec = get_spec(network)
    _, conv3, conv4, _ = spec.blocks
    places = dict(spec.unit_defaults)
    units3, units4 = (
        min(most, len(places.get(stage, ())) or count)
        for stage, most, count in ((3, 2, conv3), (4, 3, conv4))
    )
    apart = ",".join(str(place) for place in range(1, min(conv4, 5) + 1, 2))
    blocks = ["gc", f"gc@4:{max(1, conv4 - 1)}/after", "se", "snl", "nl", f"nl@4:{apart}"]
    return [*blocks, f"glore@0-{units4}", f"glore@{units3}-{units4}"]


def measured_part(symbol: mx.sym.Symbol, network: str) -> mx.sym.Symbol:
    """Return what is measured of a network: its logits, or the trunk of a detector."""
    spec = get_spec(network)
    if spec.task == "detection":
        return mx.sym.Group([output_of(symbol, node) for node in trunk_nodes(spec)])
    return output_of(symbol, "classifier")


def time_pass(block: mx.gluon.Block, data: mx.nd.NDArray, training: bool) -> float:
    """Return the seconds of one pass over a batch: forward, with ``training`` also backward."""
    mx.nd.waitall()
    started = time.perf_counter()
    if training:
        with mx.autograd.record():
            outputs = block(data)
            outputs = outputs if isinstance(outputs, list) else [outputs]
            losses = [output.sum() for output in outputs]
        mx.autograd.backward(losses)
        mx.nd.waitall()
    else:
        block(data)
        mx.nd.waitall()
    return time.perf_counter() - started


def measure(
    variants: Variants, data: mx.nd.NDArray, training: bool, rounds: int
) -> list[list[float]]:
    """Return the seconds of every variant in every round.

    Parameters
    ----------
    variants, rounds
    data
        (n, *data_shape).
    training
        Forward and backward pass, or the forward pass of evaluation.

    Returns
    -------
    list
        Per round, per variant.
    """
    blocks = []
    for symbol, conf in variants:
        names = [name[: -len("_output")] for name in symbol.list_outputs()]
        output = names if len(names) > 1 else names[0]
        blocks.append(build_block(symbol, conf, ctx=data.ctx, training=training, output=output))
    for block in blocks:
        time_pass(block, data, training)
    label = "training" if training else "inference"
    return [
        [time_pass(block, data, training) for block in blocks]
        for _ in progress(range(rounds), label, unit="rounds")
    ]


def ratios(times: list[list[float]]) -> list[float]:
    """Return per variant the median over the rounds of its time divided by the first one's."""
    return [
        statistics.median(row[index] / row[0] for row in times) for index in range(len(times[0]))
    ]


def cost_table(
    names: Sequence[str],
    variants: Variants,
    measured: dict[str, list[list[float]]],
    memory: bool = False,
) -> str:
    """Return the Markdown table.

    Parameters
    ----------
    names
    variants
        The first is what the others are compared with.
    measured
        Column title to times, see :func:`measure`.
    memory
        Tell the activations' memory for one sample too, as the graph says.
    """
    counts = [count(symbol, {"data": (1, *conf.data_shape)}) for symbol, conf in variants]
    columns = {
        f"{title}, s (ratio)": [
            f"{statistics.median(row[index] for row in times):.3f} ({ratio:.2f})"
            for index, ratio in enumerate(ratios(times))
        ]
        for title, times in measured.items()
    }
    if memory:
        needed = [activation_bytes(s, {"data": (1, *conf.data_shape)}) for s, conf in variants]
        for title in ("inference", "training"):
            values = [getattr(each, title) / 1e6 for each in needed]
            columns[f"memory in {title}, MB (ratio)"] = [
                f"{value:.0f} ({value / values[0]:.2f})" for value in values
            ]
    header = ("network", "parameters, M", "added, M", "multiply-adds, G", "added, G", *columns)
    rows = [
        (
            f"`{name}`",
            f"{counted.params / 1e6:.2f}",
            f"{(counted.params - counts[0].params) / 1e6:+.2f}",
            f"{counted.macs / 1e9:.2f}",
            f"{(counted.macs - counts[0].macs) / 1e9:+.2f}",
            *(column[index] for column in columns.values()),
        )
        for index, (name, counted) in enumerate(zip(names, counts))
    ]
    return markdown(header, rows)


def main(argv: Optional[list[str]] = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.block_cost", description=__doc__)
    parser.add_argument("network", help="a network of the table")
    parser.add_argument(
        "--blocks",
        nargs="+",
        help="see get_symbol's block (default: whole stages and single places that it has)",
    )
    parser.add_argument("--input", type=parse_shape, help="3,height,width or 3,frames,height,width")
    parser.add_argument("--batch-size", type=positive_int, default=1)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--memory", action="store_true", help="tell the activations' memory too")
    parser.add_argument("--gpu", type=int, help="number of a GPU (default: the CPU)")
    args = parser.parse_args(argv)
    names = [
        args.network,
        *(f"{args.network}+{block}" for block in args.blocks or blocks_for(args.network)),
    ]
    variants = []
    for name in names:
        symbol, conf = build_variant(name)
        variants.append((measured_part(symbol, args.network), with_shape(conf, args.input)))
    ctx = mx.cpu() if args.gpu is None else mx.gpu(args.gpu)
    shape = (args.batch_size, *variants[0][1].data_shape)
    data = mx.nd.random.normal(shape=shape, ctx=ctx)
    measured = {
        title: measure(variants, data, training, args.rounds)
        for title, training in (("inference", False), ("training", True))
    }
    print(f"Input {' x '.join(map(str, shape))}, {args.rounds} rounds, {ctx}.\n")
    print(cost_table(names, variants, measured, args.memory))


if __name__ == "__main__":
    sys.exit(run_main(main))
