"""Demo images: two figures whose relation gives the class, generated from a seed.

Each image shows a disc and a square on a textured background. The class says where the disc is
seen from the square (above, below, beside, inside) and whether both have the same colour: eight
classes. Neither figure alone tells anything: places, sizes, colours and backgrounds are drawn from
the same distributions for all classes, but for the disc inside the square, which must be smaller.
A mirrored image and one that is turned by 10 degrees still show their class. As photographs do,
the images differ in contrast, by up to four times: networks must not depend on it, and a global
reasoning unit that is put in carelessly does (docs/res4-stability.md).

The images are JPEG files in one folder per class, below ``train``, ``val`` and ``test``::

    python -m dataset.demo_images [--root DIR] [--images-per-class N] [--force]
"""

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, Optional

import cv2
import numpy as np

from glore_common import GloReError, PathLike, module_command, run_main
from glore_options import JobOptions, group, parse

from .config import default_data_root
from .generated import Counts, GeneratedOptions, Make, Recipe, count_option, prepare_generated

# Raise it with every change of what is generated: data of another version are made anew.
GENERATOR_VERSION = 2
SEED = 1

PLACES = ("above", "below", "beside", "inside")
COLOURS = ("same", "other")
CLASSES = tuple(sorted(f"{place}_{colour}" for place in PLACES for colour in COLOURS))
SPLITS = {"train": 160, "val": 40, "test": 40}  # images of each class
SIZE = 96  # pixels, width and height
QUALITY = 92  # of the JPEG files

RADIUS = (9.0, 13.0)  # half the size of a figure, in pixels
LARGE_RADIUS = (19.0, 25.0)  # of a square with the disc inside
BORDER = 2.0  # pixels, dark
HUES = (0.0, 220.0)  # degrees: red and blue
HUE_NOISE = 15.0  # degrees, at most
SLANT = 27.0  # degrees that "above", "below" and "beside" may be off, at most
CONTRAST = (0.25, 1.0)  # an image's share of the contrast it is drawn with; even on a log scale
GREY = 118.0  # what an image without any contrast would show
MARGIN = 12  # pixels at the image's edge that are free of figures: a crop may cut them off


@dataclasses.dataclass(frozen=True)
class ImageSetConfig:
    """A classification data set in folders (``train_root``, …), with one folder per class."""

    name: str
    root: str
    train_root: str
    val_root: str
    test_root: str
    class_names: tuple[str, ...]


def _colour(hue: float, rng: np.random.Generator) -> np.ndarray:
    """Return a BGR colour of about ``hue`` degrees, moderately bright and saturated."""
    hue = (hue + rng.uniform(-HUE_NOISE, HUE_NOISE)) % 360
    hls = np.array([[[hue / 2, rng.uniform(95, 165), rng.uniform(140, 230)]]])
    return cv2.cvtColor(hls.astype(np.uint8), cv2.COLOR_HLS2BGR)[0, 0].astype(np.float32)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return nearly grey noise, float32 (SIZE, SIZE, 3), with blotches of random size."""
    noise = rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), rng.uniform(1.0, 4.0))
    smooth = smooth / smooth.std()
    mixing = 0.6 * np.ones((3, 3)) + 0.15 * rng.standard_normal((3, 3))
    grey = rng.uniform(70, 185) + rng.uniform(-12, 12, 3)
    return grey + rng.uniform(10, 25) * smooth @ mixing.astype(np.float32)


def _layout(place: str, rng: np.random.Generator) -> tuple[np.ndarray, float, np.ndarray, float]:
    """Return (disc's centre, disc's radius, square's centre, square's radius): x, y in pixels."""
    disc, square = rng.uniform(*RADIUS, 2)
    if place == "inside":
        square = rng.uniform(*LARGE_RADIUS)
        room = square - disc - 2 * BORDER
        offset = rng.uniform(-room, room, 2)
    else:
        angle = {"above": -90.0, "below": 90.0, "beside": rng.choice([0.0, 180.0])}[place]
        angle = math.radians(angle + rng.uniform(-SLANT, SLANT))
        # A square's corner is further out than its side.
        distance = disc + math.sqrt(2) * square + rng.uniform(2, 10)
        offset = distance * np.array([math.cos(angle), math.sin(angle)])
    # The box around both figures goes anywhere within the margin.
    low = np.minimum(-square, offset - disc)
    high = np.maximum(square, offset + disc)
    centre = rng.uniform(MARGIN - low, np.maximum(SIZE - MARGIN - high, MARGIN - low))
    return centre + offset, disc, centre, square


def render_image(class_name: str, seed: Sequence[int]) -> np.ndarray:
    """Draw one image.

    Parameters
    ----------
    class_name
        One of ``CLASSES``.
    seed
        The image is a function of ``class_name`` and ``seed``.

    Returns
    -------
    numpy.ndarray
        uint8 (SIZE, SIZE, 3), in OpenCV's channel order BGR.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    place, _, likeness = class_name.partition("_")
    if place not in PLACES or likeness not in COLOURS:
        raise ValueError(f"unknown class {class_name!r}")
    picture = _background(rng)
    hue, other = rng.permutation(HUES)[:2]
    if likeness == "same":
        other = hue
    disc_at, disc, square_at, square = _layout(place, rng)
    # Distances from the figures' outlines (negative inside), at the centres of the pixels.
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5).astype(np.float32)
    from_square = np.maximum(abs(x - square_at[0]), abs(y - square_at[1])) - square
    from_disc = np.hypot(x - disc_at[0], y - disc_at[1]) - disc
    for distance, colour in (
        (from_square, _colour(hue, rng)),
        (from_disc, _colour(other, rng)),
    ):
        for edge, paint in ((0.0, 0.25 * colour), (BORDER, colour)):
            # The share of a pixel that the figure covers smooths its outline.
            cover = np.clip(0.5 - distance - edge, 0, 1)[..., None]
            picture = picture * (1 - cover) + paint * cover
    picture = picture + rng.normal(0, 4, picture.shape)
    contrast = math.exp(rng.uniform(*np.log(CONTRAST)))
    picture = GREY + contrast * (picture - GREY)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _make_images(
    folder: str, images: Sequence[tuple[str, str, tuple[int, ...]]]
) -> list[tuple[str, int]]:
    """Write images ``(sub/path, class name, seed)`` below ``folder``; return their sizes."""
    sizes = []
    for path, class_name, seed in images:
        full = os.path.join(folder, path)
        drawn = render_image(class_name, seed)
        encoded, content = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        if not encoded:
            raise GloReError(f"OpenCV cannot encode the JPEG file {full}")
        with open(full, "wb") as stream:
            stream.write(content.tobytes())
        sizes.append((path, os.path.getsize(full)))
    return sizes


def _parameters(counts: Counts) -> dict[str, Any]:
    return {
        "generator": GENERATOR_VERSION,
        "seed": SEED,
        "classes": list(CLASSES),
        "size": SIZE,
        "images_per_class": counts,
    }


def _generate(raw: str, counts: Counts, make: Make) -> dict[str, int]:
    """Write all images below ``raw``; return their sizes by path."""
    images = []
    for split_number, split in enumerate(SPLITS):
        for class_number, class_name in enumerate(CLASSES):
            folder = os.path.join(split, class_name)
            os.makedirs(os.path.join(raw, folder))
            for index in range(counts[split]):
                path = os.path.join(folder, f"{class_name}_{index:04d}.jpg")
                images.append((path, class_name, (SEED, split_number, class_number, index)))
    return make(_make_images, images)


RECIPE = Recipe(
    what="demo images",
    command=module_command("dataset.demo_images"),
    unit="image",
    parameters=_parameters,
    count_key="images_per_class",
    default_counts=SPLITS,
    write=_generate,
)


@dataclasses.dataclass
class DemoImagesOptions(GeneratedOptions):
    """What the command makes."""

    images_per_class: Optional[int] = count_option("training images", SPLITS["train"])
    val_images_per_class: Optional[int] = count_option("validation images", SPLITS["val"])
    test_images_per_class: Optional[int] = count_option("test images", SPLITS["test"])


@dataclasses.dataclass
class DemoImagesJobOptions(JobOptions):
    """All options of the command."""

    demo_images: DemoImagesOptions = group(DemoImagesOptions)


def prepare_demo_images(
    data_root: Optional[PathLike] = None,
    images_per_class: Optional[int] = None,
    val_images_per_class: Optional[int] = None,
    test_images_per_class: Optional[int] = None,
    jobs: Optional[int] = None,
    force: bool = False,
) -> ImageSetConfig:
    """Make the demo images unless they are there, complete and of this version.

    See :mod:`dataset.generated` for how they appear.

    Parameters
    ----------
    data_root
        Folder that holds ``DemoImages/raw/{train,val,test}``; by default the folder ``dataset``.
    images_per_class, val_images_per_class, test_images_per_class
        None keeps what is there, and makes 160, 40 and 40 where nothing is.
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
    root = os.path.join(parent, "DemoImages")
    counts = {
        "train": images_per_class,
        "val": val_images_per_class,
        "test": test_images_per_class,
    }
    prepare_generated(root, RECIPE, counts, jobs, force)
    folders = {f"{split}_root": os.path.join(root, "raw", split) for split in SPLITS}
    return ImageSetConfig(
        name="DemoImages",
        root=root,
        class_names=CLASSES,
        **folders,
    )


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line."""
    description = "Make the demo images: two figures whose relation gives one of eight classes."
    options = parse(DemoImagesJobOptions(), argv, description, prog=RECIPE.command).demo_images
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = prepare_demo_images(**dataclasses.asdict(options))
    print(f"Demo images: {os.path.join(config.root, 'raw')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
