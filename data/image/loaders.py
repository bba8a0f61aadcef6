"""Loaders of images for training, validation and testing."""

from glore_common import UsageError

from ..video.loaders import default_num_workers
from .dataset import ImageDataset
from .iterator import ImageLoader, NativeImageLoader
from .source import open_image_source
from .transforms import TenCrop, image_train_transform, image_val_transform

READERS = ("own", "native")


def get_image_train_loader(
    source,
    *,
    crop_size,
    mean,
    std,
    batch_size,
    num_classes=None,
    class_names=None,
    augmentation="reference",
    flip=True,
    rotation=0,
    resize=None,
    seed=1,
    num_workers=None,
    prefetch=2,
    last_batch="discard",
    strict=False,
    max_failures=10,
    timeout=60.0,
    rank=0,
    num_ranks=1,
    reader="own",
):
    """Return the loader for training: augmented images, in a new order each epoch.

    It yields (data, label) as ``mx.nd`` float32 on the CPU: data (n, 3, crop_size, crop_size).
    With the own reader, what it yields is a pure function of (seed, epoch, batch), whatever the
    number of workers.

    Parameters
    ----------
    source : ImageSource or str
        See :func:`data.image.source.open_image_source`: also a folder of classes or a .rec file.
    crop_size : int
    mean, std : sequence of 3 float
        RGB, on the 0..1 scale.
    num_classes : int, optional
        What the network has: no label may be above.
    class_names : sequence of str, optional
        Classes and their order, if they are not to come from ``source``.
    augmentation : {'reference', 'crop', 'none'}
        With ``flip``, ``rotation`` and ``resize`` as for
        :func:`data.image.transforms.image_train_transform`.
    num_workers : int, optional
        None: :func:`data.video.loaders.default_num_workers`.
    reader : {'own', 'native'}
        'native', for .rec files, is MXNet's; see :class:`NativeImageLoader` for what it cannot do.
    batch_size, seed, prefetch, last_batch, strict, max_failures, timeout, rank, num_ranks
        See :class:`data.common.loader.Loader`. An unreadable image is replaced by another one.

    Returns
    -------
    ImageLoader or NativeImageLoader

    Raises
    ------
    UsageError, SourceError, RecordError
    """
    source = open_image_source(source, num_classes, class_names)
    transform = image_train_transform(crop_size, mean, std, augmentation, flip, rotation, resize)
    workers = default_num_workers() if num_workers is None else num_workers
    if _is_native(reader):
        if strict or last_batch != "discard":
            raise UsageError("reader='native' knows neither strict nor last_batch='keep'.")
        return NativeImageLoader(
            source,
            crop_size,
            mean,
            std,
            batch_size,
            True,
            augmentation=augmentation,
            flip=flip,
            rotation=rotation,
            resize=resize,
            seed=seed,
            num_workers=workers,
            rank=rank,
            num_ranks=num_ranks,
        )
    return ImageLoader(
        ImageDataset(source, transform, (crop_size, crop_size)),
        batch_size,
        shuffle=True,
        seed=seed,
        num_workers=workers,
        prefetch=prefetch,
        last_batch=last_batch,
        rank=rank,
        num_ranks=num_ranks,
        strict=strict,
        max_failures=max_failures,
        timeout=timeout,
    )


def get_image_val_loader(
    source,
    *,
    crop_size,
    mean,
    std,
    batch_size,
    resize=None,
    crops="centre",
    num_classes=None,
    class_names=None,
    num_workers=None,
    prefetch=2,
    strict=False,
    max_failures=10,
    timeout=60.0,
    rank=0,
    num_ranks=1,
    with_index=True,
    reader="own",
):
    """Return the loader for validation and testing: every image once, in the source's order.

    It yields (data, label, index); rows of equal index are crops of one image and are to be
    averaged. An image that cannot be read is left out (``strict``: it ends the pass).

    Parameters
    ----------
    crops : {'centre', 'ten', 'full'}
        'centre': one crop of ``crop_size``. 'ten': corners and centre, also mirrored; the batch
        size counts crops. 'full': the whole image, its shorter side resized to ``resize``; a
        batch has images of one size, size after size in the order in which they come up. The
        headers of all images are read first.
    resize : int, optional
        Short side in pixels; by default in proportion 256 : 224 to ``crop_size``.
    with_index : bool
        False: yield (data, label).
    source, crop_size, mean, std, batch_size, num_classes, class_names, num_workers, prefetch,
    strict, max_failures, timeout, rank, num_ranks, reader
        As for :func:`get_image_train_loader`.

    Returns
    -------
    ImageLoader or NativeImageLoader

    Raises
    ------
    UsageError, SourceError, RecordError
    """
    source = open_image_source(source, num_classes, class_names)
    transform = image_val_transform(crop_size, mean, std, crops, resize)
    workers = default_num_workers() if num_workers is None else num_workers
    if _is_native(reader):
        if strict or crops != "centre":
            raise UsageError("reader='native' has centre crops only, and does not know strict.")
        return NativeImageLoader(
            source,
            crop_size,
            mean,
            std,
            batch_size,
            False,
            resize=resize,
            num_workers=workers,
            rank=rank,
            num_ranks=num_ranks,
            with_index=with_index,
        )
    size = None if crops == "full" else (crop_size, crop_size)
    views = TenCrop.num_views if crops == "ten" else 1
    return ImageLoader(
        ImageDataset(source, transform, size, views),
        batch_size,
        num_workers=workers,
        prefetch=prefetch,
        rank=rank,
        num_ranks=num_ranks,
        with_index=with_index,
        on_bad="skip",
        strict=strict,
        max_failures=max_failures,
        timeout=timeout,
    )


def _is_native(reader):
    if reader not in READERS:
        raise UsageError(f"reader must be one of {', '.join(READERS)}; got {reader!r}.")
    return reader == "native"
