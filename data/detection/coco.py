"""Objects with boxes and masks in COCO's format: reading, and finding what is wrong with it.

Any JSON file of this format will do: classes are numbered in the order of their ids, whatever these
are. What cannot be meant is an error that names the annotation; what training has to leave out
(objects outside of their image, without a usable mask, crowds) is left out and counted.
"""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from glore_common import GloReError, progress

from ..image.decode import header_of
from .rle import lengths_of

LOGGER = logging.getLogger("glore.data")
THREADS = 8
LISTED = 5
# Images of a smaller side, objects of a smaller one are not trained on.
SMALLEST_IMAGE, SMALLEST_OBJECT = 32, 1.0
# x and y of three points.
SMALLEST_POLYGON = 6


class AnnotationError(GloReError):
    """Annotations that cannot be used; the message names file and annotation, and the way out."""


class Thing(NamedTuple):
    """An object: its class from 0, box (left, top, right, bottom) and segmentation as in COCO."""

    label: int
    box: tuple[float, float, float, float]
    segmentation: Any


class Picture(NamedTuple):
    """An image: id, path below the folder of images, size, and what training uses of it."""

    id: int
    file: str
    height: int
    width: int
    things: tuple[Thing, ...] = ()


@dataclasses.dataclass(frozen=True)
class CocoSource:
    """Images, objects and classes.

    Attributes
    ----------
    root
        Folder of the images (absolute).
    path
        The JSON file; None for images without annotations.
    pictures
    names, ids
        Of the classes, and their ids in the file, in the order of the ids.
    origin
        For messages.
    left_out
        How many objects (and images) were left out, by reason.
    """

    root: str
    path: Optional[str]
    pictures: tuple[Picture, ...]
    names: tuple[str, ...]
    ids: tuple[int, ...]
    origin: str
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def num_classes(self) -> int:
        """How many classes are learnt."""
        return len(self.names)

    @property
    def most_things(self) -> int:
        """The most objects of an image."""
        return max((len(picture.things) for picture in self.pictures), default=0)

    def image(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.root, self.pictures[index].file)


def read_json(path: str, annotated: bool = True) -> dict[str, Any]:
    """Return the content of an annotation file; if not ``annotated``, it may have no annotations.

    Raises
    ------
    AnnotationError
        It cannot be read, or has no lists of images, annotations and categories.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise AnnotationError(f"the annotations {path} cannot be read: {error}") from error
    if isinstance(content, dict) and not annotated:
        content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise AnnotationError(
                f"{path} is no file of COCO's format for objects: it has no list {key}"
            )
    return content


def _unique(rows: Iterable[dict], what: str, path: str) -> None:
    found = collections.Counter(row.get("id") for row in rows)
    missing = found.pop(None, 0)
    if missing:
        raise AnnotationError(f"{path}: {missing} {what} have no id")
    twice = [str(number) for number, count in found.items() if count > 1]
    if twice:
        more = f" and {len(twice) - LISTED} more" if len(twice) > LISTED else ""
        raise AnnotationError(
            f"{path}: several {what} have the same id: {', '.join(twice[:LISTED])}{more}. Number "
            "them anew; boxes of one id would be taken for one another."
        )


def usable_segmentation(segmentation: Any, picture: Picture, where: str) -> Any:
    """Return a segmentation without polygons of fewer than three points; None if nothing is left.

    Raises
    ------
    AnnotationError
        A polygon with an odd number of coordinates, or with one that is no number; runs that do
        not make up a mask of their image's size.
    """
    if isinstance(segmentation, dict):
        if not segmentation.get("counts"):
            return None
        try:
            _, size = lengths_of(segmentation)
        except ValueError as error:
            raise AnnotationError(f"{where}: {error}") from None
        if size != (picture.height, picture.width):
            raise AnnotationError(
                f"{where}: its mask has {size[1]} x {size[0]} pixels, its image {picture.width} x "
                f"{picture.height} (width x height)"
            )
        return segmentation
    if not isinstance(segmentation, list):
        return None
    kept = []
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) % 2:
            raise AnnotationError(f"{where}: a polygon is a list of x, y, x, y, …")
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in polygon):
            raise AnnotationError(f"{where}: a polygon has a coordinate that is no number")
        if len(polygon) >= SMALLEST_POLYGON:
            kept.append(polygon)
    return kept or None


def _box(row: dict, picture: Picture, where: str) -> tuple[float, float, float, float]:
    """Return the box of an annotation, cut to its image."""
    box = row.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    ):
        raise AnnotationError(f"{where}: bbox is [x, y, width, height], not {box!r}")
    left, top, width, height = (float(value) for value in box)
    return (
        min(max(left, 0.0), picture.width),
        min(max(top, 0.0), picture.height),
        min(max(left + width, 0.0), picture.width),
        min(max(top + height, 0.0), picture.height),
    )


def _picture(row: dict, path: str) -> Picture:
    try:
        return Picture(row["id"], str(row["file_name"]), int(row["height"]), int(row["width"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(
            f"{path}: image {row.get('id')} needs id, file_name, height and width ({error!r})"
        ) from None


def read_coco(
    path: str,
    images: str,
    training: bool = False,
    keep_empty: bool = False,
    annotated: bool = True,
) -> CocoSource:
    """Read a file of COCO's format.

    Parameters
    ----------
    path
        The JSON file.
    images
        Folder of the images.
    training
        Leave out small images, and images without a usable object.
    keep_empty
        Keep the latter all the same: there is nothing on them to be found.
    annotated
        See :func:`read_json`.

    Raises
    ------
    AnnotationError
        With file and number of the annotation.
    """
    content = read_json(path, annotated)
    for what in ("images", "annotations", "categories"):
        _unique(content[what], what, path)
    categories = sorted(content["categories"], key=lambda row: row["id"])
    label_of = {row["id"]: label for label, row in enumerate(categories)}
    pictures = {row["id"]: _picture(row, path) for row in content["images"]}
    things: dict[Any, list[Thing]] = {number: [] for number in pictures}
    left_out: collections.Counter = collections.Counter()
    for row in content["annotations"]:
        where = f"{path}, annotation {row['id']}"
        if row.get("image_id") not in pictures:
            raise AnnotationError(f"{where}: there is no image {row.get('image_id')}")
        if row.get("category_id") not in label_of:
            raise AnnotationError(f"{where}: there is no category {row.get('category_id')}")
        picture = pictures[row["image_id"]]
        box = _box(row, picture, where)
        if row.get("iscrowd"):
            left_out["crowds"] += 1
        elif min(box[2] - box[0], box[3] - box[1]) < SMALLEST_OBJECT:
            left_out["objects outside of their image, or smaller than a pixel"] += 1
        else:
            usable = usable_segmentation(row.get("segmentation"), picture, where)
            if usable is None:
                left_out["objects without a usable mask"] += 1
            else:
                things[picture.id].append(Thing(label_of[row["category_id"]], box, usable))
    kept = []
    for picture in pictures.values():
        if training and min(picture.height, picture.width) < SMALLEST_IMAGE:
            left_out[f"images with a side below {SMALLEST_IMAGE} pixels"] += 1
        elif training and not keep_empty and not things[picture.id]:
            left_out["images without objects"] += 1
        else:
            kept.append(picture._replace(things=tuple(things[picture.id])))
    if not kept:
        raise AnnotationError(f"{path} has no image that can be used: {_counted(left_out)}")
    return CocoSource(
        os.path.abspath(images),
        path,
        tuple(kept),
        tuple(str(row.get("name", row["id"])) for row in categories),
        tuple(row["id"] for row in categories),
        path,
        left_out,
    )


def ground_truth(source: CocoSource) -> dict[str, Any]:
    """Return what is to be found on a source's images, crowds included, in COCO's format.

    Boxes are cut to their images; objects outside of their image are left out. An object without a
    usable mask has no ``segmentation``.
    """
    content = read_json(source.path)  # type: ignore[arg-type]
    pictures = {picture.id: picture for picture in source.pictures}
    rows = []
    for row in content["annotations"]:
        picture = pictures.get(row["image_id"])
        if picture is None:
            continue
        where = f"{source.path}, annotation {row['id']}"
        left, top, right, bottom = _box(row, picture, where)
        if right <= left or bottom <= top:
            continue
        kept = {**row, "bbox": [left, top, right - left, bottom - top]}
        usable = usable_segmentation(row.get("segmentation"), picture, where)
        if usable is None:
            kept.pop("segmentation", None)
        else:
            kept["segmentation"] = usable
        rows.append(kept)
    return {
        "images": [
            {"id": each.id, "file_name": each.file, "height": each.height, "width": each.width}
            for each in source.pictures
        ],
        "annotations": rows,
        "categories": [{"id": i, "name": name} for i, name in zip(source.ids, source.names)],
    }


def _counted(left_out: collections.Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in left_out.items()) or "it names none"


def log_left_out(source: CocoSource) -> None:
    """Say what was left out, if anything was."""
    if source.left_out:
        LOGGER.info("Left out   of %s: %s", source.origin, _counted(source.left_out))


def check_images(source: CocoSource, contents: bool = True) -> None:
    """Make sure that all images are there and have the size that the annotations say.

    The size is that of the image as it is looked at: turned as its EXIF says.

    Parameters
    ----------
    source
    contents
        Read the headers; else only whether there are such files.

    Raises
    ------
    AnnotationError
        With the first one, and how many.
    """
    paths = [source.image(index) for index in range(len(source.pictures))]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise AnnotationError(
            f"{len(missing)} of {len(paths)} images of {source.origin} are missing, the first one "
            f"{missing[0]}"
        )
    if not contents:
        return

    def look(index: int) -> Optional[str]:
        picture = source.pictures[index]
        wanted = (picture.height, picture.width)
        try:
            with open(paths[index], "rb") as stream:
                header = header_of(stream)
        except OSError as error:
            raise AnnotationError(f"{paths[index]} cannot be read: {error.strerror}") from error
        # What is no image at all is met, and dealt with, when it is read.
        if header is None or header.size == wanted:
            return None
        sizes = f"{paths[index]} has {header.size[1]} x {header.size[0]} pixels"
        said = f"{source.origin} says {wanted[1]} x {wanted[0]} (width x height)"
        if (header.height, header.width) == wanted:
            return (
                f"{sizes} once it is turned as its EXIF says, {said}: the annotations are those of "
                "the unturned image. Write the image anew without this entry."
            )
        return f"{sizes}, {said}"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        label = f"Checking the images of {source.origin}"
        looked = progress(pool.map(look, range(len(paths))), label, len(paths), unit="image")
        wrong = [found for found in looked if found]
    if wrong:
        raise AnnotationError(f"{len(wrong)} images have another size than said: {wrong[0]}")
