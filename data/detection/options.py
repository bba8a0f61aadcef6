"""Options of reading images with objects."""

import dataclasses
from typing import Optional

from glore_options import option, positive_int

from ..common.options import ReadingOptions


@dataclasses.dataclass
class DetectionReadingOptions(ReadingOptions):
    """How images and their objects are read."""

    title = "images and objects"

    short_side: Optional[int] = option(
        None,
        "images are resized to this shorter side (default: 800; demo: 160)",
        kind=positive_int,
        metavar="PIXELS",
    )
    long_side: Optional[int] = option(
        None,
        "but to a longer side of this at most (default: 1333; demo: 192)",
        kind=positive_int,
        metavar="PIXELS",
    )
    flip: bool = option(True, "mirror half of the training images")
    keep_empty: bool = option(False, "train on images without objects too")
    val_batch: int = option(1, "images at a time in validation", kind=positive_int)
    check_images: bool = option(
        True, "compare all images' sizes with the annotations before training", compare=False
    )
