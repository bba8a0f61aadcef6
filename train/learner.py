"""A block on its devices: one training step, one prediction, and whether all is finite.

MXNet's random state cannot be saved. So every step reseeds MXNet with a function of the run's seed
and the step (1.5 ms on a CPU), which makes dropout and the like, and with them a resumed run, equal
to those of an uninterrupted run.
"""

import numpy as np

from glore_common import UsageError
from mxnet_compat import mx

from .checkpoint import named_parameters
from .loss import cross_entropy

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
    """

    def __init__(self, block, optimizer, contexts, run, batch_hook=None):
        self.block = block
        self.contexts = list(contexts)
        self.run = run
        self.batch_hook = batch_hook
        self.parameters = named_parameters(block)
        if run.accumulate > 1:
            for parameter in self.trainable():
                parameter.grad_req = "add"
        # Updating outside of the store keeps the learning rate in this process's hands.
        distributed = len(self.contexts) > 1 or run.kvstore.startswith("dist")
        self.trainer = mx.gluon.Trainer(
            list(self.parameters.values()),
            optimizer,
            kvstore=run.kvstore if distributed else None,
            update_on_kvstore=False,
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

    def step(self, batches, lr, seed):
        """Take one optimiser step on the mean loss of all samples of ``batches``.

        Parameters
        ----------
        batches : list of (NDArray, NDArray)
            Data and labels; more than one for gradient accumulation.
        lr : float
            Learning rate.
        seed : int
            Source of the step's randomness.

        Returns
        -------
        list of tuple
            (losses, outputs, labels), each a list by device, for each batch.
        """
        mx.random.seed(seed)
        generator = np.random.RandomState(seed)
        results, samples = [], 0
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
                scaled = [loss * self.run.loss_scale for loss in losses]
            mx.autograd.backward(scaled)
            samples += data.shape[0]
            results.append((losses, outputs, labels))
        self.trainer.set_learning_rate(lr)
        self.trainer.step(samples * self.run.loss_scale)
        if self.run.accumulate > 1:
            for parameter in self.trainable():
                parameter.zero_grad()
        return results

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
