"""How fast networks predict and train on this CPU, beside the PyTorch original.

::

    python -m benchmark.speed RESNET50_GLORE resnet50_w-glore_2-3 --batch-sizes 1,4
    python -m benchmark.speed RESNET50_GLORE --reference GloRe --python pytorch/bin/python
    python -m benchmark.speed RESNET50_GLORE --grow batch=1,2,4 --grow crop=112,160,224

Each form of a network runs in a process of its own, which tells its peak memory; all forms of a
case take turns, round after round, so that whatever else the machine does falls on all of them
alike. A ratio is the median over the rounds of two times of one round. ``plain`` is the network as
it is, ``fused`` what this project predicts with (:mod:`network.inference`), ``int8`` the same in
8-bit numbers, ``onnx`` the network in onnxruntime, ``train`` a step of the training jobs. The
reference is a checkout of facebookresearch/GloRe, run by a Python that has PyTorch: ``eager``,
``frozen`` (traced, ``jit.freeze``, ``optimize_for_inference``) and ``bf16`` (autocast). Networks
that it does not have are computed by PyTorch from this project's graph.

What the machine can do is measured in the same rounds: one large convolution of oneDNN and one
product of matrices. A multiply-add counts as two operations, of a training step three times.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from benchmark.speed_torch import ORIGINALS, answer
from checkpoint.params import Arrays, param_shapes
from glore_common import GloReError, check_writable, progress, run_main, write_text
from glore_options import comma_list, positive_int
from mxnet_compat import mx, physical_cores
from network.block import build_block
from network.builder import InputConf, get_spec, get_symbol, logits
from network.inference import FusedNet, calibrated
from network.onnx_graph import OnnxNet, to_onnx
from network.rewriting import Graph
from network.summary import count, markdown
from train.optimizer import NesterovSGD
from train.options import TrainOptions
from train.plots import Line, Panel, plot_panels
from train.step import Learner

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLASSES = 400
OURS = {"inference": ("plain", "fused", "int8", "onnx"), "training": ("train",)}
THEIRS = {"inference": ("eager", "frozen", "bf16"), "training": ("eager", "bf16")}
# What the machine can do, and the operations of a call.
LIMITS = {"convolution": 2 * 8 * 56**2 * 256**2 * 9, "product": 2 * 2048**3}
AXES = ("batch", "frames", "crop", "threads")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed, in several forms: a task of a network, its input, and the threads."""

    network: str
    task: str
    batch: int
    threads: int
    frames: Optional[int] = None
    crop: Optional[int] = None

    def built(self) -> tuple[mx.sym.Symbol, InputConf]:
        """Return the network and its input."""
        name, plus, block = self.network.partition("+")
        overrides: dict[str, Any] = {"block": block} if plus else {}
        if self.crop:
            overrides["crop_size"] = self.crop
        if self.frames:
            overrides["clip_length"] = self.frames
        return get_symbol(name, CLASSES, **overrides)

    def operations(self) -> int:
        """Return how many a call takes."""
        macs = self.batch * count(*self.built()).macs
        return 2 * macs * (3 if self.task == "training" else 1)

    def __str__(self) -> str:
        shape = " x ".join(map(str, (self.batch, *self.built()[1].data_shape)))
        return f"{self.network}, {self.task}, {shape}, {self.threads} threads"


class Sample(NamedTuple):
    """A call: seconds by the two clocks, and the most bytes its process has held so far."""

    wall: float
    processor: float
    peak: int


# --- in the process of a form ---------------------------------------------------------------------


def made_up(symbol: mx.sym.Symbol, data_shape: tuple[int, ...]) -> Arrays:
    """Return parameters such as training leaves: of 100 gammas three are not positive.

    The weights of units are small: without a normalisation their output grows with the cube, and
    with the positions of a map.
    """
    generator = np.random.RandomState(0)
    args, auxs = param_shapes(symbol, {"data": (1, *data_shape)})
    values = {}
    for name, shape in {**args, **auxs}.items():
        if name.endswith(("gamma", "var")):
            value = generator.uniform(0.5, 1, shape)
            if name.endswith("gamma"):
                value[generator.uniform(size=shape) < 0.03] *= -0.5
        elif name.endswith(("beta", "bias", "mean")):
            value = generator.uniform(-0.3, 0.3, shape)
        else:
            value = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            value *= 0.03 if "_extra_" in name else 1.0
        values[name] = value.astype("float32")
    return values


def limit_call(form: str) -> Callable[[], Any]:
    """Return the call of a row of :data:`LIMITS`."""
    draw = mx.nd.random.normal
    if form == "product":
        left, right = draw(shape=(2048, 2048)), draw(shape=(2048, 2048))
        return lambda: mx.nd.dot(left, right).wait_to_read()
    layer = mx.gluon.nn.Conv2D(256, 3, padding=1, use_bias=False, in_channels=256)
    layer.initialize()
    layer.hybridize(static_alloc=True)
    data = draw(shape=(8, 256, 56, 56))
    return lambda: layer(data).wait_to_read()


def call_of(form: str, case: Case) -> Callable[[], Any]:
    """Return what is timed; in inference it returns the logits."""
    if form in LIMITS:
        return limit_call(form)
    symbol, conf = case.built()
    values = made_up(logits(symbol), conf.data_shape)
    generator = np.random.RandomState(1)
    array = generator.standard_normal((case.batch, *conf.data_shape)).astype("float32")
    data = mx.nd.array(array)
    if form == "train":
        block = build_block(symbol, conf, params=values)
        learner = Learner(block, NesterovSGD(wd=1e-4), [mx.cpu()], TrainOptions())
        labels = mx.nd.array(np.arange(case.batch) % CLASSES)

        def step() -> None:
            learner.step([(data, labels)], 1e-4, 0)
            mx.nd.waitall()

        return step
    if form == "onnx":
        args = {n: v for n, v in values.items() if n in symbol.list_arguments()}
        auxs = {n: v for n, v in values.items() if n in symbol.list_auxiliary_states()}
        content = to_onnx(symbol, args, auxs, conf.data_shape).SerializeToString()
        net = OnnxNet(content, case.threads)
        return lambda: net.run(array)
    output = logits(symbol).name
    if form == "plain":
        block = build_block(symbol, conf, params=values, output=output, training=False)
    else:
        shape, int8 = conf.data_shape, None
        if form == "int8":
            int8 = calibrated(symbol, values, shape, [data[:1]], output)
        block = FusedNet(symbol, values, shape, [mx.cpu()], output, int8)
    return lambda: block(data).asnumpy()


# --- in the process that asks ---------------------------------------------------------------------


class Worker:
    """A process that times a form of a case.

    Parameters
    ----------
    form, case
    options
        ``reference`` and ``python``.
    folder
        For what PyTorch must be told of a graph, and for what the process complains of.
    """

    def __init__(self, form: str, case: Case, options: argparse.Namespace, folder: str) -> None:
        self.form = form
        told = {**dataclasses.asdict(case), "form": form}
        words = [sys.executable, "-m", "benchmark.speed", "--worker"]
        if form in THEIRS[case.task]:
            symbol, conf = case.built()
            told["network"] = get_spec(case.network.partition("+")[0]).name
            if case.network != told["network"] or told["network"] not in ORIGINALS:
                told["graph"] = os.path.join(folder, "graph.json")
                describe(symbol, conf, told["graph"])
            told.update(classes=CLASSES, checkout=os.path.abspath(options.reference))
            told["shape"] = (case.batch, *conf.data_shape)
            words = [options.python, os.path.join(ROOT, "benchmark", "speed_torch.py")]
        # Not a pipe: one that nobody empties stops a process that warns a lot.
        self.complaints = os.path.join(folder, f"{form}.txt")
        with open(self.complaints, "w", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                [*words, json.dumps(told)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(case.threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            self.end()
            with open(self.complaints, encoding="utf-8", errors="replace") as stream:
                text = stream.read().strip().splitlines()
            raise GloReError(f"{self.form} failed: {text[-1] if text else 'without a word'}")
        return json.loads(line)

    def time(self) -> Sample:
        """Have it call once."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return Sample(**self._read())

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def describe(symbol: mx.sym.Symbol, conf: InputConf, path: str) -> None:
    """Write what :func:`benchmark.speed_torch.graph_net` reads."""
    plain = logits(symbol)
    args, _ = param_shapes(plain, {"data": (1, *conf.data_shape)})
    content = json.loads(plain.tojson())
    ndims = {n.name: len(n.shape) for n in Graph(plain, {"data": (1, *conf.data_shape)}).nodes()}
    for node in content["nodes"]:
        node["ndim"] = ndims[node["name"]]
    known = {"nodes": content["nodes"], "shapes": args, "head": content["heads"][0][0]}
    write_text(path, json.dumps(known))


def measure(
    case: Case, forms: Iterable[str], options: argparse.Namespace
) -> dict[str, list[Sample]]:
    """Return a sample per round of each form, and of each of :data:`LIMITS`.

    A form that fails is left out, and why is said on standard error.
    """
    found: dict[str, list[Sample]] = {}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for form in (*LIMITS, *forms):
                try:
                    workers[form] = Worker(form, case, options, folder)
                except GloReError as error:
                    print(f"{case}: {error}", file=sys.stderr)
            for _ in progress(range(options.rounds), str(case), unit="rounds"):
                for form, worker in list(workers.items()):
                    try:
                        found.setdefault(form, []).append(worker.time())
                    except GloReError as error:
                        print(f"{case}: {error}", file=sys.stderr)
                        del workers[form], found[form]
        finally:
            for worker in workers.values():
                worker.end()
    return found


def seconds(samples: Sequence[Sample], clock: str, threads: int) -> list[float]:
    """Return the times of a form: of the processor's clock, a thread's share."""
    if clock == "wall":
        return [sample.wall for sample in samples]
    return [sample.processor / threads for sample in samples]


def summarise(case: Case, found: dict[str, list[Sample]], clock: str) -> dict[str, Any]:
    """Return the figures of a case by form: times, share of the limit, memory, ratios."""
    times = {form: seconds(samples, clock, case.threads) for form, samples in found.items()}
    operations = {**dict.fromkeys(found, case.operations()), **LIMITS}
    rows: dict[str, Any] = {}
    for form, values in times.items():
        speeds = [operations[form] / value for value in values]
        rows[form] = {
            "median": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "gflops": statistics.median(speeds) / 1e9,
            "share": statistics.median(
                speed * value / LIMITS["convolution"]
                for speed, value in zip(speeds, times["convolution"])
            ),
            "peak": max(sample.peak for sample in found[form]),
            "ratios": {
                other: statistics.median(b / a for a, b in zip(values, times[other]))
                for other in times
                if other not in LIMITS and form not in LIMITS
            },
        }
    return {**dataclasses.asdict(case), "case": str(case), "forms": rows}


def case_table(result: dict[str, Any], references: Sequence[str]) -> str:
    """Return the Markdown table of a case; how many times as fast as each reference in columns."""
    rows = [
        [
            form,
            f"{row['median']:.3f}",
            f"{row['least']:.3f}–{row['most']:.3f}",
            f"{row['gflops']:.0f}",
            f"{100 * row['share']:.0f} %",
            f"{row['peak'] / 2**20:.0f}",
            *(f"{row['ratios'][other]:.2f}" if row["ratios"] else "" for other in references),
        ]
        for form, row in result["forms"].items()
    ]
    header = ["form", "median, s", "least–most", "GFLOP/s", "of the convolution's", "peak, MiB"]
    return markdown([*header, *(f"speed / {other}" for other in references)], rows)


def growth_table(axis: str, results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of the cases along an axis: median seconds (peak MiB)."""
    forms = [form for form in results[0]["forms"] if form not in LIMITS]
    rows = []
    for result in results:
        cells = [result["forms"].get(form) for form in forms]
        texts = [f"{c['median']:.3f} ({c['peak'] / 2**20:.0f})" if c else "–" for c in cells]
        rows.append([result["value"], *texts])
    return markdown([axis, *(f"{form}, s (MiB)" for form in forms)], rows)


def growth_panels(axis: str, results: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return a diagram of the seconds along an axis."""
    lines = []
    for form in results[0]["forms"]:
        if form not in LIMITS:
            cells = [result["forms"].get(form) for result in results]
            medians = [cell["median"] if cell else None for cell in cells]
            lines.append(Line([r["value"] for r in results], medians, form, style="-"))
    return [Panel(f"{results[0]['network']}, {results[0]['task']}, s", axis, lines)]


def parse_growth(text: str) -> tuple[str, tuple[int, ...]]:
    """Return axis and values of ``batch=1,2,4``."""
    axis, _, values = text.partition("=")
    if axis not in AXES or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=LIST, AXIS of {', '.join(AXES)}")
    return axis, comma_list(positive_int)(values)


def parse_options(argv: Optional[list[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    sizes = comma_list(positive_int)
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help="NAME or NAME+BLOCK")
    parser.add_argument("--batch-sizes", type=sizes, default=(1,), help="of inference (1)")
    parser.add_argument("--train-batch-sizes", type=sizes, default=(2,), help="of training (2)")
    parser.add_argument("--task", choices=OURS, help="default: both")
    parser.add_argument("--crop-size", type=positive_int, help="default: the network's own")
    parser.add_argument(
        "--grow",
        action="append",
        type=parse_growth,
        default=[],
        metavar="AXIS=LIST",
        help=f"measure along an axis, {', '.join(AXES)}, instead",
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="%(default)s")
    parser.add_argument("--threads", type=positive_int, default=physical_cores())
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: what a call takes of all cores, divided by the threads, where other "
        "programs run (default: wall)",
    )
    parser.add_argument("--reference", metavar="CHECKOUT", help="of facebookresearch/GloRe")
    parser.add_argument("--python", metavar="PROGRAM", help="a Python that has PyTorch")
    parser.add_argument("--output", default="exps/speed", metavar="PREFIX", help="%(default)s")
    options = parser.parse_args(argv)
    if bool(options.reference) != bool(options.python):
        parser.error("--reference and --python go together")
    return options


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str], list[Panel]]:
    """Measure; return the figures of all cases, the parts of the text, and the diagrams."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    panels: list[Panel] = []
    sizes = {"inference": options.batch_sizes, "training": options.train_batch_sizes}

    def timed(case: Case) -> dict[str, Any]:
        forms = [
            form
            for form in OURS[case.task]
            if form != "onnx" or importlib.util.find_spec("onnxruntime")
        ]
        if options.reference:
            forms += THEIRS[case.task]
        results.append(summarise(case, measure(case, forms, options), options.clock))
        return results[-1]

    for network in options.networks:
        for task in [options.task] if options.task else OURS:
            base = Case(network, task, sizes[task][0], options.threads, crop=options.crop_size)
            for axis, values in options.grow:
                along = [
                    {**timed(dataclasses.replace(base, **{axis: value})), "value": value}
                    for value in values
                ]
                texts += [f"{base}, by {axis}:", growth_table(axis, along)]
                panels += growth_panels(axis, along)
            for batch in sizes[task] if not options.grow else ():
                found = timed(dataclasses.replace(base, batch=batch))
                references = [form for form in THEIRS[task] if form in found["forms"]]
                texts += [f"{found['case']}:", case_table(found, references)]
    return results, texts, panels


def main(argv: Optional[list[str]] = None) -> int:
    """Measure, print the tables, write PREFIX.json, PREFIX.md and, of what grows, PREFIX.png."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        told = json.loads(argv[1])
        form = told.pop("form")
        answer(call_of(form, Case(**told)))
        return 0
    options = parse_options(argv)
    check_writable(f"{options.output}.json", "--output")
    results, texts, panels = run(options)
    clock = "wall clock" if options.clock == "wall" else "processor time / threads"
    text = "\n\n".join([f"{options.rounds} rounds, {clock}.", *texts])
    print(text)
    write_text(f"{options.output}.md", text + "\n")
    write_text(f"{options.output}.json", json.dumps({"clock": options.clock, "cases": results}))
    if panels:
        plot_panels(panels, f"{options.output}.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
