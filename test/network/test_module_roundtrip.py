"""Checkpoints of legacy ``mx.mod.Module`` jobs load and save unchanged."""

import json

import numpy as np
import pytest

from checkpoint.graph import load, save
from checkpoint.params import read_params
from mxnet_compat import mx
from network import get_symbol

SHAPE = (4, 3, 32, 32)


def data_iter():
    draw = np.random.RandomState(3)
    data = draw.standard_normal(SHAPE).astype("float32")
    return mx.io.NDArrayIter(data, np.arange(4.0), batch_size=4, label_name="softmax_label")


def outputs(module, batches):
    batches.reset()
    return module.predict(batches).asnumpy()


def bound(module, batches, for_training):
    module.bind(batches.provide_data, batches.provide_label, for_training=for_training)
    return module


@pytest.fixture(scope="module", params=[("resnet18", True), ("resnet18_w-glore_1-1", False)])
def legacy(request, tmp_path_factory):
    """Return (network, prefix, outputs) of a checkpoint that Module wrote.

    A CPU cannot train the three-dimensional BatchNorms of a unit's plain graph (MXNet issue
    20858), so the network with units is saved as it was initialised, the other one after a step.
    """
    name, trains = request.param
    symbol, _ = get_symbol(name, num_classes=4, crop_size=32)
    batches = data_iter()
    module = bound(mx.mod.Module(symbol, context=mx.cpu()), batches, trains)
    mx.random.seed(5)
    module.init_params(mx.init.Xavier())
    if trains:
        before = module.get_params()[0]["conv1_conv_weight"].asnumpy()
        module.init_optimizer(optimizer_params={"learning_rate": 0.1})
        module.forward_backward(next(batches))
        module.update()
        assert np.abs(module.get_params()[0]["conv1_conv_weight"].asnumpy() - before).max() > 0
    prefix = str(tmp_path_factory.mktemp("module") / "legacy")
    module.save_checkpoint(prefix, 7)
    return name, prefix, outputs(module, batches)


def test_module_checkpoint_loads_saves_and_loads_again_unchanged(legacy, tmp_path):
    _, prefix, expected = legacy
    symbol, args, auxs = load(prefix, 7)
    ours = str(tmp_path / "ours")
    save(ours, 7, symbol, args, auxs)

    before, after = read_params(f"{prefix}-0007.params"), read_params(f"{ours}-0007.params")
    assert set(before) == set(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with open(f"{prefix}-symbol.json") as one, open(f"{ours}-symbol.json") as other:
        assert json.load(one)["nodes"] == json.load(other)["nodes"]

    batches = data_iter()
    module = bound(mx.mod.Module.load(ours, 7, context=mx.cpu()), batches, False)
    assert np.array_equal(outputs(module, batches), expected)
    assert np.ptp(expected) > 1e-3


def test_names_in_a_module_checkpoint_are_those_of_the_symbol(legacy):
    name, prefix, _ = legacy
    symbol, _ = get_symbol(name, num_classes=4, crop_size=32)
    expected = {f"arg:{n}" for n in symbol.list_arguments()} - {"arg:data", "arg:softmax_label"}
    expected |= {f"aux:{n}" for n in symbol.list_auxiliary_states()}
    assert set(read_params(f"{prefix}-0007.params")) == expected
