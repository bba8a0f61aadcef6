"""What a network learns: its loss, what is measured beside it, and how batches are prepared.

The loop (:mod:`train.loop`) knows no task. A new kind of label or loss is one class here or in a
module of its own: :class:`train.segmentation.Segmentation` has a class for each pixel.
"""

from collections.abc import Sequence
from typing import Any, Callable, Optional

import numpy as np

from mxnet_compat import mx

from .loss import cross_entropy
from .metric import means_of, top_k_hits


class Task:
    """Base of the tasks.

    Attributes
    ----------
    sums
        Names of what :meth:`count` adds up over samples.
    figures
        Names of what :meth:`means` makes of the sums, besides ``loss``; larger is better, but for
        parts of the loss, which are called ``loss-…``. The first one chooses the best epoch.
    """

    sums: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()

    def prepare(self, data: Any, label: Any, generator: np.random.RandomState) -> tuple[Any, Any]:
        """Return a training batch as it is learnt; all randomness is ``generator``'s."""
        return data, label

    def forward(
        self, block: Any, data: Any, label: mx.nd.NDArray, smoothing: float = 0.0
    ) -> tuple[Any, mx.nd.NDArray]:
        """Return what ``block`` makes of a device's part of a batch, and the :meth:`loss` of it.

        A task whose loss needs more of the block than its output does both here.
        """
        output = block(data)
        return output, self.loss(output, label, smoothing)

    def loss(self, output: Any, label: mx.nd.NDArray, smoothing: float = 0.0) -> mx.nd.NDArray:
        """Return the loss of each sample (n,), float32.

        Parameters
        ----------
        output
            What the block computes on one device: an array, or a list where it has several outputs.
        label
            Of the same samples.
        smoothing
            Label smoothing; 0 outside of training.
        """
        raise NotImplementedError

    def count(self, output: Any, label: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        """Return the :attr:`sums` of a batch: arrays that joined have one number for each."""
        raise NotImplementedError

    def means(
        self, totals: dict[str, float], since: Optional[dict[str, float]] = None
    ) -> dict[str, Any]:
        """Return ``loss`` and the :attr:`figures` of sums, less the earlier sums ``since``.

        ``totals`` has ``samples``, ``loss`` and :attr:`sums`. NaN where there is no sample, None
        for a figure that is not measured there.
        """
        return means_of(totals, since)


class Classification(Task):
    """One class for each sample: cross entropy, and the shares of samples among the top k.

    Parameters
    ----------
    batch_hook
        ``hook(data, label, numpy.random.RandomState) -> data, label`` on each training batch,
        e.g. :class:`train.loss.Mixup`.
    top_k
        Which accuracies to measure.
    """

    def __init__(
        self, batch_hook: Optional[Callable] = None, top_k: Sequence[int] = (1, 5)
    ) -> None:
        self.batch_hook = batch_hook
        self.top_k = tuple(top_k)
        self.sums = self.figures = tuple(f"top{k}" for k in self.top_k)

    def prepare(self, data: Any, label: Any, generator: np.random.RandomState) -> tuple[Any, Any]:
        """Return what the hook makes of the batch."""
        return self.batch_hook(data, label, generator) if self.batch_hook else (data, label)

    def loss(self, output: Any, label: mx.nd.NDArray, smoothing: float = 0.0) -> mx.nd.NDArray:
        """Return :func:`train.loss.cross_entropy`."""
        return cross_entropy(output, label, smoothing)

    def count(self, output: Any, label: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        """Return :func:`train.metric.top_k_hits`."""
        return top_k_hits(output, label, self.top_k)
