"""The images of a job: which ones are trained on, validated on and tested on."""

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple, Optional

from data.image.source import (
    ImageSource,
    image_source_of_rows,
    open_image_source,
    read_image_folder,
)
from dataset import prepare_demo_images
from dataset.cub200 import hold_out, read_cub200
from glore_common import GloReError, UsageError
from glore_options import flag_of

from .options import ImageSourceOptions

LOGGER = logging.getLogger("glore")


class ImageParts(NamedTuple):
    """Training images; those that an epoch is chosen on; those of the final test."""

    train: ImageSource
    val: Optional[ImageSource]
    test: Optional[ImageSource]


def settle_files(options: ImageSourceOptions) -> None:
    """Fill in --data-train and --data-val of --folder, and find mistakes."""
    if options.folder:
        if options.data_train or options.data_val:
            raise UsageError("give --folder, or --data-train and --data-val, not both")
        options.data_train = os.path.join(options.folder, "train")
        options.data_val = os.path.join(options.folder, "val")
    if options.dataset == "folder" and options.data_root is None:
        raise UsageError("--dataset folder needs --data-root DIR, the folder of classes")
    if options.dataset != "files":
        return
    if not options.data_train:
        raise UsageError(
            "name the images: --data-train FILE.rec (and --data-val), --folder DIR with train/ and "
            "val/, or --benchmark for made-up ones"
        )
    for name in ("data_train", "data_val"):
        index = getattr(options, f"{name}_idx")
        path = getattr(options, name)
        beside = os.path.splitext(path or "")[0] + ".idx"
        if index and os.path.realpath(index) != os.path.realpath(beside):
            flag = flag_of(name)
            raise UsageError(
                f"{flag}-idx {index} is not the index beside {flag} {path}: it must be {beside}"
            )


def open_parts(options: ImageSourceOptions) -> ImageParts:
    """Return the parts of the data set; with --select-on-test the epoch is chosen on the test part.

    Raises
    ------
    GloReError
        If images are missing or too few to be divided.
    """
    parts = {"files": _files, "folder": _folder, "cub200": _cub200, "demo": _demo}[options.dataset](
        options
    )
    if options.num_examples not in (None, len(parts.train.samples)):
        LOGGER.warning(
            "--num-examples %d: the training data hold %d, which is what counts",
            options.num_examples,
            len(parts.train.samples),
        )
    if options.select_on_test:
        LOGGER.warning(
            "--select-on-test: the epoch is chosen on the test part, so that the best accuracy is "
            "too good to compare with others'"
        )
        parts = parts._replace(val=parts.test)
    return parts


def _files(options: ImageSourceOptions) -> ImageParts:
    train = open_image_source(options.data_train, options.num_classes)
    val = None
    if options.data_val:
        val = open_image_source(options.data_val, train.num_classes, train.class_names)
    return ImageParts(train, val, None)


def _demo(options: ImageSourceOptions) -> ImageParts:
    config = prepare_demo_images(options.data_root)
    roots = (config.train_root, config.val_root, config.test_root)
    return ImageParts(*(read_image_folder(root, config.class_names) for root in roots))


def _cub200(options: ImageSourceOptions) -> ImageParts:
    splits = read_cub200(
        options.data_root or "dataset",
        0.0 if options.select_on_test else options.val_fraction,
        options.split_seed,
        with_boxes=options.cub_boxes,
    )

    def part(name: str, rows: Sequence) -> Optional[ImageSource]:
        if not rows:
            return None
        return image_source_of_rows(
            rows,
            splits.root,
            splits.class_names,
            origin=f"CUB-200 {name}",
            boxes=splits.boxes,
        )

    return ImageParts(
        part("train", splits.train), part("val", splits.val), part("test", splits.test)
    )


def _folder(options: ImageSourceOptions) -> ImageParts:
    """Return the parts of a folder of classes, or of one that holds such folders."""
    root = options.data_root
    inner = {part: os.path.join(root, part) for part in ("train", "val", "test")}
    val = test = None
    if os.path.isdir(inner["train"]):
        train = read_image_folder(inner["train"])
        val, test = (
            read_image_folder(inner[part], train.class_names)
            if os.path.isdir(inner[part])
            else None
            for part in ("val", "test")
        )
    else:
        train = read_image_folder(root)
    if test is None:
        train, test = _divide(train, options.test_fraction, options, "test")
    if val is None and not options.select_on_test:
        train, val = _divide(train, options.val_fraction, options, "val")
    return ImageParts(train, val, test)


def _divide(
    source: ImageSource, fraction: float, options: ImageSourceOptions, part: str
) -> tuple[ImageSource, ImageSource]:
    """Hold a part out of a source; return what is kept and what is held out."""
    kept, held_out = hold_out(source.samples, fraction, options.split_seed)
    if not held_out:
        raise GloReError(
            f"{source.origin} has too few images to hold some out for the {part} part: put at "
            f"least two into a class, or give it a folder of its own, "
            f"{os.path.join(options.data_root or '', part)}"
        )
    return tuple(  # type: ignore[return-value]
        image_source_of_rows(rows, source.root, source.class_names, origin=source.origin)
        for rows in (kept, held_out)
    )
