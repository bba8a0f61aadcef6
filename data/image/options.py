"""Options of reading images: for training, and for testing."""

import argparse
import dataclasses
from typing import Optional

from glore_options import Alias, comma_list, number, option, pixels, positive_int

from ..common.options import ReadingOptions
from .source import DEFAULT_MAX_PIXELS

AUGMENTATIONS = ("reference", "crop", "none")
CROPS = ("centre", "ten", "full")
READERS = ("own", "native")


def image_shape(text: str) -> int:
    """Return the side of ``3,224,224``: colour images, square."""
    channels, *sides = comma_list(int, 3)(text)
    if channels != 3 or sides[0] != sides[1] or sides[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no square colour image such as 3,224,224")
    return sides[0]


@dataclasses.dataclass
class ImageReadingOptions(ReadingOptions):
    """Sizes, and the reader of record files."""

    crop_size: Optional[int] = option(
        None,
        "side of the input in pixels (default: the network's)",
        kind=pixels,
        aliases=(Alias("--image-shape", image_shape, metavar="3,SIDE,SIDE"),),
    )
    resize: Optional[int] = option(
        None,
        "shorter side before a centre crop, and before the crop of --augmentation crop (default: "
        "the input's side / 0.875)",
        kind=pixels,
    )
    max_pixels: int = option(
        DEFAULT_MAX_PIXELS,
        "an image of more, before or after resizing, counts as unreadable and is not decoded "
        "(--record-reader own)",
        kind=positive_int,
        compare=False,
    )
    record_reader: str = option(
        "own", "of .rec files; native: mx.io.ImageRecordIter", choices=READERS
    )


@dataclasses.dataclass
class ImageOptions(ImageReadingOptions):
    """How training images are augmented and read."""

    title = "images"

    augmentation: str = option(
        "reference",
        "reference: crops of random area and aspect, flip, colours; crop: resized, random crop "
        "and flip; none: as in validation",
        choices=AUGMENTATIONS,
    )
    flip: bool = option(True, "mirror half of the images")
    rotation: float = option(
        0.0, "largest random rotation in degrees", kind=number(float, 0.0, 180.0)
    )


@dataclasses.dataclass
class ImageTestOptions(ImageReadingOptions):
    """How images are cropped in testing."""

    title = "images"

    crops: Optional[str] = option(
        None,
        "centre: one in the centre; ten: corners and centre, also mirrored; full: the whole image "
        "(default: centre)",
        choices=CROPS,
    )
