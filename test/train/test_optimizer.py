"""NesterovSGD against a NumPy reference of PyTorch's rule, also while the rate changes."""

import numpy as np
import pytest

from glore_common import UsageError
from mxnet_compat import mx
from train.optimizer import FEW_NUMBERS, NesterovSGD, make_optimizer
from train.schedule import MultiFactorScheduler

RATES = (0.1, 0.2, 0.05, 0.05, 0.3, 0.1)


def reference(weight, gradients, rates, momentum, wd, rescale=1.0, nesterov=True, clip=None):
    weight, buffer = weight.astype("float64"), 0.0
    for gradient, rate in zip(gradients, rates):
        gradient = gradient * rescale
        if clip is not None:
            gradient = np.clip(gradient, -clip, clip)
        change = gradient + wd * weight
        buffer = momentum * buffer + change
        weight = weight - rate * (change + momentum * buffer if nesterov else buffer)
    return weight


def random(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("count", [1, 70])
def test_equals_pytorchs_rule_while_the_rate_changes(nesterov, count):
    optimizer = NesterovSGD(momentum=0.9, nesterov=nesterov, wd=1e-2, rescale_grad=0.5)
    updater = mx.optimizer.get_updater(optimizer)
    start = [random(2, index + 1, seed=index) for index in range(count)]
    gradients = [random(len(RATES), 2, index + 1, seed=99 + index) for index in range(count)]
    weights = [mx.nd.array(value) for value in start]
    for step, rate in enumerate(RATES):
        optimizer.set_learning_rate(rate)
        updater(list(range(count)), [mx.nd.array(value[step]) for value in gradients], weights)
    for weight, value, gradient in zip(weights, start, gradients):
        expected = reference(value, gradient, RATES, 0.9, 1e-2, 0.5, nesterov)
        np.testing.assert_allclose(weight.asnumpy(), expected, rtol=2e-6, atol=2e-6)


def test_large_and_small_weights_at_several_rates():
    """Those with few numbers are updated together, one call for a rate."""
    shapes = [(FEW_NUMBERS + 1,), (3,), (2, 5), (FEW_NUMBERS,), (7,)]
    multipliers = {0: 1.0, 1: 1.0, 2: 0.1, 3: 1.0, 4: 0.1}
    optimizer = NesterovSGD(momentum=0.9, wd=1e-2, clip_gradient=1.5)
    optimizer.set_lr_mult(multipliers)
    updater = mx.optimizer.get_updater(optimizer)
    start = [random(*shape, seed=index) for index, shape in enumerate(shapes)]
    gradients = [random(len(RATES), *s, seed=9 + index) for index, s in enumerate(shapes)]
    weights = [mx.nd.array(value) for value in start]
    for step, rate in enumerate(RATES):
        optimizer.set_learning_rate(rate)
        updater(list(range(len(shapes))), [mx.nd.array(g[step]) for g in gradients], weights)
    for index, (weight, value, gradient) in enumerate(zip(weights, start, gradients)):
        rates = [rate * multipliers[index] for rate in RATES]
        expected = reference(value, gradient, rates, 0.9, 1e-2, clip=1.5)
        np.testing.assert_allclose(weight.asnumpy(), expected, rtol=2e-6, atol=2e-6)


def test_mxnets_own_nag_differs_when_the_rate_changes():
    """The reason for our own class; if this fails, MXNet's may be used."""
    optimizer = mx.optimizer.NAG(momentum=0.9, learning_rate=0.1)
    updater = mx.optimizer.get_updater(optimizer)
    weight, gradients = mx.nd.array(random(5)), random(2, 5, seed=1)
    for gradient, rate in zip(gradients, (0.1, 0.01)):
        optimizer.set_learning_rate(rate)
        updater(0, mx.nd.array(gradient), weight)
    expected = reference(random(5), gradients, (0.1, 0.01), 0.9, 0.0)
    assert np.abs(weight.asnumpy() - expected).max() > 1e-3


@pytest.mark.parametrize("on_kvstore", [False, True])
def test_trainer_honours_multipliers(on_kvstore):
    parameters = [mx.gluon.Parameter(name, shape=(3,)) for name in ("w", "half", "undecayed")]
    start = [random(3, seed=index) for index in range(3)]
    for parameter, value in zip(parameters, start):
        parameter.initialize()
        parameter.set_data(mx.nd.array(value))
    parameters[1].lr_mult = 0.5
    parameters[2].wd_mult = 0.0
    optimizer = NesterovSGD(momentum=0.9, wd=0.1, lr_scheduler=MultiFactorScheduler(0.2, (2,), 0.1))
    trainer = mx.gluon.Trainer(
        parameters,
        optimizer,
        kvstore=mx.kv.create("local") if on_kvstore else None,
        update_on_kvstore=on_kvstore,
    )
    factor = mx.nd.array([1.0, -2.0, 3.0])
    for _ in range(4):
        with mx.autograd.record():
            loss = sum((parameter.data() * factor).sum() for parameter in parameters)
        loss.backward()
        trainer.step(2)
    gradients = [factor.asnumpy()] * 4
    rates = np.array([0.2, 0.2, 0.02, 0.02])
    for parameter, value, scale, decay in zip(parameters, start, (1, 0.5, 1), (0.1, 0.1, 0)):
        expected = reference(value, gradients, rates * scale, 0.9, decay, 0.5)
        np.testing.assert_allclose(parameter.data().asnumpy(), expected, rtol=1e-5)


def test_float16_weights_have_a_float32_master():
    optimizer = mx.optimizer.create("nesterovsgd", momentum=0.9, learning_rate=1e-4)
    updater = mx.optimizer.get_updater(optimizer)
    weight = mx.nd.ones((4,), dtype="float16")
    gradients = np.full((40, 4), 0.5, "float32")
    for gradient in gradients:
        updater(0, mx.nd.array(gradient, dtype="float16"), weight)
    expected = reference(np.ones(4), gradients, [1e-4] * 40, 0.9, 0.0)
    momentum, master = updater.states[0]
    assert momentum.dtype == master.dtype == np.float32
    np.testing.assert_allclose(master.asnumpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(weight.asnumpy(), master.asnumpy().astype("float16"))


def test_clipping_comes_before_the_decay():
    optimizer = NesterovSGD(momentum=0.5, wd=0.1, learning_rate=0.1, clip_gradient=0.2)
    weight, gradients = mx.nd.array(random(6)), random(3, 6, seed=5)
    updater = mx.optimizer.get_updater(optimizer)
    for gradient in gradients:
        updater(0, mx.nd.array(gradient), weight)
    expected = reference(random(6), gradients, [0.1] * 3, 0.5, 0.1, clip=0.2)
    np.testing.assert_allclose(weight.asnumpy(), expected, rtol=1e-5)


def test_bad_momentum():
    with pytest.raises(UsageError, match="momentum"):
        NesterovSGD(momentum=1.5)


def test_optimizers_by_name():
    kinds = {"nesterov": NesterovSGD, "sgd": mx.optimizer.SGD, "nag": mx.optimizer.NAG}
    for name, kind in kinds.items():
        optimizer = make_optimizer(name, 0.8, 0.01)
        assert type(optimizer) is kind
        assert (optimizer.momentum, optimizer.wd) == (0.8, 0.01)
        assert optimizer.multi_precision
    with pytest.raises(UsageError, match="unknown optimiser 'nesterow'; known are nesterov"):
        make_optimizer("nesterow", 0.9, 0.0)


def test_defaults():
    optimizer = NesterovSGD()
    assert (optimizer.momentum, optimizer.nesterov, optimizer.wd) == (0.9, True, 0.0)
    assert (optimizer.rescale_grad, optimizer.clip_gradient) == (1.0, None)
    assert NesterovSGD(momentum=0.0).momentum == 0.0
