"""Loss and figures of pixels."""

import math

import numpy as np
import pytest

from mxnet_compat import mx
from train.loss import cross_entropy
from train.metric import ConfusionMatrix, StreamingMetrics
from train.segmentation import IGNORED, Segmentation

CLASSES = 3


def example(seed=0, shape=(2, 5, 4)):
    generator = np.random.RandomState(seed)
    logits = mx.nd.array(generator.standard_normal((shape[0], CLASSES, *shape[1:])))
    label = mx.nd.array(generator.randint(0, CLASSES, shape))
    return logits, label


def gradient(task, outputs, label):
    for output in outputs:
        output.attach_grad()
    with mx.autograd.record():
        loss = task.loss(outputs if len(outputs) > 1 else outputs[0], label)
    loss.backward()
    return loss.asnumpy(), [output.grad.asnumpy() for output in outputs]


def expected_loss(logits, label):
    """Return the loss of each image, pixel by pixel."""
    logits, label = logits.asnumpy().astype("float64"), label.asnumpy().astype(int)
    losses = []
    for image, mask in zip(logits, label):
        terms = [
            math.log(np.exp(image[:, y, x]).sum()) - image[mask[y, x], y, x]
            for y, x in zip(*np.nonzero(mask != IGNORED))
        ]
        losses.append(np.mean(terms) if terms else 0.0)
    return losses


def test_loss_is_the_mean_over_labelled_pixels():
    """Ignored pixels are not in the mean (mmsegmentation 886)."""
    logits, label = example()
    assert Segmentation(CLASSES).loss(logits, label).asnumpy() == pytest.approx(
        expected_loss(logits, label), rel=1e-5
    )
    label[:, :, 2:] = IGNORED
    half = Segmentation(CLASSES).loss(logits[:, :, :, :2], label[:, :, :2])
    whole = Segmentation(CLASSES).loss(logits, label)
    assert whole.asnumpy() == pytest.approx(half.asnumpy(), rel=1e-6)


def test_an_image_without_labels_has_loss_and_gradient_0():
    logits, label = example()
    label[0] = IGNORED
    loss, (grad,) = gradient(Segmentation(CLASSES, ohem=0.3), [logits], label)
    assert loss[0] == 0
    assert (grad[0] == 0).all()
    assert np.isfinite(grad).all()
    assert np.abs(grad[1]).max() > 0


def test_auxiliary_weight_is_linear():
    """The weight reaches the gradient (gluon-cv 1665, 1668)."""
    found = {}
    for weight in (1.0, 0.4):
        (main, label), (aux, _) = example(1), example(2)
        found[weight] = gradient(Segmentation(CLASSES, weight), [main, aux], label)[1]
    np.testing.assert_array_equal(found[1.0][0], found[0.4][0])
    np.testing.assert_allclose(found[0.4][1], 0.4 * found[1.0][1], rtol=1e-6)
    assert np.abs(found[1.0][1]).max() > 0


def test_large_logits_give_a_finite_loss():
    logits = mx.nd.array([100.0, -21.0]).reshape((1, 2, 1, 1))
    loss = Segmentation(2).loss(logits, mx.nd.ones((1, 1, 1)))
    assert loss.asscalar() == pytest.approx(121.0)


def test_hard_examples():
    # One channel decides: log-odds of the right class.
    odds = np.array([5.0, 4.0, 3.0, -2.0, 2.5, 9.0])
    logits = mx.nd.array(np.stack([odds, 0 * odds])).reshape((1, 2, 2, 3))
    label = mx.nd.array([[[0, 0, 0], [0, 0, IGNORED]]])
    losses = np.log1p(np.exp(-odds))
    # 40 % of five labelled pixels: the two hardest, of which one is below the probability anyway.
    (loss,), (grad,) = gradient(Segmentation(2, ohem=0.4), [logits], label)
    assert loss == pytest.approx(losses[[3, 4]].mean(), rel=1e-5)
    assert np.count_nonzero(grad[0, 0]) == 2
    (loss,), _ = gradient(Segmentation(2, ohem=0.01), [logits], label)
    assert loss == pytest.approx(losses[3], rel=1e-5)
    (loss,), _ = gradient(Segmentation(2, ohem=1.0), [logits], label)
    assert loss == pytest.approx(losses[:5].mean(), rel=1e-5)


def test_figures_equal_a_loop_over_pixels():
    task = Segmentation(CLASSES)
    metrics = StreamingMetrics(task)
    matrix = np.zeros((CLASSES, CLASSES), int)
    confusion = ConfusionMatrix(CLASSES)
    for seed in range(3):
        logits, label = example(seed)
        label[0, 0] = IGNORED
        loss = task.loss(logits, label)
        metrics.update([loss], [logits], [label])
        predicted, truth = logits.asnumpy().argmax(axis=1), label.asnumpy().astype(int)
        for given, found in zip(truth.ravel(), predicted.ravel()):
            if given != IGNORED:
                matrix[given, found] += 1
        kept = truth != IGNORED
        confusion.update(truth[kept], predicted[kept])
    iou = [
        matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in range(CLASSES)
    ]
    means = metrics.means()
    assert means["miou"] == pytest.approx(np.mean(iou))
    assert means["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert (confusion.matrix == matrix).all()
    assert confusion.iou() == pytest.approx(iou)
    assert confusion.mean_iou() == pytest.approx(means["miou"])


def test_absent_classes():
    """A class that is nowhere is left out, one that is only predicted counts 0."""
    task = Segmentation(CLASSES)
    for predicted, expected in (([0, 1, 1], 1.0), ([0, 1, 2], (1 + 0.5 + 0) / 3)):
        logits = mx.nd.one_hot(mx.nd.array(predicted), CLASSES).T.reshape((1, CLASSES, 1, 3))
        metrics, label = StreamingMetrics(task), mx.nd.array([[[0, 1, 1]]])
        metrics.update([task.loss(logits, label)], [logits], [label])
        assert metrics.means()["miou"] == pytest.approx(expected)
    matrix = ConfusionMatrix(CLASSES)
    matrix.update([0, 1], [0, 1])
    assert np.isnan(matrix.iou()[2])
    assert matrix.mean_iou() == 1.0
    assert math.isnan(ConfusionMatrix(2).mean_iou())
    empty = StreamingMetrics(task)
    assert math.isnan(empty.means()["miou"])


def test_label_smoothing_is_that_of_classification():
    logits, label = example(shape=(4, 1, 1))
    flat = cross_entropy(logits.reshape((4, CLASSES)), label.reshape((4,)), 0.1)
    dense = Segmentation(CLASSES).loss(logits, label, 0.1)
    assert dense.asnumpy() == pytest.approx(flat.asnumpy(), rel=2e-5)
