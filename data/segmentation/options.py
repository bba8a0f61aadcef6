"""Options of reading images and masks."""

import argparse
import dataclasses
from typing import Optional

from glore_options import comma_list, option, positive_float, positive_int

from ..common.options import ReadingOptions


def height_width(text: str) -> tuple[int, int]:
    """Return (height, width) of ``512,1024``, or of one number for both."""
    values = comma_list(positive_int)(text)
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HEIGHT,WIDTH nor one side")
    return values[0], values[-1]


def scale_range(text: str) -> tuple[float, float]:
    """Return (low, high) of ``0.5,2``."""
    low, high = comma_list(positive_float, 2)(text)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} does not rise")
    return low, high


@dataclasses.dataclass
class SegmentationReadingOptions(ReadingOptions):
    """How images and masks are read, and training images changed."""

    title = "images and masks"

    crop: Optional[tuple[int, int]] = option(
        None,
        "size of the training crops (default: 512,1024 for Cityscapes, else 512,512)",
        kind=height_width,
        metavar="HEIGHT,WIDTH",
    )
    scale_range: Optional[tuple[float, float]] = option(
        None,
        "training images are resized by a random factor (default: 0.5,2)",
        kind=scale_range,
        metavar="LOW,HIGH",
    )
    flip: bool = option(True, "mirror half of the training images")
    colours: Optional[bool] = option(
        None,
        "shift hue, lightness and saturation of training images (default: true, but for the demo, "
        "where a colour tells the class)",
    )
    val_batch: int = option(
        1, "images at a time in validation, which sees whole images", kind=positive_int
    )
    check_masks: bool = option(
        True, "read all masks before training, to find wrong ones", compare=False
    )
