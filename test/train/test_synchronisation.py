"""How often a training step waits for the device: each wait leaves it without work for a while."""

import numpy as np
import pytest
from train_runs import train_options

from mxnet_compat import mx
from network import get_symbol
from network.block import build_block
from train.metric import StreamingMetrics
from train.optimizer import make_optimizer
from train.step import Learner
from train.task import Classification

# What of MXNet's C interface blocks until something has been computed.
WAITS = (
    "MXNDArrayWaitToRead",
    "MXNDArrayWaitToWrite",
    "MXNDArrayWaitAll",
    "MXNDArraySyncCopyToCPU",
)


@pytest.fixture
def waits(monkeypatch):
    """Return the list of the waits from now on, by name."""
    library, seen = mx.base._LIB, []

    def noted(name, function):
        def call(*arguments):
            seen.append(name)
            return function(*arguments)

        return call

    for name in WAITS:
        monkeypatch.setattr(library, name, noted(name, getattr(library, name)))
    return seen


@pytest.fixture(scope="module")
def work():
    symbol, conf = get_symbol("TINY_GLORE", 4, crop_size=32)
    data = np.random.RandomState(0).standard_normal((2, *conf.data_shape)).astype("float32")
    return symbol, conf, mx.nd.array(data), mx.nd.array([0, 1])


def learner_of(work, optimizer="nesterov", contexts=1, **options):
    symbol, conf, _, _ = work
    devices = [mx.cpu(number) for number in range(contexts)]
    block = build_block(symbol, conf, devices)
    return Learner(block, make_optimizer(optimizer, 0.9, 1e-4), devices, train_options(**options))


def test_waits_are_counted(waits):
    array = mx.nd.ones((2,))
    array.asnumpy()
    array.wait_to_read()
    mx.nd.waitall()
    assert waits == ["MXNDArraySyncCopyToCPU", "MXNDArrayWaitToRead", "MXNDArrayWaitAll"]


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "sgd"}, {"contexts": 2}, {"accumulate": 2}, {"label_smoothing": 0.1}],
)
def test_a_step_does_not_wait(work, waits, options):
    learner = learner_of(work, **options)
    metrics = StreamingMetrics(Classification())
    batches = [work[2:]] * options.get("accumulate", 1)
    for step in range(3):
        if step == 1:  # What the first one makes, it may wait for.
            waits.clear()
        for result in learner.step(batches, 0.1, step):
            metrics.update(*result, step=step)
    assert waits == []


def test_a_dynamic_loss_scale_waits_for_its_verdict_only(work, waits):
    learner = learner_of(work, loss_scale="dynamic")
    learner.step([work[2:]], 0.1, 0)
    waits.clear()
    learner.step([work[2:]], 0.1, 1)
    assert waits == ["MXNDArraySyncCopyToCPU"]
