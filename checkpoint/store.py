"""Checkpoints of a training that survive crashes, as arrays by name.

A checkpoint is three files of one stem, see :mod:`checkpoint.paths`:

``.params``
    Parameters in MXNet's own form (``arg:`` and ``aux:``). ``mx.model.load_checkpoint(
    '{task}_ep', 3)`` reads epoch 3, because the graph is written once as
    ``{task}_ep-symbol.json``.
``.states``
    The optimiser's arrays by parameter name. Plain arrays, no pickle: reading a checkpoint never
    runs code from it.
``.json``
    The manifest (:mod:`checkpoint.manifest`).
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from glore_common import (
    Locked,
    UsageError,
    file_lock,
    missing_folders,
    take_back,
    temporaries,
)
from mxnet_compat import mx

from .graph import write_symbol
from .manifest import Manifest, Position, check_files, facts_of, read_manifest, write_manifest
from .params import Arrays, CheckpointError, SaveError, read_params, write_params
from .paths import EXTENSIONS, Files, is_epoch, stem_of, task_epoch, task_stems, task_step

LOGGER = logging.getLogger("glore.train")
# Seconds that a checkpoint may take to show on another machine, and an earlier run to let go.
CHECKPOINT_PATIENCE = 60.0
LOCK_PATIENCE = 3.0
STEP_CHECKPOINTS_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint.

    Attributes
    ----------
    path
        Stem of its files.
    manifest
        What it says of itself.
    """

    path: str
    manifest: Manifest

    @property
    def position(self) -> Position:
        """Where the run stood."""
        return self.manifest.position

    def arrays(self) -> tuple[Arrays, Arrays]:
        """Return the parameters and the optimiser's arrays, by their names in the files."""
        files = Files(self.path)
        # An optimiser without a state: format 1 left an empty file.
        states = read_params(files.states) if os.path.getsize(files.states) else {}
        return read_params(files.params), states


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint's manifest and check all its files.

    Parameters
    ----------
    path
        With or without the extension of one of its files.

    Raises
    ------
    CheckpointError
        If a file is missing, cut short, or not what the manifest says.
    """
    path = stem_of(os.fspath(path))
    manifest = read_manifest(path)
    check_files(path, manifest)
    return Checkpoint(path, manifest)


def wait_for_checkpoint(path: str, seconds: float = CHECKPOINT_PATIENCE) -> Checkpoint:
    """Return :func:`read_checkpoint` of a checkpoint that another worker found whole.

    A shared file system may show it here a little later.

    Raises
    ------
    CheckpointError
        If it is not whole after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"worker 0 resumes from {path}, which this worker did not see whole within "
                    f"{seconds:g} s: {error}. The folder of the checkpoints must be on a file "
                    "system that all machines share."
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def task_lock(model_dir: str, task: str, seconds: float = LOCK_PATIENCE) -> Iterator[None]:
    """Keep other runs from writing the checkpoints of one task in one folder meanwhile.

    A run that is refused in the block leaves no new file behind.

    Raises
    ------
    CheckpointError
        If another run does so, and still does after so many seconds.
    """
    path = os.path.join(model_dir, f".{task}.lock")
    new, folders = not os.path.exists(path), missing_folders(model_dir)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path, seconds))
        except Locked as error:
            raise CheckpointError(
                f"another run is writing checkpoints of {task} to {model_dir} ({error}). Choose "
                "another --task-name or --model-dir, or give --share-task-name if you know that "
                "they do not get in each other's way."
            ) from error
        try:
            yield
        except (CheckpointError, UsageError):
            if new and not task_stems(model_dir, task):
                take_back(path, folders)
            raise


class CheckpointStore:
    """The checkpoints of one task in one folder.

    Parameters
    ----------
    model_dir
        Folder; made when the first checkpoint is written.
    task
        Name of the run, the beginning of all file names.
    keep
        How many epoch checkpoints to keep besides the best one; 0 keeps all. Of the checkpoints
        between epochs the last two are kept, and none that is older than an epoch checkpoint.
    """

    def __init__(self, model_dir: str, task: str, keep: int = 0) -> None:
        if not task or task != os.path.basename(task) or task.startswith("."):
            raise UsageError(f"the task name {task!r} cannot begin a file name")
        if keep < 0:
            raise UsageError(f"keep 0 (all) or more checkpoints, not {keep}")
        self.model_dir = model_dir
        self.task = task
        self.keep = keep

    def epoch_path(self, epoch: int) -> str:
        """Return the stem of the checkpoint after ``epoch`` logged epochs."""
        return task_epoch(self.model_dir, self.task, epoch).stem

    def step_path(self, step: int) -> str:
        """Return the stem of the checkpoint after ``step`` optimiser steps."""
        return task_step(self.model_dir, self.task, step).stem

    def paths(self) -> list[str]:
        """Return the stems of all checkpoints, complete or not: epochs, then steps, in order."""
        return task_stems(self.model_dir, self.task)

    def save(
        self,
        path: str,
        parameters: Mapping[str, Any],
        states: Mapping[str, Any],
        manifest: Manifest,
        symbol: Optional[mx.sym.Symbol] = None,
    ) -> None:
        """Write a checkpoint: each file atomically, the manifest last.

        Parameters
        ----------
        path
            From :meth:`epoch_path` or :meth:`step_path`.
        parameters, states
            Arrays by their names in the files.
        manifest
            Without ``files``, which are added.
        symbol
            The graph of all checkpoints of this task.

        Raises
        ------
        SaveError
            If something cannot be written whole.
        """
        files = Files(path)
        # While files are replaced, no old manifest may vouch for them.
        with contextlib.suppress(FileNotFoundError):
            os.remove(files.manifest)
        write_params(files.params, parameters)
        write_params(files.states, states)
        try:
            if symbol is not None:
                write_symbol(task_epoch(self.model_dir, self.task, 0).symbol, symbol)
            facts = {".params": facts_of(files.params), ".states": facts_of(files.states)}
            write_manifest(files.manifest, dataclasses.replace(manifest, files=facts))
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error.strerror or error}.") from error

    def remains(self) -> list[str]:
        """Return the files that runs which were killed while saving have left behind.

        Parameters and states without a manifest, which is written last, and temporary files.
        """
        found = []
        for stem in self.paths():
            files = Files(stem)
            if not os.path.exists(files.manifest):
                found += [path for path in (files.params, files.states) if os.path.exists(path)]
        names = (f"{self.task}_ep-", f"{self.task}_step-", f"{self.task}_options")
        found += temporaries(self.model_dir, names)
        return found

    def clean(self) -> None:
        """Delete what interrupted saves left; to be called by who holds :func:`task_lock`."""
        for path in self.remains():
            LOGGER.warning("Removed %s, which an interrupted save left behind", path)
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def in_order(self) -> tuple[list[Checkpoint], list[str]]:
        """Return (checkpoints in the order of their positions, messages about the others).

        Only manifests are read: a file that belongs to one may be damaged.
        """
        found, bad = [], []
        for path in self.paths():
            if not os.path.exists(Files(path).manifest):
                bad.append(f"{path}.json, the manifest, is missing: remains of an interrupted save")
                continue
            try:
                found.append(Checkpoint(path, read_manifest(path)))
            except CheckpointError as error:
                bad.append(str(error))
        found.sort(key=lambda checkpoint: checkpoint.position.order())
        return found, bad

    def newest(self) -> Optional[Checkpoint]:
        """Return the newest checkpoint that is whole; None if there is none at all.

        Older ones are not looked at.

        Raises
        ------
        CheckpointError
            If there are checkpoints, and none is whole.
        """
        found, bad = self.in_order()
        for message in bad:
            LOGGER.warning("Skipped a checkpoint: %s", message)
        for checkpoint in reversed(found):
            try:
                check_files(checkpoint.path, checkpoint.manifest)
                return checkpoint
            except CheckpointError as error:
                LOGGER.warning("Skipped a checkpoint: %s", error)
        damaged = [path for path in self.paths() if os.path.exists(Files(path).manifest)]
        if damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints of {self.task} in "
                f"{self.model_dir} is whole (see above). Remove them or choose another --task-name."
            )
        LOGGER.info("No checkpoint of %s in %s yet", self.task, self.model_dir)
        return None

    def choose(self, resume: str) -> Optional[Checkpoint]:
        """Return the checkpoint to start from, or None to start anew.

        Parameters
        ----------
        resume
            ``none``, ``auto`` (the newest that is whole), or a checkpoint's path.

        Raises
        ------
        CheckpointError
            If there are checkpoints that a new start would overwrite.
        """
        if resume == "auto":
            return self.newest()
        chosen = None if resume == "none" else read_checkpoint(resume)
        stale = self.newer_than(chosen)
        if stale:
            raise CheckpointError(
                f"{self.model_dir} holds {len(stale)} checkpoint(s) of {self.task} that this run "
                f"would overwrite, the newest being {os.path.basename(stale[-1])}. Continue it "
                "with --resume auto, choose another --task-name, or give --overwrite to delete "
                "them."
            )
        return chosen

    def newer_than(self, checkpoint: Optional[Checkpoint]) -> list[str]:
        """Return the stems of the checkpoints that are newer, or do not say how old they are."""
        found, _ = self.in_order()
        older = {
            other.path
            for other in found
            if checkpoint is not None and other.position.order() <= checkpoint.position.order()
        }
        return [
            path
            for path in self.paths()
            if path not in older and os.path.exists(Files(path).manifest)
        ]

    def remove(self, path: str) -> None:
        """Delete a checkpoint's files, the manifest first."""
        for extension in EXTENSIONS:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + extension)

    def overwrite(self, resume: str) -> None:
        """Delete what :meth:`choose` would complain about."""
        if resume == "auto":
            raise UsageError("--overwrite does not go with --resume auto, which continues the run")
        for path in self.newer_than(None if resume == "none" else read_checkpoint(resume)):
            LOGGER.warning("Deleting %s (--overwrite)", path)
            self.remove(path)

    def prune(self, newest: str, best_epoch: Optional[int] = None) -> None:
        """Delete checkpoints that are no longer needed, once ``newest`` has been written.

        Parameters
        ----------
        newest
            Stem of the checkpoint just written, which is never deleted.
        best_epoch
            Number of logged epochs of a checkpoint to keep as well.
        """
        epochs = [path for path in self.paths() if is_epoch(path)]
        steps = [path for path in self.paths() if not is_epoch(path)]
        old = steps if newest in epochs else steps[:-STEP_CHECKPOINTS_KEPT]
        if self.keep and newest in epochs:
            best = self.epoch_path(best_epoch) if best_epoch is not None else None
            old = old + [path for path in epochs[: -self.keep] if path != best]
        for path in old:
            if path != newest:
                self.remove(path)
