"""Trying a training: one batch (``--dry-run``), or the speed of steps on one batch."""

import logging
import time
from collections.abc import Iterable
from typing import Any, Callable

from mxnet_compat import mx

from .step import Learner

LOGGER = logging.getLogger("glore.train")


def dry_run(
    learner: Learner, loader: Iterable, schedule: Callable[[int], float], seed: int
) -> None:
    """Train one batch, say how it went, and write nothing."""
    started = time.perf_counter()
    batch = next(iter(loader))
    read = time.perf_counter()
    samples, _ = learner.group.agree(batch[0].shape[0], None)
    results = learner.step([batch], schedule(1), seed, samples)
    loss = sum(float(loss.sum().asscalar()) for losses, _, _ in results for loss in losses)
    done = time.perf_counter()
    LOGGER.info(
        "One batch: loss %.4f, %.1f s to read, %.1f s to train. Nothing was written.",
        loss / batch[0].shape[0],
        read - started,
        done - read,
    )


def benchmark(
    learner: Learner,
    batch: tuple[Any, Any],
    schedule: Callable[[int], float],
    seed: int,
    steps: int,
) -> float:
    """Time training steps on one batch that stays in memory, and log samples per second.

    Parameters
    ----------
    learner
        Of one of the workers, which all do this.
    batch
        Data and labels.
    schedule
        Learning rate of a step, from 1.
    seed
        Source of the steps' randomness.
    steps
        How many; the first ones (a fifth, at most 10, and one at least where there are two) are
        not timed.

    Returns
    -------
    float
        Samples per second over all workers, the mean over the timed steps.
    """
    warmup = min(max(1, steps // 5), 10, steps - 1)
    batches = [batch] * learner.accumulate
    started, loss = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        samples, _ = learner.group.agree(batch[0].shape[0] * learner.accumulate, None)
        results = learner.step(batches, schedule(step), seed, samples)
        if step in (warmup, steps):
            # Else steps are queued, as in training.
            loss = sum(float(loss.sum().asscalar()) for loss in results[-1][0])
            mx.nd.waitall()
        if step == warmup:
            started = time.perf_counter()
    seconds = (time.perf_counter() - started) / (steps - warmup)
    LOGGER.info(
        "Benchmark  %.2f samples/s in training: %.3f s a step of %d, mean of %d steps after %d of "
        "warm-up; loss %.4f. Nothing was read or written.",
        samples / seconds,
        seconds,
        samples,
        steps - warmup,
        warmup,
        loss / batch[0].shape[0],
    )
    return samples / seconds
