"""Checkpoints that survive crashes: parameters, optimiser state and position, with checksums.

A checkpoint is three files of one stem, ``{task}_ep-{NNNN}`` after NNNN logged epochs or
``{task}_step-{NNNNNNN}`` in between:

``.params``
    Parameters in MXNet's own form (``arg:`` and ``aux:``). ``mx.model.load_checkpoint(
    '{task}_ep', 3)`` reads epoch 3, because the graph, where the block has one, is written once as
    ``{task}_ep-symbol.json``.
``.states``
    The optimiser's arrays by parameter name. Plain arrays, no pickle: reading a checkpoint never
    runs code from it.
``.json``
    The manifest: position, metrics so far, seed, settings, and the SHA-256 of the other two and of
    itself. It is written last, so that a checkpoint without a fitting manifest is known to be
    incomplete.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import time
from typing import Any, Optional

from glore_common import GloReError, UsageError, atomic_path, sha256_of, write_text
from mxnet_compat import mx

try:
    import fcntl
except ImportError:  # not a Unix: no lock there
    fcntl = None

LOGGER = logging.getLogger("glore.train")
FORMAT = 1
# Seconds that a checkpoint may take to show on another machine, and an earlier run to let go.
CHECKPOINT_PATIENCE = 60.0
LOCK_PATIENCE = 3.0
PHASES = ("train", "precise_bn", "validate")
STEP_CHECKPOINTS_KEPT = 2
STATISTICS = ("moving_mean", "moving_var", "running_mean", "running_var")


class CheckpointError(GloReError):
    """A checkpoint cannot be read, does not fit the network, or would be lost."""


@dataclasses.dataclass
class Position:
    """Where a run stands, and what it has measured so far; kept in every manifest.

    Attributes
    ----------
    step : int
        Optimiser steps done.
    epoch : int
        Logged epochs completed.
    batch : int
        Batches of the current logged epoch done.
    phase : {'train', 'precise_bn', 'validate'}
        What the current logged epoch does next.
    totals : dict, optional
        Metric sums of the current logged epoch.
    seconds : float
        Training time of the current logged epoch.
    waited : float
        Part of ``seconds`` that was spent waiting for input.
    history : list of dict
        One row per completed logged epoch.
    loss_scale : list, optional
        See :meth:`train.step.LossScaler.state`.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    phase: str = "train"
    totals: Optional[dict] = None
    seconds: float = 0.0
    waited: float = 0.0
    history: list = dataclasses.field(default_factory=list)
    loss_scale: Optional[list] = None

    def order(self):
        """Return a key that grows as a run advances."""
        return self.epoch, PHASES.index(self.phase), self.batch, self.step


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found to be whole.

    Attributes
    ----------
    path : str
        Path without extension.
    position : Position
        Where the run stood.
    update_counts : dict
        Updates of each parameter, by name.
    settings : dict
        What the run was started with.
    """

    path: str
    position: Position
    update_counts: dict
    settings: dict


def named_parameters(block):
    """Return {name: Parameter} of a Gluon block, names without the block's own prefix."""
    prefix = block.prefix
    return {
        name[len(prefix) :] if name.startswith(prefix) else name: parameter
        for name, parameter in block.collect_params().items()
    }


def parameter_arrays(block):
    """Return a block's parameters on the CPU under MXNet's ``arg:`` and ``aux:`` names.

    Copies on several devices are averaged: they differ in their running statistics only.
    """
    return {
        ("aux:" if name.endswith(STATISTICS) else "arg:") + name: parameter._reduce()
        for name, parameter in named_parameters(block).items()
    }


def restore_parameters(block, arrays, source):
    """Set a block's parameters from :func:`parameter_arrays`, strictly.

    Raises
    ------
    CheckpointError
        Naming every parameter that is missing, extra or of another shape.
    """
    given = {name.split(":", 1)[-1]: value for name, value in arrays.items()}
    wanted = named_parameters(block)
    problems = [f"missing: {name}" for name in wanted if name not in given]
    problems += [f"not in the network: {name}" for name in given if name not in wanted]
    for name, parameter in wanted.items():
        if name in given and parameter.shape and 0 not in parameter.shape:
            ours, theirs = tuple(parameter.shape), tuple(given[name].shape)
            if ours != theirs:
                problems.append(f"{name} has shape {theirs}, the network wants {ours}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit the network:\n  " + "\n  ".join(problems) + "\n"
            "Start with the network and number of classes that it was trained with."
        )
    for name, parameter in wanted.items():
        # As Gluon's own loading: also where the shape was to come from the first batch.
        parameter.shape = given[name].shape
        parameter._load_init(given[name].astype(parameter.dtype), None)


def optimizer_arrays(trainer, names):
    """Return the optimiser's arrays by ``{slot}:{parameter name}``.

    Parameters
    ----------
    trainer : mxnet.gluon.Trainer
        A trainer that updates outside of its key-value store.
    names : list of str
        The names of its parameters, in its order.
    """
    arrays = {}
    for index, state in trainer._updaters[0].states.items():
        slots = state if isinstance(state, (list, tuple)) else (state,)
        for slot, value in enumerate(slots):
            if value is not None:
                arrays[f"{slot}:{names[index]}"] = value.as_in_context(mx.cpu())
    return arrays


def update_counts(trainer, names):
    """Return {parameter name: number of updates} of a trainer's optimiser."""
    counts = trainer.optimizer._index_update_count
    return {names[index]: count for index, count in counts.items()}


def restore_optimizer(trainer, names, parameters, arrays, counts):
    """Set a trainer's optimiser state from :func:`optimizer_arrays` and :func:`update_counts`.

    Every device gets its own copy. Raises CheckpointError for a state of an unknown parameter.
    """
    index_of = {name: index for index, name in enumerate(names)}
    slots = {}
    for key, value in arrays.items():
        slot, name = key.split(":", 1)
        if name not in index_of or tuple(value.shape) != tuple(parameters[name].shape):
            raise CheckpointError(f"the optimiser state of {name} does not fit the network")
        slots.setdefault(name, {})[int(slot)] = value
    for updater, context in zip(trainer._updaters, trainer._contexts):
        for name, by_slot in slots.items():
            values = tuple(by_slot[slot].copyto(context) for slot in sorted(by_slot))
            index = index_of[name]
            updater.states[index] = values[0] if len(values) == 1 else values
            updater.states_synced[index] = True
    optimizer = trainer.optimizer
    restored = {index_of[name]: count for name, count in counts.items()}
    # One dictionary per device; the optimiser's current one is among them.
    for device in optimizer._all_index_update_counts.values():
        device.clear()
        device.update(restored)
    for context in trainer._contexts:
        optimizer._all_index_update_counts.setdefault(context.device_id, dict(restored))
    optimizer.num_update = max(restored.values(), default=optimizer.begin_num_update)


def _load_arrays(path):
    if not os.path.getsize(path):
        return {}
    arrays = mx.nd.load(path)
    if not isinstance(arrays, dict):
        raise CheckpointError(f"{path} holds arrays without names")
    return arrays


def _number(stem):
    return int(stem.rsplit("-", 1)[1])


def _checksum(content):
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_checkpoint(path):
    """Check a checkpoint's files and read its manifest.

    Parameters
    ----------
    path : str
        With or without one of the extensions ``.params``, ``.states`` and ``.json``.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If a file is missing, cut short, or not what the manifest says.
    """
    path = os.fspath(path)
    root, extension = os.path.splitext(path)
    path = root if extension in (".params", ".states", ".json") else path
    try:
        with open(path + ".json", encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise CheckpointError(f"{path}.json, the manifest, does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}.json, the manifest, cannot be read: {error}") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise CheckpointError(f"{path}.json, the manifest, is damaged: its checksum differs")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}.json has format {content['format']}, this reads {FORMAT}")
    for extension, expected in content["files"].items():
        try:
            size = os.path.getsize(path + extension)
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"{path}{extension} has {size} bytes, it was written with "
                    f"{expected['bytes']}: it is truncated or was replaced"
                )
            if sha256_of(path + extension) != expected["sha256"]:
                raise CheckpointError(f"{path}{extension} is damaged: its checksum differs")
        except OSError as error:
            raise CheckpointError(f"{path}{extension} cannot be read: {error}") from error
    return Checkpoint(
        path=path,
        position=Position(**content["position"]),
        update_counts=content["update_counts"],
        settings=content["settings"],
    )


def wait_for_checkpoint(path, seconds=CHECKPOINT_PATIENCE):
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


class TaskLock:
    """Keeps two runs from writing the checkpoints of one task in one folder.

    A lock of the system on ``.{task}.lock``, which ends with the process, however that ends.

    Parameters
    ----------
    model_dir, task : str
        See :class:`CheckpointStore`.
    """

    def __init__(self, model_dir, task):
        self.task = task
        self.path = os.path.join(model_dir, f".{task}.lock")
        self._stream = None

    def acquire(self, seconds=LOCK_PATIENCE):
        """Take the lock.

        Raises
        ------
        CheckpointError
            If another run has it, and still has it after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() > deadline:
                with open(self.path, encoding="utf-8") as stream:
                    holder = stream.read().strip() or "another process"
                raise CheckpointError(
                    f"{holder} is writing checkpoints of {self.task} to "
                    f"{os.path.dirname(self.path)}. Choose another --task-name or --model-dir, "
                    "or give --share-task-name if you know that they do not get in each other's "
                    "way."
                )
            time.sleep(0.1)

    def _try(self):
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            stream = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  (held while locked)
        except OSError as error:
            raise CheckpointError(f"cannot write to the folder of checkpoints: {error}") from error
        try:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have deleted the file since it was opened.
            if not os.path.samestat(os.fstat(stream.fileno()), os.stat(self.path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            stream.close()
            return False
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s): this run may not be alone", self.path, error)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        self._stream = stream
        return True

    def release(self):
        """Give the lock back, if it was taken."""
        if self._stream is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path)
            self._stream.close()
            self._stream = None


class CheckpointStore:
    """The checkpoints of one task in one folder.

    Parameters
    ----------
    model_dir : str
        Folder; made when the first checkpoint is written.
    task : str
        Name of the run, the beginning of all file names.
    keep : int
        How many epoch checkpoints to keep besides the best one; 0 keeps all. Of the checkpoints
        between epochs the last two are kept, and none that is older than an epoch checkpoint.
    """

    def __init__(self, model_dir, task, keep=0):
        if not task or task != os.path.basename(task) or task.startswith("."):
            raise UsageError(f"the task name {task!r} cannot begin a file name")
        if keep < 0:
            raise UsageError(f"keep 0 (all) or more checkpoints, not {keep}")
        self.model_dir = model_dir
        self.task = task
        self.keep = keep
        self._pattern = re.compile(re.escape(task) + r"_(ep-\d{4,}|step-\d{7,})\.(json|params)")

    def epoch_path(self, epoch):
        """Return the stem of the checkpoint after ``epoch`` logged epochs."""
        return os.path.join(self.model_dir, f"{self.task}_ep-{epoch:04d}")

    def step_path(self, step):
        """Return the stem of the checkpoint after ``step`` optimiser steps."""
        return os.path.join(self.model_dir, f"{self.task}_step-{step:07d}")

    def paths(self):
        """Return the stems of all checkpoints, complete or not: epochs, then steps, in order."""
        try:
            entries = os.listdir(self.model_dir)
        except FileNotFoundError:
            return []
        found = (self._pattern.fullmatch(entry) for entry in entries)
        stems = {os.path.splitext(match.string)[0] for match in found if match}
        in_order = sorted(stems, key=lambda stem: (stem[len(self.task) + 1], _number(stem)))
        return [os.path.join(self.model_dir, stem) for stem in in_order]

    def save(self, path, block, trainer, position, settings):
        """Write a checkpoint: each file atomically, the manifest last.

        Parameters
        ----------
        path : str
            From :meth:`epoch_path` or :meth:`step_path`.
        block : mxnet.gluon.Block
            Its parameters are saved, and its ``symbol`` if it has one.
        trainer : mxnet.gluon.Trainer
            Its optimiser's state is saved.
        position : Position
            Where the run stands.
        settings : dict
            What the run was started with (JSON values).
        """
        names = list(named_parameters(block))
        # While files are replaced, no old manifest may vouch for them.
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".json")
        files = {}
        for extension, arrays in (
            (".params", parameter_arrays(block)),
            (".states", optimizer_arrays(trainer, names)),
        ):
            with atomic_path(path + extension) as temporary:
                if arrays:
                    mx.nd.save(temporary, arrays)
                digest, size = sha256_of(temporary), os.path.getsize(temporary)
            files[extension] = {"sha256": digest, "bytes": size}
        self._write_symbol(getattr(block, "symbol", None))
        content = {
            "format": FORMAT,
            "position": dataclasses.asdict(position),
            "settings": settings,
            "update_counts": update_counts(trainer, names),
            "optimizer": type(getattr(trainer.optimizer, "inner", trainer.optimizer)).__name__,
            "mxnet": mx.__version__,
            "files": files,
        }
        content = json.loads(json.dumps(content))
        content["checksum"] = _checksum(content)
        write_text(path + ".json", json.dumps(content, indent=1))

    def _write_symbol(self, symbol):
        if symbol is None:
            return
        path, text = os.path.join(self.model_dir, f"{self.task}_ep-symbol.json"), symbol.tojson()
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                if stream.read() == text:
                    return
        write_text(path, text)

    def load(self, checkpoint, block, trainer):
        """Set a block and its trainer from a checkpoint; return a copy of its position."""
        names = list(named_parameters(block))
        restore_parameters(block, _load_arrays(checkpoint.path + ".params"), checkpoint.path)
        restore_optimizer(
            trainer,
            names,
            named_parameters(block),
            _load_arrays(checkpoint.path + ".states"),
            checkpoint.update_counts,
        )
        return copy.deepcopy(checkpoint.position)

    def valid(self):
        """Return (checkpoints in the order of their positions, messages about the others)."""
        good, bad = [], []
        for path in self.paths():
            try:
                good.append(read_checkpoint(path))
            except CheckpointError as error:
                bad.append(str(error))
        good.sort(key=lambda checkpoint: checkpoint.position.order())
        return good, bad

    def choose(self, resume):
        """Return the checkpoint to start from, or None to start anew.

        Parameters
        ----------
        resume : str
            ``none``, ``auto`` (the newest that is whole), or a checkpoint's path.

        Raises
        ------
        CheckpointError
            If there are checkpoints that a new start would overwrite.
        """
        if resume == "auto":
            good, bad = self.valid()
            for message in bad:
                LOGGER.warning("Skipped a checkpoint: %s", message)
            if not good and bad:
                raise CheckpointError(
                    f"none of the {len(bad)} checkpoints of {self.task} in {self.model_dir} is "
                    "whole (see above). Remove them or choose another --task-name."
                )
            if not good:
                LOGGER.info("No checkpoint of %s in %s yet", self.task, self.model_dir)
            return good[-1] if good else None
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

    def newer_than(self, checkpoint):
        """Return the stems of the checkpoints that are newer than ``checkpoint``, or not whole."""
        good, _ = self.valid()
        order = checkpoint.position.order() if checkpoint else None
        older = {
            other.path for other in good if order is not None and other.position.order() <= order
        }
        return [path for path in self.paths() if path not in older]

    def remove(self, path):
        """Delete a checkpoint's files, the manifest first."""
        for extension in (".json", ".states", ".params"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + extension)

    def overwrite(self, resume):
        """Delete what :meth:`choose` would complain about."""
        if resume == "auto":
            raise UsageError("--overwrite does not go with --resume auto, which continues the run")
        for path in self.newer_than(None if resume == "none" else read_checkpoint(resume)):
            LOGGER.warning("Deleting %s (--overwrite)", path)
            self.remove(path)

    def prune(self, newest, best_epoch=None):
        """Delete checkpoints that are no longer needed, once ``newest`` has been written.

        Parameters
        ----------
        newest : str
            Stem of the checkpoint just written, which is never deleted.
        best_epoch : int, optional
            Number of logged epochs of a checkpoint to keep as well.
        """
        epochs = [path for path in self.paths() if path.rsplit("_", 1)[1].startswith("ep-")]
        steps = [path for path in self.paths() if path.rsplit("_", 1)[1].startswith("step-")]
        old = steps if newest in epochs else steps[:-STEP_CHECKPOINTS_KEPT]
        if self.keep and newest in epochs:
            best = self.epoch_path(best_epoch) if best_epoch is not None else None
            old = old + [path for path in epochs[: -self.keep] if path != best]
        for path in old:
            if path != newest:
                self.remove(path)


def differing_settings(ours, theirs):
    """Return lines ``name: then -> now`` for settings that differ between two runs."""

    def shown(settings: dict, name: str) -> Any:
        return settings.get(name, "absent")

    return [
        f"{name}: {shown(theirs, name)} -> {shown(ours, name)}"
        for name in sorted({*ours, *theirs})
        if shown(ours, name) != shown(theirs, name)
    ]
