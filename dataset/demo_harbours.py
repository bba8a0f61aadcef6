"""Demo scenes for detection: harbours whose ships look alike and differ in class, from a seed.

Each scene shows the sea below a strip of sky. In the sky hangs a signal, red or green: with a red
one all ships are *waiting*, with a green one *sailing*; nothing else tells them apart. Buoys are
buoys in any case, whatever the signal. Some scenes are empty, and at the horizon of some lies a
fleet of boats too small to be told apart: a crowd.

The annotations are in COCO's format, ``annotations/instances_{train,val}.json`` beside the images
in ``{train,val}``; objects are polygons, crowds runs of pixels::

    python -m dataset.demo_harbours [--root DIR] [--images N] [--force]
"""

import colorsys
import dataclasses
import json
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

WAITING, SAILING, BUOY = range(3)
CLASSES = ("waiting ship", "sailing ship", "buoy")
CATEGORY_IDS = (1, 2, 3)
SPLITS = {"train": 400, "val": 100}
HEIGHT, WIDTH = 160, 192
HORIZON = 40  # no part of the signal is below this row, no part of a ship or buoy above it
SIGNALS = {"red": (0.0, WAITING), "green": (1 / 3, SAILING)}
EMPTY, FLEET = 0.05, 0.1  # shares of scenes without objects, and with a crowd
TRIES = 50  # to find room for an object
GAP = 3  # pixels between objects


class HarboursConfig(NamedTuple):
    """Where the scenes lie: ``root`` holds ``annotations`` and ``{train,val}``."""

    root: str
    class_names: tuple[str, ...]


class Item(NamedTuple):
    """An object: class, polygons (k, 2) in continuous coordinates, colours of each."""

    label: int
    polygons: tuple[np.ndarray, ...]
    colours: tuple[np.ndarray, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        points = np.concatenate(self.polygons)
        return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


class Scene(NamedTuple):
    """What a scene shows: signal (left, top, width, height), items, boats of the fleet."""

    signal: tuple[int, int, int, int]
    items: tuple[Item, ...]
    fleet: tuple[tuple[int, int, int, int], ...]


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _ship(label: int, rng: np.random.Generator) -> Item:
    """Return a ship at the origin: a hull and a cabin on it."""
    width = float(rng.uniform(26, 70))
    hull, cabin = width * rng.uniform(0.2, 0.3), width * rng.uniform(0.12, 0.25)
    slant, left = width * 0.15, width * rng.uniform(0.2, 0.45)
    right = left + width * 0.3
    paint = _colour(rng.uniform(), rng.uniform(0.0, 0.6), rng.uniform(0.3, 0.9))
    bottom = cabin + hull
    return Item(
        label,
        (
            np.array([(0, cabin), (width, cabin), (width - slant, bottom), (slant, bottom)]),
            np.array([(left, 0), (right, 0), (right, cabin), (left, cabin)]),
        ),
        (paint, np.clip(1.3 * paint, 0, 255)),
    )


def _buoy(rng: np.random.Generator) -> Item:
    """Return a buoy at the origin: a disc."""
    radius = float(rng.uniform(6, 13))
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    disc = radius + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    paint = _colour(rng.uniform(0.05, 0.17), rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0))
    return Item(BUOY, (disc,), (paint,))


def _free(box: Sequence[float], taken: Sequence[Sequence[float]]) -> bool:
    return all(
        box[0] > other[2] + GAP
        or box[2] < other[0] - GAP
        or box[1] > other[3] + GAP
        or box[3] < other[1] - GAP
        for other in taken
    )


def plan_scene(signal: str, rng: np.random.Generator) -> Scene:
    """Decide what a scene shows.

    Parameters
    ----------
    signal
        ``red`` or ``green``.
    rng
    """
    width, height = int(rng.integers(120, 180)), int(rng.integers(24, 32))
    left = int(rng.integers(4, WIDTH - width - 4))
    lamp = (left, int(rng.integers(3, HORIZON - height - 3)), width, height)
    items: list[Item] = []
    boats = []
    if rng.uniform() >= EMPTY:
        made = [_ship(SIGNALS[signal][1], rng) for _ in range(int(rng.integers(1, 4)))]
        made += [_buoy(rng) for _ in range(int(rng.integers(0, 3)))]
        for item in made:
            _, _, right, bottom = item.box
            for _ in range(TRIES):
                shift = np.array(
                    [rng.uniform(0, WIDTH - right), rng.uniform(HORIZON + 8, HEIGHT - bottom)]
                )
                moved = item._replace(polygons=tuple(p + shift for p in item.polygons))
                if _free(moved.box, [other.box for other in items]):
                    items.append(moved)
                    break
    if rng.uniform() < FLEET:
        start = int(rng.integers(0, WIDTH - 60))
        boats = [(start + 7 * n, HORIZON + int(rng.integers(0, 4)), 5, 3) for n in range(8)]
    return Scene(lamp, tuple(items), tuple(boats))


def _noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Return smooth noise of deviation 1, float32 (HEIGHT, WIDTH, 1)."""
    noise = cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32), (0, 0), sigma)
    return (noise / noise.std())[..., None]


def render_scene(signal: str, seed: Sequence[int]) -> tuple[np.ndarray, Scene]:
    """Draw one scene.

    Parameters
    ----------
    signal
        ``red`` or ``green``.
    seed
        The scene is a function of ``signal`` and ``seed``.

    Returns
    -------
    picture, scene
        uint8 (HEIGHT, WIDTH, 3) RGB, and what it shows.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    scene = plan_scene(signal, rng)
    picture = np.empty((HEIGHT, WIDTH, 3), np.float32)
    picture[:HORIZON] = _colour(0.58, rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.95))
    picture[HORIZON:] = _colour(
        rng.uniform(0.5, 0.62), rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.6)
    )
    picture += rng.uniform(4, 9) * _noise(rng, 1.0) + rng.uniform(4, 9) * _noise(rng, 4.0)
    for left, top, width, height in scene.fleet:
        picture[top : top + height, left : left + width] = (60, 50, 40)
    for item in scene.items:
        for polygon, colour in zip(item.polygons, item.colours):
            # OpenCV's pixel 0 has its centre at 0, and 16 units.
            points = np.round((polygon - 0.5) * 16).astype(np.int32)
            cv2.fillPoly(picture, [points], colour.tolist(), shift=4)
    left, top, width, height = scene.signal
    picture[top - 2 : top + height + 2, left - 2 : left + width + 2] = 30
    hue = SIGNALS[signal][0] + rng.uniform(-0.03, 0.03)
    light = _colour(hue, rng.uniform(0.8, 1.0), rng.uniform(0.8, 1.0))
    picture[top : top + height, left : left + width] = light
    picture += rng.normal(0, 4, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), scene


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)


def _runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of runs down the columns, those that are not set first."""
    flat = np.concatenate([[0], mask.reshape(-1, order="F"), [2]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], ends])).tolist()


def annotations_of(scene: Scene, image: int) -> list[dict[str, Any]]:
    """Return the annotations of a scene, without their ids."""
    rows = []
    for item in scene.items:
        left, top, right, bottom = item.box
        rows.append(
            {
                "image_id": image,
                "category_id": CATEGORY_IDS[item.label],
                "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
                "area": round(sum(map(_area, item.polygons)), 2),
                "iscrowd": 0,
                "segmentation": [np.round(p, 2).reshape(-1).tolist() for p in item.polygons],
            }
        )
    if scene.fleet:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for left, top, width, height in scene.fleet:
            mask[top : top + height, left : left + width] = 1
        rows_set, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        low, high = (columns[0], rows_set[0]), (columns[-1] + 1, rows_set[-1] + 1)
        rows.append(
            {
                "image_id": image,
                "category_id": CATEGORY_IDS[WAITING],
                "bbox": [*map(int, low), int(high[0] - low[0]), int(high[1] - low[1])],
                "area": int(mask.sum()),
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": _runs(mask)},
            }
        )
    return rows


def _make_scenes(
    folder: str, scenes: Sequence[tuple[str, str, tuple[int, ...]]]
) -> list[tuple[str, int]]:
    """Write scenes ``(file name, signal, seed)``; return their sizes."""
    sizes = []
    for place, signal, seed in scenes:
        path = os.path.join(folder, place)
        if not cv2.imwrite(path, render_scene(signal, seed)[0][..., ::-1]):
            raise GloReError(f"OpenCV cannot write {path}")
        sizes.append((place, os.path.getsize(path)))
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
    """Write all scenes and annotations below ``raw``; return the sizes by path."""
    os.makedirs(os.path.join(raw, "annotations"))
    scenes, sizes = [], {}
    for number, split in enumerate(SPLITS):
        os.makedirs(os.path.join(raw, split))
        images, rows = [], []
        for index in range(counts[split]):
            signal, seed = tuple(SIGNALS)[index % 2], (SEED, number, index)
            name = f"harbour_{index:04d}.png"
            scenes.append((os.path.join(split, name), signal, seed))
            images.append({"id": index + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
            rows += annotations_of(plan_scene(signal, rng), index + 1)
        content = {
            "images": images,
            "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
            "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASSES)],
        }
        path = os.path.join("annotations", f"instances_{split}.json")
        with open(os.path.join(raw, path), "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        sizes[path] = os.path.getsize(os.path.join(raw, path))
    return {**sizes, **make(_make_scenes, scenes)}


RECIPE = Recipe(
    what="demo harbours",
    command=module_command("dataset.demo_harbours"),
    unit="image",
    parameters=_parameters,
    count_key="images",
    default_counts=SPLITS,
    write=_generate,
)


@dataclasses.dataclass
class DemoHarboursOptions(GeneratedOptions):
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
class DemoHarboursJobOptions(JobOptions):
    """All options of the command."""

    demo_harbours: DemoHarboursOptions = group(DemoHarboursOptions)


def prepare_demo_harbours(
    data_root: Optional[PathLike] = None,
    images: Optional[int] = None,
    val_images: Optional[int] = None,
    jobs: Optional[int] = None,
    force: bool = False,
) -> HarboursConfig:
    """Make the demo harbours unless they are there, complete and of this version.

    Parameters
    ----------
    data_root
        Folder that holds ``DemoHarbours/raw``; by default the folder ``dataset``.
    images, val_images
        None keeps what is there, and makes 400 and 100 where nothing is.
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
    root = os.path.join(parent, "DemoHarbours")
    prepare_generated(root, RECIPE, {"train": images, "val": val_images}, jobs, force)
    return HarboursConfig(os.path.join(root, "raw"), CLASSES)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line."""
    description = "Make the demo harbours: scenes whose ships' class depends on a signal."
    options = parse(DemoHarboursJobOptions(), argv, description, prog=RECIPE.command).demo_harbours
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = prepare_demo_harbours(**dataclasses.asdict(options))
    print(f"Demo harbours: {config.root}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
