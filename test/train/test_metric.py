"""Streaming loss and top-k, and the confusion matrix, against NumPy."""

import math

import numpy as np
import pytest

from glore_common import UsageError
from mxnet_compat import mx
from train.loss import Mixup, cross_entropy
from train.metric import ConfusionMatrix, StreamingMetrics, means_of, top_k_hits
from train.task import Classification


def hits(logits, labels, top_k=(1, 5)):
    arrays = top_k_hits(mx.nd.array(logits), mx.nd.array(labels), top_k)
    return [int(array.asscalar()) for array in arrays]


def test_top_k_equals_sorting():
    generator = np.random.RandomState(0)
    logits, labels = generator.standard_normal((200, 20)), generator.randint(0, 20, 200)
    order = np.argsort(-logits, axis=1)
    expected = [int((order[:, :k] == labels[:, None]).any(axis=1).sum()) for k in (1, 3, 5)]
    assert hits(logits, labels, (1, 3, 5)) == expected


def test_top_k_of_constant_and_broken_logits_is_no_success():
    labels = np.array([0, 1, 6])
    assert hits(np.zeros((3, 7)), labels) == [1, 2]  # ties rank by class index
    assert hits(np.full((3, 7), np.nan), labels) == [0, 0]
    assert hits(np.full((3, 3), np.nan), np.array([0, 1, 2])) == [0, 0]


def test_top_5_of_three_classes_is_always_a_hit():
    assert hits([[3.0, 2.0, 1.0]] * 3, [0, 1, 2]) == [1, 3]


def test_streaming_means_and_windows():
    metrics = StreamingMetrics(Classification(top_k=(1,)))
    logits, labels = mx.nd.array([[2.0, 1.0], [2.0, 1.0]]), mx.nd.array([0, 1])
    metrics.update([mx.nd.array([1.0, 2.0])], [logits], [labels])
    first = metrics.totals()
    metrics.update([mx.nd.array([4.0])], [logits[:1]], [labels[:1]])
    assert first == {"samples": 2, "loss": 3.0, "top1": 1.0}
    assert metrics.means() == {"loss": pytest.approx(7 / 3), "top1": pytest.approx(2 / 3)}
    assert metrics.means(first) == {"loss": 4.0, "top1": 1.0}
    assert math.isnan(means_of(first, first)["loss"])


def test_sums_do_not_depend_on_when_they_are_fetched():
    losses = [mx.nd.array(np.random.RandomState(seed).rand(7)) for seed in range(20)]
    logits, labels = mx.nd.zeros((7, 3)), mx.nd.zeros((7,))
    eager, lazy, resumed = (
        StreamingMetrics(Classification()),
        StreamingMetrics(Classification()),
        StreamingMetrics(Classification()),
    )
    for index, loss in enumerate(losses):
        eager.update([loss], [logits], [labels])
        eager.totals()
        lazy.update([loss], [logits], [labels])
        resumed.update([loss], [logits], [labels])
        if index == 10:
            totals = resumed.totals()
            resumed = StreamingMetrics(Classification())
            resumed.restore(totals)
    assert eager.totals() == lazy.totals() == resumed.totals()


def test_first_bad_step_is_named():
    metrics = StreamingMetrics(Classification())
    for step, value in enumerate((1.0, math.inf, math.nan), 1):
        metrics.update([mx.nd.array([value])], [mx.nd.zeros((1, 3))], [mx.nd.zeros((1,))], step)
    metrics.totals()
    assert metrics.first_bad == 2


def test_foreign_totals_are_refused():
    with pytest.raises(UsageError):
        StreamingMetrics(Classification(top_k=(1,))).restore({"samples": 1, "loss": 1.0})


def test_confusion_matrix():
    confusion = ConfusionMatrix(3)
    confusion.update([0, 0, 1], [0, 1, 1])
    confusion.update(np.array([1.0]), mx.nd.array([1]).asnumpy())
    np.testing.assert_array_equal(confusion.matrix, [[1, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert confusion.accuracy() == 0.75
    np.testing.assert_array_equal(confusion.per_class(), [0.5, 1.0, np.nan])
    assert confusion.mean_class_accuracy() == 0.75


@pytest.mark.parametrize(("labels", "predictions"), [([3], [0]), ([0], [-1]), ([0, 1], [0])])
def test_confusion_matrix_refuses(labels, predictions):
    confusion = ConfusionMatrix(3)
    with pytest.raises(UsageError):
        confusion.update(labels, predictions)
    assert confusion.matrix.sum() == 0


def test_cross_entropy_equals_numpy():
    logits = np.random.RandomState(0).standard_normal((4, 5))
    labels = np.array([0, 3, 4, 1])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = 0.8 * np.eye(5)[labels] + 0.2 / 5
    loss = cross_entropy(mx.nd.array(logits), mx.nd.array(labels))
    np.testing.assert_allclose(loss.asnumpy(), -log_p[range(4), labels], rtol=1e-5)
    smooth = cross_entropy(mx.nd.array(logits), mx.nd.array(labels), 0.2)
    np.testing.assert_allclose(smooth.asnumpy(), -(target * log_p).sum(axis=1), rtol=1e-5)
    dense = cross_entropy(mx.nd.array(logits), mx.nd.array(target))
    np.testing.assert_allclose(dense.asnumpy(), smooth.asnumpy(), rtol=1e-5)


def test_mixup_blends_data_and_targets_alike():
    data = mx.nd.array(np.eye(4))
    mixed, target = Mixup(0.5, 4)(data, mx.nd.arange(4), np.random.RandomState(3))
    # The data are the one-hot labels, so both must have been blended in the same way.
    np.testing.assert_allclose(mixed.asnumpy(), target.asnumpy(), rtol=1e-6)
    np.testing.assert_allclose(target.sum(axis=1).asnumpy(), 1, rtol=1e-6)
    assert (target.asnumpy() > 0).sum() > 4
    again, _ = Mixup(0.5, 4)(data, mx.nd.arange(4), np.random.RandomState(3))
    np.testing.assert_array_equal(again.asnumpy(), mixed.asnumpy())


def test_labels_may_be_shares_of_classes():
    logits = [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]
    assert hits(logits, [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], (1, 2)) == [1, 1]
    assert hits(logits, [[0.2, 0.7, 0.1], [0.1, 0.2, 0.7]], (1, 2)) == [1, 2]


def test_what_is_kept_by_default():
    assert StreamingMetrics(Classification()).names == ("loss", "top1", "top5")
