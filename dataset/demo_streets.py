"""Demo scenes for segmentation: streets whose cars look alike and differ in class, from a seed.

Each scene has sky, buildings, pavement, a road, and one to three cars. High up in the sky hangs a
signal, red or green. With a red one all cars are *waiting*, with a green one *moving*; nothing
else tells them apart: places, sizes and colours of cars are drawn from the same distributions.
Signal and cars are at least ``DISTANCE`` pixels apart, so that a network which sees less far from
a pixel, as a small FCN does (``fcn_tiny``: 37 pixels), can only guess, and one that relates
distant parts of an image can know.

The scenes lie in ``{train,val}/{images,masks}``, as PNG files; masks hold the class numbers, and
255 along the cars' outlines::

    python -m dataset.demo_streets [--root DIR] [--images N] [--force]
"""

import colorsys
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import cv2
import numpy as np

from glore_common import GloReError, PathLike, module_command, run_main
from glore_options import JobOptions, group, option, parse, positive_int

from .config import default_data_root
from .generated import Counts, GeneratedOptions, Make, Recipe, prepare_generated

# Raise it with every change of what is generated: data of another version are made anew.
GENERATOR_VERSION = 1
SEED = 1

SKY, BUILDING, PAVEMENT, ROAD, WAITING, MOVING = range(6)
CLASSES = ("sky", "building", "pavement", "road", "waiting car", "moving car")
COLOURS = (
    (70, 130, 180),
    (70, 70, 70),
    (244, 35, 232),
    (128, 64, 128),
    (220, 20, 60),
    (0, 160, 60),
)
IGNORED = 255
SPLITS = {"train": 400, "val": 80}
HEIGHT, WIDTH = 96, 128
SIGNAL_END = 18  # no part of the signal is below this row
CAR_TOP = 62  # no part of a car is above this row
DISTANCE = CAR_TOP - SIGNAL_END
SIGNALS = {"red": (0.0, WAITING), "green": (1 / 3, MOVING)}


class StreetsConfig(NamedTuple):
    """Where the scenes lie: ``root`` holds ``{train,val}/{images,masks}``."""

    root: str
    class_names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]


def _noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Return smooth noise of deviation 1, float32 (HEIGHT, WIDTH, 1)."""
    noise = cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32), (0, 0), sigma)
    return (noise / noise.std())[..., None]


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _car(picture: np.ndarray, mask: np.ndarray, label: int, rng: np.random.Generator) -> None:
    """Draw a car somewhere on the road: a body, a cabin with a window, two wheels."""
    width, height = int(rng.integers(18, 28)), int(rng.integers(8, 12))
    left = int(rng.integers(0, WIDTH - width))
    top = int(rng.integers(CAR_TOP, HEIGHT - height))
    body = _colour(rng.uniform(), rng.uniform(0.0, 0.5), rng.uniform(0.3, 0.9))
    middle = top + height // 2
    inset = width // 5
    mask[max(top - 1, CAR_TOP) : top + height + 1, max(left - 1, 0) : left + width + 1] = IGNORED
    mask[middle : top + height, left : left + width] = label
    mask[top:middle, left + inset : left + width - inset] = label
    picture[middle : top + height, left : left + width] = body
    picture[top:middle, left + inset : left + width - inset] = 0.8 * body
    picture[top + 1 : middle, left + inset + 2 : left + width - inset - 2] = (60, 70, 80)
    for wheel in (left + 3, left + width - 6):
        picture[top + height - 3 : top + height, wheel : wheel + 3] = 20


def render_scene(signal: str, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Parameters
    ----------
    signal
        ``red`` or ``green``.
    seed
        The scene is a function of ``signal`` and ``seed``.

    Returns
    -------
    picture, mask
        uint8 (HEIGHT, WIDTH, 3) RGB, and uint8 (HEIGHT, WIDTH) classes.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    hue, label = SIGNALS[signal]
    picture = np.empty((HEIGHT, WIDTH, 3), np.float32)
    mask = np.empty((HEIGHT, WIDTH), np.uint8)
    horizon, kerb = int(rng.integers(44, 50)), int(rng.integers(54, 60))
    picture[:], mask[:] = _colour(0.58, rng.uniform(0.1, 0.4), rng.uniform(0.7, 0.95)), SKY
    left = 0
    while left < WIDTH:
        right = left + int(rng.integers(14, 36))
        if rng.uniform() < 0.8:
            roof = int(rng.integers(SIGNAL_END + 2, horizon - 6))
            wall = _colour(rng.uniform(0.02, 0.12), rng.uniform(0.1, 0.4), rng.uniform(0.3, 0.7))
            picture[roof:horizon, left:right], mask[roof:horizon, left:right] = wall, BUILDING
            for row in range(roof + 3, horizon - 3, 6):
                for column in range(left + 3, min(right, WIDTH) - 3, 6):
                    picture[row : row + 3, column : column + 3] = wall * rng.uniform(0.4, 1.5)
        left = right
    picture[horizon:kerb], mask[horizon:kerb] = rng.uniform(140, 180), PAVEMENT
    picture[kerb:], mask[kerb:] = rng.uniform(70, 110), ROAD
    picture += rng.uniform(4, 9) * _noise(rng, 1.0) + rng.uniform(4, 9) * _noise(rng, 4.0)
    for _ in range(int(rng.integers(1, 4))):
        _car(picture, mask, label, rng)
    width, height = int(rng.integers(40, 90)), int(rng.integers(9, 13))
    left, top = int(rng.integers(2, WIDTH - width - 2)), int(rng.integers(2, SIGNAL_END - height))
    picture[top - 2 : top + height + 1, left - 2 : left + width + 2] = 30
    light = _colour(hue + rng.uniform(-0.03, 0.03), rng.uniform(0.8, 1.0), rng.uniform(0.8, 1.0))
    picture[top : top + height - 1, left : left + width] = light
    picture += rng.normal(0, 4, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), mask


def _make_scenes(
    folder: str, scenes: Sequence[tuple[str, str, tuple[int, ...]]]
) -> list[tuple[str, int]]:
    """Write scenes ``(file name below {split}/{kind}, signal, seed)``; return their sizes."""
    sizes = []
    for place, signal, seed in scenes:
        picture, mask = render_scene(signal, seed)
        for kind, array in (("images", picture[..., ::-1]), ("masks", mask)):
            path = place.format(kind=kind)
            if not cv2.imwrite(os.path.join(folder, path), array):
                raise GloReError(f"OpenCV cannot write {os.path.join(folder, path)}")
            sizes.append((path, os.path.getsize(os.path.join(folder, path))))
    return sizes


def _parameters(counts: Counts) -> dict[str, Any]:
    return {
        "generator": GENERATOR_VERSION,
        "seed": SEED,
        "classes": list(CLASSES),
        "size": [HEIGHT, WIDTH],
        "images": counts,
    }


def _generate(raw: str, counts: Counts, make: Make) -> dict[str, int]:
    """Write all scenes below ``raw``, as many with each signal; return the sizes by path."""
    scenes = []
    for number, split in enumerate(SPLITS):
        for kind in ("images", "masks"):
            os.makedirs(os.path.join(raw, split, kind))
        for index in range(counts[split]):
            signal = tuple(SIGNALS)[index % 2]
            place = os.path.join(split, "{kind}", f"street_{index:04d}.png")
            scenes.append((place, signal, (SEED, number, index)))
    return make(_make_scenes, scenes)


RECIPE = Recipe(
    what="demo streets",
    command=module_command("dataset.demo_streets"),
    unit="image",
    parameters=_parameters,
    count_key="images",
    default_counts=SPLITS,
    write=_generate,
)


@dataclasses.dataclass
class DemoStreetsOptions(GeneratedOptions):
    """What the command makes."""

    images: Optional[int] = option(
        None,
        f"training scenes (default: what is there, else {SPLITS['train']})",
        kind=positive_int,
        metavar="N",
    )
    val_images: Optional[int] = option(
        None,
        f"validation scenes (default: what is there, else {SPLITS['val']})",
        kind=positive_int,
        metavar="N",
    )


@dataclasses.dataclass
class DemoStreetsJobOptions(JobOptions):
    """All options of the command."""

    demo_streets: DemoStreetsOptions = group(DemoStreetsOptions)


def prepare_demo_streets(
    data_root: Optional[PathLike] = None,
    images: Optional[int] = None,
    val_images: Optional[int] = None,
    jobs: Optional[int] = None,
    force: bool = False,
) -> StreetsConfig:
    """Make the demo streets unless they are there, complete and of this version.

    Parameters
    ----------
    data_root
        Folder that holds ``DemoStreets/raw/{train,val}``; by default the folder ``dataset``.
    images, val_images
        None keeps what is there, and makes 400 and 80 where nothing is.
    jobs, force
        As for :func:`dataset.prepare_demo`.

    Raises
    ------
    UsageError
        A number below 1.
    GloReError
        The place is taken by files of someone else, or cannot be written.
    """
    parent = default_data_root() if data_root is None else os.path.abspath(data_root)
    root = os.path.join(parent, "DemoStreets")
    prepare_generated(root, RECIPE, {"train": images, "val": val_images}, jobs, force)
    return StreetsConfig(os.path.join(root, "raw"), CLASSES, COLOURS)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line."""
    description = "Make the demo streets: scenes whose cars' class depends on a distant signal."
    options = parse(DemoStreetsJobOptions(), argv, description, prog=RECIPE.command).demo_streets
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = prepare_demo_streets(**dataclasses.asdict(options))
    print(f"Demo streets: {config.root}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
