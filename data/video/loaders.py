"""Loaders for training, validation and testing, with upstream's sampling and augmentation.

The figures are those of facebookresearch/GloRe for crops of 224 pixels; sizes in pixels grow and
shrink with the crop. ``mean`` and ``std`` are RGB, on the 0..1 scale.
"""

from collections.abc import Sequence
from typing import Optional

from glore_common import UsageError

from ..common.loader import Loader, LoaderConfig
from ..common.options import settled
from ..common.transforms import (
    CenterCrop,
    Compose,
    RandomCrop,
    RandomHLS,
    RandomHorizontalFlip,
    Resize,
    ToInput,
    default_resize,
)
from .dataset import Sampler, Transform, VideoDataset
from .list import FrameCounts, list_of_files, read_video_list, without_absent
from .options import AUGMENTATIONS, ClipOptions, ClipTestOptions, VideoReadingOptions
from .sampler import EvenlySampling, RandomSampling
from .transforms import MixedCrop, RandomScale, ThreeCrop, ToNoisyInput

ASPECT_RATIO, SHORT_SIDE = (0.8, 1.25), (224, 340)
PLAIN_SHORT_SIDE = (256, 256)
HLS, JITTER = (15, 35, 25), (-20, 20)


def train_transform(
    crop_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool = True,
    augmentation: str = "full",
) -> Compose:
    """Return a training augmentation.

    Parameters
    ----------
    crop_size
    mean, std
    flip
        Mirror half of the clips; False where left and right mean something.
    augmentation
        'full': upstream's random scale, aspect, crop, colours and noise. 'crop': short side 256
        (for a crop of 224) and a random crop.
    """
    if augmentation not in AUGMENTATIONS:
        raise UsageError(
            f"augmentation must be one of {', '.join(AUGMENTATIONS)}; got {augmentation!r}."
        )
    full = augmentation == "full"
    aspect, sides = (ASPECT_RATIO, SHORT_SIDE) if full else ((1.0, 1.0), PLAIN_SHORT_SIDE)
    scaled = tuple(side * crop_size / 224 for side in sides)
    steps: list[Transform] = [RandomScale(aspect, scaled), RandomCrop(crop_size)]
    if flip:
        steps.append(RandomHorizontalFlip())
    if full:
        return Compose([*steps, RandomHLS(HLS), ToNoisyInput(JITTER, mean, std)])
    return Compose([*steps, ToInput(mean, std)])


def val_transform(
    crop_size: int, mean: Sequence[float], std: Sequence[float], crop: Optional[Transform] = None
) -> Compose:
    """Return the validation transform: short side 256 (for a crop of 224), centre or other crop."""
    steps = [Resize(default_resize(crop_size)), crop or CenterCrop(crop_size)]
    return Compose([*steps, ToInput(mean, std)])


def get_train_loader(
    list_path: str,
    root: str,
    options: ClipOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: Optional[int] = None,
    flip: bool = True,
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Return the loader for training: random clips, augmented, in a new order each epoch.

    It yields (data, label) as ``mx.nd`` float32 on the CPU: data (n, 3, clip_length, crop_size,
    crop_size). A video that cannot be read is replaced by another one.

    Parameters
    ----------
    list_path, root
        Video list, and the folder its paths start from.
    options
        With batch size, clip length, frame interval, crop size and augmentation settled.
    mean, std
    num_classes
        To check the labels.
    flip
        See :func:`train_transform`.
    seed, rank, num_ranks
        See :class:`data.common.loader.LoaderConfig`.
    """
    crop_size = settled(options, "crop_size")
    dataset = _dataset(
        (list_path, root, num_classes),
        RandomSampling(settled(options, "clip_length"), settled(options, "train_frame_interval")),
        train_transform(crop_size, mean, std, flip, settled(options, "augmentation")),
        crop_size,
        options,
    )
    config = LoaderConfig.of(
        options,
        shuffle=True,
        balanced=options.class_balance == "sampling",
        seed=seed,
        last_batch="discard",
        rank=rank,
        num_ranks=num_ranks,
    )
    return Loader(dataset, config)


def get_val_loader(
    list_path: str,
    root: str,
    options: ClipOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: Optional[int] = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Return the loader for validation: the middle clip of each video, centre crop.

    Every video comes exactly once, in the list's order, the last batch may be smaller; a video
    that cannot be read is left out. Parameters as for :func:`get_train_loader`.
    """
    crop_size = settled(options, "crop_size")
    dataset = _dataset(
        (list_path, root, num_classes),
        EvenlySampling(settled(options, "clip_length"), settled(options, "val_frame_interval")),
        val_transform(crop_size, mean, std),
        crop_size,
        options,
    )
    return Loader(dataset, LoaderConfig.of(options, on_bad="skip", rank=rank, num_ranks=num_ranks))


def get_test_loader(
    list_path: str,
    root: str,
    options: ClipTestOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: Optional[int] = None,
    seed: int = 0,
) -> Loader:
    """Return the loader for testing with several clips and crops of each video.

    Yields (data, label, index); rows of equal index belong to one video and are to be averaged.
    The crops of a clip are cut from frames decoded once. The author's video-level test is 10 clips
    x 5 mixed crops.

    Parameters
    ----------
    options
        With batch size, clip length, frame interval and crop size settled. Without a kind of
        crops, the one that fits ``num_crops``: 1 'centre', 3 'spatial', any other 'mixed'.
    list_path, root, mean, std, num_classes, seed
        As for :func:`get_train_loader`; random are the places of mixed crops.
    """
    dataset = get_test_dataset(options, mean=mean, std=std).with_list(
        without_absent(read_video_list(list_path, root, num_classes), options.max_missing)
    )
    return Loader(dataset, LoaderConfig.of(options, seed=seed, with_index=True, on_bad="skip"))


def get_test_dataset(
    options: ClipTestOptions, *, mean: Sequence[float], std: Sequence[float]
) -> VideoDataset:
    """Return the clips that :func:`get_test_loader` reads, of no video yet.

    ``with_files`` says of which. Parameters as there.
    """
    crop_size = settled(options, "crop_size")
    views, clips = options.num_crops, options.num_clips
    crops = options.crops or {1: "centre", 3: "spatial"}.get(views, "mixed")
    crop: Transform
    if crops == "centre" and views == 1:
        crop = CenterCrop(crop_size)
    elif crops == "spatial" and views == ThreeCrop.num_views:
        crop = ThreeCrop(crop_size)
    elif crops == "mixed":
        crop = MixedCrop(crop_size, views)
    else:
        raise UsageError(
            f"{views} crops of kind {crops!r}: possible are 1 'centre', 3 'spatial', and any "
            "number 'mixed'."
        )
    length, interval = settled(options, "clip_length"), settled(options, "frame_interval")
    return VideoDataset(
        list_of_files(()),
        EvenlySampling(length, interval, clips),
        val_transform(crop_size, mean, std, crop),
        (3, length, crop_size, crop_size),
        views,
        clips,
        decoder=options.decoder,
        clip_seconds=options.clip_seconds,
    )


def _dataset(
    where: tuple[str, str, Optional[int]],
    sampler: Sampler,
    transform: Transform,
    crop_size: int,
    options: VideoReadingOptions,
) -> VideoDataset:
    """Return the clips of the list ``where`` (path, root, number of classes), counts cached."""
    videos = without_absent(read_video_list(*where), options.max_missing)
    return VideoDataset(
        videos,
        sampler,
        transform,
        (3, sampler.num, crop_size, crop_size),
        frame_counts=FrameCounts(videos),
        decoder=options.decoder,
        clip_seconds=options.clip_seconds,
    )
