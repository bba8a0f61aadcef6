"""A class for each pixel: loss over labelled pixels, pixel accuracy, intersection over union."""

import math
from typing import Any, Optional

import numpy as np

from mxnet_compat import mx

from .loss import log_probability_of
from .metric import iou_of
from .task import Task

# Pixels of this label are neither learnt nor counted.
IGNORED = 255


class Segmentation(Task):
    """Cross entropy over the labelled pixels of each image; mean IoU and pixel accuracy.

    The loss of an image is the mean over its labelled pixels (0, with gradient 0, where there is
    none), that of a step the mean over images: it does not depend on how a batch is divided
    between devices and workers. Losses of the outputs behind the first are added with a weight.

    Parameters
    ----------
    num_classes
    aux_weight
        Of an auxiliary output's loss.
    ohem
        Online hard example mining: 0 for none, else the share of an image's labelled pixels that
        are learnt at least. Besides these, the hardest, only pixels whose class has a probability
        below ``OHEM_PROBABILITY`` are.
    """

    figures = ("miou", "pixel_accuracy")
    OHEM_PROBABILITY = 0.7

    def __init__(self, num_classes: int, aux_weight: float = 0.4, ohem: float = 0.0) -> None:
        self.num_classes = num_classes
        self.aux_weight = aux_weight
        self.ohem = ohem
        self.sums = tuple(
            f"{what}_{index}"
            for what in ("hits", "labels", "found")
            for index in range(num_classes)
        )

    def loss(self, output: Any, label: mx.nd.NDArray, smoothing: float = 0.0) -> mx.nd.NDArray:
        """Return the loss of each image (n,): that of the first output, plus auxiliary ones.

        Parameters
        ----------
        output
            (n, classes, h, w) logits, or a list of such arrays.
        label
            (n, h, w), ``IGNORED`` where a pixel has none.
        smoothing
            See :func:`train.loss.cross_entropy`.
        """
        main, *others = output if isinstance(output, (list, tuple)) else [output]
        loss = self._of_pixels(main, label, smoothing)
        for other in others:
            loss = loss + self.aux_weight * self._of_pixels(other, label, smoothing)
        return loss

    def _of_pixels(self, logits: Any, label: Any, smoothing: float) -> mx.nd.NDArray:
        labelled = label != IGNORED
        # (n, classes, h, w), (n, h, w) -> (n, h, w); unlabelled pixels take any class here.
        loss = -log_probability_of(logits, label * labelled, smoothing) * labelled
        if self.ohem:
            with mx.autograd.pause():
                labelled = labelled * self._is_hard(loss, labelled)
            loss = loss * labelled
        count = labelled.sum(axis=(1, 2))
        return loss.sum(axis=(1, 2)) / mx.nd.maximum(count, 1)

    def _is_hard(self, loss: mx.nd.NDArray, labelled: mx.nd.NDArray) -> mx.nd.NDArray:
        """Return 1 for each pixel that is learnt, (n, h, w)."""
        pixels = loss.shape[1] * loss.shape[2]
        # Largest first; those without a label, which have loss 0, come last.
        ordered = mx.nd.sort(loss.reshape((0, -1)), axis=1, is_ascend=False)
        least = mx.nd.ceil(self.ohem * labelled.reshape((0, -1)).sum(axis=1)).clip(1, pixels)
        last = mx.nd.pick(ordered, least - 1, axis=1)
        bound = mx.nd.minimum(last, -math.log(self.OHEM_PROBABILITY))
        return mx.nd.broadcast_greater_equal(loss, bound.reshape((-1, 1, 1)))

    def count(self, output: Any, label: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        """Return, of each class, labelled pixels that are right, that have it, that are given it.

        Parameters
        ----------
        output, label
            As for :meth:`loss`; the first output counts.
        """
        logits = output[0] if isinstance(output, (list, tuple)) else output
        classes = self.num_classes
        found = logits.argmax(axis=1).astype("float32")
        labelled = label != IGNORED
        # Pairs (label, found) as numbers; what is outside the range of bins is not counted.
        pairs = (label * classes + found) * labelled - (1 - labelled)
        counts, _ = mx.nd.histogram(pairs, bins=classes**2, range=(-0.5, classes**2 - 0.5))
        matrix = counts.astype("float32").reshape((classes, classes))
        hits = (matrix * mx.nd.eye(classes, ctx=matrix.context)).sum(axis=0)
        return [hits, matrix.sum(axis=1), matrix.sum(axis=0)]

    def means(
        self, totals: dict[str, float], since: Optional[dict[str, float]] = None
    ) -> dict[str, float]:
        """Return the mean ``loss``, and ``miou`` and ``pixel_accuracy`` of all pixels."""
        means = super().means(totals, since)
        hits, labels, found = (
            np.array(
                [
                    totals[name] - (since[name] if since else 0)
                    for name in (f"{what}_{index}" for index in range(self.num_classes))
                ]
            )
            for what in ("hits", "labels", "found")
        )
        iou = iou_of(hits, labels, found)
        pixels = labels.sum()
        return {
            "loss": means["loss"],
            "miou": float(np.nanmean(iou)) if (~np.isnan(iou)).any() else math.nan,
            "pixel_accuracy": float(hits.sum() / pixels) if pixels else math.nan,
        }
