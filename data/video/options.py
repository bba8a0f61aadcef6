"""Options of reading clips: for training, and for testing."""

import dataclasses
from typing import Optional

from glore_options import number, option, pixels, positive_float, positive_int

from ..common.options import ReadingOptions
from .container import DECODERS

AUGMENTATIONS = ("full", "crop")
BALANCES = ("none", "weights", "sampling")
CROPS = ("centre", "spatial", "mixed")


@dataclasses.dataclass
class VideoReadingOptions(ReadingOptions):
    """How videos are read, and what becomes of absent ones."""

    decoder: str = option(
        "auto",
        "decord or pyav, which gives FFmpeg's frames of every file; auto: decord where it gives "
        "the same",
        choices=DECODERS,
    )
    max_missing: float = option(
        0.25,
        "share of the listed videos that may be absent",
        kind=number(float, 0.0, 1.0),
        compare=False,
    )
    clip_seconds: Optional[float] = option(
        None,
        "what a clip spans, for videos of different frame rates: instead of the interval",
        kind=positive_float,
    )


@dataclasses.dataclass
class ClipOptions(VideoReadingOptions):
    """Which videos a training reads, and how clips are taken from them.

    What is None is the data set's; see ``dataset.config.DatasetConfig``.
    """

    title = "data (defaults marked * are the data set's)"

    dataset: str = option(
        "Kinetics", "its lists lie below DATA_ROOT/DATASET/raw; any name for one of your own"
    )
    data_root: Optional[str] = option(
        None, "folder that holds DATASET/raw (default: ./dataset)", compare=False
    )
    split: int = option(1, "official split (UCF101, HMDB51)", kind=positive_int)
    num_classes: Optional[int] = option(
        None,
        "classes (default: the data set's; one of your own has those of its mapping table)",
        kind=positive_int,
    )
    class_balance: str = option(
        "none",
        "for classes of different sizes: weights counts a video by how few its class has, sampling "
        "draws all classes equally often",
        choices=BALANCES,
    )
    clip_length: Optional[int] = option(None, "frames of a clip *", kind=positive_int)
    train_frame_interval: Optional[int] = option(
        None, "frames from one to the next *", kind=positive_int
    )
    val_frame_interval: Optional[int] = option(None, "the same for validation *", kind=positive_int)
    crop_size: Optional[int] = option(None, "side of the input in pixels *", kind=pixels)
    augmentation: Optional[str] = option(
        None,
        "full: random scale, aspect, crop, flip, colours, noise; crop: random crop and flip *",
        choices=AUGMENTATIONS,
    )


@dataclasses.dataclass
class ClipTestOptions(VideoReadingOptions):
    """How clips are taken in testing."""

    title = "clips"

    clip_length: Optional[int] = option(
        None, "frames of a clip (default: as in training)", kind=positive_int
    )
    frame_interval: Optional[int] = option(
        None, "frames from one to the next (default: as in training)", kind=positive_int
    )
    crop_size: Optional[int] = option(
        None, "side of the input in pixels (default: as in training)", kind=pixels
    )
    num_clips: int = option(1, "clips per video, evenly spread", kind=positive_int)
    num_crops: int = option(1, "crops per clip; see --crops", kind=positive_int)
    crops: Optional[str] = option(
        None,
        "centre: one in the centre; spatial: 3 along the longer side; mixed: the centre and "
        "random ones (default: what fits --num-crops)",
        choices=CROPS,
    )
