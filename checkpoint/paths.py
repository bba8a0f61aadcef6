"""How the files of a checkpoint are called: the one grammar of their names.

``PREFIX-0003.params`` are the parameters after epoch 3, as MXNet's own tools call them, and
``PREFIX-symbol.json`` is the graph of all epochs. A training of ours writes ``TASK_ep-0003`` after
a logged epoch and ``TASK_step-0001200`` in between, each with ``.params``, ``.states`` (of the
optimiser) and ``.json`` (the manifest), and one graph ``TASK_ep-symbol.json`` for all of them.
"""

import glob
import os
import re
from typing import NamedTuple, Optional

from glore_common import UsageError

from .params import CheckpointError

SYMBOL = "-symbol.json"
# The manifest first: files are deleted in this order.
EXTENSIONS = (".json", ".states", ".params")


class Files(NamedTuple):
    """Paths of one checkpoint's files, which need not all exist.

    Attributes
    ----------
    stem
        Path without extension, such as ``exps/models/TASK_ep-0003``.
    """

    stem: str

    @property
    def params(self) -> str:
        """Parameters."""
        return self.stem + ".params"

    @property
    def states(self) -> str:
        """State of the optimiser."""
        return self.stem + ".states"

    @property
    def manifest(self) -> str:
        """What describes the others (:mod:`checkpoint.manifest`)."""
        return self.stem + ".json"

    @property
    def prefix(self) -> str:
        """What the graph's name begins with."""
        prefix = re.sub(r"-\d{4,}$", "", self.stem)
        # Checkpoints within an epoch share the graph of those at its end.
        shared = re.sub(r"_step$", "_ep", prefix)
        if not os.path.exists(prefix + SYMBOL) and os.path.exists(shared + SYMBOL):
            return shared
        return prefix

    @property
    def symbol(self) -> str:
        """Graph."""
        return self.prefix + SYMBOL


def epoch_files(prefix: str, epoch: int) -> Files:
    """Return the files of a prefix after an epoch."""
    return Files(f"{prefix}-{epoch:04d}")


def task_epoch(folder: str, task: str, epoch: int) -> Files:
    """Return the files of a task of ours after so many logged epochs."""
    return epoch_files(os.path.join(folder, f"{task}_ep"), epoch)


def task_step(folder: str, task: str, step: int) -> Files:
    """Return the files of a task of ours after so many optimiser steps."""
    return Files(os.path.join(folder, f"{task}_step-{step:07d}"))


def is_epoch(stem: str) -> bool:
    """Return whether a task's checkpoint is one at the end of a logged epoch."""
    return re.search(r"_ep-\d+$", stem) is not None


def task_stems(folder: str, task: str) -> list[str]:
    """Return the stems of a task's checkpoints, whole or not: epochs, then steps, in order."""
    pattern = re.compile(re.escape(task) + r"_(ep-\d{4,}|step-\d{7,})\.(json|params)")
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = {
        os.path.splitext(entry)[0]: match[1].split("-")
        for entry in entries
        for match in [pattern.fullmatch(entry)]
        if match
    }
    in_order = sorted(found, key=lambda stem: (found[stem][0], int(found[stem][1])))
    return [os.path.join(folder, stem) for stem in in_order]


def epochs(prefix: str) -> list[int]:
    """Return the epochs of which ``PREFIX-NNNN.params`` exists, in ascending order."""
    pattern = re.compile(re.escape(os.path.basename(prefix)) + r"-(\d{4,})\.params")
    found = (
        pattern.fullmatch(os.path.basename(path))
        for path in glob.glob(glob.escape(prefix) + "-*.params")
    )
    return sorted(int(match[1]) for match in found if match)


def stem_of(path: str) -> str:
    """Return a path without a checkpoint's extension, if it has one."""
    root, extension = os.path.splitext(path)
    return root if extension in EXTENSIONS else path


def split_key(text: str) -> tuple[str, Optional[str]]:
    """Return (file, key) of ``FILE:KEY``, one of several state dicts in a PyTorch file."""
    text = os.fspath(text)
    path, colon, key = text.rpartition(":")
    if colon and key and not os.path.exists(text) and os.path.isfile(path):
        return path, key
    return text, None


def find(text: str, epoch: Optional[int] = None) -> Files:
    """Return the files that a user's text stands for.

    Parameters
    ----------
    text
        A prefix (``exps/models/TASK_ep``), the graph's path, a checkpoint's stem
        (``exps/models/TASK_ep-0003``), or one of its files. A task that has not completed a logged
        epoch yet is represented by its newest checkpoint within one.
    epoch
        Of a prefix; the newest by default.

    Raises
    ------
    CheckpointError
        If a prefix has no checkpoint.
    UsageError
        If an epoch is given for one checkpoint.
    """
    text = os.fspath(text)
    prefix = text[: -len(SYMBOL)] if text.endswith(SYMBOL) else text
    one = stem_of(prefix)
    known = epochs(prefix)
    if one != prefix or (not known and os.path.exists(one + ".params")):
        if epoch is not None:
            raise UsageError(f"{text} is one checkpoint: it has no epoch {epoch}")
        return Files(one)
    if epoch is None and not known:
        folder, name = os.path.split(prefix)
        steps = task_stems(folder or ".", re.sub(r"_ep$", "", name))
        if steps:
            return Files(steps[-1])
        raise CheckpointError(
            f"there is neither a file {prefix} nor a checkpoint {prefix}-NNNN.params"
        )
    return epoch_files(prefix, known[-1] if epoch is None else epoch)
