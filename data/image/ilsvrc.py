"""Folders of images without class folders, and the files that say which class each image is of.

ILSVRC's validation images come this way: 50,000 files in one folder, and their classes in the
development kit, whose numbers are not those that networks are trained with. (These number the
synsets, such as ``n01440764``, in sorted order.) What is read, and looked for near the images:

* ``ILSVRC2012_validation_ground_truth.txt`` of the development kit, a number in each line for the
  images in their order, with ``meta.mat`` (or ``map_clsloc.txt``) beside it;
* ``LOC_val_solution.csv`` of Kaggle's copy;
* ``imagenet_2012_validation_synset_labels.txt`` of TensorFlow, a synset in each line;
* ``val.txt`` of Caffe and any file like it, ``name label`` in each line: a class's number from 0,
  or its name.
"""

import glob
import logging
import os
import re
from collections.abc import Sequence
from typing import Any, Optional

from glore_common import printable

from .source import (
    ImageSource,
    SourceError,
    class_folders,
    files_below,
    image_source_of_rows,
    is_image,
    resolve_classes,
)

LOGGER = logging.getLogger("glore.data")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KNOWN_FILES = (
    GROUND_TRUTH,
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
)
# Where a development kit lies, seen from a folder above the images.
PLACES = ("", "data", os.path.join("*devkit*", "data"), os.path.join("*devkit*", "*", "data"))
LEVELS = 4
SYNSET = re.compile(r"n\d+")
NUMBERED = re.compile(r"_val_(\d{8})\.\w+$")


def imagenet_synsets() -> tuple[str, ...]:
    """Return the 1000 synsets of ILSVRC 2012 in the order in which networks number them."""
    # The package needs the patches of mxnet_compat before MXNet.
    from gluoncv.data.imagenet.classification import ImageNet1kAttr

    import mxnet_compat  # noqa: F401

    return tuple(ImageNet1kAttr().synset)


def classes_of_network(source: Any, num_classes: int) -> Optional[tuple[str, ...]]:
    """Return the classes of a network that does not name them, if a folder tells that it is ILSVRC.

    Parameters
    ----------
    source
        What is going to be tested on: a path, or an :class:`data.image.source.ImageSource`.
    num_classes
        Of the network.
    """
    if num_classes != 1000 or isinstance(source, ImageSource) or not os.path.isdir(source):
        return None
    names = class_folders(source)
    if not names or not all(SYNSET.fullmatch(name) for name in names):
        return None
    synsets = imagenet_synsets()
    return synsets if set(names) <= set(synsets) else None


def find_labels(folder: str) -> Optional[str]:
    """Return the first of the known files that lies in a folder or in one of those above it."""
    for _ in range(LEVELS):
        for place in PLACES:
            for name in KNOWN_FILES:
                found = sorted(glob.glob(os.path.join(glob.escape(folder), place, name)))
                if found:
                    return found[0]
        folder = os.path.dirname(folder)
    return None


def read_flat_folder(
    root: str, class_names: Optional[Sequence[str]] = None, labels: Optional[str] = None
) -> ImageSource:
    """Read a folder of images whose classes a file says.

    Parameters
    ----------
    root
    class_names
        Classes and their order in the training data; by default those of ILSVRC where the file
        names its synsets, else the sorted names in it.
    labels
        The file; by default the first known one near the folder.

    Raises
    ------
    SourceError
        Without images or a file, or if both do not fit.
    """
    names = [name for name in files_below(root) if is_image(name)]
    if not names:
        raise SourceError(
            f"{root} has no folders: expected one folder of images for each class, as "
            f"{os.path.join(root, 'sparrow', 'photo.jpg')}."
        )
    path = labels or find_labels(root)
    if path is None:
        raise SourceError(
            f"{root} has {len(names)} images but no class folders, and nothing near it says of "
            f"which classes they are ({', '.join(KNOWN_FILES)}). Sort them into one folder per "
            "class, or put such a file beside the folder; see docs/images.md."
        )
    LOGGER.info("%s has no class folders: its classes are those of %s", root, path)
    found = _read_labels(path, names)
    rows, order = _numbered(found, names, class_names, path)
    return image_source_of_rows(rows, root, order, origin=root)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as stream:
            return [line.strip() for line in stream if line.strip()]
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}.") from error


def _read_labels(path: str, names: Sequence[str]) -> dict[str, str]:
    """Return {name of an image: its class} as the file has it; of ground truth, the synset."""
    lines = _lines(path)
    if not lines:
        raise SourceError(f"{path} is empty.")
    if lines[0].replace(" ", "") == "ImageId,PredictionString":
        rows = [line.split(",", 1) for line in lines[1:]]
        return {row[0]: row[-1].split()[0] for row in rows if len(row) == 2 and row[1].strip()}
    if len(lines[0].split()) > 1:
        pairs = (line.rsplit(None, 1) for line in lines)
        return {os.path.basename(pair[0]): pair[-1] for pair in pairs}
    if all(line.isdigit() for line in lines):
        synsets = _synsets_of_kit(os.path.dirname(path))
        unknown = [line for line in lines if int(line) not in synsets]
        if unknown:
            raise SourceError(f"{path}: {unknown[0]} is no class of the development kit.")
        lines = [synsets[int(line)] for line in lines]
    return dict(zip(names, _in_order(lines, names, path)))


def _in_order(lines: list[str], names: Sequence[str], path: str) -> list[str]:
    """Return the lines that belong to the images, by their number or else by their order."""
    numbers = [NUMBERED.search(name) for name in names]
    if all(numbers):
        wanted = [int(match[1]) for match in numbers if match]
        if max(wanted) <= len(lines) and min(wanted) > 0:
            return [lines[number - 1] for number in wanted]
    if len(lines) != len(names):
        raise SourceError(
            f"{path} has {len(lines)} lines for {len(names)} images whose names do not say which "
            "line is theirs (as ILSVRC2012_val_00000001.JPEG does)."
        )
    return lines


def _synsets_of_kit(folder: str) -> dict[int, str]:
    """Return {ILSVRC2012_ID: synset} of the development kit whose ``data`` is ``folder``."""
    text, mat = os.path.join(folder, "map_clsloc.txt"), os.path.join(folder, "meta.mat")
    if os.path.exists(text):
        rows = (line.split() for line in _lines(text))
        return {int(row[1]): row[0] for row in rows}
    if os.path.exists(mat):
        from scipy.io import loadmat

        try:
            synsets = loadmat(mat, squeeze_me=True)["synsets"]
            # Inner nodes of the hierarchy come after the classes, and have children.
            return {
                int(row["ILSVRC2012_ID"]): str(row["WNID"])
                for row in synsets
                if int(row["num_children"]) == 0
            }
        except Exception as error:  # it is a binary file of another's making
            raise SourceError(f"{mat} cannot be read: {error}") from error
    raise SourceError(
        f"{folder} has the ground truth but neither meta.mat nor map_clsloc.txt, which say which "
        "classes its numbers are: keep the files of the development kit together."
    )


def _numbered(
    found: dict[str, str],
    names: Sequence[str],
    class_names: Optional[Sequence[str]],
    path: str,
) -> tuple[list[tuple[str, int]], Optional[Sequence[str]]]:
    """Return rows (path, label) and the classes' names."""
    # Kaggle's list has the names without an extension.
    stems = {os.path.splitext(name)[0]: label for name, label in found.items()}
    classes = {}
    for name in names:
        base = os.path.basename(name)
        label = found.get(name) or found.get(base) or stems.get(os.path.splitext(base)[0])
        if label is None:
            raise SourceError(f"{path} does not say of which class {printable(name)} is.")
        classes[name] = label
    if all(label.isdigit() for label in classes.values()):
        return [(name, int(label)) for name, label in classes.items()], class_names
    if class_names is None:
        synsets = all(SYNSET.fullmatch(label) for label in found.values())
        known = imagenet_synsets() if synsets else ()
        class_names = known if set(found.values()) <= set(known) else sorted(set(found.values()))
    numbers = resolve_classes(sorted(set(classes.values())), class_names, path, "class")
    return [(name, numbers[label]) for name, label in classes.items()], class_names
