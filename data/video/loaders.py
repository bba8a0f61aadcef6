"""Loaders for training, validation and testing, with upstream's sampling and augmentation.

The figures are those of facebookresearch/GloRe for crops of 224 pixels; sizes in pixels grow and
shrink with the crop.
"""

import mxnet_compat
from glore_common import UsageError

from . import transforms
from .dataset import VideoDataset
from .iterator import VideoLoader
from .list import FrameCounts, read_video_list
from .sampler import EvenlySampling, RandomSampling

KINETICS_MEAN = (124 / 255, 117 / 255, 104 / 255)
KINETICS_STD = (1 / (0.0167 * 255),) * 3


def default_num_workers():
    """Return how many worker processes to use by default: the physical cores, at most 8."""
    return min(8, mxnet_compat.physical_cores())


def train_transform(
    crop_size=224,
    mean=KINETICS_MEAN,
    std=KINETICS_STD,
    flip=True,
    aspect_ratio=(0.8, 1.25),
    short_side=(224, 340),
    hls=(15, 35, 25),
    jitter=20,
):
    """Return upstream's training augmentation.

    Parameters
    ----------
    crop_size : int
    mean, std : tuple of 3 float
        RGB, on the 0..1 scale.
    flip : bool
        Mirror half of the clips; False where left and right mean something.
    aspect_ratio : (float, float)
    short_side : (float, float)
        For a crop of 224; scaled with ``crop_size``.
    hls : (int, int, int) or None
        None leaves the colours as they are.
    jitter : float or None
        None (or 0) adds no noise.
    """
    scaled = tuple(side * crop_size / 224 for side in short_side)
    steps = [transforms.RandomScale(aspect_ratio, scaled), transforms.RandomCrop(crop_size)]
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    if hls:
        steps.append(transforms.RandomHLS(hls))
    if jitter:
        steps.append(transforms.PixelJitter((-jitter, jitter)))
    return transforms.Compose([*steps, transforms.ToArray(), transforms.Normalize(mean, std)])


def random_crop_transform(
    crop_size=224, mean=KINETICS_MEAN, std=KINETICS_STD, flip=True, short_side=256
):
    """Return a plain training augmentation: short side 256 (for a crop of 224), random crop, flip.

    Parameters
    ----------
    crop_size : int
    mean, std : tuple of 3 float
        RGB, on the 0..1 scale.
    flip : bool
    short_side : float
        For a crop of 224; scaled with ``crop_size``.
    """
    return train_transform(
        crop_size,
        mean,
        std,
        flip,
        aspect_ratio=(1.0, 1.0),
        short_side=(short_side, short_side),
        hls=None,
        jitter=None,
    )


def _resize_for(crop_size):
    return transforms.Resize(round(256 * crop_size / 224))


def val_transform(crop_size=224, mean=KINETICS_MEAN, std=KINETICS_STD):
    """Return the validation transform: short side 256 (for a crop of 224), centre crop."""
    steps = [_resize_for(crop_size), transforms.CenterCrop(crop_size)]
    return transforms.Compose([*steps, transforms.ToArray(), transforms.Normalize(mean, std)])


def _dataset(
    list_path,
    root,
    num_classes,
    sampler,
    transform,
    crop_size,
    cache_counts,
    views=1,
    num_clips=1,
    decoder_resize=False,
):
    video_list = read_video_list(list_path, root, num_classes)
    return VideoDataset(
        video_list,
        sampler,
        transform,
        (3, sampler.num, crop_size, crop_size),
        frame_counts=FrameCounts(video_list) if cache_counts else None,
        views=views,
        num_clips=num_clips,
        decoder_resize=decoder_resize,
    )


def get_train_loader(
    list_path,
    root,
    num_classes=None,
    clip_length=8,
    frame_interval=8,
    crop_size=224,
    mean=KINETICS_MEAN,
    std=KINETICS_STD,
    flip=True,
    batch_size=64,
    seed=0,
    num_workers=None,
    prefetch=2,
    last_batch="discard",
    rank=0,
    num_ranks=1,
    strict=False,
    max_failures=10,
    timeout=60.0,
    cache_counts=True,
    decoder_resize=False,
    transform=None,
):
    """Return the loader for training: random clips, augmented, in a new order each epoch.

    Parameters
    ----------
    list_path, root : str
        Video list, and the folder its paths start from.
    num_classes : int, optional
        To check the labels.
    clip_length, frame_interval : int
        Frames of a clip and their distance.
    crop_size : int
    mean, std : tuple of 3 float
        RGB, on the 0..1 scale.
    flip : bool
    num_workers : int, optional
        None: :func:`default_num_workers`.
    cache_counts : bool
        Keep frame counts beside the list.
    decoder_resize : bool
        See :meth:`VideoDataset.load`.
    transform : callable, optional
        Instead of :func:`train_transform`, which gets ``crop_size, mean, std, flip``.
    batch_size, seed, prefetch, last_batch, rank, num_ranks, strict, max_failures, timeout
        See :class:`VideoLoader`.

    Returns
    -------
    VideoLoader
    """
    dataset = _dataset(
        list_path,
        root,
        num_classes,
        RandomSampling(clip_length, frame_interval),
        transform or train_transform(crop_size, mean, std, flip),
        crop_size,
        cache_counts,
        decoder_resize=decoder_resize,
    )
    return VideoLoader(
        dataset,
        batch_size,
        shuffle=True,
        seed=seed,
        num_workers=default_num_workers() if num_workers is None else num_workers,
        prefetch=prefetch,
        last_batch=last_batch,
        rank=rank,
        num_ranks=num_ranks,
        strict=strict,
        max_failures=max_failures,
        timeout=timeout,
    )


def get_val_loader(
    list_path,
    root,
    num_classes=None,
    clip_length=8,
    frame_interval=8,
    crop_size=224,
    mean=KINETICS_MEAN,
    std=KINETICS_STD,
    batch_size=64,
    num_workers=None,
    prefetch=2,
    rank=0,
    num_ranks=1,
    strict=False,
    max_failures=10,
    timeout=60.0,
    cache_counts=True,
    with_index=False,
):
    """Return the loader for validation: the middle clip of each video, centre crop.

    Every video comes exactly once, in the list's order, the last batch may be smaller; a video
    that cannot be read is left out. Parameters as for :func:`get_train_loader`.
    """
    return get_test_loader(
        list_path,
        root,
        num_classes=num_classes,
        clip_length=clip_length,
        frame_interval=frame_interval,
        crop_size=crop_size,
        mean=mean,
        std=std,
        batch_size=batch_size,
        num_workers=num_workers,
        prefetch=prefetch,
        rank=rank,
        num_ranks=num_ranks,
        strict=strict,
        max_failures=max_failures,
        timeout=timeout,
        cache_counts=cache_counts,
        with_index=with_index,
    )


def get_test_loader(
    list_path,
    root,
    num_classes=None,
    num_clips=1,
    num_crops=1,
    crops=None,
    clip_length=8,
    frame_interval=8,
    crop_size=224,
    mean=KINETICS_MEAN,
    std=KINETICS_STD,
    batch_size=64,
    seed=0,
    num_workers=None,
    prefetch=2,
    rank=0,
    num_ranks=1,
    strict=False,
    max_failures=10,
    timeout=60.0,
    cache_counts=True,
    with_index=True,
):
    """Return the loader for testing with several clips and crops of each video.

    Yields (data, label, index); rows of equal index belong to one video and are to be averaged.
    The crops of a clip are cut from frames decoded once.

    Parameters
    ----------
    num_clips : int
        Clips spread evenly over the video.
    num_crops : int
        Crops of each clip.
    crops : {'centre', 'spatial', 'mixed'}, optional
        'centre': one crop; 'spatial': 3 along the longer side; 'mixed': the centre and random
        places (the author's video-level test is 10 clips x 5 mixed crops). By default the kind
        that fits ``num_crops``: 1, 3, any other.

    Other parameters as for :func:`get_train_loader`.
    """
    if crops is None:
        crops = {1: "centre", 3: "spatial"}.get(num_crops, "mixed")
    if crops == "centre" and num_crops == 1:
        crop = transforms.CenterCrop(crop_size)
    elif crops == "spatial" and num_crops == transforms.ThreeCrop.num_views:
        crop = transforms.ThreeCrop(crop_size)
    elif crops == "mixed":
        crop = transforms.MixedCrop(crop_size, num_crops)
    else:
        raise UsageError(
            f"{num_crops} crops of kind {crops!r}: possible are 1 'centre', 3 'spatial', and any "
            "number 'mixed'."
        )
    steps = [_resize_for(crop_size), crop, transforms.ToArray(), transforms.Normalize(mean, std)]
    dataset = _dataset(
        list_path,
        root,
        num_classes,
        EvenlySampling(clip_length, frame_interval, num_clips),
        transforms.Compose(steps),
        crop_size,
        cache_counts,
        views=num_crops,
        num_clips=num_clips,
    )
    return VideoLoader(
        dataset,
        batch_size,
        seed=seed,
        num_workers=default_num_workers() if num_workers is None else num_workers,
        prefetch=prefetch,
        rank=rank,
        num_ranks=num_ranks,
        with_index=with_index,
        on_bad="skip",
        strict=strict,
        max_failures=max_failures,
        timeout=timeout,
    )
