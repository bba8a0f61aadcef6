"""Scores of samples that are seen in several views, and the figures that follow from them.

A view is a clip of a video or a crop of an image. The softmax scores of a sample's views are
averaged, as the authors of GloRe (Chen et al., CVPR 2019) test at video level. All of it is done
with logarithms in float64: a probability that float32 cannot hold still has its cross entropy, and
a test of one view has the loss of the training's validation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from glore_common import GloReError, progress
from mxnet_compat import mx

from .metric import ConfusionMatrix

TOP = 5


class Score(NamedTuple):
    """What became of a sample.

    Attributes
    ----------
    label
        Its class.
    log_mean
        Logarithms of the mean probabilities over its views: (classes,), float64.
    views
        How many there were.
    """

    label: int
    log_mean: np.ndarray
    views: int

    @property
    def mean(self) -> np.ndarray:
        """The mean probabilities: (classes,)."""
        return np.exp(self.log_mean)


Scores = dict[int, Score]


def predictor(
    block: mx.gluon.Block, contexts: list[mx.Context]
) -> Callable[[mx.nd.NDArray], np.ndarray]:
    """Return a function from a batch (n, ...) to logits (n, classes) as a NumPy array.

    Parameters
    ----------
    block
        Gives logits (n, classes).
    contexts
        Each batch is split over these.
    """

    def predict(data: mx.nd.NDArray) -> np.ndarray:
        split = mx.gluon.utils.split_and_load
        parts = split(data, contexts[: data.shape[0]], even_split=False)
        outputs = [block(part).astype("float32") for part in parts]
        return np.concatenate([output.asnumpy() for output in outputs])

    return predict


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the softmax over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def average_scores(
    predict: Callable[[mx.nd.NDArray], np.ndarray],
    batches: Iterable,
    total: Optional[int] = None,
    limit: Optional[int] = None,
) -> Scores:
    """Return the mean scores of each sample over its views.

    Parameters
    ----------
    predict
        Maps data (n, ...), an NDArray, to logits (n, classes); see :func:`predictor`.
    batches
        Yields (data, label, index); rows of one index are views of one sample, and samples come
        one after the other.
    total
        Number of batches, for the progress; asked of ``batches`` by default.
    limit
        Stop once so many samples are complete; the first ones count.

    Returns
    -------
    dict
        Index of the sample to its :class:`Score`, in ascending order.

    Raises
    ------
    GloReError
        If the network gives something that is not finite.
    """
    sums: dict[int, tuple] = {}
    for data, label, index in progress(batches, "Testing", total=total, unit="batches"):
        logits = predict(data)
        if not np.isfinite(logits).all():
            raise GloReError(
                f"the network gives values that are not finite for sample {int(index[0])} or one "
                "beside it: its weights are damaged, or the training that made them diverged"
            )
        for row, own, sample in zip(log_softmax(logits), label.asnumpy(), index):
            _, added, views = sums.get(int(sample), (0, -np.inf, 0))
            sums[int(sample)] = (int(own), np.logaddexp(added, row), views + 1)
        # One more than wanted: the last one may go on in the next batch.
        if limit is not None and len(sums) > limit:
            break
    kept = sorted(list(sums.items())[:limit])
    return {
        sample: Score(own, added - np.log(views), views) for sample, (own, added, views) in kept
    }


def rank_of(scores: np.ndarray, label: int) -> int:
    """Return how many classes come before ``label``; of equal scores the lower class does.

    As in :func:`train.metric.top_k_hits`, NaN pushes the class down, not up.
    """
    own = scores[label]
    return int((~(scores <= own)).sum() + (scores[:label] == own).sum())


def summarize(scores: Scores, num_classes: int) -> tuple[dict[str, Any], ConfusionMatrix]:
    """Return the figures and the confusion matrix of :func:`average_scores`' result.

    Parameters
    ----------
    scores
        Not empty.
    num_classes
        Of the network.

    Returns
    -------
    figures
        ``count``, ``loss`` (mean cross entropy of the mean scores), ``top1``, ``top5`` and
        ``mean_class_accuracy``, the accuracies as shares.
    confusion
    """
    confusion = ConfusionMatrix(num_classes)
    confusion.update(
        [score.label for score in scores.values()],
        [score.log_mean.argmax() for score in scores.values()],
    )
    ranks = np.array([rank_of(score.log_mean, score.label) for score in scores.values()])
    losses = [-score.log_mean[score.label] for score in scores.values()]
    figures = {
        "count": len(scores),
        "loss": float(np.mean(losses)),
        "top1": float((ranks < 1).mean()),
        "top5": float((ranks < TOP).mean()),
        "mean_class_accuracy": confusion.mean_class_accuracy(),
    }
    return figures, confusion


def predictions(
    scores: Scores, name: str, names: Union[Mapping[int, str], Sequence[str]]
) -> list[dict[str, Any]]:
    """Return one JSON-ready row per sample.

    Parameters
    ----------
    scores
        Of :func:`average_scores`.
    name
        What a sample is: the key of its name in a row.
    names
        Sample's index to its name.

    Returns
    -------
    list of dict
    """
    return [
        {
            name: names[sample],
            "label": score.label,
            "prediction": int(score.log_mean.argmax()),
            "score": round(float(score.mean.max()), 6),
            "label_score": round(float(score.mean[score.label]), 6),
            "top5": [int(index) for index in np.argsort(-score.log_mean, kind="stable")[:TOP]],
            "views": score.views,
        }
        for sample, score in scores.items()
    ]


def class_rows(
    scores: Scores, confusion: ConfusionMatrix, class_names: Optional[Sequence[str]] = None
) -> list[dict[str, Any]]:
    """Return what became of each class, the rows of a table.

    Parameters
    ----------
    scores
        Of :func:`average_scores`.
    confusion
        Of the same scores.
    class_names
        Of all classes.

    Returns
    -------
    list of dict
        ``class``, ``name``, ``count``, ``top1`` and ``top5`` (shares; None without a sample), and
        the wrong class most often taken for it, ``confused_with``, with its ``confused_count``
        (None where there is none).
    """
    hits = np.zeros(confusion.num_classes, np.int64)
    for score in scores.values():
        hits[score.label] += rank_of(score.log_mean, score.label) < TOP
    rows = []
    for index, (counts, share) in enumerate(zip(confusion.matrix, confusion.per_class())):
        count = int(counts.sum())
        wrong = counts.copy()
        wrong[index] = 0
        most = int(wrong.argmax())
        confused = wrong[most] > 0
        rows.append(
            {
                "class": index,
                "name": class_names[index] if class_names else "",
                "count": count,
                "top1": float(share) if count else None,
                "top5": float(hits[index] / count) if count else None,
                "confused_with": most if confused else None,
                "confused_count": int(wrong[most]) if confused else None,
            }
        )
    return rows
