"""The training loop: :func:`train_and_evaluate`.

It takes any Gluon block and any sized iterable of (data, label) batches; a
:class:`train.task.Task` says what is learnt and measured. A *logged epoch* is one of
``epoch_div_factor`` nearly equal parts of a pass over the training data, followed by precise
BatchNorm (if asked for), a validation, a row of the history and a checkpoint; the schedule is that
of the original project (facebookresearch/GloRe).
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any, Callable, Optional

from checkpoint.params import SaveError
from checkpoint.store import task_lock
from glore_common import GloReError, UsageError
from mxnet_compat import mx

from .batches import BatchStream, epoch_bounds, spread_batches
from .interrupt import Interrupted, StopSignals
from .metric import StreamingMetrics
from .options import TrainOptions
from .precise_bn import affine_names, estimate_statistics, only_trainable
from .report import Reporter, best_row
from .saving import Checkpoints
from .state import contexts_of_block
from .step import Learner, derived_seed
from .task import Task
from .workers import Group, is_distributed

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
    history
        One row per logged epoch; see :func:`train.report.columns`.
    best
        The row that is best in validation: see :func:`train.report.best_row`.
    checkpoint
        Stem of the last checkpoint that this run wrote or started from.
    steps
        Optimiser steps done, resumed ones included.
    """

    history: list[dict]
    best: Optional[dict]
    checkpoint: Optional[str]
    steps: int


class Session:
    """One run of :func:`train_and_evaluate`: its position, and what moves it on.

    Parameters
    ----------
    learner
        What learns.
    train_data, val_data
        ``val_data`` may be None.
    schedule
        Learning rate of a step (from 1).
    options
        How the run is carried out.
    reporter
        Who hears of it.
    checkpoints
        Where it starts from and what it leaves.
    stop
        Who may end it.
    """

    def __init__(
        self,
        learner: Learner,
        train_data: BatchStream,
        val_data: Optional[BatchStream],
        schedule: Callable[[int], float],
        options: TrainOptions,
        reporter: Reporter,
        checkpoints: Checkpoints,
        stop: StopSignals,
    ) -> None:
        self.learner = learner
        self.group = learner.group
        self.train_data = train_data
        self.val_data = val_data
        self.schedule = schedule
        self.options = options
        self.run = options.run
        self.div = options.run.epoch_div_factor
        self.reporter = reporter
        self.checkpoints = checkpoints
        self.stop = stop
        self.task = learner.task
        self.metrics = StreamingMetrics(self.task)
        self.position = checkpoints.resume()
        # They are sums over all workers: one of them goes on with them.
        if self.position.totals is not None and self.group.is_main:
            self.metrics.restore(self.position.totals)

    @property
    def lr(self) -> float:
        """Learning rate of the step last done, or of the first one."""
        return self.schedule(max(self.position.step, 1))

    def enough(self) -> bool:
        """Return whether ``max_steps`` are done."""
        return self.run.max_steps is not None and self.position.step >= self.run.max_steps

    def done(self) -> bool:
        """Return whether the run has come to its end."""
        return self.position.epoch >= self.run.end_epoch or self.enough()

    def totals(self) -> dict[str, float]:
        """Return the metric sums of the logged epoch over all workers."""
        return self.group.sum_totals(self.metrics.totals())

    def check_finite(self) -> None:
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
        raise NonFiniteError(
            f"{what} (learning rate {lr:.4g}). {self.saved_last()} Try a smaller --lr-base or a "
            "longer warm-up."
        )

    def saved_last(self) -> str:
        """Say which checkpoint there is to go back to."""
        if self.checkpoints.last is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {self.checkpoints.last}."

    def save(self, path: str, together: bool = True) -> None:
        """Write a checkpoint unless this position has been saved or is the very start.

        Parameters
        ----------
        path
            From the store.
        together
            Whether all workers are here. If not, what needs the others is as it was when they
            last were: metric sums, and an optimiser's state that is on servers.
        """
        position, learner = self.position, self.learner
        if self.checkpoints.has(position):
            return
        self.check_finite()
        with self.group.heartbeat.phase("saving"):
            if together:
                position.totals = self.totals()
                learner.trainer.fetch(position.step)
            position.loss_scale = learner.scaler.state()
            self.checkpoints.save(path, position)

    def save_step(self, together: bool = True) -> None:
        """Write a checkpoint of the position within the logged epoch."""
        self.save(self.checkpoints.store.step_path(self.position.step), together)

    def agree(self, batches: list) -> int:
        """Agree on a step with the other workers; return how many samples it has.

        All of them hear of a signal at the same step: what each of them was doing else would
        leave some waiting for ever.
        """
        own = sum(data.shape[0] for data, _ in batches)
        samples, self.stop.agreed = self.group.agree(own, self.stop.number)
        self.group.heartbeat.tick("compute", self.position.step)
        return samples

    def obey(self, save: bool = True, together: bool = False) -> None:
        """If a signal came, save (unless told not to) and raise Interrupted.

        Parameters
        ----------
        save
            Whether there is something that could be saved.
        together
            Whether the workers just agreed on a step.
        """
        together = together and self.group.in_step
        number = self.stop.agreed if together else self.stop.number
        if number is None:
            return
        self.reporter.end_bar()
        if save:
            self.save_step(together or self.group.size == 1)
        if self.checkpoints.failure is not None:
            raise Interrupted(number, f"stopped; the last steps are lost. {self.saved_last()}")
        if self.checkpoints.last is None:
            raise Interrupted(number, "stopped; no step was done, nothing was saved")
        raise Interrupted(
            number,
            f"stopped after step {self.position.step}, saved as {self.checkpoints.last}. Continue "
            f"with: {self.options.continuation()}",
        )

    @contextlib.contextmanager
    def guarded_input(self) -> Iterator[None]:
        """Save what was learnt if reading fails; workers die of a signal to the whole group."""
        try:
            yield
        except Exception:
            self.obey()
            try:
                self.save_step(together=self.group.size == 1)
            except SaveError as error:
                LOGGER.error("%s", error)
            raise

    def train_step(self, batches: list) -> float:
        """Take one step on batches; return its learning rate."""
        position = self.position
        samples = self.agree(batches)
        step = position.step + 1
        lr = self.schedule(step)
        seed = derived_seed(self.run.random_seed, step, *self.group.seed)
        for result in self.learner.step(batches, lr, seed, samples):
            self.metrics.update(*result, step=step)
        ahead = STEPS_AHEAD * len(batches) * len(self.learner.contexts)
        self.metrics.wait_for_all_but(ahead)
        position.step = step
        position.batch += len(batches)
        self.reporter.advance(len(batches))
        return lr

    def train_epoch(self) -> bool:
        """Train to the end of the logged epoch (True), or until ``max_steps`` are done."""
        position, run = self.position, self.run
        pass_index, first, last = epoch_bounds(position.epoch, self.train_data.batches, self.div)
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
            self.group.heartbeat.tick("input", position.step)
            with self.guarded_input():
                batches = [self.train_data.need() for _ in range(chunk)]
            position.waited += time.perf_counter() - before
            lr = self.train_step(batches)
            due = position.batch % self.options.logging.log_frequency < chunk
            if due or position.batch == size or self.enough():
                self.check_finite()
                totals, now = sums(), time.perf_counter()
                speed = (totals["samples"] - printed["samples"]) / (now - printed_at)
                means = self.task.means(totals, printed)
                self.reporter.step_line(position, size, lr, speed, means)
                printed, printed_at = totals, now
            now = time.perf_counter()
            position.seconds, mark = position.seconds + now - mark, now
            every = self.options.checkpoints.save_every_steps
            # At the end of an epoch its own checkpoint follows at once, after the validation.
            if every and position.step % every == 0 and position.batch < size:
                self.save_step()
            self.obey(together=True)
        self.reporter.end_bar()
        self.check_finite()
        if position.batch == size:
            # From here to the epoch's end workers save by themselves, if they have to.
            position.totals = self.totals()
            self.learner.trainer.fetch(position.step)
        return position.batch == size

    def precise_bn(self) -> None:
        """Tune BatchNorm's gammas and betas, and estimate its statistics anew."""
        tune, estimate = self.options.precise_bn.precise_bn_batches
        epoch = self.position.epoch
        block, contexts = self.learner.block, self.learner.contexts
        self.reporter.start_bar(f"Epoch {epoch + 1} precise BN", tune + estimate)
        self.train_data.seek(PRECISE_BN_PASS + epoch, 0)

        def batches(count: int, offset: int, together: bool) -> Iterator[tuple[int, tuple]]:
            for index in range(count):
                # Between here and its own checkpoint there is nothing that could be saved.
                self.obey(save=False, together=together)
                parts = (epoch, offset + index, 1, *self.group.seed)
                self.group.heartbeat.tick("input")
                yield derived_seed(self.run.random_seed, *parts), self.train_data.need()
                self.reporter.advance()

        def inputs() -> Iterator[mx.nd.NDArray]:
            for seed, (data, _) in batches(estimate, tune, False):
                mx.random.seed(seed)
                yield data if isinstance(data, mx.nd.NDArray) else mx.nd.array(data)

        with only_trainable(block, affine_names(block)):
            for seed, batch in batches(tune, 0, True):
                samples = self.agree([batch])
                losses, _, _ = self.learner.step([batch], self.lr, seed, samples)[0]
                losses[0].wait_to_read()
        estimate_statistics(block, contexts, inputs(), self.learner.dtype)
        self.reporter.end_bar()
        self.check_finite()

    def validate(self) -> Optional[dict[str, float]]:
        """Return the validation's mean metrics, or None without validation data."""
        if self.val_data is None:
            return None
        div = self.div
        if self.run.val_batch_limit:
            div = max(div, -(-self.val_data.batches // self.run.val_batch_limit))
        runs = spread_batches(self.val_data.batches, div)
        metrics = StreamingMetrics(self.task)
        title = f"Epoch {self.position.epoch + 1} validation"
        self.reporter.start_bar(title, sum(stop - start for start, stop in runs))
        for start, stop in runs:
            self.val_data.seek(0, start, stop)
            for _ in range(start, stop):
                self.group.heartbeat.tick("validation")
                with self.guarded_input():
                    batch = self.val_data.read()
                if batch is not None:
                    metrics.update(*self.learner.predict(*batch))
                    metrics.wait_for_all_but(STEPS_AHEAD * len(self.learner.contexts))
                self.reporter.advance()
                self.obey()
        self.reporter.end_bar()
        totals = self.group.sum_totals(metrics.totals())
        if not totals["samples"]:
            LOGGER.warning(
                "epoch %d: none of its validation samples could be read; it has no validation "
                "figures",
                self.position.epoch + 1,
            )
            return None
        return self.task.means(totals)

    def row(self, validation: Optional[dict[str, float]], seconds: float) -> dict[str, Any]:
        """Return the history's row for the current logged epoch."""
        position = self.position
        totals = self.totals()
        train, measured = self.task.means(totals), validation or {}
        names = ("loss", *self.task.figures)
        return {
            "epoch": position.epoch + 1,
            "step": position.step,
            "lr": self.lr,
            **{f"train_{name}": train[name] for name in names},
            **{f"val_{name}": measured.get(name) for name in names},
            "train_seconds": round(position.seconds, 3),
            "val_seconds": round(seconds, 3) if measured else None,
            "samples_per_second": round(totals["samples"] / max(position.seconds, 1e-9), 3),
            "input_wait": round(position.waited / max(position.seconds, 1e-9), 4),
        }

    def run_epoch(self) -> list[dict]:
        """Do what is left of the logged epoch; save it, or the position within it.

        Returns
        -------
        list of dict
            The history, with a row for this epoch even if ``max_steps`` cut it short. Such a row
            is shown, but not kept in the checkpoint: it is made anew when the epoch ends.
        """
        position = self.position
        precise_bn = self.options.precise_bn.precise_bn
        complete = True
        if position.phase == "train":
            complete = self.train_epoch()
            if complete:
                position.phase = "precise_bn" if precise_bn else "validate"
            if not complete or precise_bn:
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
            if position.epoch % self.options.checkpoints.save_frequency == 0 or self.done():
                self.save(self.checkpoints.store.epoch_path(position.epoch))
        self.reporter.epoch_end(history)
        return history


def open_streams(
    train_data: Any, val_data: Any, div: int, group: Group
) -> tuple[BatchStream, Optional[BatchStream]]:
    """Return the data as streams of batches, once they are known to suffice."""
    train_stream = BatchStream(train_data, "training")
    val_stream = None
    if val_data is not None:
        val_stream = BatchStream(val_data, "validation", may_be_empty=group.size > 1)
    group.check_equal("the number of training batches", train_stream.batches)
    if div > train_stream.batches:
        raise UsageError(
            f"a pass of {train_stream.batches} batches cannot be divided into "
            f"{div} logged epochs: use a smaller batch or epoch_div_factor 1"
        )
    return train_stream, val_stream


def train_and_evaluate(
    block: mx.gluon.Block,
    train_data: Any,
    val_data: Any,
    options: TrainOptions,
    *,
    optimizer: mx.optimizer.Optimizer,
    schedule: Callable[[int], float],
    task: Optional[Task] = None,
    reporter: Optional[Reporter] = None,
    model: Optional[dict] = None,
    group: Optional[Group] = None,
) -> Summary:
    """Train a block, validate it after each logged epoch, and keep checkpoints.

    Parameters
    ----------
    block
        Maps data to what ``task`` takes: logits (n, classes); of type ``options.devices.dtype``,
        and initialised (deferred shapes are fine) on the devices that it is to learn on. Its
        ``symbol``, if it has one, is saved with the checkpoints.
    train_data, val_data
        Sized iterables of (data, label), see :class:`train.batches.BatchStream`; ``val_data`` may
        be None. Data (n, ...), labels (n,) or what else ``task`` takes.
    options
        How the run is carried out, all settled. If they have more groups than ``TrainOptions``,
        these are kept in the checkpoints and compared too.
    optimizer
        E.g. :class:`train.optimizer.NesterovSGD`; parameters bring their own ``lr_mult`` and
        ``wd_mult``.
    schedule
        Maps a step (from 1) to a learning rate; see ``train.schedule``.
    task
        What is learnt and measured; classification by default.
    reporter
        Writes history, curves and events; a default one under ``./exps/logs``.
    model
        Describes the network in the manifests (JSON values), see
        :class:`checkpoint.manifest.Manifest`.
    group
        The workers of a distributed run, from :func:`train.workers.join`; each has its own
        share of the data. Files are written by worker 0.

    Raises
    ------
    Interrupted
        After SIGINT or SIGTERM, once the run has been saved.
    NonFiniteError
        When the loss, a parameter or a gradient is no longer finite.
    CheckpointError
        When a checkpoint cannot be read, does not fit, or would be overwritten; SaveError when one
        cannot be written.
    """
    started = time.perf_counter()
    options.check()
    kept, group = options.checkpoints, group or Group()
    if is_distributed(options.devices.kv_store) and group.store is None:
        raise UsageError(
            f"{options.devices.kv_store} needs a group of workers: see train.workers.join"
        )
    reporter = reporter or Reporter(kept.task_name, files=group.is_main)
    train_stream, val_stream = open_streams(
        train_data, val_data, options.run.epoch_div_factor, group
    )
    contexts = contexts_of_block(block)
    learner = Learner(block, optimizer, contexts, options, task, group, schedule)
    checkpoints = Checkpoints(learner, options, model, train_stream.batches)
    with StopSignals() as stop, contextlib.ExitStack() as closing:
        closing.callback(train_stream.close)
        if val_stream is not None:
            closing.callback(val_stream.close)
        closing.callback(reporter.close)
        if group.is_main and not kept.share_task_name:
            closing.enter_context(task_lock(kept.model_dir, kept.task_name))
            checkpoints.store.clean()
        session = Session(
            learner, train_stream, val_stream, schedule, options, reporter, checkpoints, stop
        )
        position = session.position
        checkpoints.write_options()
        reporter.open(position.step)
        history = position.history
        if session.done():
            LOGGER.info("This run is already complete: step %d", position.step)
        while not session.done():
            history = session.run_epoch()
            session.obey()
        reporter.finish(history, checkpoints.last, started)
    if checkpoints.failure is not None:
        raise SaveError(
            f"The training is done, but its result could not be saved: {checkpoints.failure} "
            f"{session.saved_last()}"
        )
    return Summary(history, best_row(history), checkpoints.last, position.step)
