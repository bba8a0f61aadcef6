"""Training speed by 1, 2, 4 workers and devices, where a step's time goes, and a model of more.

::

    python -m benchmark.scaling --network TINY_GLORE --counts 1,2,4 --output exps/scaling

Data are made up. A step is measured in parts, each waited for before the next begins: input (making
a batch), compute (forward, backward), communication (gradients added up over devices and workers),
update. In training they overlap, so that the parts' sum is an upper bound of a step's time; the
speed is measured without waiting in between.

On a machine with as many cores as workers have threads in all, more workers only divide what is
there: figures of one small machine show the cost of communication, not what more machines bring.
The model of several machines is arithmetic, not a measurement.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Optional

import numpy as np

from glore_common import GloReError, UsageError, check_writable, run_main, write_text
from glore_options import (
    JobOptions,
    Options,
    comma_list,
    group,
    option,
    parse,
    positive_float,
    positive_int,
)
from mxnet_compat import mx, physical_cores
from network.block import build_block
from network.builder import InputConf, get_symbol
from network.summary import count, markdown
from train import workers as distributed
from train.optimizer import NesterovSGD
from train.options import TrainOptions
from train.plots import Line, Panel, plot_panels
from train.schedule import ConstantScheduler
from train.step import Learner

PARTS = ("input", "compute", "communication", "update")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIGABIT = 1e9 / 8
BYTES = 4  # of a gradient in float32


@dataclasses.dataclass
class ScalingOptions(Options):
    """What is measured, and the machines of the model."""

    title = "options"

    network: str = option("TINY_GLORE", "which is trained")
    num_classes: int = option(8, "of the network", kind=positive_int)
    crop_size: Optional[int] = option(
        None, "side of the input in pixels (default: the network's own)", kind=positive_int
    )
    batch_size: int = option(4, "of each device", kind=positive_int)
    steps: int = option(10, "that are measured", kind=positive_int)
    counts: tuple[int, ...] = option(
        (1, 2, 4), "workers, and devices", kind=comma_list(positive_int), metavar="LIST"
    )
    bandwidth: float = option(10.0, "of the model: Gbit/s per machine", kind=positive_float)
    machines: int = option(8, "of the model", kind=positive_int)
    devices: int = option(8, "of the model, of each machine", kind=positive_int)
    step_seconds: Optional[float] = option(
        None,
        "of the model: a step's compute and update on one device, for --batch-size samples "
        "(default: as measured here with one)",
        kind=positive_float,
    )
    output: str = option("exps/scaling", "beginning of the files' names", metavar="PREFIX")
    measure: str = option(
        "",
        "measure as one worker with devices (what this program calls itself with)",
        metavar="STORE,DEVICES",
    )

    def symbol(self) -> tuple[mx.sym.Symbol, InputConf]:
        """Return the network and its input."""
        overrides = {"crop_size": self.crop_size} if self.crop_size else {}
        return get_symbol(self.network, self.num_classes, **overrides)


@dataclasses.dataclass
class ScalingJobOptions(JobOptions):
    """All options of the program."""

    scaling: ScalingOptions = group(ScalingOptions)


def make_batch(
    generator: np.random.Generator, size: int, shape: tuple[int, ...], num_classes: int
) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
    """Return a made-up batch."""
    data = generator.standard_normal((size, *shape), dtype=np.float32)
    return mx.nd.array(data), mx.nd.array(generator.integers(0, num_classes, size))


def measure(args: ScalingOptions, store: str, devices: int) -> tuple[bool, dict[str, float]]:
    """Measure in this worker; return samples/s over all workers and the seconds of the parts."""
    symbol, conf = args.symbol()
    contexts = [mx.cpu(index) for index in range(devices)]
    size = args.batch_size * devices
    options = TrainOptions()
    options.devices.kv_store = store
    schedule = ConstantScheduler(1e-4)
    with distributed.join(store) as workers:
        block = build_block(symbol, conf, ctx=contexts)
        learner = Learner(block, NesterovSGD(), contexts, options, group=workers, schedule=schedule)
        generator = np.random.default_rng(workers.rank)
        total = size * workers.size

        def batch() -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
            return make_batch(generator, size, conf.data_shape, args.num_classes)

        learner.step([batch()], 1e-4, 0, total)
        mx.nd.waitall()
        workers.sum([1.0])
        started = time.perf_counter()
        for step in range(args.steps):
            samples, _ = workers.agree(size, None)
            learner.step([batch()], 1e-4, step, samples)
        mx.nd.waitall()
        workers.sum([1.0])
        speed = total * args.steps / (time.perf_counter() - started)

        seconds = dict.fromkeys(PARTS, 0.0)
        for step in range(args.steps):
            current = None
            for part in PARTS:
                started = time.perf_counter()
                if part == "input":
                    current = batch()
                elif part == "compute":
                    learner.backward([current], step)
                elif part == "communication":
                    learner.trainer.allreduce_grads()
                else:
                    learner.trainer.update(total)
                mx.nd.waitall()
                seconds[part] += (time.perf_counter() - started) / args.steps
        return workers.is_main, {"samples_per_second": speed, **seconds}


def run_one(argv: list[str], kind: str, number: int) -> dict[str, float]:
    """Measure ``number`` workers or devices in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result")
        store = "dist_sync" if kind == "workers" else "device"
        devices = 1 if kind == "workers" else number
        words = [sys.executable, "-m", "benchmark.scaling", *argv, "--output", path]
        words += ["--measure", f"{store},{devices}"]
        if kind == "workers":
            launch = [sys.executable, os.path.join(ROOT, "launch.py"), "-n", str(number), "-s", "1"]
            words = [*launch, "--log-dir", folder, "--", *words]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GloReError(f"measuring {number} {kind} failed:\n{done.stderr.strip()}")
        with open(f"{path}.json", encoding="utf-8") as stream:
            return json.load(stream)


def model(
    params: int, step_seconds: float, batch: int, machines: int, devices: int, bandwidth: float
) -> dict[str, float]:
    """Predict the speed of several machines with one worker and one server each.

    Each machine's network card sends a worker's gradients to the other machines' servers, and its
    own server's sums to the other workers: ``2 (m - 1) / m`` times the parameters' bytes in either
    direction, per step.

    Parameters
    ----------
    params
        Number of parameters.
    step_seconds
        Of one device, without communication.
    batch
        Samples of a device.
    machines, devices
        How many machines, and devices in each.
    bandwidth
        Gbit/s of a machine in either direction.

    Returns
    -------
    dict
        ``communication`` (seconds), and samples/s: ``hidden`` if all of it overlaps with compute,
        ``exposed`` if none does, ``ideal`` without any.
    """
    moved = 2 * (machines - 1) / machines * params * BYTES
    seconds = moved / (bandwidth * GIGABIT)
    samples = batch * machines * devices
    return {
        "communication": seconds,
        "hidden": samples / max(step_seconds, seconds),
        "exposed": samples / (step_seconds + seconds),
        "ideal": samples / step_seconds,
    }


def main(argv: Optional[list[str]] = None) -> int:
    """Measure, print the table, write PREFIX.json, PREFIX.md and PREFIX.png."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(ScalingJobOptions(), argv, str(__doc__).split("\n\n")[0]).scaling
    if args.measure:
        store, devices = args.measure.split(",")
        is_main, result = measure(args, store, int(devices))
        if is_main:
            write_text(f"{args.output}.json", json.dumps(result))
        return 0
    if args.counts[:1] != (1,):
        raise UsageError("--counts begins with 1, what the others are compared with")
    check_writable(f"{args.output}.json", "--output")
    symbol, conf = args.symbol()
    params = count(symbol, conf).params
    results = {
        kind: {number: run_one(argv, kind, number) for number in args.counts}
        for kind in ("workers", "devices")
    }
    rows = []
    for kind, by_number in results.items():
        for number, found in by_number.items():
            ratio = found["samples_per_second"] / by_number[1]["samples_per_second"]
            parts = [f"{1000 * found[part]:.1f}" for part in PARTS]
            rows.append(
                [f"{number} {kind}", f"{found['samples_per_second']:.2f}", f"{ratio:.2f}", *parts]
            )
    header = ["", "samples/s", "of one", *(f"{part}, ms" for part in PARTS)]
    one = results["devices"][1]
    step_seconds = args.step_seconds or one["compute"] + one["update"]
    counts = sorted({2**power for power in range(12) if 2**power < args.machines} | {args.machines})
    modelled = {
        number: model(params, step_seconds, args.batch_size, number, args.devices, args.bandwidth)
        for number in counts
    }
    predicted = [
        [
            f"{number} x {args.devices}",
            f"{1000 * found['communication']:.1f}",
            f"{found['exposed']:.1f}",
            f"{found['hidden']:.1f}",
            f"{found['ideal']:.1f}",
        ]
        for number, found in modelled.items()
    ]
    origin = "given" if args.step_seconds else "measured here"
    text = "\n".join(
        [
            f"{args.network}, {params:,} parameters, batch {args.batch_size} per device, "
            f"{args.steps} steps, {physical_cores()} cores shared by all workers and devices.",
            "",
            markdown(header, rows),
            "",
            f"Model, not measured: {args.bandwidth:g} Gbit/s per machine, {step_seconds:.4f} s a "
            f"step of one device ({origin}), the devices of one machine without cost.",
            "",
            markdown(
                ["machines x devices", "communication, ms"]
                + ["samples/s, not overlapped", "all overlapped", "without communication"],
                predicted,
            ),
        ]
    )
    print(text)
    write_text(f"{args.output}.md", text + "\n")
    content = {"params": params, "measured": results, "modelled": modelled}
    write_text(f"{args.output}.json", json.dumps(content, indent=1) + "\n")
    plot_panels(
        [
            Panel(
                "samples/s, measured",
                "workers or devices",
                [
                    Line(list(found), [r["samples_per_second"] for r in found.values()], kind)
                    for kind, found in results.items()
                ],
            ),
            Panel(
                f"samples/s, model at {args.bandwidth:g} Gbit/s",
                f"machines of {args.devices} devices",
                [
                    Line(counts, [modelled[number][kind] for number in counts], kind)
                    for kind in ("ideal", "hidden", "exposed")
                ],
            ),
        ],
        f"{args.output}.png",
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
