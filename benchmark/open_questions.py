"""How many nodes, and in which stage? And what does a block bring on a small real data set?

::

    python -m benchmark.open_questions                       # all three, three seeds
    python -m benchmark.open_questions --experiments digits  # needs scikit-learn

A public report on GloRe units for fine-grained images asks how many nodes a unit should have and
whether early layers want one. ``nodes`` and ``stages`` train a narrow ResNet-18 on the made-up
fine-grained images (:mod:`dataset.demo_images`); ``digits`` trains a network of four blocks on the
1,797 digits that scikit-learn ships (8 x 8 pixels, from the UCI repository), with each block at the
same budget. The same questions on a task that needs distant relations: benchmark/relations.py.
"""

import functools
import os
import sys
from typing import Any, Callable, NamedTuple

import cv2
import numpy as np

from benchmark.short_runs import (
    Batch,
    fit,
    grouped,
    name_list,
    new_block,
    outputs,
    run_missing,
    spread,
    write_csv,
)
from data.image.dataset import decode_image
from data.image.source import read_image_folder
from dataset import prepare_demo_images
from dataset.cub200 import MEAN, STD
from glore_common import GloReError, run_main, write_text
from glore_options import Parser, comma_list, positive_int
from network.builder import logits
from network.summary import count
from network.summary import markdown as table
from train.report import log_to

BATCH = 32
CROP, RESIZED = 64, 72  # pixels of demo images
NETWORKS = {"demo": "resnet18_v1_slim", "digits": "local39"}
DIGIT_SCALE = 4  # times 8 pixels
RATES = {"demo": 3e-3, "digits": 3e-3}
UNIT = "flavour=video,normalize=true"
DIGIT_BLOCKS = {
    "none": "none",
    "glore": "glore@4:1",
    "nl": "nl@4:1",
    "snl": "snl@4:1",
    "gc": "gc@4:1/after:ratio=1/2",
    "se": "se@4:1/after:ratio=1/2",
}


class Case(NamedTuple):
    """One run; ``block`` as ``--block`` has it."""

    experiment: str
    data: str
    label: str
    block: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.experiment}_{self.label.replace(' ', '-')}_{self.seed}_{self.steps}"


class Parts(NamedTuple):
    """Images (n, h, w, 3) on the scale of a network's input, and labels: training and test."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


@functools.cache
def demo() -> Parts:
    """Return the made-up images; those for validation are the test."""
    config, parts = prepare_demo_images(), []
    for root in (config.train_root, config.val_root):
        source = read_image_folder(root)
        images = []
        for index in range(len(source.samples)):
            path = os.path.join(root, source.name(index))
            with open(path, "rb") as stream:
                images.append(cv2.resize(decode_image(stream.read(), path), (RESIZED, RESIZED)))
        pixels = np.stack(images).astype("float32") / 255
        parts += [(pixels - np.asarray(MEAN, "float32")) / np.asarray(STD, "float32")]
        parts += [np.array([sample.label for sample in source.samples])]
    return Parts(*parts)


@functools.cache
def digits() -> Parts:
    """Return scikit-learn's digits, every fifth of a shuffle for testing.

    Raises
    ------
    GloReError
        Without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise GloReError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install scikit-learn==1.6.1 (in a wheel: the extra `study`)"
        ) from error
    found = load_digits()
    pixels = (found.images.astype("float32") - 8) / 8
    pixels = pixels.repeat(DIGIT_SCALE, 1).repeat(DIGIT_SCALE, 2)[..., None].repeat(3, 3)
    order = np.random.default_rng(0).permutation(len(pixels))
    test, train = order[::5], np.setdiff1d(order, order[::5])
    return Parts(pixels[train], found.target[train], pixels[test], found.target[test])


SOURCES: dict[str, Callable[[], Parts]] = {"demo": demo, "digits": digits}


def _crop(images: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return random crops, half of them mirrored, (n, 3, size, size)."""
    room = images.shape[1] - size + 1
    cut = []
    for image, top, left, flip in zip(
        images, *rng.integers(room, size=(2, len(images))), rng.integers(2, size=len(images))
    ):
        crop = image[top : top + size, left : left + size]
        cut.append(crop[:, ::-1] if flip else crop)
    return np.stack(cut).transpose(0, 3, 1, 2)


def _nodes(seed: int, steps: int) -> list[Case]:
    cases = [Case("nodes", "demo", "no unit", "none", seed, steps)]
    return cases + [
        Case("nodes", "demo", f"{n} nodes", f"glore@4:2:num_node={n},{UNIT}", seed, steps)
        for n in (1, 4, 16, 64)
    ]


def _stages(seed: int, steps: int) -> list[Case]:
    return [
        Case("stages", "demo", f"conv{stage}", f"glore@{stage}:2:num_node=16,{UNIT}", seed, steps)
        for stage in (2, 3, 4, 5)
    ]


def _digits(seed: int, steps: int) -> list[Case]:
    return [
        Case("digits", "digits", label, block, seed, steps) for label, block in DIGIT_BLOCKS.items()
    ]


EXPERIMENTS = {"nodes": _nodes, "stages": _stages, "digits": _digits}


def run(case: Case) -> dict[str, Any]:
    """Train and test one case."""
    parts = SOURCES[case.data]()
    size = CROP if case.data == "demo" else parts.train.shape[1]
    overrides = {"block": case.block, "crop_size": size}
    classes = int(parts.train_labels.max()) + 1
    block = new_block(NETWORKS[case.data], classes, overrides, case.seed)

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([case.seed, step])
        chosen = rng.integers(len(parts.train), size=BATCH)
        images, labels = parts.train[chosen], parts.train_labels[chosen].astype("float32")
        if case.data == "demo":
            return _crop(images, rng, size), labels
        # Digits are not mirrored.
        return images.transpose(0, 3, 1, 2), labels

    losses = fit(block, batch, case.steps, case.seed, RATES[case.data])
    margin = (parts.test.shape[1] - size) // 2
    test = parts.test[:, margin : margin + size, margin : margin + size].transpose(0, 3, 1, 2)
    made = outputs(block, np.ascontiguousarray(test)).astype("float64")
    made -= np.logaddexp.reduce(made, 1)[:, None]
    return {
        "parameters": count(logits(block.symbol), block.input_conf).params,
        "training loss": float(np.mean(losses[-20:])),
        "loss": float(-made[np.arange(len(made)), parts.test_labels].mean()),
        "accuracy": float((made.argmax(1) == parts.test_labels).mean()),
    }


def tables(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table per experiment: means over the seeds (smallest and largest)."""
    lines = []
    for (experiment,), group in grouped(results, "experiment").items():
        seeds = len({result["seed"] for result in group})
        lines += [f"**{experiment}**: {seeds} seed(s), {group[0]['steps']} steps of {BATCH}", ""]
        rows = [
            [
                label,
                f"{part[0]['parameters']:,}",
                spread([result["training loss"] for result in part]),
                spread([result["loss"] for result in part]),
                spread([100 * result["accuracy"] for result in part], ".1f"),
            ]
            for (label,), part in grouped(group, "label").items()
        ]
        head = [experiment, "parameters", "training loss", "test loss", "accuracy %"]
        lines += [table(head, rows), ""]
    return "\n".join(lines)


def main(argv=None) -> None:
    """Run the command."""
    parser = Parser(__doc__.split("\n\n")[0], prog="python -m benchmark.open_questions")
    parser.add_argument(
        "--experiments",
        type=name_list(EXPERIMENTS),
        default=tuple(EXPERIMENTS),
        metavar="LIST",
        help=f"of {','.join(EXPERIMENTS)} (default: all)",
    )
    parser.add_argument("--seeds", type=comma_list(int), default=(0, 1, 2), metavar="LIST")
    parser.add_argument("--steps", type=positive_int, default=160)
    parser.add_argument(
        "--results",
        default=os.path.join("exps", "open-questions"),
        metavar="DIR",
        help="of the runs and tables (default: exps/open-questions)",
    )
    args = parser.parse_args(argv)
    with log_to(None):
        wanted = [
            case
            for experiment in args.experiments
            for seed in args.seeds
            for case in EXPERIMENTS[experiment](seed, args.steps)
        ]
        results = run_missing(wanted, args.results, run)
        write_csv(os.path.join(args.results, "open_questions.csv"), results)
        text = tables(results)
        write_text(os.path.join(args.results, "open_questions.md"), text + "\n")
        print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
