"""Which checkpoint a run starts from, and what it writes: between the store and the learner."""

import copy
import importlib.metadata
import logging
import os
import platform
from typing import Optional

import numpy as np

from checkpoint.manifest import Manifest, Position
from checkpoint.params import SaveError
from checkpoint.store import Checkpoint, CheckpointStore, wait_for_checkpoint
from glore_common import UsageError, write_text
from glore_options import as_dict, as_yaml, differences
from mxnet_compat import mx

from .options import TrainOptions
from .report import best_row
from .state import (
    named_parameters,
    optimizer_arrays,
    optimizer_name,
    parameter_arrays,
    restore_optimizer,
    restore_parameters,
    update_counts,
)
from .step import Learner

LOGGER = logging.getLogger("glore.train")


def versions() -> dict[str, str]:
    """Return the versions that a manifest names."""
    try:
        own = importlib.metadata.version("glore-mxnet")
    except importlib.metadata.PackageNotFoundError:
        own = "checkout"
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mxnet": mx.__version__,
        "glore": own,
    }


class Checkpoints:
    """The checkpoints of a run; worker 0 chooses and writes for all.

    Parameters
    ----------
    learner
        What is saved and restored.
    options
        Those of ``checkpoints``; all of them are kept in the manifests.
    model
        The network as the job describes it, for the manifests.
    batches
        Of a pass over the training data.

    Attributes
    ----------
    last
        Stem of the last checkpoint that this run wrote or started from.
    failure
        Why the newest checkpoint could not be written, where the run went on without it.
    """

    def __init__(
        self, learner: Learner, options: TrainOptions, model: Optional[dict], batches: int
    ) -> None:
        kept = options.checkpoints
        self.store = CheckpointStore(kept.model_dir, kept.task_name, kept.keep)
        self.learner = learner
        self.options = options
        self.model = model or {}
        self.data = {"batches": batches, "workers": learner.group.size}
        self.last: Optional[str] = None
        self.failure: Optional[SaveError] = None
        self._order: Optional[tuple] = None

    def choose(self) -> Optional[Checkpoint]:
        """Return the checkpoint to start from, worker 0's choice, or None."""
        start = self.options.checkpoints.start()
        found: list[Checkpoint] = []

        def own_choice() -> Optional[str]:
            if self.options.checkpoints.overwrite:
                self.store.overwrite(start)
            chosen = self.store.choose(start)
            if chosen is None:
                return None
            found.append(chosen)
            return os.path.abspath(chosen.path)

        path = self.learner.group.decide(own_choice, "start")
        if path is None:
            return None
        return found[0] if found else wait_for_checkpoint(path)

    def resume(self) -> Position:
        """Set the learner from the checkpoint to start from, if any; return where the run stands.

        Raises
        ------
        UsageError
            If the run cannot go on where the checkpoint stands, since the data changed.
        """
        checkpoint = self.choose()
        if checkpoint is None:
            return Position()
        manifest, learner = checkpoint.manifest, self.learner
        earlier = manifest.options_of(self.options.groups())
        changed = {
            name: then for name, then in manifest.data.items() if then != self.data.get(name)
        }
        for line in [
            *differences(self.options, earlier),
            *(f"{name}: {then} -> {self.data.get(name)}" for name, then in changed.items()),
        ]:
            LOGGER.warning("Not as when the checkpoint was written: %s", line)
        div = self.options.run.epoch_div_factor
        fixed = ["batches"] if "batches" in changed else []
        fixed += ["epoch_div_factor"] if earlier["run"].get("epoch_div_factor") != div else []
        if fixed and manifest.position.batch:
            raise UsageError(
                f"{checkpoint.path} lies within an epoch, where {' and '.join(fixed)} "
                "must be as they were: keep the data and the batch size, or resume from an epoch's "
                "checkpoint"
            )
        parameters, states = checkpoint.arrays()
        restore_parameters(learner.block, parameters, checkpoint.path)
        restore_optimizer(learner.trainer, learner.parameters, states, manifest.update_counts)
        position = copy.deepcopy(manifest.position)
        learner.steps = position.step
        learner.scaler.restore(position.loss_scale)
        self.last, self._order = checkpoint.path, position.order()
        LOGGER.info(
            "Resumed from %s: step %d, logged epoch %d, batch %d",
            checkpoint.path,
            position.step,
            position.epoch + 1,
            position.batch,
        )
        return position

    def write_options(self) -> None:
        """Write the settled options beside the checkpoints; worker 0 does."""
        if not self.learner.group.is_main or not self.options.command_line:
            return
        path = os.path.join(self.store.model_dir, f"{self.store.task}_options.yaml")
        try:
            write_text(path, as_yaml(self.options))
            LOGGER.info("Options    %s (--config reads them)", path)
        except OSError as error:
            LOGGER.warning("%s cannot be written: %s", path, error.strerror or error)

    def has(self, position: Position) -> bool:
        """Return whether a position has been saved, or is the very start."""
        return position.step == 0 or position.order() == self._order

    def save(self, path: str, position: Position) -> None:
        """Write a checkpoint, and delete those that are no longer needed; worker 0 does.

        Parameters
        ----------
        path
            From the store.
        position
            Where the run stands.
        """
        if not self.learner.group.is_main:
            self.last, self._order = path, position.order()
            return
        block, trainer = self.learner.block, self.learner.trainer
        names = list(named_parameters(block))
        manifest = Manifest(
            position=position,
            model=self.model,
            options=as_dict(self.options),
            command_line=self.options.command_line,
            versions=versions(),
            data=self.data,
            update_counts=update_counts(trainer, names),
            optimizer=optimizer_name(trainer),
        )
        symbol = getattr(block, "symbol", None)
        states = optimizer_arrays(trainer, names)
        try:
            self.store.save(path, parameter_arrays(block), states, manifest, symbol)
        except SaveError as error:
            self.store.remove(path)
            if self.options.checkpoints.on_save_error == "stop":
                raise
            LOGGER.error("%s The run goes on (--on-save-error continue).", error)
            self.failure = error
            return
        self.last, self._order, self.failure = path, position.order(), None
        best = best_row(position.history)
        self.store.prune(path, best["epoch"] if best else None)
