"""Which images and masks there are: Cityscapes, Pascal VOC, ADE20K, or two folders.

All become one :class:`SegmentationSource`, which :func:`check` looks through before work starts.
"""

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from glore_common import UsageError, progress

from ..image.decode import header_of
from ..image.source import files_below, is_image
from .labels import CITYSCAPES, IGNORED, VOC, Labels, MaskError, ade20k
from .masks import read_mask

LOGGER = logging.getLogger("glore.data")
THREADS = 8
CITYSCAPES_END = "_leftImg8bit.png"
# A street without a car, a person, the sky, or a tree: the highest train id is 18.
HIGHEST_TRAIN_ID = 18


class Pair(NamedTuple):
    """An image and its mask, below the source's root; no mask where there is none to be had."""

    image: str
    mask: Optional[str]


@dataclasses.dataclass(frozen=True)
class SegmentationSource:
    """Images, masks and classes.

    Attributes
    ----------
    root
        Folder that the paths start from (absolute).
    pairs
    labels
    kind
        Of the data set: ``cityscapes``, ``voc``, ``ade20k``, ``folders``, ``demo``.
    origin
        For messages.
    """

    root: str
    pairs: tuple[Pair, ...]
    labels: Labels
    kind: str
    origin: str

    def image(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.root, self.pairs[index].image)

    def mask(self, index: int) -> Optional[str]:
        """Return the path of a mask."""
        mask = self.pairs[index].mask
        return None if mask is None else os.path.join(self.root, mask)


def _folder(path: str, what: str) -> str:
    if not os.path.isdir(path):
        raise MaskError(f"{what} {path} is no folder")
    return path


def _images_in(folder: str) -> list[str]:
    """Return the images below a folder, by their path below it, sorted."""
    return list(filter(is_image, files_below(folder)))


def _source(
    root: str, pairs: Sequence[Pair], labels: Labels, kind: str, origin: str
) -> SegmentationSource:
    """Return the source, once all masks are known to exist."""
    if not pairs:
        raise MaskError(f"{origin} holds no images")
    missing = [
        pair for pair in pairs if pair.mask and not os.path.isfile(os.path.join(root, pair.mask))
    ]
    if missing:
        raise MaskError(
            f"{len(missing)} of {len(pairs)} masks of {origin} are missing, the first one "
            f"{os.path.join(root, str(missing[0].mask))} of {missing[0].image}"
        )
    return SegmentationSource(os.path.abspath(root), tuple(pairs), labels, kind, origin)


def read_cityscapes(root: str, split: str) -> SegmentationSource:
    """Read a part of Cityscapes: ``leftImg8bit/SPLIT/CITY`` and ``gtFine/SPLIT/CITY``.

    Masks are those of ids (``…_gtFine_labelIds.png``). The part ``test`` has none that count.
    """
    base = os.path.join("leftImg8bit", split)
    _folder(os.path.join(root, base), "Cityscapes' images:")
    pairs = []
    for path in _images_in(os.path.join(root, base)):
        if not path.endswith(CITYSCAPES_END):
            continue
        mask = None
        if split != "test":
            stem = path[: -len(CITYSCAPES_END)]
            mask = os.path.join("gtFine", split, f"{stem}_gtFine_labelIds.png")
        pairs.append(Pair(os.path.join(base, path), mask))
    return _source(root, pairs, CITYSCAPES, "cityscapes", f"Cityscapes {split} ({root})")


def read_voc(root: str, split: str) -> SegmentationSource:
    """Read a part of Pascal VOC: ``ImageSets/Segmentation/SPLIT.txt`` says which images.

    ``root`` is VOC2012, or holds it (also as VOCdevkit/VOC2012). Masks are palette pictures of ids.
    """
    for below in ("", "VOC2012", os.path.join("VOCdevkit", "VOC2012")):
        base = os.path.join(root, below)
        listed = os.path.join(base, "ImageSets", "Segmentation", f"{split}.txt")
        if os.path.isfile(listed):
            break
    else:
        raise MaskError(f"Pascal VOC: {root} has no ImageSets/Segmentation/{split}.txt")
    with open(listed, encoding="utf-8") as stream:
        names = stream.read().split()
    pairs = [
        Pair(
            os.path.join("JPEGImages", f"{name}.jpg"),
            os.path.join("SegmentationClass", f"{name}.png"),
        )
        for name in names
    ]
    absent = [p.image for p in pairs if not os.path.isfile(os.path.join(base, p.image))]
    if absent:
        raise MaskError(f"{listed} names {absent[0]}, which is missing; {len(absent)} in all")
    return _source(base, pairs, VOC, "voc", f"Pascal VOC {split} ({base})")


def read_ade20k(root: str, split: str) -> SegmentationSource:
    """Read a part of ADE20K's scene parsing: ``images/PART`` and ``annotations/PART``.

    ``root`` is ADEChallengeData2016, or holds it; the parts are called training and validation.
    """
    inner = os.path.join(root, "ADEChallengeData2016")
    base = inner if os.path.isdir(inner) else root
    part = {"train": "training", "val": "validation"}.get(split, split)
    images = os.path.join("images", part)
    _folder(os.path.join(base, images), "ADE20K's images:")
    names = None
    table = os.path.join(base, "objectInfo150.txt")
    if os.path.isfile(table):
        with open(table, encoding="utf-8") as stream:
            lines = stream.read().splitlines()[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    pairs = [
        Pair(
            os.path.join(images, path),
            os.path.join("annotations", part, f"{os.path.splitext(path)[0]}.png"),
        )
        for path in _images_in(os.path.join(base, images))
    ]
    return _source(base, pairs, ade20k(names), "ade20k", f"ADE20K {part} ({base})")


def read_folders(
    images: str, masks: Optional[str], labels: Labels, kind: str = "folders"
) -> SegmentationSource:
    """Read a folder of images and one of masks, which have the same names but for the ending.

    Parameters
    ----------
    images
        Images lie in it or below.
    masks
        None: there are no masks, as for prediction.
    labels
    kind
    """
    _folder(images, "the folder of images")
    found = _images_in(images)
    if masks is None:
        pairs = [Pair(path, None) for path in found]
        return _source(images, pairs, labels, kind, images)
    _folder(masks, "the folder of masks")
    by_stem: dict[str, str] = {}
    for path in _images_in(masks):
        stem = os.path.splitext(path)[0]
        if stem in by_stem:
            raise MaskError(f"{masks} has two masks for {stem}: {by_stem[stem]} and {path}")
        by_stem[stem] = path
        if path.lower().endswith((".jpg", ".jpeg")) and len(by_stem) == 1:
            LOGGER.warning(
                "%s is a JPEG file, whose pixels are not those that were saved: ids are wrong "
                "along all borders. Use PNG.",
                os.path.join(masks, path),
            )
    root = os.path.commonpath([os.path.abspath(images), os.path.abspath(masks)])
    pairs = []
    for path in found:
        stem = os.path.splitext(path)[0]
        mask = by_stem.get(stem, f"{stem}.png")
        pairs.append(
            Pair(
                os.path.relpath(os.path.join(images, path), root),
                os.path.relpath(os.path.join(masks, mask), root),
            )
        )
    return _source(root, pairs, labels, kind, images)


class Looked(NamedTuple):
    """What :func:`check` found: labelled pixels of each class, and the highest id."""

    pixels: np.ndarray
    highest: int


def check(source: SegmentationSource, contents: bool = True) -> Optional[Looked]:
    """Look through images and masks before work starts.

    Parameters
    ----------
    source
    contents
        Read all masks too; else only sizes, from the headers.

    Returns
    -------
    None without contents.

    Raises
    ------
    MaskError
        A mask that cannot be read, has another size than its image, or values that are no class;
        masks without a labelled pixel; or train ids in place of Cityscapes' ids.
    """

    def look(index: int) -> tuple[np.ndarray, int]:
        path = source.mask(index)
        counts, highest = np.zeros(source.labels.num_classes, np.int64), 0
        if path is None:
            return counts, highest
        sizes = []
        for name in (source.image(index), path):
            try:
                with open(name, "rb") as stream:
                    header = header_of(stream)
                    sizes.append(header.size if header else None)
            except OSError as error:
                raise MaskError(f"{name} cannot be read: {error.strerror}") from error
        # What is no image at all is met, and dealt with, when it is read.
        if None not in sizes and sizes[0] != sizes[1]:
            (height, width), (mask_height, mask_width) = sizes  # type: ignore[misc]
            raise MaskError(
                f"the image {source.image(index)} has {width} x {height} pixels, its mask {path} "
                f"{mask_width} x {mask_height} (width x height, turned as their EXIF says)"
            )
        if contents:
            ids = read_mask(path)
            mask = source.labels.train_ids(ids, path)
            counts += np.bincount(mask[mask != IGNORED], minlength=len(counts))
            highest = int(ids.max())
        return counts, highest

    total, highest = np.zeros(source.labels.num_classes, np.int64), 0
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        looked = pool.map(look, range(len(source.pairs)))
        label = f"Checking the masks of {source.origin}"
        for counts, most in progress(looked, label, len(source.pairs), unit="mask"):
            total += counts
            highest = max(highest, most)
    masks = [pair.mask for pair in source.pairs if pair.mask]
    if not contents or not masks:
        return None
    if source.kind == "cityscapes" and highest <= HIGHEST_TRAIN_ID:
        first = os.path.join(source.root, masks[0])
        values = ", ".join(map(str, np.unique(read_mask(first))[:8]))
        raise MaskError(
            f"no mask of {source.origin} has an id above {highest}: these are train ids, not "
            f"Cityscapes' ids, although {first} (values {values}) is called so. Make the masks of "
            "ids anew (cityscapesscripts, csCreateTrainIdLabelImgs makes the others)."
        )
    if not total.any():
        raise MaskError(f"no mask of {source.origin} has a labelled pixel")
    return Looked(total, highest)


def highest_id(source: SegmentationSource) -> int:
    """Return the highest value, but for 255, of all masks: how many classes they are for."""
    found = -1
    for index in range(len(source.pairs)):
        path = source.mask(index)
        if path is not None:
            ids = read_mask(path)
            if ids.ndim == 3:
                raise UsageError(
                    f"the mask {path} is a colour picture: give the colours of the classes in a "
                    "class file (--classes)"
                )
            known = ids[ids != IGNORED]
            found = max(found, int(known.max()) if known.size else -1)
    return found
