"""What a GPU computes otherwise than a CPU, checked once on a machine that has one.

::

    python -m benchmark.gpu_check                 all GPUs: with two, synchronised BatchNorm too
    python -m benchmark.gpu_check --gpus 0        one of them
    python -m benchmark.gpu_check --dry-run       tries this program: CPU against CPU, tiny

It compares each block and whole training steps with the CPU, trains in float16 with float32 master
weights beside float32, adds up gradients through the key-value stores of GPUs, and measures speed
with and without cuDNN's autotuning. The result is text to paste into an issue.
"""

import argparse
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

import mxnet_gpu
from glore_common import GloReError, run_main
from mxnet_compat import mx
from network import GCBlock, GloRe, NonLocal, SEBlock, SNLBlock, get_symbol
from network.batch_norm import with_batch_norm
from network.block import build_block
from network.summary import markdown, with_shape
from train.devices import contexts_of
from train.optimizer import make_optimizer
from train.options import DeviceOptions, TrainOptions, gpu_list
from train.state import parameter_arrays
from train.step import Learner

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BLOCKS = (GloRe, GCBlock, SEBlock, SNLBlock, NonLocal)
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"
# Largest difference relative to the largest value. The sums of a GPU are in another order; a step
# passes through dozens of BatchNorms, which magnify that.
BLOCK_BOUND, STEP_BOUND = 2e-3, 5e-2
AUTOTUNE = "MXNET_CUDNN_AUTOTUNE_DEFAULT"


class Sizes(NamedTuple):
    """How large the checks are."""

    network: str
    batch: int
    shape: Optional[tuple[int, ...]]  # of one sample; None: the network's own
    channels: int
    side: int
    steps: int
    rounds: int


FULL = Sizes("RESNET50_GLORE", 8, None, 64, 14, 20, 10)
TINY = Sizes("TINY_GLORE", 2, (3, 4, 32, 32), 32, 4, 3, 1)


class Row(NamedTuple):
    """One check."""

    check: str
    result: str
    bound: str
    verdict: str


def relative(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference, divided by the reference's largest value."""
    scale = max(float(np.abs(reference).max()), 1e-12)
    difference = float(np.abs(reference - other).max()) / scale
    return difference if np.isfinite(difference) else float("inf")


def compared(check: str, reference: Iterable, other: Iterable, bound: float) -> Row:
    """Return the row of two sequences of arrays."""
    worst = max(relative(a, b) for a, b in zip(reference, other))
    return Row(check, f"{worst:.1e}", f"{bound:.0e}", OK if worst <= bound else FAILED)


def attempt(check: str, function: Callable[[], Row]) -> Row:
    """Return the row of ``function``, or one that says how it failed: the others go on."""
    try:
        row = function()
    except (mx.MXNetError, GloReError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        row = Row(check, lines[-1] if lines else type(error).__name__, "", FAILED)
    print(f"{row.check}: {row.result} {row.verdict}", file=sys.stderr)
    return row


def block_arrays(kind: type, ndim: int, sizes: Sizes, context: mx.Context) -> list[np.ndarray]:
    """Return a block's output and all its gradients, for values that depend on the place only."""
    generator = np.random.RandomState(0)
    block = kind(sizes.channels, ndim=ndim, prefix="check_")
    block.initialize(ctx=context)
    for name, parameter in block.collect_params().items():
        if not name.endswith("running_var"):
            values = generator.normal(0.5 if name.endswith("gamma") else 0, 0.3, parameter.shape)
            parameter.set_data(mx.nd.array(values))
    shape = (2, sizes.channels, *(4, sizes.side, sizes.side)[3 - ndim :])
    data = mx.nd.array(generator.normal(size=shape), ctx=context)
    weights = mx.nd.array(generator.normal(size=shape), ctx=context)
    data.attach_grad()
    with mx.autograd.record():
        output = block(data)
        loss = (output * weights).sum()
    loss.backward()
    grads = [p.grad() for p in block.collect_params().values() if p.grad_req != "null"]
    return [array.asnumpy() for array in (output, data.grad, *grads)]


def check_block(
    check: str, kind: type, ndim: int, sizes: Sizes, cpu: mx.Context, gpu: mx.Context
) -> Row:
    """Compare a block's output and gradients."""
    reference, other = (block_arrays(kind, ndim, sizes, context) for context in (cpu, gpu))
    return compared(check, reference, other, BLOCK_BOUND)


class Run:
    """A network, freshly made from the same values, that trains on one random batch."""

    def __init__(self, sizes: Sizes, contexts: Sequence[mx.Context], **devices: Any) -> None:
        symbol, conf = get_symbol(sizes.network, num_classes=10, dropout=0.0)
        conf = with_shape(conf, sizes.shape)
        options = TrainOptions()
        for name, value in devices.items():
            setattr(options.devices, name, value)
        symbol = with_batch_norm(symbol, options.devices.batch_norm, contexts)
        self.block = build_block(symbol, conf, ctx=list(contexts))
        self.block.cast(options.devices.dtype)
        optimizer = make_optimizer("nesterov", momentum=0.9, wd=1e-4)
        self.learner = Learner(self.block, optimizer, contexts, options)
        generator = np.random.RandomState(1)
        self.data = mx.nd.array(generator.normal(size=(sizes.batch, *conf.data_shape)))
        self.label = mx.nd.array(np.arange(sizes.batch) % 10)

    def step(self) -> float:
        """Take one step and return the mean loss."""
        ((losses, _, _),) = self.learner.step([(self.data, self.label)], lr=0.01, seed=0)
        return float(np.mean(np.concatenate([loss.asnumpy().ravel() for loss in losses])))

    def change(self) -> dict[str, np.ndarray]:
        """Take one step and return what it changed in each parameter, and the loss."""
        before = self._values()
        loss = self.step()
        after = self._values()
        return {"loss": np.array([loss]), **{name: after[name] - before[name] for name in before}}

    def predict(self) -> None:
        """Compute the logits."""
        _, outputs, _ = self.learner.predict(self.data, self.label)
        for output in outputs:
            output.wait_to_read()

    def _values(self):
        arrays = parameter_arrays(self.block)
        return {name: array.asnumpy().astype("float32") for name, array in arrays.items()}


def check_step(check: str, sizes: Sizes, cpu: Sequence, gpus: Sequence, **devices: Any) -> Row:
    """Compare the loss and the change of all parameters and statistics of one step.

    Of the parameters, those count that change by a hundredth of the largest change or more: the
    gradient of what stands before a BatchNorm can be a sum that cancels.
    """
    reference, other = Run(sizes, cpu).change(), Run(sizes, gpus, **devices).change()
    size = {name: float(np.abs(array).max()) for name, array in reference.items()}
    least = 0.01 * max(value for name, value in size.items() if name.startswith("arg:"))
    kept = [n for n, value in size.items() if not n.startswith("arg:") or value >= least]
    return compared(check, [reference[n] for n in kept], [other[n] for n in kept], STEP_BOUND)


def check_float16(check: str, sizes: Sizes, contexts: Sequence[mx.Context]) -> Row:
    """Train on one batch in float32 and in float16, and compare how the losses fall."""
    # A CPU has no float16 matrix product: there the program alone is tried.
    dtype = "float16" if contexts[0].device_type == "gpu" else "float32"
    full, half = Run(sizes, contexts), Run(sizes, contexts, dtype=dtype, loss_scale="dynamic")
    full_losses = [full.step() for _ in range(sizes.steps)]
    half_losses = [half.step() for _ in range(sizes.steps)]
    shown = " ".join(
        f"{full_losses[i]:.3f}/{half_losses[i]:.3f}"
        for i in sorted({0, sizes.steps // 2, sizes.steps - 1})
    )
    # The first steps may be left out, until the loss scale fits.
    gap = abs(half_losses[0] - full_losses[0]) / full_losses[0]
    fell = sizes.steps < 10 or half_losses[-1] < half_losses[0]
    good = np.isfinite(half_losses).all() and gap < 0.02 and fell
    return Row(check, f"float32/float16 {shown}", "falls", OK if good else FAILED)


def check_store(check: str, name: str, contexts: Sequence[mx.Context]) -> Row:
    """Add up one array of each device in a key-value store."""
    store = mx.kv.create(name)
    arrays = [mx.nd.full((1000,), 1.5 + i, ctx=context) for i, context in enumerate(contexts)]
    total = np.full(1000, sum(1.5 + i for i in range(len(contexts))))
    store.init("sum", mx.nd.zeros((1000,), ctx=contexts[0]))
    store.pushpull("sum", arrays, out=arrays)
    return compared(check, [total] * len(arrays), [a.asnumpy() for a in arrays], 1e-6)


def check_job(check: str, contexts: Sequence[mx.Context], log_dir: str) -> Row:
    """Start a job of workers and a server, in which :func:`worker` takes a step."""
    on_gpu = contexts[0].device_type == "gpu"
    program = [sys.executable, "-m", "benchmark.gpu_check", "--worker"]
    program += [] if on_gpu else ["--dry-run"]
    workers = len(contexts) if on_gpu else 2
    command = [sys.executable, os.path.join(ROOT, "launch.py"), "-n", str(workers), "-s", "1"]
    done = subprocess.run(
        [*command, "--log-dir", log_dir, "--", *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    good = done.returncode == 0 and "added up" in done.stdout + done.stderr
    result = f"{workers} worker(s)" if good else (done.stderr.strip().splitlines() or [""])[-1]
    return Row(check, result, "", OK if good else FAILED)


def worker(context: mx.Context) -> None:
    """Be one worker of :func:`check_job`."""
    store = mx.kv.create("dist_device_sync")
    array = mx.nd.full((1000,), store.rank + 1.0, ctx=context)
    store.init("sum", mx.nd.zeros((1000,)))
    store.pushpull("sum", array, out=array)
    expected = store.num_workers * (store.num_workers + 1) / 2
    if not (array.asnumpy() == expected).all():
        raise GloReError(f"the workers' sum is {array[0].asscalar()}, not {expected}")
    print("added up")


def speed(sizes: Sizes, contexts: Sequence[mx.Context], autotune: bool, **devices: Any) -> list:
    """Return a row of the table of speeds: samples a second."""
    os.environ[AUTOTUNE] = str(int(autotune))
    try:
        run = Run(sizes, contexts, **devices)
        figures = []
        for function in (run.step, run.predict):
            function()
            mx.nd.waitall()
            started = time.perf_counter()
            for _ in range(sizes.rounds):
                function()
            mx.nd.waitall()
            figures.append(sizes.batch * sizes.rounds / (time.perf_counter() - started))
    finally:
        os.environ.pop(AUTOTUNE)
    where = f"{len(contexts)} x {contexts[0].device_type}"
    dtype = devices.get("dtype", "float32")
    return [where, dtype, "on" if autotune else "off", *(f"{figure:.1f}" for figure in figures)]


def checks(sizes: Sizes, gpus: Sequence[mx.Context], log_dir: str) -> list[Row]:
    """Run all checks of ``gpus`` (devices of the CPU, where the program itself is tried)."""
    cpus = [mx.cpu(index) for index in range(len(gpus))]
    cpu, one, on_gpu = cpus[:1], gpus[:1], gpus[0].device_type == "gpu"
    rows = []

    def add(check, function, *arguments, **devices):
        rows.append(attempt(check, lambda: function(check, *arguments, **devices)))

    for kind, ndim in itertools.product(BLOCKS, (2, 3)):
        name = f"{kind.__name__} {ndim}D, forward and backward"
        add(name, check_block, kind, ndim, sizes, cpu[0], one[0])
    networks = ("TINY_GLORE", "resnet18_w-glore_1-1") if on_gpu else ()
    for network in dict.fromkeys((*networks, sizes.network)):
        shape = (3, 64, 64) if network.startswith("resnet18") else sizes.shape
        small = sizes._replace(network=network, shape=shape)
        add(f"step of {network}", check_step, small, cpu, one)
        if len(gpus) > 1:
            add(f"step of {network} on {len(gpus)} devices", check_step, small, cpus, gpus)
    add(f"float16 with master weights, {sizes.network}", check_float16, sizes, one)
    for name in ("device", "nccl"):
        if name == "nccl" and not on_gpu:
            rows.append(Row("kvstore nccl", "needs a GPU", "", NOT_RUN))
        else:
            add(f"kvstore {name}", check_store, name, gpus)
    add("kvstore dist_device_sync", check_job, gpus, log_dir)
    if on_gpu and len(gpus) > 1:
        add("synchronised BatchNorm", check_step, sizes, cpu, gpus, batch_norm="sync")
    else:
        rows.append(Row("synchronised BatchNorm", "needs two GPUs", "", NOT_RUN))
    return rows


def header(gpus: Sequence[mx.Context]) -> str:
    """Say on what the figures were found."""
    driver = mxnet_gpu.read_driver()
    names = [f"{gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})" for gpu in driver.gpus]
    cuda = f", driver of CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    build = ", ".join(mxnet_gpu.installed_builds())
    return (
        f"MXNet {mx.__version__} ({build}), NumPy {np.__version__}, Python "
        f"{platform.python_version()}; devices {', '.join(map(str, gpus))}; "
        f"GPUs: {', '.join(names) or 'none'}{cuda}"
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the checks and print their tables; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gpus", type=gpu_list, metavar="LIST", help="GPU numbers (default: all)")
    parser.add_argument("--network", default=FULL.network, help="of the float16 run and the speeds")
    parser.add_argument("--batch-size", type=int, default=FULL.batch)
    parser.add_argument("--dry-run", action="store_true", help="CPU against CPU, with tiny sizes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dry_run:
        sizes, gpus = TINY, [mx.cpu()]
    else:
        sizes = FULL._replace(network=args.network, batch=args.batch_size)
        gpus = contexts_of(DeviceOptions(gpus=args.gpus))
        if gpus[0].device_type != "gpu":
            raise GloReError(
                "there is no GPU to check (python -m mxnet_compat says more); --dry-run tries this "
                "program on the CPU"
            )
    if args.worker:
        worker(gpus[int(os.environ.get("DMLC_TASK_ID", "0")) % len(gpus)])
        return 0
    with tempfile.TemporaryDirectory() as log_dir:
        rows = checks(sizes, gpus, log_dir)
    speeds = [speed(sizes, [mx.cpu()], True)]
    for dtype in ("float32", "float16") if not args.dry_run else ():
        speeds += [speed(sizes, gpus, autotune, dtype=dtype) for autotune in (False, True)]
    failed = sum(row.verdict == FAILED for row in rows)
    print(header(gpus), end="\n\n")
    print(markdown(("check", "largest relative difference", "bound", "verdict"), rows))
    print(f"\n{sizes.network}, batch {sizes.batch}, samples a second:\n")
    print(markdown(("device", "type", "autotuning", "training", "inference"), speeds))
    print(f"\n{len(rows)} checks, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_main(main))
