"""CUB-200-2011 in its own layout: 11,788 photographs of 200 kinds of birds (Wah et al., 2011).

What the archive CUB_200_2011.tgz holds is read as it is::

    CUB_200_2011/images/<class>/<photo>.jpg
    CUB_200_2011/images.txt               image_id  path below images/
    CUB_200_2011/image_class_labels.txt   image_id  class_id, from 1
    CUB_200_2011/train_test_split.txt     image_id  1 for training, 0 for testing
    CUB_200_2011/classes.txt              class_id  name (may be missing)
    CUB_200_2011/bounding_boxes.txt       image_id  left top width height, in pixels (if asked for)

Subsets with fewer classes are read as well.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from glore_common import GloReError, UsageError

WHERE = "https://www.vision.caltech.edu/datasets/cub_200_2011/"
FOLDER = "CUB_200_2011"
# Of its photographs, RGB on the scale 0..1.
MEAN, STD = (0.4707, 0.4601, 0.4549), (0.2767, 0.2760, 0.2850)


Rows = Sequence[tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class ImageSplits:
    """Images of a data set in three parts, each a tuple of (path below ``root``, label from 0).

    ``val`` is held out of the official training part. ``boxes``, where they were asked for, are
    (left, top, width, height) in pixels by path.
    """

    root: str
    class_names: tuple[str, ...]
    train: Rows
    val: Rows
    test: Rows
    boxes: Mapping[str, tuple[float, float, float, float]] = dataclasses.field(default_factory=dict)


def _read_table(path: str, meaning: str) -> dict[int, tuple[str, int]]:
    """Return {id: (text, line number)} of a file with rows ``id text``."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = stream.read().split("\n")
    except FileNotFoundError:
        raise GloReError(
            f"{path} is missing. Expected is the layout of CUB_200_2011.tgz ({WHERE}), unpacked, "
            "with images/, images.txt, image_class_labels.txt and train_test_split.txt."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GloReError(f"cannot read {path}: {error}") from error
    table: dict[int, tuple[str, int]] = {}
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{line_number}"
        columns = line.strip().split(None, 1)
        if len(columns) != 2 or not columns[0].isdigit():
            raise GloReError(f"{place}: expected '{meaning}', found {line.strip()!r}")
        key, value = int(columns[0]), columns[1]
        if key in table:
            raise GloReError(f"{place}: {key} is there twice, first in line {table[key][1]}")
        table[key] = value, line_number
    if not table:
        raise GloReError(f"{path} is empty: expected rows '{meaning}'")
    return table


def _read_numbers(path: str, meaning: str) -> dict[int, tuple[int, int]]:
    """Return {id: (whole number, line number)} of a file with rows ``id number``."""
    table = {}
    for key, (text, line) in _read_table(path, meaning).items():
        try:
            table[key] = int(text), line
        except ValueError:
            raise GloReError(
                f"{path}:{line}: expected '{meaning}' with whole numbers, found '{key} {text}'"
            ) from None
    return table


def _check_same_ids(
    paths_file: str, paths: dict[int, Any], other_file: str, other: dict[int, Any]
) -> None:
    for first_file, first, second_file, second in (
        (paths_file, paths, other_file, other),
        (other_file, other, paths_file, paths),
    ):
        missing = [key for key in first if key not in second]
        if missing:
            raise GloReError(
                f"{second_file} has no row for image {missing[0]} of "
                f"{first_file}:{first[missing[0]][1]} ({len(missing)} such images); the files "
                f"belong to different data sets, or were cut off: unpack {FOLDER}.tgz again."
            )


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows into a training and a held-out part, class by class.

    Parameters
    ----------
    rows
        (path, label) each.
    fraction
        Part of each class that is held out, 0 <= fraction < 1, rounded; a class with two images
        or more keeps one at least on each side, unless ``fraction`` is 0.
    seed
        The split is a function of it and of the rows.

    Returns
    -------
    train, held_out
        In the order of ``rows``.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the held-out fraction must be in 0 .. 1 (not 1), got {fraction}.")
    by_class: dict[int, list[int]] = {}
    for number, (_, label) in enumerate(rows):
        by_class.setdefault(label, []).append(number)
    chosen: set[int] = set()
    for label, numbers in sorted(by_class.items()):
        count = round(fraction * len(numbers))
        if fraction > 0 and len(numbers) > 1:
            count = min(max(count, 1), len(numbers) - 1)
        rng = np.random.default_rng([seed, label])
        chosen.update(rng.permutation(numbers)[:count].tolist())
    train = tuple(row for number, row in enumerate(rows) if number not in chosen)
    return train, tuple(rows[number] for number in sorted(chosen))


def read_cub200(
    folder: str,
    val_fraction: float = 0.1,
    seed: int = 0,
    num_classes: Optional[int] = None,
    with_boxes: bool = False,
) -> ImageSplits:
    """Read CUB-200-2011.

    Parameters
    ----------
    folder
        ``CUB_200_2011``, or the folder that holds it.
    val_fraction
        Part of the official training images, of each class, that is held out; see
        :func:`hold_out`.
    seed
        For the held-out part.
    num_classes
        Class ids run from 1 to it; by default the classes are those of ``classes.txt``, or else
        those that images have. Labels count them in the order of their ids.
    with_boxes
        Read the birds' bounding boxes.

    The result's ``root`` is the folder ``images``.

    Raises
    ------
    GloReError
        A file is missing or malformed (with file and line), an image is not in all of them, a
        class id is out of range, or a part is empty.
    """
    folder = os.path.abspath(folder)
    inner = os.path.join(folder, FOLDER)
    folder = inner if os.path.isdir(inner) else folder
    root = os.path.join(folder, "images")
    files = {
        name: os.path.join(folder, f"{name}.txt")
        for name in (
            "images",
            "image_class_labels",
            "train_test_split",
            "classes",
            "bounding_boxes",
        )
    }
    paths = _read_table(files["images"], "image_id path")
    labels = _read_numbers(files["image_class_labels"], "image_id class_id")
    split = _read_numbers(files["train_test_split"], "image_id is_training")
    for name, table in (("image_class_labels", labels), ("train_test_split", split)):
        _check_same_ids(files["images"], paths, files[name], table)
    if not os.path.isdir(root):
        raise GloReError(f"{root} is missing: the photographs of {files['images']} lie there.")
    names = _class_names(files["classes"], num_classes, (value for value, _ in labels.values()))
    label_of = {class_id: label for label, class_id in enumerate(names)}
    parts: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    for key, (path, _) in paths.items():
        class_id, line = labels[key]
        if class_id not in label_of:
            raise GloReError(
                f"{files['image_class_labels']}:{line}: class {class_id} is out of range (1 to "
                f"{max(names)})"
            )
        part, line = split[key]
        if part not in parts:
            raise GloReError(
                f"{files['train_test_split']}:{line}: expected 1 (training) or 0 (testing), found "
                f"{part}"
            )
        parts[part].append((path, label_of[class_id]))
    for part, name in ((1, "training"), (0, "test")):
        if not parts[part]:
            raise GloReError(f"{files['train_test_split']} names no {name} images")
    train, val = hold_out(tuple(parts[1]), val_fraction, seed)
    boxes = _read_boxes(files["bounding_boxes"], files["images"], paths) if with_boxes else {}
    return ImageSplits(root, tuple(names.values()), train, val, tuple(parts[0]), boxes)


def _class_names(
    path: str, num_classes: Optional[int], ids_of_images: Iterable[int]
) -> dict[int, str]:
    """Return {class id: name} of all classes, in order; without the file, names are numbers."""
    ids = None if num_classes is None else list(range(1, num_classes + 1))
    if not os.path.exists(path):
        return {number: f"class {number}" for number in ids or sorted(set(ids_of_images))}
    table = _read_table(path, "class_id name")
    if ids is not None:
        missing = [number for number in ids if number not in table]
        if missing or len(table) != num_classes:
            what = f"no class {missing[0]}" if missing else f"{len(table)} classes"
            raise GloReError(f"{path} has {what}; expected are the classes 1 to {num_classes}")
    return {number: table[number][0] for number in sorted(table)}


def _read_boxes(
    path: str, images_path: str, paths: dict[int, tuple[str, int]]
) -> dict[str, tuple[float, float, float, float]]:
    """Return {path of an image: its box}."""
    table = _read_table(path, "image_id left top width height")
    _check_same_ids(images_path, paths, path, table)
    boxes = {}
    for key, (text, line) in table.items():
        try:
            left, top, width, height = (float(value) for value in text.split())
            if width <= 0 or height <= 0:
                raise ValueError
        except ValueError:
            raise GloReError(
                f"{path}:{line}: expected 'image_id left top width height' with a box that is not "
                f"empty, found '{key} {text}'"
            ) from None
        boxes[paths[key][0]] = (left, top, width, height)
    return boxes
