"""Kinds of BatchNorm, devices of the CPU, and the arithmetic of benchmark/scaling.py."""

import json

import numpy as np
import pytest

from benchmark.scaling import model
from glore_common import UsageError
from mxnet_compat import mx
from network import get_symbol
from network.batch_norm import with_batch_norm
from network.block import build_block
from train.devices import contexts_of
from train.options import TrainDeviceOptions


@pytest.fixture(scope="module")
def network():
    return get_symbol("TINY_GLORE", num_classes=3, crop_size=32, dropout=0.0)


def nodes(symbol):
    return {node["name"]: node for node in json.loads(symbol.tojson())["nodes"]}


def test_synchronised_nodes_replace_the_plain_ones(network):
    symbol, _ = network
    found = with_batch_norm(symbol, "sync", [mx.gpu(0), mx.gpu(1)])
    assert found.list_arguments() == symbol.list_arguments()
    assert found.list_auxiliary_states() == symbol.list_auxiliary_states()
    plain, synchronised = nodes(symbol), nodes(found)
    names = [name for name, node in plain.items() if node["op"] == "BatchNorm"]
    assert len(names) > 5
    for name in names:
        node = synchronised[name]
        assert node["op"] == "_contrib_SyncBatchNorm"
        assert (node["attrs"]["ndev"], node["attrs"]["key"]) == ("2", name)
        for attribute in ("eps", "momentum", "fix_gamma"):
            assert node["attrs"][attribute] == plain[name]["attrs"][attribute]


def test_one_device_needs_no_synchronisation_and_several_of_a_cpu_have_none(network):
    symbol, _ = network
    assert with_batch_norm(symbol, "sync", [mx.cpu()]) is symbol
    assert with_batch_norm(symbol, "local", [mx.cpu(0), mx.cpu(1)]) is symbol
    with pytest.raises(UsageError, match="is for GPUs"):
        with_batch_norm(symbol, "sync", [mx.cpu(0), mx.cpu(1)])
    with pytest.raises(UsageError, match="known are local, sync, frozen"):
        with_batch_norm(symbol, "none", [mx.cpu()])


def test_frozen_statistics_are_used_and_stay(network):
    symbol, conf = network
    block = build_block(with_batch_norm(symbol, "frozen", [mx.cpu()]), conf, ctx=mx.cpu())
    data = mx.nd.random.normal(shape=(2, *conf.data_shape))
    stats = {k: p for k, p in block.collect_params().items() if p.grad_req == "null"}
    before = {name: value.data().asnumpy() for name, value in stats.items()}
    with mx.autograd.record():
        output = block(data)
    output.backward()
    assert len(before) > 10
    for name, value in stats.items():
        np.testing.assert_array_equal(value.data().asnumpy(), before[name])
    np.testing.assert_allclose(output.asnumpy(), block(data).asnumpy(), rtol=1e-5, atol=1e-6)


def test_devices_of_the_cpu():
    assert contexts_of(TrainDeviceOptions(cpus=2)) == [mx.cpu(0), mx.cpu(1)]
    with pytest.raises(UsageError, match="--gpus or --cpus"):
        contexts_of(TrainDeviceOptions(gpus=(0,), cpus=2), 1)


def test_the_model_of_several_machines():
    one = model(1_000_000, 0.5, 4, 1, 8, 1.0)
    assert one == {"communication": 0.0, "hidden": 64.0, "exposed": 64.0, "ideal": 64.0}
    # 2 * 3/4 * 4 MB at 8 Mbit/s: 6 s.
    four = model(1_000_000, 0.5, 4, 4, 8, 0.008)
    assert four["communication"] == pytest.approx(6.0)
    assert four["ideal"] == 256.0
    assert four["hidden"] == pytest.approx(128 / 6)
    assert four["exposed"] == pytest.approx(128 / 6.5)
