"""A block on its devices: one training step, one prediction, and whether all is finite.

MXNet's random state cannot be saved. So every step reseeds MXNet with a function of the run's seed
and the step (1.5 ms on a CPU), which makes dropout and the like, and with them a resumed run, equal
to those of an uninterrupted run.
"""

import logging
from collections.abc import Iterable
from typing import Any, Callable, Optional

import numpy as np

from glore_common import UsageError
from mxnet_compat import mx

from .options import DYNAMIC, TrainOptions
from .server_side import StoreTrainer
from .state import STATISTICS, named_parameters
from .task import Classification, Task
from .workers import Group

LOGGER = logging.getLogger("glore.train")
# multi_all_finite copies its arguments into a fixed array (200 in MXNet 1.9.1) without a check.
FINITE_AT_ONCE = 100


# A training batch's (losses, outputs, labels), each a list by device.
Result = tuple[list, list, list]


def derived_seed(*parts: int) -> int:
    """Return a seed below 2**31 that depends on all of ``parts`` (whole numbers >= 0)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def all_finite(arrays: Iterable[mx.nd.NDArray]) -> bool:
    """Return whether no array holds a NaN or an infinity; arrays of any devices and types."""
    # The operator wants arrays of one device and, since it reads all as the first, of one type.
    alike: dict[tuple, list] = {}
    for array in arrays:
        alike.setdefault((array.context, array.dtype), []).append(array)
    flags = []
    for group in alike.values():
        for start in range(0, len(group), FINITE_AT_ONCE):
            part = group[start : start + FINITE_AT_ONCE]
            flags.append(mx.nd.multi_all_finite(*part, num_arrays=len(part)))
    return all(bool(flag.asscalar()) for flag in flags)


class LossScaler:
    """The scale of the loss, which keeps small gradients of float16 above zero.

    If dynamic, a step whose gradients overflow is left out and halves the scale; a run of steps
    without doubles it.

    Parameters
    ----------
    scale
        Where it starts.
    dynamic
        Whether it changes.
    """

    FIRST, LARGEST, STEPS = 2.0**16, 2.0**24, 2000

    def __init__(self, scale: float, dynamic: bool) -> None:
        self.scale = scale
        self.dynamic = dynamic
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Take note of whether a step's gradients were finite."""
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self.STEPS:
            self.scale, self.good_steps = min(self.scale * 2, self.LARGEST), 0

    def state(self) -> Optional[list]:
        """Return what a checkpoint keeps; None for a fixed scale."""
        return [self.scale, self.good_steps] if self.dynamic else None

    def restore(self, state: Optional[list]) -> None:
        """Continue from :meth:`state`."""
        if self.dynamic and state is not None:
            self.scale, self.good_steps = state


class Learner:
    """A block on its devices: training steps and predictions.

    Parameters
    ----------
    block
        Maps data to what ``task`` takes: logits (n, classes); initialised on ``contexts``.
    optimizer
        Its learning rate is set at each step.
    contexts
        Devices; each batch is split over them.
    options
        Those of ``devices``, and the label smoothing and accumulation of ``run``.
    task
        What is learnt; classification by default.
    group
        The workers, if there are several.
    schedule
        Learning rate of a step, from 1; needed if parameter servers update the weights.

    Attributes
    ----------
    steps
        Steps done; to be set when a run is resumed.
    """

    def __init__(
        self,
        block: mx.gluon.Block,
        optimizer: mx.optimizer.Optimizer,
        contexts: Iterable[mx.Context],
        options: TrainOptions,
        task: Optional[Task] = None,
        group: Optional[Group] = None,
        schedule: Optional[Callable[[int], float]] = None,
    ) -> None:
        scale = options.devices.loss_scale
        self.scaler = (
            LossScaler(LossScaler.FIRST, True)
            if scale == DYNAMIC
            else LossScaler(float(scale), False)
        )
        self.block = block
        self.group = group or Group()
        self.steps = 0
        self.contexts = list(contexts)
        self.dtype = options.devices.dtype
        self.label_smoothing = options.run.label_smoothing
        self.accumulate = options.run.accumulate
        self.clip_norm = options.schedule.clip_norm
        self.task = task or Classification()
        self.parameters = named_parameters(block)
        if self.accumulate > 1:
            for parameter in self.trainable():
                parameter.grad_req = "add"
        self.trainer = StoreTrainer(
            list(self.parameters.values()),
            optimizer,
            options.devices,
            len(self.contexts),
            self.group,
            schedule,
        )

    def trainable(self) -> list[mx.gluon.Parameter]:
        """Return the parameters that get a gradient."""
        return [value for value in self.parameters.values() if value.grad_req != "null"]

    def split(self, data: Any, label: Any, contexts: list[mx.Context]) -> tuple[list, list]:
        """Put a batch's parts on their devices; data in the block's type."""
        data = data if isinstance(data, mx.nd.NDArray) else mx.nd.array(data)
        label = label if isinstance(label, mx.nd.NDArray) else mx.nd.array(label)
        load = mx.gluon.utils.split_and_load
        return (
            load(data.astype(self.dtype, copy=False), contexts, even_split=False),
            load(label, contexts, even_split=False),
        )

    def step(
        self, batches: list, lr: float, seed: int, samples: Optional[int] = None
    ) -> list[Result]:
        """Take one optimiser step on the mean loss of all samples of ``batches``.

        Parameters
        ----------
        batches
            Data (NDArray) and labels; more than one for gradient accumulation.
        lr
            Learning rate.
        seed
            Source of the step's randomness.
        samples
            Samples of the step over all workers (:meth:`train.workers.Group.agree`); this
            worker's own by default.

        Returns
        -------
        list of Result
            One for each batch.
        """
        samples = samples or sum(data.shape[0] for data, _ in batches)
        scale = self.scaler.scale * self.trainer.weight_of(samples)
        results = self.backward(batches, seed, scale)
        self.trainer.set_learning_rate(lr)
        divisor = samples * scale
        self.trainer.start(divisor, self.steps)
        overflow = not self._update(divisor)
        self.steps += 1
        if self.accumulate > 1 or overflow:
            for parameter in self.trainable():
                parameter.zero_grad()
        return results

    def backward(self, batches: list, seed: int, scale: float = 1.0) -> list[Result]:
        """Compute the gradients of ``scale`` times the summed loss; results as of :meth:`step`."""
        mx.random.seed(seed)
        generator = np.random.RandomState(seed)
        results = []
        for data, label in batches:
            if data.shape[0] < len(self.contexts):
                raise UsageError(
                    f"a training batch has {data.shape[0]} samples for {len(self.contexts)} "
                    "devices: choose a larger batch, or drop the last one of a pass"
                )
            data, label = self.task.prepare(data, label, generator)
            parts, labels = self.split(data, label, self.contexts)
            with mx.autograd.record():
                outputs, losses = self._forward(parts, labels, self.label_smoothing)
                scaled = [loss * scale for loss in losses]
            mx.autograd.backward(scaled)
            results.append((losses, outputs, labels))
        return results

    def _update(self, divisor: float) -> bool:
        """Add up the gradients and update; return False if they overflowed and nothing was done."""
        if not self.scaler.dynamic and not self.clip_norm:
            self.trainer.step(divisor)
            return True
        # Added up they are the same for all workers, and so is what follows.
        self.trainer.allreduce_grads()
        finite = True
        if self.scaler.dynamic:
            finite = all_finite([g for p in self.trainable() for g in p.list_grad()])
            self.scaler.update(finite)
        if finite:
            # To divide by more is to scale down.
            excess = self._norm() / divisor / self.clip_norm if self.clip_norm else 1.0
            self.trainer.update(divisor * max(1.0, excess))
        else:
            LOGGER.info("Gradients overflowed: step left out, loss scale %g", self.scaler.scale)
        return finite

    def _norm(self) -> float:
        """Return the norm of all gradients together, of one device's copies."""
        squares = [
            p.list_grad()[0].astype("float32").square().sum().reshape((1,))
            for p in self.trainable()
        ]
        return float(mx.nd.concat(*squares, dim=0).sum().asscalar()) ** 0.5

    def share_statistics(self) -> None:
        """Give all workers worker 0's running statistics, which are those of its own data."""
        if self.group.size == 1:
            return
        shared = [p for name, p in self.parameters.items() if name.endswith(STATISTICS)]
        own = [parameter._reduce().asnumpy().reshape(-1) for parameter in shared]
        values = self.group.broadcast(np.concatenate(own) if own else [])
        for parameter in shared:
            size = int(np.prod(parameter.shape))
            part, values = values[:size], values[size:]
            # Not by set_data, which makes a trainer on a distributed store fail.
            for array in parameter.list_data():
                array[:] = mx.nd.array(part.reshape(parameter.shape), dtype=parameter.dtype)

    def predict(self, data: Any, label: Any) -> Result:
        """Return (losses, outputs, labels), each a list by device, in evaluation mode."""
        parts, labels = self.split(data, label, self.contexts[: data.shape[0]])
        with mx.autograd.predict_mode():
            outputs, losses = self._forward(parts, labels)
        return losses, outputs, labels

    def _forward(self, parts: list, labels: list, smoothing: float = 0.0) -> tuple[list, list]:
        """Return (outputs, losses), each a list by device."""
        pairs = [
            self.task.forward(self.block, part, target, smoothing)
            for part, target in zip(parts, labels)
        ]
        return [output for output, _ in pairs], [loss for _, loss in pairs]

    def is_finite(self) -> bool:
        """Return whether all parameters, running statistics and gradients are finite."""
        arrays = [array for value in self.parameters.values() for array in value.list_data()]
        for parameter in self.trainable():
            arrays += parameter.list_grad()
        return all_finite(arrays)
