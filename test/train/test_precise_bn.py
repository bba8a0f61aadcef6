"""Precise BatchNorm: statistics equal NumPy's, and tuning moves gammas and betas only."""

import numpy as np
import pytest

from glore_common import GloReError
from mxnet_compat import mx
from train.precise_bn import (
    affine_names,
    batch_norms,
    estimate_statistics,
    only_trainable,
    traced,
)

CONTEXT = [mx.cpu()]


def network(prefix="net_"):
    block = mx.gluon.nn.HybridSequential(prefix=prefix)
    with block.name_scope():
        block.add(
            mx.gluon.nn.BatchNorm(momentum=0.5),
            mx.gluon.nn.Conv2D(8, 3, use_bias=False),
            mx.gluon.nn.BatchNorm(),
            mx.gluon.nn.Activation("relu"),
            mx.gluon.nn.LayerNorm(),
            mx.gluon.nn.Dense(3),
        )
    block.initialize(mx.init.Xavier())
    return block


def batches(count, size=6):
    generator = np.random.RandomState(0)
    return [
        mx.nd.array(generator.normal(50 + 10 * index, 2 + index, (size, 8, 6, 6)))
        for index in range(count)
    ]


def values(block, ending):
    return {
        name: parameter.data().asnumpy()
        for name, parameter in block.collect_params().items()
        if name.endswith(ending)
    }


def test_affine_names_are_batch_norms_only():
    block = network()
    assert affine_names(block) == {
        f"net_batchnorm{index}_{kind}" for index in (0, 1) for kind in ("gamma", "beta")
    }


@pytest.mark.parametrize("hybrid", [False, True])
def test_statistics_of_the_input_are_those_of_all_samples_together(hybrid):
    block = network()
    block.hybridize(hybrid)
    data = batches(4)
    block(data[0])
    before = {
        name: parameter.data().asnumpy()
        for name, parameter in block.collect_params().items()
        if "running" not in name
    }
    assert estimate_statistics(block, CONTEXT, iter(data)) == 4
    every = np.concatenate([batch.asnumpy() for batch in data]).astype("float64")
    mean = block[0].running_mean.data().asnumpy()
    var = block[0].running_var.data().asnumpy()
    np.testing.assert_allclose(mean, every.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(var, every.var(axis=(0, 2, 3)), rtol=1e-5)
    for name, value in before.items():
        np.testing.assert_array_equal(block.collect_params()[name].data().asnumpy(), value)


def test_second_norm_sees_inputs_normalised_by_their_own_batch():
    block = network()
    data = batches(3)
    block(data[0])
    estimate_statistics(block, CONTEXT, data)
    inputs = []
    for batch in data:
        with mx.autograd.train_mode():
            inputs.append(block[1](block[0](batch)).asnumpy())
    every = np.concatenate(inputs).astype("float64")
    np.testing.assert_allclose(
        block[2].running_mean.data().asnumpy(), every.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        block[2].running_var.data().asnumpy(), every.var(axis=(0, 2, 3)), rtol=1e-4
    )


def test_uneven_batches_count_by_their_samples():
    block = network()
    data = [*batches(1, size=6), *batches(2, size=2)[1:]]
    block(data[0])
    estimate_statistics(block, CONTEXT, data)
    every = np.concatenate([batch.asnumpy() for batch in data]).astype("float64")
    np.testing.assert_allclose(
        block[0].running_mean.data().asnumpy(), every.mean(axis=(0, 2, 3)), rtol=1e-6
    )


def test_two_devices_get_the_same_statistics():
    contexts = [mx.cpu(0), mx.cpu(1)]
    block = network()
    block.collect_params().reset_ctx(contexts)
    data = batches(2)
    for context in contexts:
        block(data[0].as_in_context(context))
    estimate_statistics(block, contexts, data)
    first, second = (array.asnumpy() for array in block[0].running_mean.list_data())
    np.testing.assert_array_equal(first, second)
    every = np.concatenate([batch.asnumpy() for batch in data])
    np.testing.assert_allclose(first, every.mean(axis=(0, 2, 3)), rtol=1e-5)


def test_symbol_block_with_the_released_names():
    data = mx.sym.Variable("data")
    output = mx.sym.BatchNorm(data, name="conv1_bn", fix_gamma=False, momentum=0.92, eps=1e-4)
    frozen = mx.sym.BatchNorm(output, name="frozen", use_global_stats=True)
    block = mx.gluon.SymbolBlock(mx.sym.FullyConnected(frozen, num_hidden=2, name="fc"), data)
    block.initialize()
    batch = batches(1)[0]
    block(batch)
    assert [node.name for node in batch_norms(traced(block)[1])] == ["conv1_bn"]
    estimate_statistics(block, CONTEXT, [batch])
    np.testing.assert_allclose(
        block.collect_params()["conv1_bn_moving_mean"].data().asnumpy(),
        batch.asnumpy().mean(axis=(0, 2, 3)),
        rtol=1e-5,
    )


def test_only_trainable_freezes_and_restores():
    block = network()
    data = batches(1)[0]
    block(data)
    block[5].bias.grad_req = "add"
    trainer = mx.gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.1})

    def step():
        with mx.autograd.record():
            loss = (block(data) ** 2).sum()
        loss.backward()
        trainer.step(6)

    def everything():
        return {name: p.data().asnumpy() for name, p in block.collect_params().items()}

    step()
    before = everything()
    names = affine_names(block)
    with only_trainable(block, names):
        step()
    after = everything()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved - {name for name in before if "running" in name} == names
    assert block[5].bias.grad_req == "add"
    assert block[1].weight.grad_req == "write"
    step()
    assert not np.array_equal(everything()["net_conv0_weight"], after["net_conv0_weight"])


def test_without_batch_norm_or_batches_nothing_happens():
    block = mx.gluon.nn.Dense(2)
    block.initialize()
    block(mx.nd.ones((1, 3)))
    assert estimate_statistics(block, CONTEXT, [mx.nd.ones((1, 3))]) == 0
    block = network()
    block(batches(1)[0])
    assert estimate_statistics(block, CONTEXT, []) == 0
    np.testing.assert_array_equal(block[0].running_mean.data().asnumpy(), 0)


def test_cpu_forward_leaves_running_statistics_alone():
    """Why the estimate does not rely on them."""
    norm = mx.gluon.nn.BatchNorm(in_channels=8)
    norm.initialize()
    with mx.autograd.record():
        output = norm(batches(1)[0])
    np.testing.assert_array_equal(norm.running_mean.data().asnumpy(), 0)
    output.backward()
    assert (norm.running_mean.data().asnumpy() > 1).all()


def test_errors():
    class Eager(mx.gluon.Block):
        def forward(self, data):
            return data.asnumpy()

    with pytest.raises(GloReError, match="trace"):
        traced(Eager())
