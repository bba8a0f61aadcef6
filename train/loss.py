"""Cross entropy on class indices or on distributions, label smoothing, and mixup.

Mixup: Zhang et al., ICLR 2018 (arXiv 1710.09412). Label smoothing: Szegedy et al., CVPR 2016.
"""

import numpy as np

from glore_common import UsageError
from mxnet_compat import mx


def log_probability_of(
    logits: mx.nd.NDArray, label: mx.nd.NDArray, smoothing: float = 0.0
) -> mx.nd.NDArray:
    """Return the logarithm of the probability of each target, in float32.

    Parameters
    ----------
    logits
        (n, classes, …), any float type.
    label
        (n, …) class indices.
    smoothing
        As for :func:`cross_entropy`.

    Returns
    -------
    NDArray
        (n, …).
    """
    log_probability = mx.nd.log_softmax(logits.astype("float32"), axis=1)
    picked = mx.nd.pick(log_probability, label, axis=1)
    if not smoothing:
        return picked
    return (1 - smoothing) * picked + smoothing * log_probability.mean(axis=1)


def cross_entropy(
    logits: mx.nd.NDArray, label: mx.nd.NDArray, smoothing: float = 0.0
) -> mx.nd.NDArray:
    """Return the cross entropy of each sample, in float32.

    Parameters
    ----------
    logits
        (n, classes), any float type.
    label
        (n,) class indices, or (n, classes) target distributions.
    smoothing
        Share of each target that is spread evenly over all classes, 0 to below 1.

    Returns
    -------
    NDArray
        (n,), not averaged.
    """
    if label.ndim == 1:
        return -log_probability_of(logits, label, smoothing)
    log_probability = mx.nd.log_softmax(logits.astype("float32"), axis=1)
    loss = -(log_probability * label).sum(axis=1)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_probability.mean(axis=1)
    return loss


class ClassWeights:
    """Weigh each sample by how few its class has.

    An instance is a ``batch_hook`` of :class:`train.task.Classification`.

    Parameters
    ----------
    labels
        Of all training samples.
    num_classes
    """

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        counts = np.bincount(labels, minlength=num_classes)
        # The mean over all samples is 1, so that the learning rate means what it did.
        self.weights = len(labels) / np.count_nonzero(counts) / np.maximum(counts, 1)

    def __call__(
        self, data: mx.nd.NDArray, label: mx.nd.NDArray, generator: np.random.RandomState
    ) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return the data and (n, classes) targets, of which each row sums up to its weight."""
        del generator
        weights = mx.nd.array(self.weights, ctx=label.context)
        return data, mx.nd.one_hot(label, len(self.weights)) * weights.take(label).expand_dims(1)


class Mixup:
    """Blend each sample and its target with those of another sample of the batch.

    An instance is a ``batch_hook`` of :class:`train.task.Classification`.

    Parameters
    ----------
    alpha
        Both parameters of the Beta distribution that the shares are drawn from.
    num_classes
        Length of the targets.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        if alpha <= 0:
            raise UsageError(f"mixup's alpha must be above 0, not {alpha}")
        self.alpha = alpha
        self.num_classes = num_classes

    def __call__(
        self, data: mx.nd.NDArray, label: mx.nd.NDArray, generator: np.random.RandomState
    ) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return blended data and (n, classes) targets.

        Parameters
        ----------
        data
            (n, ...).
        label
            (n,) class indices.
        generator
            Where the shares and partners come from.
        """
        share = float(generator.beta(self.alpha, self.alpha))
        partner = mx.nd.array(generator.permutation(data.shape[0]), dtype="int32")
        target = mx.nd.one_hot(label, self.num_classes)
        return (
            share * data + (1 - share) * data.take(partner),
            share * target + (1 - share) * target.take(partner),
        )
