"""The training loop: :func:`train_and_evaluate`.

It takes any Gluon block that maps a batch to logits and any sized iterable of (data, label)
batches. A *logged epoch* is one of ``epoch_div_factor`` nearly equal parts of a pass over the
training data, followed by precise BatchNorm (if asked for), a validation, a row of the history
and a checkpoint; the schedule is that of the original project (facebookresearch/GloRe).
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from typing import Optional

from checkpoint.store import (
    CheckpointStore,
    Position,
    TaskLock,
    differing_settings,
    wait_for_checkpoint,
)
from glore_common import GloReError, UsageError
from mxnet_compat import mx

from .batches import BatchStream, epoch_bounds, spread_batches
from .config import RunConfig
from .interrupt import Interrupted, StopSignals
from .metric import StreamingMetrics, means_of
from .precise_bn import affine_names, estimate_statistics, only_trainable
from .report import Reporter, best_row
from .step import Learner, derived_seed
from .workers import Group, is_distributed

__all__ = [
    "BatchStream",
    "Interrupted",
    "Learner",
    "NonFiniteError",
    "RunConfig",
    "Summary",
    "epoch_bounds",
    "train_and_evaluate",
]

LOGGER = logging.getLogger("glore.train")
# Steps that may be queued on a device before Python waits: enough to keep it busy, few enough for
# the input batches that they hold in memory.
STEPS_AHEAD = 2
# Precise BatchNorm reads the training data as passes of its own, far beyond any real one.
PRECISE_BN_PASS = 1_000_000


class NonFiniteError(GloReError):
    """The loss, a parameter or a gradient is no longer finite."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What :func:`train_and_evaluate` returns.

    Attributes
    ----------
    history : list of dict
        One row per logged epoch; see ``train.report.COLUMNS``.
    best : dict or None
        The row with the highest validation top-1.
    checkpoint : str or None
        Stem of the last checkpoint that this run wrote or started from.
    steps : int
        Optimiser steps done, resumed ones included.
    """

    history: list
    best: Optional[dict]
    checkpoint: Optional[str]
    steps: int


class Session:
    """One run of :func:`train_and_evaluate`: its position, and what moves it on.

    Parameters
    ----------
    learner : Learner
        What learns.
    train_data, val_data : BatchStream
        ``val_data`` may be None.
    schedule : callable
        Learning rate of a step (from 1).
    run : RunConfig
        How the run is carried out.
    reporter : train.report.Reporter
        Who hears of it.
    settings : dict
        Kept in checkpoints.
    stop : StopSignals
        Who may end it.
    """

    def __init__(self, learner, train_data, val_data, schedule, run, reporter, settings, stop):
        self.learner = learner
        self.train_data = train_data
        self.val_data = val_data
        self.schedule = schedule
        self.run = run
        self.reporter = reporter
        self.settings = settings
        self.stop = stop
        self.group = learner.group
        self.agreed_signal = None
        self.store = CheckpointStore(run.model_dir, run.task_name, run.keep)
        self.position = Position()
        self.metrics = StreamingMetrics()
        self.last_saved = None
        self.last_order = None

    @property
    def lr(self):
        """Learning rate of the step last done, or of the first one."""
        return self.schedule(max(self.position.step, 1))

    def choose(self):
        """Return the checkpoint to start from, worker 0's choice, or None."""
        if not self.group.is_main:
            answer = json.loads(self.group.broadcast_text(""))
            if answer["error"] is not None:
                raise GloReError(f"worker 0 cannot start: {answer['error']}")
            return wait_for_checkpoint(answer["path"]) if answer["path"] else None
        checkpoint, error = None, None
        try:
            if self.run.overwrite:
                self.store.overwrite(self.run.resume)
            checkpoint = self.store.choose(self.run.resume)
        except GloReError as problem:
            error = problem
        path = os.path.abspath(checkpoint.path) if checkpoint else None
        self.group.broadcast_text(json.dumps({"path": path, "error": error and str(error)}))
        if error is not None:
            raise error
        return checkpoint

    def resume(self):
        """Start from the checkpoint that ``run.resume`` asks for, if any."""
        checkpoint = self.choose()
        if checkpoint is None:
            return
        for line in differing_settings(self.settings, checkpoint.settings):
            LOGGER.warning("Not as when the checkpoint was written: %s", line)
        changed = {
            name
            for name in ("batches", "epoch_div_factor")
            if self.settings[name] != checkpoint.settings.get(name)
        }
        if changed and checkpoint.position.batch:
            raise UsageError(
                f"{checkpoint.path} lies within an epoch, where {' and '.join(sorted(changed))} "
                "must be as they were: keep the data and the batch size, or resume from an epoch's "
                "checkpoint"
            )
        self.position = self.store.load(checkpoint, self.learner.block, self.learner.trainer)
        self.learner.steps = self.position.step
        self.learner.scaler.restore(self.position.loss_scale)
        # They are sums over all workers: one of them goes on with them.
        if self.position.totals is not None and self.group.is_main:
            self.metrics.restore(self.position.totals)
        self.last_saved, self.last_order = checkpoint.path, self.position.order()
        LOGGER.info(
            "Resumed from %s: step %d, logged epoch %d, batch %d",
            checkpoint.path,
            self.position.step,
            self.position.epoch + 1,
            self.position.batch,
        )

    @property
    def own_seed(self):
        """What makes this worker's randomness (dropout, mixup) differ from the others'."""
        return () if self.group.is_main else (self.group.rank,)

    def enough(self):
        """Return whether ``max_steps`` are done."""
        return self.run.max_steps is not None and self.position.step >= self.run.max_steps

    def check_finite(self):
        """Raise NonFiniteError if the loss, a parameter or a gradient is not finite.

        The parameters are looked at as well, since oneDNN's relu turns NaN into 0: a broken
        network then shows a healthy loss.
        """
        self.metrics.totals()
        if self.metrics.first_bad is not None:
            what = f"The loss is not finite at step {self.metrics.first_bad}"
            lr = self.schedule(self.metrics.first_bad)
        elif not self.learner.is_finite():
            what = f"A parameter or gradient is not finite at step {self.position.step} or before"
            lr = self.lr
        else:
            return
        last = (
            f"The last good checkpoint is {self.last_saved}"
            if self.last_saved
            else ("There is no checkpoint yet")
        )
        raise NonFiniteError(
            f"{what} (learning rate {lr:.4g}). {last}. Try a smaller --lr-base or a longer warm-up."
        )

    def totals(self):
        """Return the metric sums of the logged epoch over all workers."""
        return self.summed(self.metrics.totals())

    def summed(self, totals):
        """Return metric sums over all workers, which call this at the same place."""
        sums = self.group.sum(list(totals.values())).tolist()
        return dict(zip(totals, sums), samples=round(sums[list(totals).index("samples")]))

    def save(self, path, together=True):
        """Write a checkpoint unless this position has been saved or is the very start.

        Parameters
        ----------
        path : str
            From the store.
        together : bool
            Whether all workers are here. If not, what needs the others is as it was when they
            last were: metric sums, and an optimiser's state that is on servers.
        """
        if self.position.step == 0 or self.position.order() == self.last_order:
            return
        self.check_finite()
        learner = self.learner
        with self.group.progress.phase("saving"):
            if together:
                self.position.totals = self.totals()
                learner.trainer.fetch(self.position.step)
            self.position.loss_scale = learner.scaler.state()
            self.last_saved, self.last_order = path, self.position.order()
            if not self.group.is_main:
                return
            self.store.save(path, learner.block, learner.trainer, self.position, self.settings)
            best = best_row(self.position.history)
            self.store.prune(path, best["epoch"] if best else None)

    def save_step(self, together=True):
        """Write a checkpoint of the position within the logged epoch."""
        self.save(self.store.step_path(self.position.step), together)

    def agree(self, batches):
        """Agree on a step with the other workers; return how many samples it has.

        All of them hear of a signal at the same step: what each of them was doing else would
        leave some waiting for ever.
        """
        own = sum(data.shape[0] for data, _ in batches)
        samples, self.agreed_signal = self.group.agree(own, self.stop.number)
        self.group.progress.tick("compute", self.position.step)
        return samples

    def obey(self, save=True, together=False):
        """If a signal came, save (unless told not to) and raise Interrupted.

        Parameters
        ----------
        save : bool
            Whether there is something that could be saved.
        together : bool
            Whether the workers just agreed on a step.
        """
        together = together and self.group.in_step
        number = self.agreed_signal if together else self.stop.number
        if number is None:
            return
        self.reporter.end_bar()
        if save:
            self.save_step(together or self.group.size == 1)
        if self.last_saved is None:
            raise Interrupted(number, "stopped; no step was done, nothing was saved")
        raise Interrupted(
            number,
            f"stopped after step {self.position.step}, saved as {self.last_saved}. Continue with "
            "the same command and --resume auto.",
        )

    @contextlib.contextmanager
    def guarded_input(self):
        """Save what was learnt if reading fails; workers die of a signal to the whole group."""
        try:
            yield
        except Exception:
            self.obey()
            self.save_step(together=self.group.size == 1)
            raise

    def train_epoch(self):
        """Train to the end of the logged epoch, or until ``max_steps`` are done."""
        position, run = self.position, self.run
        pass_index, first, last = epoch_bounds(
            position.epoch, self.train_data.batches, run.epoch_div_factor
        )
        size = last - first
        self.train_data.seek(pass_index, first + position.batch)
        self.reporter.start_bar(f"Epoch {position.epoch + 1}", size, position.batch)
        # Workers that need not wait for each other do not do so for a step line.
        sums = self.metrics.totals if self.group.asynchronous else self.totals
        printed, printed_at = sums(), time.perf_counter()
        mark = printed_at
        while position.batch < size and not self.enough():
            chunk = min(run.accumulate, size - position.batch)
            before = time.perf_counter()
            self.group.progress.tick("input", position.step)
            with self.guarded_input():
                batches = [self.train_data.read() for _ in range(chunk)]
            position.waited += time.perf_counter() - before
            samples = self.agree(batches)
            step = position.step + 1
            lr = self.schedule(step)
            seed = derived_seed(run.seed, step, *self.own_seed)
            for result in self.learner.step(batches, lr, seed, samples):
                self.metrics.update(*result, step=step)
            self.metrics.wait_for_all_but(STEPS_AHEAD * chunk * len(self.learner.contexts))
            position.step = step
            position.batch += chunk
            self.reporter.advance(chunk)
            due = position.batch % run.log_frequency < chunk
            if due or position.batch == size or self.enough():
                self.check_finite()
                totals, now = sums(), time.perf_counter()
                speed = (totals["samples"] - printed["samples"]) / (now - printed_at)
                means = means_of(totals, printed)
                self.reporter.step_line(position, size, lr, speed, means)
                printed, printed_at = totals, now
            now = time.perf_counter()
            position.seconds, mark = position.seconds + now - mark, now
            # At the end of an epoch its own checkpoint follows at once, after the validation.
            if run.save_every_steps and step % run.save_every_steps == 0 and position.batch < size:
                self.save_step()
            self.obey(together=True)
        self.reporter.end_bar()
        self.check_finite()
        if position.batch == size:
            # From here to the epoch's end workers save by themselves, if they have to.
            position.totals = self.totals()
            self.learner.trainer.fetch(position.step)
        return position.batch == size

    def precise_bn(self):
        """Tune BatchNorm's gammas and betas, and estimate its statistics anew."""
        plan, run, epoch = self.run.precise_bn, self.run, self.position.epoch
        block, contexts = self.learner.block, self.learner.contexts
        total = plan.tune_batches + plan.estimate_batches
        self.reporter.start_bar(f"Epoch {epoch + 1} precise BN", total)
        self.train_data.seek(PRECISE_BN_PASS + epoch, 0)

        def batches(count, offset, together):
            for index in range(count):
                # Between here and its own checkpoint there is nothing that could be saved.
                self.obey(save=False, together=together)
                seed = derived_seed(run.seed, epoch, offset + index, 1, *self.own_seed)
                self.group.progress.tick("input")
                yield seed, self.train_data.read()
                self.reporter.advance()

        def inputs():
            for seed, (data, _) in batches(plan.estimate_batches, plan.tune_batches, False):
                mx.random.seed(seed)
                yield data if isinstance(data, mx.nd.NDArray) else mx.nd.array(data)

        with only_trainable(block, affine_names(block)):
            for seed, batch in batches(plan.tune_batches, 0, True):
                samples = self.agree([batch])
                losses, _, _ = self.learner.step([batch], self.lr, seed, samples)[0]
                losses[0].wait_to_read()
        estimate_statistics(block, contexts, inputs(), run.dtype)
        self.reporter.end_bar()
        self.check_finite()

    def validate(self):
        """Return the validation's mean metrics, or None without validation data."""
        if self.val_data is None:
            return None
        div = self.run.epoch_div_factor
        if self.run.max_val_batches:
            div = max(div, -(-self.val_data.batches // self.run.max_val_batches))
        runs = spread_batches(self.val_data.batches, div)
        metrics = StreamingMetrics()
        label = f"Epoch {self.position.epoch + 1} validation"
        self.reporter.start_bar(label, sum(stop - start for start, stop in runs))
        for start, stop in runs:
            self.val_data.seek(0, start)
            for _ in range(start, stop):
                self.group.progress.tick("validation")
                with self.guarded_input():
                    data, label = self.val_data.read()
                metrics.update(*self.learner.predict(data, label))
                metrics.wait_for_all_but(STEPS_AHEAD * len(self.learner.contexts))
                self.reporter.advance()
                self.obey()
        self.reporter.end_bar()
        return means_of(self.summed(metrics.totals()))

    def row(self, validation, seconds):
        """Return the history's row for the current logged epoch."""
        position = self.position
        totals = self.totals()
        train, validation = means_of(totals), validation or {}
        return {
            "epoch": position.epoch + 1,
            "step": position.step,
            "lr": self.lr,
            **{f"train_{name}": train[name] for name in self.metrics.names},
            **{f"val_{name}": validation.get(name) for name in self.metrics.names},
            "train_seconds": round(position.seconds, 3),
            "val_seconds": round(seconds, 3) if validation else None,
            "samples_per_second": round(totals["samples"] / max(position.seconds, 1e-9), 3),
            "input_wait": round(position.waited / max(position.seconds, 1e-9), 4),
        }

    def run_epoch(self):
        """Do what is left of the logged epoch; save it, or the position within it.

        Returns
        -------
        list of dict
            The history, with a row for this epoch even if ``max_steps`` cut it short. Such a row
            is shown, but not kept in the checkpoint: it is made anew when the epoch ends.
        """
        position = self.position
        complete = True
        if position.phase == "train":
            complete = self.train_epoch()
            if complete:
                position.phase = "precise_bn" if self.run.precise_bn else "validate"
            if not complete or self.run.precise_bn:
                self.save_step()
        if position.phase == "precise_bn":
            self.precise_bn()
            position.phase = "validate"
        self.learner.share_statistics()
        started = time.perf_counter()
        validation = self.validate()
        history = [*position.history, self.row(validation, time.perf_counter() - started)]
        if complete:
            position.history = history
            position.epoch += 1
            position.batch, position.phase = 0, "train"
            position.seconds = position.waited = 0.0
            self.metrics.reset()
            due = position.epoch % self.run.save_frequency == 0
            if due or position.epoch == self.run.end_epoch or self.enough():
                self.save(self.store.epoch_path(position.epoch))
        self.reporter.epoch_end(history)
        return history


def train_and_evaluate(
    block,
    train_data,
    val_data,
    optimizer,
    schedule,
    run,
    contexts=None,
    batch_hook=None,
    reporter=None,
    settings=None,
    group=None,
):
    """Train a block, validate it after each logged epoch, and keep checkpoints.

    Parameters
    ----------
    block : mxnet.gluon.Block
        Maps data to logits (n, classes); initialised on ``contexts`` (deferred shapes are fine)
        and of type ``run.dtype``. Its ``symbol``, if it has one, is saved with the checkpoints.
    train_data, val_data : sized iterable of (data, label)
        See :class:`train.batches.BatchStream`; ``val_data`` may be None. Data (n, ...), labels
        (n,).
    optimizer : mxnet.optimizer.Optimizer
        E.g. :class:`train.optimizer.NesterovSGD`; parameters bring their own ``lr_mult`` and
        ``wd_mult``.
    schedule : callable
        Maps a step (from 1) to a learning rate; see ``train.schedule``.
    run : RunConfig
        How the run is carried out.
    contexts : list of mxnet.Context, optional
        Devices; the CPU by default.
    batch_hook : callable, optional
        See :class:`train.step.Learner`.
    reporter : train.report.Reporter, optional
        Writes history, curves and events; a default one under ``./exps/logs``.
    settings : dict, optional
        More of the run's settings (JSON values), kept in its checkpoints and compared when it is
        resumed.
    group : train.workers.Group, optional
        The workers of a distributed run, from :func:`train.workers.join`; each has its own
        share of the data. Files are written by worker 0.

    Returns
    -------
    Summary

    Raises
    ------
    Interrupted
        After SIGINT or SIGTERM, once the run has been saved.
    NonFiniteError
        When the loss, a parameter or a gradient is no longer finite.
    CheckpointError
        When a checkpoint cannot be read, does not fit, or would be overwritten.
    """
    started = time.perf_counter()
    contexts = list(contexts or [mx.cpu()])
    group = group or Group()
    if is_distributed(run.kvstore) and group.store is None:
        raise UsageError(f"{run.kvstore} needs a group of workers: see train.workers.join")
    reporter = reporter or Reporter(run.task_name, files=group.is_main)
    train_stream = BatchStream(train_data, "training")
    val_stream = None
    if val_data is not None:
        val_stream = BatchStream(val_data, "validation", may_be_empty=group.size > 1)
    group.check_equal("the number of training batches", train_stream.batches)
    if run.epoch_div_factor > train_stream.batches:
        raise UsageError(
            f"a pass of {train_stream.batches} batches cannot be divided into "
            f"{run.epoch_div_factor} logged epochs: use a smaller batch or epoch_div_factor 1"
        )
    settings = {
        **(settings or {}),
        "batches": train_stream.batches,
        "epoch_div_factor": run.epoch_div_factor,
        "seed": run.seed,
        "accumulate": run.accumulate,
        **({"workers": group.size} if group.size > 1 else {}),
    }
    # As they come back from a manifest: a tuple as a list, and so on.
    settings = json.loads(json.dumps(settings))
    learner = Learner(block, optimizer, contexts, run, batch_hook, group, schedule)
    with StopSignals() as stop, contextlib.ExitStack() as closing:
        closing.callback(train_stream.close)
        if val_stream is not None:
            closing.callback(val_stream.close)
        closing.callback(reporter.close)
        if group.is_main and not run.share_task:
            lock = TaskLock(run.model_dir, run.task_name)
            lock.acquire()
            closing.callback(lock.release)
        session = Session(
            learner, train_stream, val_stream, schedule, run, reporter, settings, stop
        )
        session.resume()
        reporter.open(session.position.step)
        history = session.position.history
        if session.position.epoch >= run.end_epoch or session.enough():
            LOGGER.info("This run is already complete: step %d", session.position.step)
        while session.position.epoch < run.end_epoch and not session.enough():
            history = session.run_epoch()
            session.obey()
        reporter.finish(history, session.last_saved, started)
    return Summary(history, best_row(history), session.last_saved, session.position.step)
