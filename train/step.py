"""A block on its devices: one training step, one prediction, and whether all is finite.

MXNet's random state cannot be saved. So every step reseeds MXNet with a function of the run's seed
and the step (1.5 ms on a CPU), which makes dropout and the like, and with them a resumed run, equal
to those of an uninterrupted run.
"""

import logging

import numpy as np

from checkpoint.store import STATISTICS, named_parameters
from glore_common import UsageError
from mxnet_compat import mx

from .loss import cross_entropy
from .server_side import StoreTrainer
from .workers import Group

LOGGER = logging.getLogger("glore.train")
# multi_all_finite copies its arguments into a fixed array (200 in MXNet 1.9.1) without a check.
FINITE_AT_ONCE = 100


def derived_seed(*parts):
    """Return a seed below 2**31 that depends on all of ``parts`` (whole numbers >= 0)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def all_finite(arrays):
    """Return whether no array holds a NaN or an infinity; arrays of any number of devices."""
    by_context = {}
    for array in arrays:
        by_context.setdefault(array.context, []).append(array)
    flags = []
    for group in by_context.values():
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
    scale : float
        Where it starts.
    dynamic : bool
        Whether it changes.
    """

    STEPS, LARGEST = 2000, 2.0**24

    def __init__(self, scale, dynamic):
        self.scale = scale
        self.dynamic = dynamic
        self.good_steps = 0

    def update(self, finite):
        """Take note of whether a step's gradients were finite."""
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self.STEPS:
            self.scale, self.good_steps = min(self.scale * 2, self.LARGEST), 0

    def state(self):
        """Return what a checkpoint keeps; None for a fixed scale."""
        return [self.scale, self.good_steps] if self.dynamic else None

    def restore(self, state):
        """Continue from :meth:`state`."""
        if self.dynamic and state is not None:
            self.scale, self.good_steps = state


class Learner:
    """A block on its devices: training steps and predictions.

    Parameters
    ----------
    block : mxnet.gluon.Block
        Maps data to logits (n, classes); initialised on ``contexts``.
    optimizer : mxnet.optimizer.Optimizer
        Its learning rate is set at each step.
    contexts : list of mxnet.Context
        Devices; each batch is split over them.
    run : RunConfig
        Seed, type, loss and accumulation.
    batch_hook : callable, optional
        ``hook(data, label, numpy.random.RandomState) -> data, label`` on each training batch,
        e.g. :class:`train.loss.Mixup`.
    group : train.workers.Group, optional
        The workers, if there are several.
    schedule : callable, optional
        Learning rate of a step, from 1; needed if parameter servers update the weights.

    Attributes
    ----------
    steps : int
        Steps done; to be set when a run is resumed.
    """

    def __init__(self, block, optimizer, contexts, run, batch_hook=None, group=None, schedule=None):
        self.block = block
        self.group = group or Group()
        self.steps = 0
        self.scaler = LossScaler(run.loss_scale, run.dynamic_loss_scale)
        self._step_samples = None
        self.contexts = list(contexts)
        self.run = run
        self.batch_hook = batch_hook
        self.parameters = named_parameters(block)
        if run.accumulate > 1:
            for parameter in self.trainable():
                parameter.grad_req = "add"
        kvstore = self.group.store
        if kvstore is None and len(self.contexts) > 1:
            kvstore = run.kvstore
        if run.compression is not None and self.group.store is not None:
            self.group.compress(run.compression)
        self.trainer = StoreTrainer(
            list(self.parameters.values()),
            optimizer,
            kvstore,
            kvstore is not None and (run.update_on_kvstore or self.group.asynchronous),
            self.group,
            schedule,
        )

    def trainable(self):
        """Return the parameters that get a gradient."""
        return [value for value in self.parameters.values() if value.grad_req != "null"]

    def split(self, data, label, contexts):
        """Put a batch's parts on their devices; data in the block's type."""
        data = data if isinstance(data, mx.nd.NDArray) else mx.nd.array(data)
        label = label if isinstance(label, mx.nd.NDArray) else mx.nd.array(label)
        load = mx.gluon.utils.split_and_load
        return (
            load(data.astype(self.run.dtype, copy=False), contexts, even_split=False),
            load(label, contexts, even_split=False),
        )

    def step(self, batches, lr, seed, samples=None):
        """Take one optimiser step on the mean loss of all samples of ``batches``.

        Parameters
        ----------
        batches : list of (NDArray, NDArray)
            Data and labels; more than one for gradient accumulation.
        lr : float
            Learning rate.
        seed : int
            Source of the step's randomness.
        samples : int, optional
            Samples of the step over all workers (:meth:`train.workers.Group.agree`); this
            worker's own by default.

        Returns
        -------
        list of tuple
            (losses, outputs, labels), each a list by device, for each batch.
        """
        samples = samples or sum(data.shape[0] for data, _ in batches)
        # The rate at which servers rescale is fixed by the first step: another size is made up
        # for here.
        self._step_samples = self._step_samples or samples
        scale = self.scaler.scale
        if self.trainer.remote:
            scale *= self._step_samples / samples
        results = self.backward(batches, seed, scale)
        self.trainer.set_learning_rate(lr)
        divisor = (self._step_samples if self.trainer.remote else samples) * self.scaler.scale
        self.trainer.start(divisor, self.steps)
        overflow = not self._update(divisor)
        self.steps += 1
        if self.run.accumulate > 1 or overflow:
            for parameter in self.trainable():
                parameter.zero_grad()
        return results

    def backward(self, batches, seed, scale=1.0):
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
            if self.batch_hook is not None:
                data, label = self.batch_hook(data, label, generator)
            parts, labels = self.split(data, label, self.contexts)
            with mx.autograd.record():
                outputs = [self.block(part) for part in parts]
                losses = [
                    cross_entropy(output, target, self.run.label_smoothing)
                    for output, target in zip(outputs, labels)
                ]
                scaled = [loss * scale for loss in losses]
            mx.autograd.backward(scaled)
            results.append((losses, outputs, labels))
        return results

    def _update(self, divisor):
        """Add up the gradients and update; return False if they overflowed and nothing was done."""
        if not self.scaler.dynamic:
            self.trainer.step(divisor)
            return True
        # Added up they are the same for all workers, and so is what follows.
        self.trainer.allreduce_grads()
        finite = all_finite([g for p in self.trainable() for g in p.list_grad()])
        self.scaler.update(finite)
        if finite:
            self.trainer.update(divisor)
        else:
            LOGGER.info("Gradients overflowed: step left out, loss scale %g", self.scaler.scale)
        return finite

    def share_statistics(self):
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

    def predict(self, data, label):
        """Return (losses, outputs, labels), each a list by device, in evaluation mode."""
        parts, labels = self.split(data, label, self.contexts[: data.shape[0]])
        with mx.autograd.predict_mode():
            outputs = [self.block(part) for part in parts]
        losses = [cross_entropy(output, target) for output, target in zip(outputs, labels)]
        return losses, outputs, labels

    def is_finite(self):
        """Return whether all parameters, running statistics and gradients are finite."""
        arrays = [array for value in self.parameters.values() for array in value.list_data()]
        for parameter in self.trainable():
            arrays += parameter.list_grad()
        return all_finite(arrays)
