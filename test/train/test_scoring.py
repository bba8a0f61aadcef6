"""Scores averaged over views, and the figures that follow from them, against hand computation."""

import math

import numpy as np
import pytest

from glore_common import GloReError
from mxnet_compat import mx
from train.loss import cross_entropy
from train.scoring import (
    Score,
    average_scores,
    class_rows,
    predictions,
    predictor,
    rank_of,
    summarize,
)

# Two views of sample 0, one in each batch; one of samples 2 and 1, in this order.
BATCHES = (
    (mx.nd.array([[0.6, 0.3, 0.1]]), mx.nd.array([0]), np.array([0])),
    (
        mx.nd.array([[0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]),
        mx.nd.array([0, 2, 2]),
        np.array([0, 2, 1]),
    ),
)


def same(data):
    # The softmax of the logarithms of probabilities are these probabilities.
    return np.log(data.asnumpy())


def test_views_are_averaged_by_sample():
    scores = average_scores(same, BATCHES)
    assert list(scores) == [0, 1, 2]
    assert [(score.label, score.views) for score in scores.values()] == [(0, 2), (2, 1), (2, 1)]
    np.testing.assert_allclose(scores[0].mean, [0.4, 0.5, 0.1], rtol=1e-6)
    np.testing.assert_allclose(scores[1].mean, [0.5, 0.25, 0.25], rtol=1e-6)
    assert scores[0].log_mean.dtype == np.float64


@pytest.mark.parametrize(("limit", "kept"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])])
def test_a_limit_keeps_the_first_samples_with_all_their_views(limit, kept):
    scores = average_scores(same, BATCHES, limit=limit)
    assert list(scores) == kept
    assert scores[0].views == 2


def test_figures_equal_hand_computation():
    figures, confusion = summarize(average_scores(same, BATCHES), 3)
    # Sample 0: class 0 is second. Sample 1: class 2 is third, after its equal. Sample 2: first.
    assert figures["count"] == 3
    assert figures["loss"] == pytest.approx(-math.log(0.4 * 0.25 * 0.7) / 3, rel=1e-6)
    assert figures["top1"] == pytest.approx(1 / 3)
    assert figures["top5"] == 1.0
    # Class 0: 0 of 1; class 2: 1 of 2; class 1 never came.
    assert figures["mean_class_accuracy"] == pytest.approx(0.25)
    np.testing.assert_array_equal(confusion.matrix, [[0, 1, 0], [0, 0, 0], [1, 0, 1]])


def test_top5_counts_the_sixth_as_a_miss():
    falling = np.linspace(0.3, 0.01, 7)
    scores = {index: Score(index, np.log(falling), 1) for index in range(7)}
    assert summarize(scores, 7)[0]["top5"] == pytest.approx(5 / 7)


def test_equal_scores_rank_by_class_and_nan_is_a_miss():
    assert [rank_of(np.array([0.2, 0.4, 0.4, 0.2]), label) for label in range(4)] == [2, 0, 1, 3]
    assert rank_of(np.full(4, np.nan), 0) == 4


# float32 holds no probability below about e-103, float64 none below e-745.
@pytest.mark.parametrize("margin", [30.0, 200.0, 5000.0])
@pytest.mark.parametrize("views", [1, 3])
def test_the_loss_of_extreme_logits_is_that_of_training(margin, views):
    logits = np.array([[margin, 0.0, -margin], [0.0, margin, 3.0]], "float32")
    labels = np.array([2, 1])
    batches = [(mx.nd.array(logits), mx.nd.array(labels), np.array([0, 1]))] * views
    figures, _ = summarize(average_scores(lambda data: data.asnumpy(), batches), 3)
    expected = cross_entropy(mx.nd.array(logits), mx.nd.array(labels)).asnumpy().mean()
    assert expected == pytest.approx(margin, rel=1e-5)
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error(value):
    batch = (mx.nd.array([[1.0, value]]), mx.nd.array([0]), np.array([7]))
    with pytest.raises(GloReError, match="not finite for sample 7"):
        average_scores(lambda data: data.asnumpy(), [batch])


def test_class_rows():
    scores = average_scores(same, BATCHES)
    _, confusion = summarize(scores, 3)
    first, second, third = class_rows(scores, confusion, ("a", "b", "c"))
    assert first == {
        **{"class": 0, "name": "a", "count": 1, "top1": 0.0, "top5": 1.0},
        **{"confused_with": 1, "confused_count": 1},
    }
    assert second["top1"] is second["top5"] is second["confused_with"] is None
    assert (third["count"], third["top1"], third["confused_with"]) == (2, 0.5, 0)


def test_predictions():
    rows = predictions(average_scores(same, BATCHES), "image", ["x.jpg", "y.jpg", "z.jpg"])
    assert rows[0] == {
        **{"image": "x.jpg", "label": 0, "prediction": 1, "score": 0.5, "label_score": 0.4},
        **{"top5": [1, 0, 2], "views": 2},
    }
    assert rows[1]["top5"] == [0, 1, 2]


@pytest.mark.parametrize("devices", [1, 3])
def test_predictor_gives_the_blocks_logits(devices):
    data = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], "float32")
    contexts = [mx.cpu(index) for index in range(devices)]
    found = predictor(lambda part: 2 * part, contexts)(mx.nd.array(data))
    np.testing.assert_array_equal(found, 2 * data)
