"""Prepare a checkpoint for prediction in 8-bit whole numbers (INT8) on a CPU.

Sample videos or images, such as some of the training's, show which ranges the numbers inside the
network have. What is found is written beside the weights, for ``--int8`` of ``evaluate.py``,
``predict.py`` and ``serve.py``. Other samples then tell how often INT8 names the same class as
float32 and how much faster it is. Where the classes differ too often, each layer is tried alone,
and those that do the most harm stay in float32.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

import numpy as np

from checkpoint.manifest import facts_of
from data.common.options import PixelOptions
from glore_common import GloReError, UsageError, check_writable, command, progress, write_text
from glore_options import JobOptions, Options, group, option, parse, positive_int, share
from mxnet_compat import mx
from network.inference import FusedNet, calibrated
from network.quantization import MODES, Int8, joined, layers_of
from train.report import log_to

from .evaluate import log_input, read_model
from .media import FileOptions, View, every_batch, find_files, loader_of, view_of
from .model import Model, int8_path
from .options import ViewOptions, WeightsOptions

LOGGER = logging.getLogger("glore")
# Samples that each layer is tried on, and rows of the table in the log.
TRIED, LISTED = 8, 10


@dataclasses.dataclass
class Int8Options(Options):
    """How the ranges are found, and what is asked of the result."""

    title = "INT8"

    calibration: str = option(
        "naive",
        "ranges: naive (from the least to the largest number), entropy (without outliers, so that "
        "the numbers' distribution is kept best; many times slower)",
        choices=MODES,
    )
    samples: int = option(32, "files that the ranges are found on", kind=positive_int)
    check_samples: int = option(
        200, "at most so many of the other files are compared with float32", kind=positive_int
    )
    agreement: float = option(
        0.99,
        "share of samples whose likeliest class must stay what it is in float32; else layers are "
        "left in float32",
        kind=share,
    )
    sensitivity: bool = option(False, "try each layer alone in any case, and list what it does")
    log_file: str = option("", "log file (default: none)")


@dataclasses.dataclass
class QuantizeOptions(JobOptions):
    """Options of ``quantize.py``."""

    network: WeightsOptions = group(WeightsOptions)
    files: FileOptions = group(FileOptions)
    data: ViewOptions = group(ViewOptions)
    pixels: PixelOptions = group(PixelOptions)
    int8: Int8Options = group(Int8Options)


class Comparison(NamedTuple):
    """INT8 beside float32: share of equal classes, median difference of logits as a share of the
    largest one, times as fast (median), and samples."""

    agreement: float
    difference: float
    speed: float
    samples: int


def samples_of(view: View, paths: list[str]) -> Iterator[mx.nd.NDArray]:
    """Yield the views (1, …) of files that can be read."""
    with loader_of(view, paths) as loader:
        for data, _, _ in every_batch(loader):
            for place in range(len(data)):
                yield data[place : place + 1]


def compare(plain: FusedNet, int8: FusedNet, samples: Iterable[mx.nd.NDArray]) -> Comparison:
    """Compare two forms of a network; they take turns, for the time of each.

    Raises
    ------
    GloReError
        If there are no samples.
    """
    same = 0
    differences: list[float] = []
    speeds: list[float] = []
    for data in samples:
        results, seconds = [], []
        for net in (plain, int8):
            if not speeds:
                net(data).wait_to_read()  # what the first call plans is not timed
            started = time.perf_counter()
            results.append(net(data).asnumpy())
            seconds.append(time.perf_counter() - started)
        want, got = results
        same += int(want.argmax() == got.argmax())
        differences.append(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
        speeds.append(seconds[0] / seconds[1])
    if not speeds:
        raise GloReError("none of the files to compare on can be read")
    return Comparison(
        same / len(speeds), float(np.median(differences)), float(np.median(speeds)), len(speeds)
    )


def sensitivities(
    model: Model, int8: Int8, plain: FusedNet, samples: list[mx.nd.NDArray]
) -> list[tuple[str, float]]:
    """Return (layer, difference of logits when it alone is INT8), the largest difference first."""
    names = list(layers_of(joined(plain.optimized)))
    found = []
    for name in progress(names, "Layers", unit="layer"):
        floats = tuple(other for other in names if other != name)
        net = model.fused([mx.cpu()], dataclasses.replace(int8, floats=floats))
        found.append((name, compare(plain, net, samples[:TRIED]).difference))
    return sorted(found, key=lambda row: -row[1])


def search(
    model: Model,
    int8: Int8,
    plain: FusedNet,
    samples: list[mx.nd.NDArray],
    table: list[tuple[str, float]],
    reached: float,
    wanted: float,
) -> Int8:
    """Leave layers in float32, twice as many each time, until the classes of samples agree.

    ``table`` has the layers in the order in which they are left out, ``reached`` is the agreement
    without. At most half of them are left out; if the classes never agree as often as wanted, it
    is the form in which they agree most often.
    """
    best, most, count = int8, reached, 1
    while count <= len(table) // 2 and most < wanted:
        tried = dataclasses.replace(int8, floats=tuple(name for name, _ in table[:count]))
        agreement = compare(plain, model.fused([mx.cpu()], tried), samples).agreement
        LOGGER.info("In float32 %d layers: %.2f %% agree", count, 100 * agreement)
        if agreement > most:
            best, most = tried, agreement
        count *= 2
    return best


def divided(paths: list[str], options: Int8Options) -> tuple[list[str], list[str]]:
    """Return the files to find ranges on, evenly spaced, and those to compare on."""
    count = min(options.samples, max(1, len(paths) // 2))
    places = {int(place) for place in np.linspace(0, len(paths) - 1, count)}
    rest = [path for place, path in enumerate(paths) if place not in places]
    count = min(options.check_samples, len(rest))
    kept = [rest[int(place)] for place in np.linspace(0, len(rest) - 1, count)]
    return [paths[place] for place in sorted(places)], kept


def main(argv: Optional[list[str]] = None) -> None:
    """Quantise as the command line says."""
    options = parse(QuantizeOptions(), argv, (__doc__ or "").split("\n\n")[0])
    wanted = options.int8
    with log_to(wanted.log_file or None):
        if options.network.weights is None:
            raise UsageError(f"name a checkpoint: {command('quantize')} CHECKPOINT PATH ...")
        model = read_model(options)
        if options.data.crops == "full":
            raise UsageError("--crops full is not for INT8: files then have all sizes")
        view = view_of(model, options.data)
        model = view.model
        path = int8_path(model.path)
        check_writable(path, "the INT8 form")
        paths = find_files(options.files, model.facts.task)
        if len(paths) < 2:
            raise UsageError("give two files at least: ranges are found on some, tested on others")
        first, second = divided(paths, wanted)
        log_input(model, f"{len(first)} {model.facts.task}s for the ranges, {len(second)} to test")
        samples = list(progress(samples_of(view, first), "Reading", unit="sample"))
        if not samples:
            raise GloReError(f"none of the {len(first)} {model.facts.task}s can be read")
        plain = model.fused([mx.cpu()])
        int8 = calibrated(
            model.symbol,
            {**model.arg_params, **model.aux_params},
            model.facts.data_shape,
            progress(samples, "Ranges", unit="sample"),
            plain.output,
            wanted.calibration,
        )
        table = None
        agreement = compare(plain, model.fused([mx.cpu()], int8), samples).agreement
        LOGGER.info("All INT8   %.2f %% of the samples for the ranges agree", 100 * agreement)
        if agreement < wanted.agreement or wanted.sensitivity:
            table = sensitivities(model, int8, plain, samples)
            for name, difference in table[:LISTED]:
                LOGGER.info("Layer      %-50s %.2f %%", name, 100 * difference)
        if table is not None and agreement < wanted.agreement:
            int8 = search(model, int8, plain, samples, table, agreement, wanted.agreement)
        tests = progress(samples_of(view, second), "Testing", unit="sample")
        result = compare(plain, model.fused([mx.cpu()], int8), tests)
        content = {
            "weights": facts_of(model.path),
            "calibration": wanted.calibration,
            "samples": len(samples),
            "floats": int8.floats,
            "ranges": int8.ranges,
            "sensitivity": table,
            "test": result._asdict(),
        }
        write_text(path, json.dumps(content, indent=1))
        LOGGER.info(
            "Test       %.2f %% of %d samples get the class of float32, %.2f times as fast; "
            "logits differ by %.2f %% of the largest (median)",
            100 * result.agreement,
            result.samples,
            result.speed,
            100 * result.difference,
        )
        if result.agreement < wanted.agreement:
            LOGGER.warning(
                "That is less than --agreement %g: give more or other samples, or --calibration %s",
                wanted.agreement,
                next(mode for mode in MODES if mode != wanted.calibration),
            )
        LOGGER.info(
            "In float32 %d layers%s", len(int8.floats), "".join(f", {n}" for n in int8.floats)
        )
        LOGGER.info("Written    %s", path)
        LOGGER.info("Use it     %s %s --int8", command("evaluate"), model.path)
