"""Loaders of images for training, validation and testing, and their transforms.

``reference`` is the augmentation that the author of the GloRe networks documents for ImageNet
(cypw/DPNs, README): mirror, random area 8 to 100 %, aspect 3/4 to 4/3, HSL 20, 40, 50. Pixels of
the validation transforms are those of MXNet's ``ImageRecordIter``, with which the released networks
were tested. ``mean`` and ``std`` are RGB, on the 0..1 scale.
"""

from collections.abc import Sequence
from typing import Any, Optional

import cv2

from glore_common import UsageError

from ..common.loader import BatchSource, Loader, LoaderConfig
from ..common.options import settled
from ..common.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomCrop,
    RandomHLS,
    RandomHorizontalFlip,
    Resize,
    ToArray,
    default_resize,
)
from .dataset import ImageDataset
from .native import NativeImageLoader
from .options import AUGMENTATIONS, CROPS, READERS, ImageOptions, ImageReadingOptions
from .source import ImageSource
from .transforms import HLS, RandomResizedCrop, RandomRotation, TenCrop


def image_train_transform(
    crop_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: str = "reference",
    flip: bool = True,
    rotation: float = 0,
    resize: Optional[int] = None,
) -> Compose:
    """Return a training augmentation.

    Parameters
    ----------
    crop_size
    mean, std
    augmentation
        'reference': random area and aspect ratio, mirror, colours. 'crop': short side ``resize``,
        random crop, mirror. 'none': the validation transform; ``flip`` and ``rotation`` are
        not used.
    flip
        False where left and right mean something.
    rotation
        Largest angle, in degrees.
    resize
        Short side in pixels for 'crop' and 'none'; by default in proportion 256 : 224.

    Returns
    -------
    Compose
        (1, H, W, 3) uint8 -> (3, 1, crop_size, crop_size) float32.
    """
    if augmentation not in AUGMENTATIONS:
        raise UsageError(
            f"augmentation must be one of {', '.join(AUGMENTATIONS)}; got {augmentation!r}."
        )
    if augmentation == "none":
        return image_val_transform(crop_size, mean, std, "centre", resize)
    steps: list[Any] = []
    if augmentation == "crop":
        steps.append(_resize_for_crop(crop_size, resize))
    if rotation:
        steps.append(RandomRotation(rotation))
    steps.append(RandomCrop(crop_size) if augmentation == "crop" else RandomResizedCrop(crop_size))
    if flip:
        steps.append(RandomHorizontalFlip())
    if augmentation == "reference":
        steps.append(RandomHLS(HLS))
    return Compose([*steps, ToArray(), Normalize(mean, std)])


def image_val_transform(
    crop_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crops: str = "centre",
    resize: Optional[int] = None,
) -> Compose:
    """Return a transform for validation and testing.

    Parameters
    ----------
    crop_size
        Not used by ``crops='full'``, but for its default of ``resize``.
    mean, std, resize
        As for :func:`image_train_transform`.
    crops
        'centre': one crop; 'ten': :class:`TenCrop`; 'full': the whole image with short side
        ``resize``.
    """
    if crops not in CROPS:
        raise UsageError(f"crops must be one of {', '.join(CROPS)}; got {crops!r}.")
    steps: list[Any]
    if crops == "full":
        steps = [Resize(resize or default_resize(crop_size), cv2.INTER_CUBIC)]
    else:
        crop = CenterCrop(crop_size, round_down=True) if crops == "centre" else TenCrop(crop_size)
        steps = [_resize_for_crop(crop_size, resize), crop]
    return Compose([*steps, ToArray(), Normalize(mean, std)])


def _resize_for_crop(crop_size: int, resize: Optional[int]) -> Resize:
    resize = default_resize(crop_size) if resize is None else resize
    if resize < crop_size:
        raise UsageError(
            f"a crop of {crop_size} pixels does not fit in images resized to a short side of "
            f"{resize}: resize to {crop_size} or more."
        )
    return Resize(resize, cv2.INTER_CUBIC)


def get_image_train_loader(
    source: ImageSource,
    options: ImageOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> BatchSource:
    """Return the loader for training: augmented images, in a new order each epoch.

    It yields (data, label) as ``mx.nd`` float32 on the CPU: data (n, 3, crop_size, crop_size).
    With the own reader, what it yields is a pure function of (seed, epoch, batch), whatever the
    number of workers, and an unreadable image is replaced by another one.

    Parameters
    ----------
    source
        See :func:`data.image.source.open_image_source`.
    options
        With batch size and crop size settled.
    mean, std
    seed, rank, num_ranks
        See :class:`data.common.loader.LoaderConfig`.

    Raises
    ------
    UsageError, SourceError, RecordError
    """
    crop_size = settled(options, "crop_size")
    transform = image_train_transform(
        crop_size,
        mean,
        std,
        options.augmentation,
        options.flip,
        options.rotation,
        options.resize,
    )
    config = LoaderConfig.of(
        options, shuffle=True, seed=seed, last_batch="discard", rank=rank, num_ranks=num_ranks
    )
    dataset = ImageDataset(source, transform, (crop_size, crop_size), max_pixels=options.max_pixels)
    if _is_native(options):
        return NativeImageLoader(dataset, options, config, mean, std)
    return Loader(dataset, config)


def get_image_val_loader(
    source: ImageSource,
    options: ImageReadingOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: Optional[int] = None,
    crops: str = "centre",
    with_index: bool = True,
    rank: int = 0,
    num_ranks: int = 1,
) -> BatchSource:
    """Return the loader for validation and testing: every image once, in the source's order.

    It yields (data, label, index); rows of equal index are crops of one image and are to be
    averaged. An image that cannot be read is left out (``strict_data``: it ends the pass).

    Parameters
    ----------
    options
        With crop size settled. Augmentation is not used.
    batch_size
        By default the options'.
    crops
        'centre': one crop of ``crop_size``. 'ten': corners and centre, also mirrored; the batch
        size counts crops. 'full': the whole image, its shorter side resized to ``resize``; a
        batch has images of one size, size after size in the order in which they come up. The
        headers of all images are read first.
    with_index
        False: yield (data, label).
    source, mean, std, rank, num_ranks
        As for :func:`get_image_train_loader`.

    Raises
    ------
    UsageError, SourceError, RecordError
    """
    crop_size = settled(options, "crop_size")
    transform = image_val_transform(crop_size, mean, std, crops, options.resize)
    config = LoaderConfig.of(
        options,
        batch_size=settled(options, "batch_size") if batch_size is None else batch_size,
        with_index=with_index,
        on_bad="skip",
        rank=rank,
        num_ranks=num_ranks,
    )
    native = _is_native(options)
    if native and crops != "centre":
        raise UsageError("reader='native' has centre crops only.")
    size = None if crops == "full" else (crop_size, crop_size)
    views = TenCrop.num_views if crops == "ten" else 1
    dataset = ImageDataset(source, transform, size, views, max_pixels=options.max_pixels)
    if native:
        return NativeImageLoader(dataset, options, config, mean, std)
    return Loader(dataset, config)


def _is_native(options: ImageReadingOptions) -> bool:
    reader = options.record_reader
    if reader not in READERS:
        raise UsageError(f"reader must be one of {', '.join(READERS)}; got {reader!r}.")
    return reader == "native"
