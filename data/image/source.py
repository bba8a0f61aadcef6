"""Which images there are: a folder of classes, a record file of im2rec, or a list of files.

All become one :class:`ImageSource`.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional, Union

from glore_common import GloReError, UsageError, closest_first

from .records import RecordError, read_index, scan_records

LOGGER = logging.getLogger("glore.data")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class SourceError(GloReError):
    """Images that cannot be used as data; the message names file or folder and the way out."""


class ImageSample(NamedTuple):
    """One image.

    ``where`` is its path below the source's root, or its byte offset in the record file;
    ``label`` (0-based) is None for a record that was not read yet.
    """

    where: Union[str, int]
    label: Optional[int]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Images and their classes.

    Attributes
    ----------
    root
        Folder that the paths start from, or the record file (absolute).
    samples
    num_classes
    class_names
    records
        The images lie in a record file.
    origin
        The folder, record file or list, for messages.
    index_path
        The .idx file of a record file.
    """

    root: str
    samples: tuple[ImageSample, ...]
    num_classes: int
    class_names: Optional[tuple[str, ...]] = None
    records: bool = False
    origin: str = ""
    index_path: Optional[str] = None

    def name(self, index: int) -> str:
        """Return the file of sample ``index``, or the record's place."""
        return name_of(self, self.samples[index].where)


def name_of(source: ImageSource, where: Union[str, int]) -> str:
    """Return the file, or the record's place, of a sample of ``source``."""
    if source.records:
        return f"{source.root} (byte {where})"
    return os.path.join(source.root, str(where))


def source_of_files(paths: Sequence[str]) -> ImageSource:
    """Return a source of some files, none of which has a class: all labels are 0."""
    samples = tuple(ImageSample(os.path.abspath(path), 0) for path in paths)
    return ImageSource(os.sep, samples, 1, origin="the images given")


def _is_image(name):
    # macOS leaves "._name.jpg" beside the real ones.
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _require_folder(path, what):
    if not os.path.isdir(path):
        state = "is a file" if os.path.exists(path) else "does not exist"
        raise SourceError(f"{what} {path} {state}; expected a folder.")


def read_image_folder(root: str, class_names: Optional[Sequence[str]] = None) -> ImageSource:
    """Read a folder that has one folder of images for each class.

    Classes are numbered in the order of their sorted names. Images are files with the extensions
    :data:`EXTENSIONS` in any letter case, directly in the class folder; names that begin with a
    dot are passed over.

    Parameters
    ----------
    root
    class_names
        The classes and their order, those of the training data: a folder of another name is an
        error, one that is missing only a warning.

    Raises
    ------
    SourceError
    """
    root = os.path.abspath(root)
    _require_folder(root, "the image folder")
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise SourceError(
            f"{root} has no folders: expected one folder of images for each class, as "
            f"{os.path.join(root, 'sparrow', 'photo.jpg')}."
        )
    order = list(names if class_names is None else class_names)
    unknown = [name for name in names if name not in order]
    if unknown:
        raise SourceError(
            f"{root} has the folder {unknown[0]}, which is none of the {len(order)} classes of the "
            f"training data (nearest: {closest_first(unknown[0], order)[0]}); {len(unknown)} such "
            "in all. Rename or remove them."
        )
    absent = [name for name in order if name not in names]
    if absent:
        LOGGER.warning("%s has no folder for %d classes: %s", root, len(absent), _some(absent))
    samples, empty = [], []
    for label, name in enumerate(order):
        if name in absent:
            continue
        files = sorted(filter(_is_image, os.listdir(os.path.join(root, name))))
        samples += [ImageSample(os.path.join(name, file), label) for file in files]
        if not files:
            empty.append(name)
    if empty:
        raise SourceError(
            f"{root} has class folders without images: {_some(empty)}. Remove them, or put images "
            f"({', '.join(EXTENSIONS)}) directly into them."
        )
    return ImageSource(root, tuple(samples), len(order), tuple(order), origin=root)


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_label(label, num_classes, place):
    if label < 0 or (num_classes is not None and label >= num_classes):
        allowed = f"0 to {num_classes - 1}" if num_classes is not None else "0 or more"
        raise SourceError(f"{place}: label {label} is out of range ({allowed}).")


def image_source_of_rows(
    rows: Iterable[tuple[str, int]],
    root: str,
    class_names: Optional[Sequence[str]] = None,
    num_classes: Optional[int] = None,
    origin: Optional[str] = None,
) -> ImageSource:
    """Return the source for explicit (path, label) pairs.

    Parameters
    ----------
    rows
        Paths below ``root`` and 0-based labels.
    root
    class_names
    num_classes
        By default the number of names, or else the largest label + 1.
    origin
        What the rows come from, for messages; by default ``root``.

    Raises
    ------
    SourceError
        No rows, no such folder, or a label out of range.
    """
    root = os.path.abspath(root)
    origin = origin or root
    names = tuple(class_names) if class_names is not None else None
    if num_classes is None and names is not None:
        num_classes = len(names)
    pairs = [(path, int(label)) for path, label in rows]
    if not pairs:
        raise SourceError(f"{origin} names no images.")
    for path, label in pairs:
        _check_label(label, num_classes, f"{origin}: {path}")
    _require_folder(root, f"the folder of the images of {origin},")
    samples = tuple(ImageSample(*pair) for pair in pairs)
    count = num_classes or max(label for _, label in pairs) + 1
    return ImageSource(root, samples, count, names, origin=origin)


def read_image_list(
    path: str,
    root: str,
    class_names: Optional[Sequence[str]] = None,
    num_classes: Optional[int] = None,
) -> ImageSource:
    """Read a list file with rows ``path label``.

    Columns are separated by spaces or tabs; paths may contain spaces. Parameters and errors are
    those of :func:`image_source_of_rows`, with file and line.
    """
    path = os.path.abspath(path)
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = stream.read().split("\n")
    except OSError as error:
        raise SourceError(f"cannot read the image list {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error.reason}).") from error
    if num_classes is None and class_names is not None:
        num_classes = len(class_names)
    rows = []
    for number, line in enumerate(lines, 1):
        columns = line.rsplit(None, 1)
        if not columns:
            continue
        try:
            row = columns[0].strip(), int(columns[1])
        except (IndexError, ValueError):
            raise SourceError(
                f"{path}:{number}: expected 'path label' with a whole number as label, found "
                f"{line.strip()!r}."
            ) from None
        _check_label(row[1], num_classes, f"{path}:{number}")
        rows.append(row)
    return image_source_of_rows(rows, root, class_names, num_classes, path)


def read_image_records(
    path: str, num_classes: Optional[int] = None, class_names: Optional[Sequence[str]] = None
) -> ImageSource:
    """Read a record file (.rec) that MXNet's im2rec made.

    With its .idx file beside it and ``num_classes`` given, nothing is read but the index: labels
    are checked as the images are read. Without either, the headers of all records are read once.

    Parameters
    ----------
    path
        The .rec file.
    num_classes
        By default the number of ``class_names``, or else the largest label + 1.
    class_names

    Raises
    ------
    SourceError, RecordError
        Missing, empty, cut off, or a label out of range.
    """
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise SourceError(f"the record file {path} does not exist.")
    names = tuple(class_names) if class_names is not None else None
    if num_classes is None and names is not None:
        num_classes = len(names)
    index_path = os.path.splitext(path)[0] + ".idx"
    indexed = os.path.isfile(index_path)
    if not indexed:
        LOGGER.info("%s has no index (%s): its records are found by a scan", path, index_path)
    rows = read_index(index_path, path) if indexed else []
    labels: dict[int, int] = {}
    if not indexed or num_classes is None:
        offsets, values = scan_records(path)
        for offset, value in zip(offsets, values):
            if value != int(value):
                raise SourceError(
                    f"{path} (byte {offset}): the label {value:g} is no whole number, but a class "
                    "is needed."
                )
            _check_label(int(value), num_classes, f"{path} (byte {offset})")
            labels[offset] = int(value)
        rows = rows or list(enumerate(offsets))
        stray = [offset for _, offset in rows if offset not in labels]
        if stray:
            raise RecordError(
                f"{index_path} names byte {stray[0]} of {path}, where no record begins. Delete the "
                "index to have the records found by a scan."
            )
    if not rows:
        raise SourceError(f"{path} holds no records.")
    samples = tuple(ImageSample(offset, labels.get(offset)) for _, offset in rows)
    count = num_classes or max(labels.values()) + 1
    used_index = index_path if indexed else None
    return ImageSource(path, samples, count, names, True, path, used_index)


def open_image_source(
    source: Union[ImageSource, str],
    num_classes: Optional[int] = None,
    class_names: Optional[Sequence[str]] = None,
) -> ImageSource:
    """Return ``source``, or what lies at a path, as an :class:`ImageSource`.

    Parameters
    ----------
    source
        A folder of classes or a .rec file.
    num_classes
        What the network has: labels must be below it.
    class_names
        Classes and their order in the training data.

    Raises
    ------
    SourceError
        Or more classes than ``num_classes``.
    """
    if not isinstance(source, ImageSource):
        path = os.fspath(source)
        if os.path.isdir(path):
            source = read_image_folder(path, class_names)
        elif path.lower().endswith(".rec"):
            source = read_image_records(path, num_classes, class_names)
        elif os.path.exists(path):
            raise UsageError(
                f"{path} is neither a folder with one folder per class nor a .rec file of im2rec."
            )
        else:
            raise SourceError(
                f"{path} does not exist: expected a folder of classes or a .rec file."
            )
    if num_classes is None or source.num_classes == num_classes:
        return source
    if source.num_classes > num_classes:
        raise SourceError(
            f"{source.origin} has {source.num_classes} classes, more than the {num_classes} of the "
            "network."
        )
    LOGGER.warning(
        "%s has %d classes, the network %d", source.origin, source.num_classes, num_classes
    )
    return dataclasses.replace(source, num_classes=num_classes)
