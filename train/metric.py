"""Loss and top-k accuracy that leave the device unhindered, and a confusion matrix.

MXNet's own metrics fetch their inputs at every update, which stops the device each time. Here an
update only queues a few small operators; figures are fetched when somebody looks.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from glore_common import UsageError
from mxnet_compat import mx

if TYPE_CHECKING:
    from .task import Task


def top_k_hits(logits: mx.nd.NDArray, label: mx.nd.NDArray, top_k: Sequence[int]) -> list:
    """Return how many samples of a batch have their class among the ``k`` highest logits.

    Equal logits rank by class index. A row with a logit that is not a number counts as a miss.
    With fewer than ``k`` classes every (finite) row is a hit.

    Parameters
    ----------
    logits
        (n, classes).
    label
        (n,) class indices, or (n, classes) distributions, whose largest entry counts.
    top_k
        The values of k.

    Returns
    -------
    list of NDArray
        One array of shape (1,) for each k.
    """
    logits = logits.astype("float32")
    if label.ndim > 1:
        label = label.argmax(axis=1)
    label = label.astype("float32")
    classes = logits.shape[1]
    own = mx.nd.pick(logits, label, axis=1, keepdims=True)
    number = mx.nd.arange(classes, ctx=logits.context).reshape((1, -1))
    # A comparison with NaN is false: `not (x <= own)` lets NaN push the class down, not up.
    above = 1 - mx.nd.broadcast_lesser_equal(logits, own)
    before = mx.nd.broadcast_equal(logits, own) * mx.nd.broadcast_lesser(
        number, label.reshape((-1, 1))
    )
    rank = (above + before).sum(axis=1)
    return [(rank < min(k, classes)).sum() for k in top_k]


class StreamingMetrics:
    """Mean loss and the figures of a task over batches.

    Batch sums wait on their device until :meth:`totals` fetches them; they are added in double
    precision and in order, so that the result does not depend on when somebody looked.

    Parameters
    ----------
    task
        What is measured.
    """

    def __init__(self, task: "Task") -> None:
        self.task = task
        self.names = ("loss", *task.sums)
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self._waiting: list = []
        self._totals = {"samples": 0, **dict.fromkeys(self.names, 0.0)}
        self.first_bad: Optional[int] = None

    def update(self, losses: list, outputs: list, labels: list, step: Optional[int] = None) -> None:
        """Queue a batch.

        Parameters
        ----------
        losses
            Per-sample losses (n,), one array per device.
        outputs, labels
            See :meth:`train.task.Task.count`, one of each per device.
        step
            Named by ``first_bad`` if the batch's loss is not finite.
        """
        for loss, output, label in zip(losses, outputs, labels):
            parts = [loss.astype("float32").sum(), *self.task.count(output, label)]
            sums = mx.nd.concat(*(part.reshape((-1,)) for part in parts), dim=0)
            self._waiting.append((step, loss.shape[0], sums))

    def wait_for_all_but(self, count: int) -> None:
        """Block until all but the last ``count`` queued sums have been computed.

        Bounds how far Python may run ahead of the device, and the input that waits in memory.
        """
        if len(self._waiting) > count:
            self._waiting[-1 - count][2].wait_to_read()

    def totals(self) -> dict[str, float]:
        """Fetch what is queued and return the sums since the start.

        Returns
        -------
        dict
            ``samples``, ``loss`` and the task's sums.
        """
        for step, samples, sums in self._waiting:
            values = sums.asnumpy().astype("float64")
            if self.first_bad is None and not np.isfinite(values[0]):
                self.first_bad = step
            self._totals["samples"] += samples
            for name, value in zip(self.names, values):
                self._totals[name] += float(value)
        self._waiting = []
        return dict(self._totals)

    def restore(self, totals: dict[str, float]) -> None:
        """Continue from sums that :meth:`totals` returned earlier."""
        if set(totals) != {"samples", *self.names}:
            raise UsageError(f"metric sums {sorted(totals)} do not fit {sorted(self.names)}")
        self.reset()
        self._totals = dict(totals)

    def means(self, since: Optional[dict[str, float]] = None) -> dict[str, float]:
        """Return loss and figures since the start, or since the sums ``since``."""
        return self.task.means(self.totals(), since)


def means_of(
    totals: dict[str, float], since: Optional[dict[str, float]] = None
) -> dict[str, float]:
    """Turn sums of :meth:`StreamingMetrics.totals` into means, less the earlier sums ``since``."""
    since = since or dict.fromkeys(totals, 0)
    samples = totals["samples"] - since["samples"]
    return {
        name: (totals[name] - since[name]) / samples if samples else math.nan
        for name in totals
        if name != "samples"
    }


def iou_of(hits: np.ndarray, labels: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class; NaN for one that never came up.

    Parameters
    ----------
    hits, labels, found
        (classes,) numbers of pixels that are right, that have the class, and that are given it.
    """
    union = labels + found - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


class ConfusionMatrix:
    """Counts of (true class, predicted class), and what follows from them.

    Parameters
    ----------
    num_classes
        Number of classes.

    Attributes
    ----------
    matrix
        (classes, classes) int64; a row is a true class, a column a predicted one.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError(f"a confusion matrix needs 1 class or more, not {num_classes}")
        self.num_classes = num_classes
        self.matrix = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, labels: Any, predictions: Any) -> None:
        """Count pairs of class indices; any integer arrays of one length."""
        pairs = []
        for name, values in (("label", labels), ("prediction", predictions)):
            values = np.asarray(values).reshape(-1).astype(np.int64)
            outside = values[(values < 0) | (values >= self.num_classes)]
            if outside.size:
                raise UsageError(
                    f"{name} {outside[0]} is not one of the {self.num_classes} classes "
                    f"0 to {self.num_classes - 1}"
                )
            pairs.append(values)
        if pairs[0].size != pairs[1].size:
            raise UsageError(f"{pairs[0].size} labels, but {pairs[1].size} predictions")
        flat = np.bincount(pairs[0] * self.num_classes + pairs[1], minlength=self.matrix.size)
        self.matrix += flat.reshape(self.matrix.shape)

    def accuracy(self) -> float:
        """Return the share of right predictions; NaN before the first one."""
        total = self.matrix.sum()
        return float(np.trace(self.matrix) / total) if total else math.nan

    def per_class(self) -> np.ndarray:
        """Return each class's share of right predictions, (classes,); NaN where it never came."""
        counts = self.matrix.sum(axis=1)
        right = np.diag(self.matrix).astype(np.float64)
        return np.divide(right, counts, out=np.full(self.num_classes, np.nan), where=counts > 0)

    def iou(self) -> np.ndarray:
        """Return each class's :func:`iou_of`, (classes,)."""
        return iou_of(np.diag(self.matrix), self.matrix.sum(axis=1), self.matrix.sum(axis=0))

    def mean_iou(self) -> float:
        """Return the mean of :meth:`iou` over the classes that came up."""
        values = self.iou()
        seen = ~np.isnan(values)
        return float(values[seen].mean()) if seen.any() else math.nan

    def mean_class_accuracy(self) -> float:
        """Return the mean of :meth:`per_class` over the classes that came up."""
        values = self.per_class()
        seen = ~np.isnan(values)
        return float(values[seen].mean()) if seen.any() else math.nan
