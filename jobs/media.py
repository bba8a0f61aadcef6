"""What predict, features and the server share: files, and how a checkpoint's network sees them."""

import dataclasses
import glob
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from data.common.loader import Loader, LoaderConfig
from data.common.samples import Dataset
from data.image.loaders import get_image_val_loader
from data.image.source import EXTENSIONS as IMAGES
from data.image.source import source_of_files
from data.video.loaders import get_test_dataset
from glore_common import GloReError, UsageError, command
from glore_options import Options, option
from train.scoring import log_softmax

from .evaluate import settle_images
from .model import Model, ModelFacts
from .options import ViewOptions

LOGGER = logging.getLogger("glore")
VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"),
    *(".3gp", ".ogv"),
)
# Of a network without a manifest: Kinetics' in validation.
FRAME_INTERVAL = 8
BATCH_SIZE = 8
# A file that cannot be read never stops a run here.
NO_LIMIT = 2**31


@dataclasses.dataclass
class FileOptions(Options):
    """Which files are read."""

    title = "files"

    inputs: tuple[str, ...] = option(
        (),
        "files, folders (all files of the network's kind in them and below), and patterns such as "
        "'clips/**/*.mp4'",
        kind=str,
        several=True,
        positional=True,
        metavar="PATH",
    )
    list: str = option(
        "",
        "more files: a text file with a path a line (from its own folder on), or a video list "
        "'v_id label path'; # begins a remark",
        metavar="FILE",
    )
    list_root: Optional[str] = option(
        None, "folder that the paths of --list start from (default: the list's)", metavar="DIR"
    )
    class_names: str = option(
        "", "names of the classes, one a line (default: the checkpoint's)", metavar="FILE"
    )


def _from_list(path: str, root: Optional[str]) -> list[str]:
    """Return the files that a list names."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = [line.strip() for line in stream]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--list {path} cannot be read: {error}") from error
    root = os.path.dirname(path) if root is None else root
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            # A row of a video list has its label second.
            parts = line.split(None, 2)
            row = len(parts) == 3 and parts[1].isdigit()
            found.append(os.path.join(root, parts[2] if row else line))
    return found


def find_files(options: FileOptions, task: str) -> list[str]:
    """Return the files that are asked for, in order; those named outright need not exist.

    Parameters
    ----------
    options
    task
        'video' or 'image': which files of a folder or a pattern count.

    Raises
    ------
    UsageError
        If there are none.
    """
    endings = VIDEOS if task == "video" else IMAGES

    def counts(path: str) -> bool:
        name = os.path.basename(path)
        return name.lower().endswith(endings) and not name.startswith(".")

    found: list[str] = []
    for text in options.inputs:
        if os.path.isdir(text):
            for folder, folders, names in os.walk(text):
                folders.sort()
                found += filter(counts, (os.path.join(folder, name) for name in sorted(names)))
        elif not os.path.lexists(text) and glob.has_magic(text):
            found += filter(counts, sorted(glob.glob(text, recursive=True)))
        else:
            found.append(text)
    if options.list:
        found += _from_list(options.list, options.list_root)
    if not found:
        what = ", ".join([*options.inputs, *([options.list] if options.list else [])])
        raise UsageError(
            f"no {task}s ({', '.join(endings)}) in {what}"
            if what
            else f"name the {task}s to read: files, folders, patterns, or --list FILE"
        )
    return found


def names_of(facts: ModelFacts, path: str = "") -> Optional[list[str]]:
    """Return the names of a network's classes: those of a file, else its own.

    Raises
    ------
    UsageError
        If they are not as many as the classes.
    """
    names = facts.class_names
    if path:
        try:
            with open(path, encoding="utf-8-sig") as stream:
                names = [line.strip() for line in stream if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--class-names {path} cannot be read: {error}") from error
    if names is not None and len(names) != facts.num_classes:
        raise UsageError(
            f"{path or 'the checkpoint'} names {len(names)} classes, the network has "
            f"{facts.num_classes}"
        )
    return names


def file_names(paths: list[str], ending: str) -> list[str]:
    """Return a name for what is written of each path: its own, with a number where it is taken."""
    found: list[str] = []
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        name, number = stem + ending, 1
        while name in found:
            number += 1
            name = f"{stem}-{number}{ending}"
        found.append(name)
    return found


class View(NamedTuple):
    """A network, how files are shown to it, and the options of that with every size settled."""

    model: Model
    dataset: Any  # a VideoDataset or an ImageDataset, by the task
    reading: Any


def view_of(model: Model, options: ViewOptions) -> View:
    """Return how files are shown to a network: as ``evaluate.py`` does it.

    The dataset is that of no file yet; ``with_files`` says of which. (With ``--crops full``, which
    no dataset of other files has, there is none: see :func:`loader_of`.)

    Raises
    ------
    UsageError
        If options do not fit the network.
    """
    facts = model.facts
    if facts.task == "segmentation":
        raise UsageError(
            f"{model.path} segments images: {command('predict')} writes masks, "
            f"{command('evaluate')} tests it"
        )
    if facts.task == "detection":
        raise UsageError(
            f"{model.path} finds objects: {command('predict')} lists and draws them, "
            f"{command('evaluate')} tests it"
        )
    wrong = ("ten", "full") if facts.task == "video" else ("spatial", "mixed")
    if options.crops in wrong:
        raise UsageError(f"--crops {options.crops} is not for {facts.task}s")
    batch = options.batch_size or BATCH_SIZE
    if facts.task == "video":
        interval = options.frame_interval or facts.frame_interval or FRAME_INTERVAL
        facts = dataclasses.replace(facts, frame_interval=interval)
        reading: Any = dataclasses.replace(
            options,
            batch_size=batch,
            clip_length=facts.data_shape[1],
            crop_size=facts.data_shape[-1],
            frame_interval=interval,
            max_failures=NO_LIMIT,
        )
        dataset = get_test_dataset(reading, mean=facts.mean, std=facts.std)
        return View(dataclasses.replace(model, facts=facts), dataset, reading)
    model, reading = settle_images(model, options, options.crops or "centre")
    reading = dataclasses.replace(reading, batch_size=batch, max_failures=NO_LIMIT)
    with _image_loader(model, reading, []) as loader:
        return View(model, loader.dataset, reading)


def _image_loader(model: Model, reading: Any, paths: list[str]) -> Any:
    return get_image_val_loader(
        source_of_files(paths),
        reading,
        mean=model.facts.mean,
        std=model.facts.std,
        crops=reading.crops or "centre",
    )


def loader_of(view: View, paths: list[str]) -> Any:
    """Return a loader of files: (data, label, index), the index being the place in ``paths``."""
    if view.model.facts.task == "image":
        return _image_loader(view.model, view.reading, paths)
    return files_loader(view, view.dataset.with_files(paths))


def files_loader(view: View, dataset: Dataset) -> Loader:
    """Return a loader of a dataset's items, each once, without those that cannot be read."""
    config = LoaderConfig.of(
        view.reading, seed=view.reading.random_seed, with_index=True, on_bad="skip"
    )
    return Loader(dataset, config)


class Scored(NamedTuple):
    """An item, the mean of its views' outputs, and how many they are."""

    item: int
    mean: np.ndarray
    views: int


def every_batch(loader: Any) -> Iterator[tuple]:
    """Go through a loader; that nothing could be read is said by its list of bad files alone."""
    try:
        yield from loader
    except GloReError:
        if not loader.bad_files():
            raise


def reasons(paths: list[str], bad: Mapping[str, str]) -> dict[str, str]:
    """Return why files could not be read; ``bad`` may have their absolute paths."""
    found = {path: bad.get(path) or bad.get(os.path.abspath(path)) for path in paths}
    return {path: reason for path, reason in found.items() if reason}


def of_another_kind(paths: list[str], task: str) -> dict[str, str]:
    """Return why images among videos are not read: FFmpeg would take them for videos of a frame."""
    if task == "image":
        return {}
    reason = "it is an image, and this network reads videos"
    found = {path: reason for path in paths if path.lower().endswith(IMAGES)}
    for path in found:
        LOGGER.warning("cannot read %s: %s", path, reason)
    return found


def scorer(model: Model, contexts: list, backend: str) -> Callable[[Any], np.ndarray]:
    """Return a function from a batch to softmax scores (n, classes), in float64."""
    run = model.predictor(contexts, backend)
    return lambda data: np.exp(log_softmax(run(data)))


def averaged(run: Callable[[Any], np.ndarray], batches: Iterable) -> Iterator[Scored]:
    """Yield the mean output of each item over its views, as soon as the next item begins.

    Parameters
    ----------
    run
        Maps data (n, …), an NDArray, to a NumPy array (n, …).
    batches
        Yields (data, label, index); rows of one index are views of one item and follow each other.
    """
    current, total, views = -1, np.zeros(()), 0
    for data, _, index in batches:
        for row, item in zip(run(data), index):
            if item != current and views:
                yield Scored(current, total / views, views)
                total, views = np.zeros(()), 0
            current, total, views = int(item), total + row.astype(np.float64), views + 1
    if views:
        yield Scored(current, total / views, views)
