"""Options of reading clips: for training, and for testing."""

import dataclasses
from typing import Optional

from glore_options import option, pixels, positive_int

from ..common.options import ReadingOptions
from .container import DECODERS

AUGMENTATIONS = ("full", "crop")
CROPS = ("centre", "spatial", "mixed")


@dataclasses.dataclass
class DecoderOptions(ReadingOptions):
    """What reads videos."""

    decoder: str = option(
        "auto",
        "decord or pyav, which gives FFmpeg's frames of every file; auto: decord where it gives "
        "the same",
        choices=DECODERS,
    )


@dataclasses.dataclass
class ClipOptions(DecoderOptions):
    """Which videos a training reads, and how clips are taken from them.

    What is None is the data set's; see ``dataset.config.DatasetConfig``.
    """

    title = "data (defaults marked * are the data set's)"

    dataset: str = option("Kinetics", "its lists lie below DATA_ROOT/DATASET/raw")
    data_root: Optional[str] = option(
        None, "folder that holds DATASET/raw (default: ./dataset)", compare=False
    )
    split: int = option(1, "official split (UCF101, HMDB51)", kind=positive_int)
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
class ClipTestOptions(DecoderOptions):
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
