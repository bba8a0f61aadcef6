"""--class-balance weights: the loss of each sample by how few its class has."""

import numpy as np
import pytest

from mxnet_compat import mx
from train.loss import ClassWeights, cross_entropy


def test_weights_average_to_one_over_the_samples():
    labels = np.array([0] * 6 + [2] * 2)
    hook = ClassWeights(labels, 4)
    assert hook.weights[labels].mean() == pytest.approx(1)
    assert hook.weights[0] == pytest.approx(hook.weights[2] / 3)
    data, label = mx.nd.zeros((3, 2)), mx.nd.array([0, 2, 2])
    same, targets = hook(data, label, None)
    assert same is data
    logits = mx.nd.array(np.random.RandomState(0).standard_normal((3, 4)))
    expected = cross_entropy(logits, label) * mx.nd.array(hook.weights[[0, 2, 2]])
    result = cross_entropy(logits, targets).asnumpy()
    np.testing.assert_allclose(result, expected.asnumpy(), rtol=1e-5)
