"""Which images there are: a folder of classes, a record file of im2rec, or a list of files.

All become one :class:`ImageSource`.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

from glore_common import GloReError, UsageError, closest_first, printable

from .records import RecordError, first_labels, read_index, scan_records

LOGGER = logging.getLogger("glore.data")
# Files in folders that count as images; what one of them holds is told by its content.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".gif", ".avif"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# What systems put into folders of images.
CLUTTER = ("thumbs.db", "desktop.ini")
# Folders that hold folders of classes, and are none themselves.
PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")
# Records whose labels are looked at before their turn.
LOOKED_AT = 64
DEFAULT_MAX_PIXELS = 100_000_000
MOST_CLASSES = 1_000_000

# (left, top, width, height) in pixels.
Box = tuple[float, float, float, float]


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
    boxes
        The part of an image that counts, by ``where``; all of those that are not named here.
    """

    root: str
    samples: tuple[ImageSample, ...]
    num_classes: int
    class_names: Optional[tuple[str, ...]] = None
    records: bool = False
    origin: str = ""
    index_path: Optional[str] = None
    boxes: Mapping[Any, Box] = dataclasses.field(default_factory=dict)

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


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image."""
    # macOS leaves "._name.jpg" beside the real ones.
    name = os.path.basename(name)
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _require_folder(path, what):
    if not os.path.isdir(path):
        state = "is a file" if os.path.exists(path) else "does not exist"
        raise SourceError(f"{what} {path} {state}; expected a folder.")


def files_below(folder: str) -> Iterator[str]:
    """Yield the paths of all files in a folder and those below it, relative to it and sorted.

    What is hidden (its name begins with a dot) is passed over. Links to folders are followed, each
    folder once.

    Raises
    ------
    SourceError
        If a folder cannot be read.
    """

    def fail(error):
        raise SourceError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found, seen = [], set()
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(path, folder)
        found += [os.path.normpath(os.path.join(below, n)) for n in files if not n.startswith(".")]
    yield from sorted(found)


def class_folders(root: str) -> list[str]:
    """Return the names of the classes of a folder: its folders that are not hidden, sorted.

    This is the one definition of classes and their numbers: of training, testing and packing.
    """
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def resolve_classes(
    names: Sequence[str], order: Sequence[str], origin: str, what: str = "folder"
) -> dict[str, int]:
    """Return {class: number} for names of classes, by the order of the training's classes.

    ``what`` the names are of in ``origin`` is for messages.

    Raises
    ------
    SourceError
        One that lists all names that are none of them.
    """
    numbers = {name: number for number, name in enumerate(order)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        nearest = printable(closest_first(unknown[0], order)[0])
        first = printable(unknown[0])
        raise SourceError(
            f"{origin} has the {what} {first}, which is none of the {len(order)} classes of the "
            f"training data (nearest: {nearest}); {len(unknown)} such in all: "
            f"{', '.join(map(printable, unknown))}. Rename or remove them."
        )
    return {name: numbers[name] for name in names}


def read_image_folder(
    root: str, class_names: Optional[Sequence[str]] = None, labels: Optional[str] = None
) -> ImageSource:
    """Read a folder that has one folder of images for each class.

    Classes are numbered in the order of their sorted names (:func:`class_folders`). Images are
    files with the :data:`EXTENSIONS` in any letter case, in the class folder and at any depth
    below it. How many files of what kinds are left out is said.

    A folder of images without class folders, as ILSVRC's ``val``, is read by a file that has the
    classes (:mod:`data.image.ilsvrc`), if there is one.

    Parameters
    ----------
    root
    class_names
        The classes and their order, those of the training data: folders of other names are an
        error, those that are missing or empty only a warning.
    labels
        File with the classes of a folder without class folders; by default one that lies near it.

    Raises
    ------
    SourceError
    """
    from .ilsvrc import read_flat_folder  # which needs this module

    root = os.path.abspath(root)
    _require_folder(root, "the image folder")
    names = class_folders(root)
    if labels is not None or not names:
        return read_flat_folder(root, class_names, labels)
    order = list(names if class_names is None else class_names)
    resolve_classes(names, order, root)
    samples: list[ImageSample] = []
    left: collections.Counter[str] = collections.Counter()
    filled: set[str] = set()
    for label, name in enumerate(order):
        if name not in names:
            continue
        for file in files_below(os.path.join(root, name)):
            path = os.path.join(name, file)
            if is_image(file):
                samples.append(ImageSample(path, label))
                filled.add(name)
            elif os.path.basename(file).lower() not in CLUTTER:
                left[os.path.splitext(file)[1].lower() or "without an extension"] += 1
    loose = sum(entry.is_file() and is_image(entry.name) for entry in os.scandir(root))
    if loose:
        left["images in no class folder"] += loose
    _check_filled(root, order, names, filled, known=class_names is not None)
    if class_names is None and all(name.lower() in PARTS for name in names):
        raise SourceError(
            f"{root} has the folders {', '.join(names)}, which look like parts of a data set and "
            f"not like classes: name one of them, as {os.path.join(root, names[0])}."
        )
    if left:
        LOGGER.warning(
            "%s: %d files are left out: %s",
            root,
            sum(left.values()),
            ", ".join(f"{count} {kind}" for kind, count in left.most_common()),
        )
    return ImageSource(root, tuple(samples), len(order), tuple(order), origin=root)


def _check_filled(root, order, names, filled, known):
    """Say which classes have no images; raise SourceError where all of them must have some."""
    empty = [name for name in names if name not in filled]
    if not filled or (empty and not known):
        raise SourceError(
            f"{root} has class folders without images: {_some(empty)}. Remove them, or put images "
            f"({', '.join(EXTENSIONS)}) into them."
        )
    absent = [name for name in order if name not in names]
    if absent:
        LOGGER.warning("%s has no folder for %d classes: %s", root, len(absent), _some(absent))
    if empty:
        LOGGER.warning("%s has no images of %d classes: %s", root, len(empty), _some(empty))


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more


def _check_label(label, num_classes, place):
    # Without a number of classes the largest label gives it, and with it the classifier's size.
    most = MOST_CLASSES if num_classes is None else num_classes
    if not 0 <= label < most:
        allowed = f"0 to {most - 1}"
        raise SourceError(f"{place}: label {label} is out of range ({allowed}).")


def image_source_of_rows(
    rows: Iterable[tuple[str, int]],
    root: str,
    class_names: Optional[Sequence[str]] = None,
    num_classes: Optional[int] = None,
    origin: Optional[str] = None,
    boxes: Optional[Mapping[str, Box]] = None,
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
    boxes
        Parts of the images that count, by path.

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
    kept = {path: boxes[path] for path, _ in pairs if path in boxes} if boxes else {}
    return ImageSource(root, samples, count, names, origin=origin, boxes=kept)


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
        # File names need not be UTF-8.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as stream:
            lines = stream.read().split("\n")
    except OSError as error:
        raise SourceError(f"cannot read the image list {path}: {error.strerror}.") from error
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
            if not value.is_integer():
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
    _warn_of_one_label(path, samples, num_classes)
    count = num_classes or max(labels.values()) + 1
    used_index = index_path if indexed else None
    return ImageSource(path, samples, count, names, True, path, used_index)


def _warn_of_one_label(path, samples, num_classes):
    """Say so if all records that are looked at have one label although there are several classes.

    That is what im2rec makes of a folder without class folders, and trains and scores in silence.
    """
    if len(samples) < 2 or num_classes == 1:
        return
    known = [sample.label for sample in samples if sample.label is not None]
    if not known:
        step = max(1, len(samples) // LOOKED_AT)
        known = first_labels(path, [int(sample.where) for sample in samples[::step]])
    if len(set(known)) == 1:
        LOGGER.warning(
            "%s: all %d labels that were looked at are %g. A folder without class folders, as "
            "ILSVRC's val, gets this label when it is packed. Pack it again from one folder per "
            "class, or with --labels FILE; see docs/images.md",
            path,
            len(known),
            known[0],
        )


def with_classes(source: ImageSource, class_names: Optional[Sequence[str]]) -> ImageSource:
    """Return a source with its classes numbered as a network's are, by their names.

    Without names on either side the numbers stay.

    Raises
    ------
    SourceError
        If the network does not know some of them: the message lists all of these.
    """
    names = source.class_names
    if names is None or class_names is None or tuple(names) == tuple(class_names):
        return source
    numbers = resolve_classes(names, class_names, source.origin, "class")
    samples = tuple(
        sample._replace(label=None if sample.label is None else numbers[names[sample.label]])
        for sample in source.samples
    )
    return dataclasses.replace(
        source, samples=samples, num_classes=len(class_names), class_names=tuple(class_names)
    )


def open_image_source(
    source: Union[ImageSource, str],
    num_classes: Optional[int] = None,
    class_names: Optional[Sequence[str]] = None,
    labels: Optional[str] = None,
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
    labels
        See :func:`read_image_folder`.

    Raises
    ------
    SourceError
        Or more classes than ``num_classes``.
    """
    if not isinstance(source, ImageSource):
        path = os.fspath(source)
        if os.path.isdir(path):
            if class_names is None and len(class_folders(path)) == num_classes:
                # In their order, some may be empty.
                class_names = class_folders(path)
            source = read_image_folder(path, class_names, labels)
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
        "%s has %d classes, the network %d, whose names are not known: these are taken for its "
        "first ones",
        source.origin,
        source.num_classes,
        num_classes,
    )
    return dataclasses.replace(source, num_classes=num_classes)
