"""Learning-rate schedules with warm-up, as pure functions of the step.

The step schedule and its warm-up are those of the original project (facebookresearch/GloRe):
during the first ``warmup_steps`` steps the rate rises linearly from ``warmup_factor`` times its
base, and after that it is multiplied by ``factor`` once the step **exceeds** each entry of
``steps``. MXNet's own schedulers change their ``base_lr`` while they are called, so the rate they
give depends on the calls before; here the step alone decides, which is what makes a resumed run
equal to an uninterrupted one.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from glore_common import UsageError, closest_first
from mxnet_compat import mx

from .batches import epoch_bounds

if TYPE_CHECKING:
    from .options import TrainOptions


class Schedule(mx.lr_scheduler.LRScheduler):
    """Base of the schedules: warm-up, then :meth:`after_warmup`.

    Parameters
    ----------
    base_lr
        Learning rate after the warm-up.
    warmup_steps
        Number of steps over which the rate rises; 0 for none.
    warmup_factor
        Share of the rate that the warm-up starts from, above 0 to 1.
    """

    def __init__(self, base_lr: float, warmup_steps: int = 0, warmup_factor: float = 0.1) -> None:
        if not (math.isfinite(base_lr) and base_lr > 0):
            raise UsageError(f"the base learning rate must be above 0, not {base_lr}")
        if warmup_steps < 0:
            raise UsageError(f"the warm-up takes 0 or more steps, not {warmup_steps}")
        if not 0 < warmup_factor <= 1:
            raise UsageError(f"the warm-up factor must be above 0 and at most 1: {warmup_factor}")
        super().__init__(base_lr=base_lr, warmup_steps=int(warmup_steps))
        self.warmup_factor = warmup_factor

    def __call__(self, num_update: int) -> float:
        """Return the learning rate of step ``num_update`` (the first step is 1)."""
        rate = self.after_warmup(num_update)
        if num_update < self.warmup_steps:
            # Written with the gain (10 for a factor of 0.1), whose rounding is the original's.
            gain = 1 / self.warmup_factor
            rate = rate * (1 + (gain - 1) * num_update / self.warmup_steps) / gain
        return rate

    def after_warmup(self, step: int) -> float:
        """Return the learning rate of ``step`` without the warm-up."""
        raise NotImplementedError


class ConstantScheduler(Schedule):
    """The base rate throughout, after the warm-up."""

    def after_warmup(self, step: int) -> float:
        """Return the base rate."""
        return self.base_lr


class MultiFactorScheduler(Schedule):
    """Multiply the rate by ``factor`` after each of ``steps``.

    Parameters
    ----------
    base_lr, warmup_steps, warmup_factor
        See :class:`Schedule`.
    steps
        Increasing step numbers; step ``s + 1`` is the first with the smaller rate.
    factor
        What the rate is multiplied by.
    """

    def __init__(
        self,
        base_lr: float,
        steps: Sequence[int],
        factor: float = 0.1,
        warmup_steps: int = 0,
        warmup_factor: float = 0.1,
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_factor)
        steps = tuple(int(step) for step in steps)
        if any(step < 1 for step in steps) or list(steps) != sorted(set(steps)):
            raise UsageError(f"learning-rate steps must be positive and increase: {steps}")
        if factor <= 0:
            raise UsageError(f"the learning-rate factor must be above 0, not {factor}")
        self.steps = steps
        self.factor = factor

    def after_warmup(self, step: int) -> float:
        """Return the base rate times ``factor`` for each boundary that lies behind ``step``."""
        rate = self.base_lr
        for boundary in self.steps:
            if step > boundary:
                rate *= self.factor
        return rate


class _Decay(Schedule):
    """A rate that falls from the base to ``final_lr`` between the warm-up and ``total_steps``."""

    def __init__(
        self,
        base_lr: float,
        total_steps: int,
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_factor: float = 0.1,
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_factor)
        if total_steps <= warmup_steps:
            raise UsageError(
                f"the schedule's {total_steps} steps must outnumber the {warmup_steps} of its "
                "warm-up: train longer or warm up for less"
            )
        if not 0 <= final_lr <= base_lr:
            raise UsageError(f"the final rate {final_lr} must lie between 0 and {base_lr}")
        self.total_steps = int(total_steps)
        self.final_lr = final_lr

    def after_warmup(self, step: int) -> float:
        """Return the rate at ``step``; the base before the warm-up's end, the final one after."""
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        share = self.remaining(min(max(done, 0.0), 1.0))
        return self.final_lr + (self.base_lr - self.final_lr) * share

    def remaining(self, done: float) -> float:
        """Return the share of the way down that is left when the share ``done`` has passed."""
        raise NotImplementedError


class PolyScheduler(_Decay):
    """Polynomial decay: ``final + (base - final) * (1 - done) ** power``."""

    def __init__(
        self,
        base_lr: float,
        total_steps: int,
        power: float = 0.9,
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_factor: float = 0.1,
    ) -> None:
        super().__init__(base_lr, total_steps, final_lr, warmup_steps, warmup_factor)
        self.power = power

    def remaining(self, done: float) -> float:
        """Return ``(1 - done) ** power``."""
        return (1 - done) ** self.power


class CosineScheduler(_Decay):
    """Half a cosine: ``final + (base - final) * (1 + cos(pi * done)) / 2``."""

    def remaining(self, done: float) -> float:
        """Return ``(1 + cos(pi * done)) / 2``."""
        return (1 + math.cos(math.pi * done)) / 2


SCHEDULES = ("step", "poly", "cosine", "constant")


def steps_from_samples(samples: Sequence[float], batch_size: int) -> tuple[int, ...]:
    """Turn sample counts into step numbers for batches of ``batch_size`` (rounded down).

    ``--lr-steps`` counts samples, so that the schedule does not depend on the batch size.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size must be 1 or more, not {batch_size}")
    return tuple(int(count / batch_size) for count in samples)


def make_schedule(
    name: str,
    base_lr: float,
    steps: Sequence[int] = (),
    factor: float = 0.1,
    total_steps: Optional[int] = None,
    power: float = 0.9,
    final_lr: float = 0.0,
    warmup_steps: int = 0,
    warmup_factor: float = 0.1,
) -> Schedule:
    """Return the schedule ``name``.

    Parameters
    ----------
    name
        One of :data:`SCHEDULES`.
    base_lr, warmup_steps, warmup_factor
        See :class:`Schedule`.
    steps, factor
        For ``step``, see :class:`MultiFactorScheduler`.
    total_steps
        For ``poly`` and ``cosine``: the step at which ``final_lr`` is reached.
    power, final_lr
        For ``poly`` and ``cosine``.
    """
    warmup = (warmup_steps, warmup_factor)
    if name == "step":
        return MultiFactorScheduler(base_lr, steps, factor, *warmup)
    if name == "constant":
        return ConstantScheduler(base_lr, *warmup)
    if name not in SCHEDULES:
        known = ", ".join(closest_first(name, SCHEDULES))
        raise UsageError(f"unknown learning-rate schedule {name!r}; known are {known}")
    if total_steps is None:
        raise UsageError(f"the schedule {name!r} needs the total number of steps")
    if name == "poly":
        return PolyScheduler(base_lr, total_steps, power, final_lr, *warmup)
    return CosineScheduler(base_lr, total_steps, final_lr, *warmup)


def schedule_for(
    options: "TrainOptions", train_batches: int, batch_size: int, workers: int = 1
) -> Schedule:
    """Return the schedule that the options ask for.

    Parameters
    ----------
    options
        All settled: ``end_epoch``, ``epoch_div_factor`` and the learning rate are numbers.
    train_batches
        Batches of a pass over one worker's share of the training data.
    batch_size
        Samples of a batch of one worker.
    workers
        How many there are.
    """
    plan, run = options.schedule, options.run
    div = run.epoch_div_factor

    def steps(logged_epochs: int) -> int:
        bounds = (epoch_bounds(epoch, train_batches, div) for epoch in range(logged_epochs))
        return sum(-(-(last - first) // run.accumulate) for _, first, last in bounds)

    per_pass = steps(div)
    if plan.lr_step_epochs is not None:
        lr_steps = tuple(int(passes * per_pass) for passes in plan.lr_step_epochs)
    else:
        lr_steps = steps_from_samples(plan.lr_steps or (), batch_size * run.accumulate * workers)
    warmup_steps = plan.warmup_steps or 0
    if plan.warmup_epochs is not None:
        warmup_steps = int(plan.warmup_epochs * per_pass)
    return make_schedule(
        plan.lr_schedule,
        plan.lr_base * (workers if options.devices.lr_scaling == "linear" else 1),
        steps=lr_steps,
        factor=plan.lr_factor,
        total_steps=steps(run.end_epoch),
        power=plan.lr_power,
        final_lr=plan.lr_final,
        warmup_steps=warmup_steps,
        warmup_factor=plan.warmup_factor,
    )
