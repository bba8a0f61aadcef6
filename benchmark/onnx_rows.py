"""Every network of the table as an ONNX model: is it the same, and how fast is it?

``python -m benchmark.onnx_rows [NETWORK ...]`` writes the table of docs/export.md to standard
output: the largest difference of logits from MXNet's, as a share of the largest logit, in batches
of 1 and of 3; the file's size; and the time of one input of the network's own size by MXNet's
executor and by onnxruntime, best of ``--repeats``. Weights are made up: fresh ones, with what a
network starts at zero (the ends of its blocks) drawn small, so that the blocks count, and the
projections of GloRe units damped: several units whose output grows with the cube of their input
leave the range of float32.
"""

import argparse
import sys
import time
from typing import Any, Callable, Optional

import numpy as np

from checkpoint.params import Arrays
from glore_common import run_main
from mxnet_compat import mx
from network.block import build_block
from network.builder import get_symbol, list_networks, logits
from network.initializer import initial_params
from network.onnx_graph import OnnxNet, difference, to_onnx

CLASSES = 10
# Side of the inputs that outputs are compared for, of networks that take more.
SIDE = 64


def made_up(symbol: mx.sym.Symbol, inputs: dict[str, tuple[int, ...]]) -> tuple[Arrays, Arrays]:
    """Return fresh parameters, of which none is zero throughout."""
    generator = np.random.RandomState(0)
    args, auxs = initial_params(logits(symbol), inputs, seed=0)
    stirred = {}
    for name, value in args.items():
        array = np.array(value, np.float32)
        if not array.any():
            array += 0.02 * generator.standard_normal(array.shape) / np.sqrt(array[0].size or 1)
        stirred[name] = 0.03 * array if "conv-proj" in name and name.endswith("weight") else array
    return stirred, {name: np.array(value, np.float32) for name, value in auxs.items()}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the best time of a call; the first one does not count."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def row(name: str, repeats: int) -> str:
    """Return a network's row of the table."""
    _, own = get_symbol(name)
    side = min(SIDE, own.data_shape[-1])
    symbol, conf = get_symbol(name, CLASSES, crop_size=side)
    params = made_up(symbol, {"data": (1, *conf.data_shape)})
    net = OnnxNet(to_onnx(symbol, *params, conf.data_shape).SerializeToString())
    block = build_block(symbol, conf, params=params, training=False)
    generator = np.random.RandomState(1)
    found = [
        difference(net, block, generator.standard_normal((n, *conf.data_shape)).astype("float32"))
        for n in (1, 3)
    ]
    whole, conf = get_symbol(name, CLASSES)
    content = to_onnx(whole, *params, conf.data_shape).SerializeToString()
    data = generator.standard_normal((1, *conf.data_shape)).astype("float32")
    net = OnnxNet(content)
    ours = seconds(lambda: block(mx.nd.array(data)).asnumpy(), repeats)
    theirs = seconds(lambda: net.run(data), repeats)
    shape = " x ".join(str(size) for size in conf.data_shape[1:])
    return (
        f"| `{name}` | {shape} | {found[0]:.1e} | {found[1]:.1e} | {len(content) / 1e6:.0f} | "
        f"{1000 * ours:.0f} | {1000 * theirs:.0f} |"
    )


def main(argv: Optional[list[str]] = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.onnx_rows", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="default: the whole table")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    print("| network | input | difference, 1 | difference, 3 | MB | MXNet, ms | onnxruntime, ms |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in options.networks or list_networks():
        print(row(name, options.repeats), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
