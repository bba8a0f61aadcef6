"""The study of docs/res4-stability.md: which part of a GloRe unit lets a ResNet-18 train with it.

::

    python -m benchmark.res4_stability run     # trains what is not there yet; one file per run
    python -m benchmark.res4_stability report  # table (CSV and Markdown) and diagrams of all runs
    python -m benchmark.res4_stability spread  # what one image has of a batch's features

Compared are a public reproduction's unit on CUB-200-2011, three repairs of it one by one, and all
of them, which is the video form of GloRe (Chen et al., CVPR 2019) with a normalised projection.
"""

import argparse
import csv
import io
import json
import logging
import math
import os
import sys
import time
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image

from data.image.loaders import get_image_train_loader, get_image_val_loader
from data.image.options import ImageOptions
from data.image.source import read_image_folder
from dataset import prepare_demo_images
from dataset.cub200 import MEAN, STD
from dataset.demo_images import CLASSES, GREY
from glore_common import GloReError, UsageError, atomic_path, run_main, write_text
from glore_options import Parser, comma_list, positive_int
from jobs.train_classifier import GLORE_STAGES
from mxnet_compat import mx
from network.block import build_block
from network.builder import get_spec, get_symbol, logits
from network.initializer import DEFAULT_RULES, initial_params, ones, zeros
from train.metric import StreamingMetrics
from train.optimizer import make_optimizer
from train.options import TrainOptions
from train.plots import Line, Panel, plot_panels
from train.report import log_to
from train.step import Learner, derived_seed
from train.task import Classification

LOGGER = logging.getLogger("glore")
HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs")
BATCH_SIZE, MOMENTUM, WEIGHT_DECAY, NODES, ROTATION = 32, 0.9, 5e-4, 16, 10
EVERY = 10  # steps between validations, and steps that a figure of training is the mean of
COLOURS = 128  # of a picture
COLUMNS = 3  # of diagrams in a figure: one per learning rate by default
PLACES = ("res3", "res4")
STARTS = ("fresh", "trained")
CONTRASTS = ("varied", "even")
# Of the network that ``--start trained`` goes out from.
START_RATE, START_STEPS = 0.02, 160


class Variant(NamedTuple):
    """One form of the unit: overrides of ``get_symbol`` beside its place, and initial values."""

    label: str
    overrides: dict
    rules: tuple
    colour: str


VARIANTS = {
    "none": Variant("no unit", {}, (), "black"),
    "report": Variant("reproduction's unit", {"glore_flavour": "report"}, (), "tab:red"),
    "zero": Variant(
        "repair: last BN starts at 0",
        {"glore_flavour": "report"},
        ((r"_last_bn_gamma$", zeros),),
        "tab:blue",
    ),
    "norm": Variant(
        "repair: projection divided by L",
        {"glore_flavour": "report", "normalize": True},
        (),
        "tab:orange",
    ),
    "graph": Variant(
        "repair: shortcut and relu",
        {"glore_flavour": "video"},
        ((r"_blocker_bn_gamma$", ones),),
        "tab:purple",
    ),
    "all": Variant("all repairs", {"glore_flavour": "video", "normalize": True}, (), "tab:green"),
}


class Case(NamedTuple):
    """One run. ``place`` is '' for the network without a unit."""

    network: str
    crop_size: int
    start: str
    contrast: str
    place: str
    variant: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its file."""
        place = self.place or "nowhere"
        return (
            f"{self.network}_{self.crop_size}px_{self.start}_{self.contrast}_{place}_"
            f"{self.variant}_lr{self.rate:g}_seed{self.seed}_{self.steps}"
        )


def cases(args: argparse.Namespace) -> list[Case]:
    """Return all cases that the options ask for, those of one seed together."""
    found = []
    for seed in args.seeds:
        for rate in args.rates:
            for variant in args.variants:
                places = ("",) if variant == "none" else args.places
                found += [
                    Case(
                        args.network,
                        args.crop_size,
                        args.start,
                        args.contrast,
                        place,
                        variant,
                        rate,
                        seed,
                        args.steps,
                    )
                    for place in places
                ]
    return found


def overrides_of(case: Case) -> dict[str, Any]:
    """Return the overrides of ``get_symbol`` of a case.

    All units have as many states as channels, as the reproduction's, so that what is compared
    has one size.
    """
    variant = VARIANTS[case.variant]
    if not case.place:
        return variant.overrides
    (stage,) = GLORE_STAGES[case.place]
    spec = get_spec(case.network)
    return {
        "glore": {stage: (spec.blocks[stage - 2],)},
        "num_node": NODES,
        "num_state": spec.num_out[stage - 2],
        **variant.overrides,
    }


def even(batch: tuple) -> tuple:
    """Return a batch (data, label) with every image brought to one contrast.

    Its distance from grey, (n, 3, h, w) on the scale of the network's input, gets the root mean
    square 1: what makes the demo images differ in contrast is taken back.
    """
    data, label = batch
    values = data.asnumpy()
    grey = ((GREY / 255 - np.array(MEAN)) / np.array(STD)).astype("float32").reshape(1, 3, 1, 1)
    away = values - grey
    away /= np.sqrt((away**2).mean((1, 2, 3), keepdims=True))
    return mx.nd.array(grey + away), label


class Images:
    """The made-up images of one seed, augmented, in memory: what every run of it reads."""

    def __init__(self, seed: int, crop_size: int, steps: int, contrast: str) -> None:
        config = prepare_demo_images()
        options = ImageOptions(
            batch_size=BATCH_SIZE,
            num_workers=0,
            crop_size=crop_size,
            augmentation="crop",
            rotation=ROTATION,
        )
        pixels: dict[str, Any] = {"mean": MEAN, "std": STD}
        source = read_image_folder(config.train_root)
        self.num_classes = source.num_classes
        with get_image_train_loader(source, options, seed=seed, **pixels) as loader:
            self.train: list[tuple] = []
            while len(self.train) < steps:
                loader.set_position(len(self.train) // len(loader), 0)
                self.train += list(loader)[: steps - len(self.train)]
        source = read_image_folder(config.val_root)
        with get_image_val_loader(source, options, with_index=False, **pixels) as loader:
            self.val = list(loader)
        if contrast == "even":
            self.train, self.val = (
                [even(batch) for batch in part] for part in (self.train, self.val)
            )


def start_params(case: Case, images: Images, folder: str) -> dict[str, np.ndarray]:
    """Return parameters of the network without a unit, trained for a while; kept in a file."""
    name = f"start_{case.network}_{case.crop_size}px_{case.contrast}_seed{case.seed}.params"
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        plain = case._replace(place="", variant="none", rate=START_RATE, start="fresh")
        _, block = train(plain, images, None, START_STEPS)
        args, auxs = block.arg_aux_params()
        mx.nd.save(path, {**args, **auxs})
    return {name: value.asnumpy() for name, value in mx.nd.load(path).items()}


def fresh_params(case: Case, symbol: mx.sym.Symbol, trained: Optional[dict]) -> tuple:
    """Return the initial parameters of a case: those of ``trained`` where it has them.

    The classifier always starts afresh.
    """
    rules = (*VARIANTS[case.variant].rules, *DEFAULT_RULES)
    # Another seed than that with which the start was made: its classifier would fit.
    seed = case.seed if trained is None else case.seed + 1000
    shape = (1, 3, case.crop_size, case.crop_size)
    parts = initial_params(symbol, {"data": shape}, seed, rules)
    for part in parts if trained is not None else ():
        for name in part:
            if name in trained and not name.startswith("classifier_"):
                part[name] = trained[name]
    return parts


def train(
    case: Case, images: Images, trained: Optional[dict], steps: int
) -> tuple[dict[str, Any], mx.gluon.Block]:
    """Train one case; return (result as JSON takes it, block)."""
    symbol, input_conf = get_symbol(
        case.network, images.num_classes, crop_size=case.crop_size, **overrides_of(case)
    )
    params = fresh_params(case, logits(symbol), trained)
    block = build_block(symbol, input_conf, ctx=mx.cpu(), params=params)
    optimizer = make_optimizer("sgd", MOMENTUM, WEIGHT_DECAY)
    learner = Learner(block, optimizer, [mx.cpu()], TrainOptions())
    losses, validations = [], []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = images.train[(step - 1) % len(images.train)]
        ((parts, _, _),) = learner.step([batch], case.rate, derived_seed(case.seed, step))
        losses.append(float(parts[0].mean().asscalar()))
        if step % EVERY == 0 or step == steps:
            metrics = StreamingMetrics(Classification())
            for data, label in images.val:
                metrics.update(*learner.predict(data, label))
            means = metrics.means()
            validations.append([step, means["loss"], means["top1"]])
    result = {
        **case._asdict(),
        "losses": [round(loss, 5) for loss in losses],
        "validations": validations,
        "finite": bool(np.isfinite(losses).all() and learner.is_finite()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return result, block


def run(args: argparse.Namespace) -> None:
    """Train all cases that have no file yet."""
    os.makedirs(args.results, exist_ok=True)
    wanted = cases(args)
    missing = [case for case in wanted if not os.path.exists(path_of(args, case))]
    LOGGER.info("%d runs, %d of them to do", len(wanted), len(missing))
    images, seed, trained = None, None, None
    for number, case in enumerate(missing, 1):
        # Another process may have done it meanwhile.
        if os.path.exists(path_of(args, case)):
            continue
        if case.seed != seed:
            seed = case.seed
            images = Images(seed, args.crop_size, case.steps, args.contrast)
            if case.start == "trained":
                trained = start_params(case, images, args.results)
        result, _ = train(case, images, trained, case.steps)
        write_text(path_of(args, case), json.dumps(result))
        LOGGER.info(
            "%d/%d %s: training loss %.3f, validation loss %.3g (%.0f s)",
            number,
            len(missing),
            case.name,
            np.mean(result["losses"][-EVERY:]),
            result["validations"][-1][1],
            result["seconds"],
        )


def path_of(args: argparse.Namespace, case: Case) -> str:
    """Return the file of a run."""
    return os.path.join(args.results, f"{case.name}.json")


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table of runs.

    ``loss_1`` to ``loss_3`` are the mean training losses of the thirds of a run, an epoch of the
    demo each at 120 steps, and ``worst_loss`` the largest of a step; ``val_loss``, ``val_top1``
    are those after the last step, ``worst_val_loss`` the largest of the second half of the run,
    when BatchNorm's running statistics have left their start.
    """
    losses, validations = result["losses"], result["validations"]
    late = [loss for step, loss, _ in validations if step > len(losses) / 2]
    thirds = [float(np.mean(part)) for part in np.array_split(losses, 3)]
    return {
        **{name: result[name] for name in Case._fields},
        **{f"loss_{number}": round(loss, 4) for number, loss in enumerate(thirds, 1)},
        "worst_loss": round(max(losses), 4),
        "val_loss": round(validations[-1][1], 4),
        "worst_val_loss": round(max(late), 4),
        "val_top1": round(validations[-1][2], 4),
        "finite": result["finite"],
    }


def read_results(folder: str) -> list[dict[str, Any]]:
    """Return the results of all runs, in the order of places, variants, rates and seeds."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except FileNotFoundError:
        names = []
    results = []
    for name in names:
        with open(os.path.join(folder, name), encoding="utf-8") as stream:
            results.append(json.load(stream))
    if not results:
        raise GloReError(f"there are no runs in {folder}: python -m benchmark.res4_stability run")
    order = list(VARIANTS)
    return sorted(
        results,
        key=lambda r: (
            r["network"],
            r["crop_size"],
            STARTS.index(r["start"]),
            CONTRASTS.index(r["contrast"]),
            r["place"],
            order.index(r["variant"]),
            r["rate"],
            r["seed"],
        ),
    )


def kind_of(row: dict[str, Any]) -> tuple:
    """Return what the runs of one figure have in common: network, pixels, start and contrast."""
    return (row["network"], f"{row['crop_size']}px", row["start"], row["contrast"])


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: one row per kind of runs, place and variant.

    A cell has, at one learning rate, the means over the seeds of the training losses of the thirds
    of the runs, the worst validation loss and the mean validation accuracy.
    """
    rates = sorted({row["rate"] for row in rows})
    groups: dict[tuple, dict] = {}
    for row in rows:
        key = (kind_of(row), row["place"], row["variant"])
        groups.setdefault(key, {}).setdefault(row["rate"], []).append(row)
    heads = [f"lr {rate:g}: losses / worst val. loss / top-1" for rate in rates]
    lines = [
        "| runs | unit after | unit | " + " | ".join(heads) + " |",
        "|" + "---|" * (3 + len(rates)),
    ]
    for (kind, place, variant), by_rate in groups.items():
        cells = []
        for rate in rates:
            group = by_rate.get(rate)
            if not group:
                cells.append("")
                continue
            *thirds, top1 = (
                np.mean([row[name] for row in group])
                for name in ("loss_1", "loss_2", "loss_3", "val_top1")
            )
            losses = ", ".join(f"{loss:.2f}" for loss in thirds)
            worst = max(row["worst_val_loss"] for row in group)
            cells.append(f"{losses} / {worst:.3g} / {100 * top1:.0f} %")
        label = VARIANTS[variant].label
        lines.append(f"| {', '.join(kind)} | {place or '-'} | {label} | {' | '.join(cells)} |")
    return lines


def paired(rows: list[dict[str, Any]]) -> Any:
    """Return the lines of a table that compares runs with those without a unit.

    Compared are the last thirds of runs of one kind, learning rate and seed. A run has failed when
    its training loss there is not below that of a guess.
    """

    def key(row):
        return (kind_of(row), row["steps"], row["rate"], row["seed"])

    plain = {key(row): row for row in rows if row["variant"] == "none"}
    groups: dict[tuple, list] = {}
    for row in rows:
        if key(row) in plain:
            place = (kind_of(row), row["place"], row["variant"])
            groups.setdefault(place, []).append((row, plain[key(row)]))
    lines = [
        "| runs | unit after | unit | loss | larger in | top-1, points | failed |",
        "|" + "---|" * 7,
    ]
    chance = math.log(len(CLASSES))
    for (kind, place, variant), pairs in groups.items():
        losses = [row["loss_3"] - other["loss_3"] for row, other in pairs]
        top1 = [100 * (row["val_top1"] - other["val_top1"]) for row, other in pairs]
        failed = sum(not row["loss_3"] < chance for row, _ in pairs)
        larger = sum(loss > 0 for loss in losses)
        lines.append(
            f"| {', '.join(kind)} | {place or '-'} | {VARIANTS[variant].label} | "
            f"{np.mean(losses):+.2f} | {larger} of {len(pairs)} | {np.mean(top1):+.1f} | "
            f"{failed} of {len(pairs)} |"
        )
    return lines


def means(values: list[float], width: int) -> list[float]:
    """Return the means of consecutive ``width`` values."""
    return [float(np.mean(values[i : i + width])) for i in range(0, len(values), width)]


def draw(results: list[dict[str, Any]], folder: str) -> Any:
    """Draw training and validation losses, one figure per kind of runs; return the paths."""
    paths = []
    for kind in sorted({kind_of(r) for r in results}):
        network, pixels, start, contrast = kind
        chosen = [r for r in results if kind_of(r) == kind]
        # Runs without a unit belong to both places.
        compared = sorted({(r["place"], r["rate"]) for r in chosen if r["place"]})
        if not compared:
            continue
        for what in ("training", "validation"):
            panels = [
                Panel(
                    f"{place}, learning rate {rate:g}",
                    "step",
                    list(curves(chosen, place, rate, what)),
                    log=what == "validation",
                    marker=None,
                )
                for place, rate in compared
            ]
            path = os.path.join(folder, f"res4-{'-'.join(kind)}-{what}.png")
            title = f"{network}, {pixels}: {what} loss, a line a run\n"
            title += f"({start} start, {contrast} contrast)"
            columns = min(COLUMNS, len(panels))
            plot_panels(panels, path, title, columns, size=(4.2, 3.2), one_legend=True)
            shrink(path)
            paths.append(path)
    return paths


def shrink(path: str) -> None:
    """Write a picture anew with few colours: a repository keeps all of its versions."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(COLOURS)
    with atomic_path(path) as temporary:
        few.save(temporary, optimize=True)


def curves(results: list[dict[str, Any]], place: str, rate: float, what: str) -> Any:
    """Yield one line per run."""
    for result in results:
        if result["rate"] != rate or result["place"] not in ("", place):
            continue
        variant = VARIANTS[result["variant"]]
        if what == "training":
            y: Any = means(result["losses"], EVERY)
            x: Any = [EVERY * index for index in range(1, len(y) + 1)]
        else:
            x, y, _ = zip(*result["validations"])
        # matplotlib gives up on values that are not finite: they leave a gap.
        y = [value if math.isfinite(value) else None for value in y]
        yield Line(x, y, variant.label, "-", variant.colour, 0.8)


def report(args: argparse.Namespace) -> None:
    """Write the table of all runs and the diagrams."""
    results = read_results(args.results)
    rows = [summary_of(result) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = os.path.join(HERE, "res4_stability.csv")
    write_text(path, text.getvalue())
    print("\n".join([*markdown(rows), "", *paired(rows)]))
    for written in (path, *draw(results, os.path.join(HERE, "img"))):
        LOGGER.info("written %s", written)


def spread(args: argparse.Namespace) -> None:
    """Print which part of a batch's features is its largest image's, before and behind the unit.

    Features are squared and summed over channels and positions. The network is fresh, the batch
    the first of training, normalised with its own statistics; means over the seeds.
    """
    print(f"Batches of {BATCH_SIZE}: one of equal images has {100 / BATCH_SIZE:.1f} %.\n")
    print("| contrast | unit after | largest image's part of the input | of the unit's output |")
    print("|" + "---|" * 4)
    for contrast in CONTRASTS:
        images = {seed: Images(seed, args.crop_size, 1, contrast) for seed in args.seeds}
        for place in args.places:
            parts = []
            for seed in args.seeds:
                case = Case(
                    args.network, args.crop_size, "fresh", contrast, place, "report", 0.0, seed, 1
                )
                parts.append(largest_parts(case, images[seed]))
            before, behind = 100 * np.mean(parts, axis=0)
            print(f"| {contrast} | {place} | {before:.1f} % | {behind:.1f} % |")


def largest_parts(case: Case, images: Images) -> Any:
    """Return the largest image's parts of the first batch's features, before and behind a unit."""
    symbol, input_conf = get_symbol(
        case.network, images.num_classes, crop_size=case.crop_size, **overrides_of(case)
    )
    (stage,) = GLORE_STAGES[case.place]
    block_name = f"conv{stage}_B{get_spec(case.network).blocks[stage - 2]:02d}"
    parts = []
    for node in (f"{block_name}_relu", f"{block_name}_extra_last_bn"):
        block = build_block(symbol, input_conf, ctx=mx.cpu(), seed=case.seed, output=node)
        with mx.autograd.train_mode():
            features = block(images.train[0][0]).asnumpy()
        squares = (features.astype("float64") ** 2).sum((1, 2, 3))
        parts.append(squares.max() / squares.sum())
    return parts


def name_list(known: Any) -> Any:
    """Return a type for comma-separated names out of ``known``."""

    def convert(text):
        names = comma_list(str)(text)
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return convert


def main(argv: Optional[list[str]] = None) -> None:
    """Run the command."""
    parser = Parser(__doc__.split("\n\n")[0], prog="python -m benchmark.res4_stability")
    parser.add_argument("command", choices=("run", "report", "spread"))
    parser.add_argument(
        "--results", default=os.path.join("exps", "res4-stability"), help="folder of the runs"
    )
    parser.add_argument("--network", default="resnet18_v1_slim", help="a network of basic blocks")
    parser.add_argument(
        "--start",
        choices=STARTS,
        default="fresh",
        help=f"trained: from the network without a unit after {START_STEPS} steps at {START_RATE}",
    )
    parser.add_argument(
        "--contrast",
        choices=CONTRASTS,
        default="varied",
        help="even: every image is brought to the same contrast",
    )
    parser.add_argument("--places", type=name_list(PLACES), default=PLACES, metavar="LIST")
    parser.add_argument(
        "--variants", type=name_list(VARIANTS), default=tuple(VARIANTS), metavar="LIST"
    )
    parser.add_argument(
        "--rates", type=comma_list(float), default=(0.01, 0.04, 0.16), metavar="LIST"
    )
    parser.add_argument("--seeds", type=comma_list(int), default=(0, 1, 2), metavar="LIST")
    parser.add_argument("--steps", type=positive_int, default=120)
    parser.add_argument("--crop-size", type=positive_int, default=64)
    args = parser.parse_args(argv)
    if get_spec(args.network).bottleneck:
        raise UsageError(f"{args.network} has no stages of 256 and 512 channels' kind")
    with log_to(None):
        {"run": run, "report": report, "spread": spread}[args.command](args)


if __name__ == "__main__":
    sys.exit(run_main(main))
