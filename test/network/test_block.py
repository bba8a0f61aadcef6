"""A Symbol as a trainable Gluon block."""

import dataclasses

import numpy as np
import pytest

from checkpoint.params import CheckpointError
from glore_common import UsageError
from mxnet_compat import mx
from network import get_symbol
from network.block import (
    FINE_TUNE_LR_MULT,
    KINETICS_LR_MULT,
    KINETICS_WD_MULT,
    NO_DECAY_BN_BIAS,
    build_block,
    by_rule,
)
from network.initializer import identity_units, ones, xavier_uniform


@dataclasses.dataclass(frozen=True)
class Conf:
    data_shape: tuple


CONF = Conf((3, 2, 6, 6))
BN_MOMENTUM = 0.9


def net():
    """A small 3D network with the names of the real ones."""
    data = mx.sym.Convolution(
        mx.sym.var("data", lr_mult=9.0, init=mx.init.One()),
        num_filter=8,
        kernel=(1, 1, 1),
        no_bias=True,
        name="conv2_B01_conv-m2_conv",
    )
    data = mx.sym.BatchNorm(
        data, eps=1e-4, momentum=BN_MOMENTUM, fix_gamma=False, name="conv2_B01_conv-m3_bn"
    )
    data = mx.sym.Activation(data, act_type="relu", name="conv2_B01_conv-m3_relu")
    data = mx.sym.Pooling(data, global_pool=True, kernel=(1, 1, 1), pool_type="avg", name="pool")
    data = mx.sym.FullyConnected(mx.sym.flatten(data), num_hidden=4, name="classifier")
    return mx.sym.SoftmaxOutput(data, name="softmax")


def clips(n=2, seed=0, ctx=None):
    value = np.random.RandomState(seed).standard_normal((n, *CONF.data_shape)).astype("float32")
    return mx.nd.array(value, ctx=ctx or mx.cpu())


def values_of(block):
    args, auxs = block.arg_aux_params()
    return {name: value.asnumpy() for name, value in {**args, **auxs}.items()}


def step(block, data, label, trainer=None):
    loss_of = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    with mx.autograd.record():
        loss = loss_of(block(data), label)
    loss.backward()
    if trainer is not None:
        trainer.step(len(label))
    return float(loss.mean().asscalar())


def test_initial_values_follow_the_rules():
    block = build_block(net(), CONF, seed=3)
    values = values_of(block)
    assert (values["conv2_B01_conv-m3_bn_gamma"] == 1).all()
    assert (values["conv2_B01_conv-m3_bn_beta"] == 0).all()
    assert (values["conv2_B01_conv-m3_bn_moving_mean"] == 0).all()
    assert (values["conv2_B01_conv-m3_bn_moving_var"] == 1).all()
    assert (values["classifier_bias"] == 0).all()
    bound = np.sqrt(6 / (3 + 8))
    weight = values["conv2_B01_conv-m2_conv_weight"]
    assert 0.5 * bound < np.abs(weight).max() <= bound
    assert block.symbol.list_outputs() == ["softmax_output"]
    assert block.input_conf is CONF


def test_same_seed_same_values_whatever_ran_before():
    first = values_of(build_block(net(), CONF, seed=3))
    np.random.seed(99)  # noqa: NPY002 - the global state must not matter
    mx.random.seed(99)
    mx.nd.random.normal(shape=(5,)).wait_to_read()
    second = values_of(build_block(net(), CONF, seed=3))
    other = values_of(build_block(net(), CONF, seed=4))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["classifier_weight"], other["classifier_weight"])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            KINETICS_WD_MULT,
            {"a_conv_bias": 0, "a_bn_beta": 0, "a_bn_gamma": 1, "conv1_conv_weight": 1},
        ),
        (
            NO_DECAY_BN_BIAS,
            {"classifier_bias": 0, "a_bn_beta": 0, "a_bn_gamma": 0, "classifier_weight": 1},
        ),
        (
            KINETICS_LR_MULT,
            {
                "conv3_B01_conv-m2_bn_gamma": 0.5,
                "conv3_B01_conv-m2_conv_weight": 0.5,
                "conv3_B01_conv-m1_conv_weight": 1,
                "classifier_weight": 1,
            },
        ),
        (
            FINE_TUNE_LR_MULT,
            {
                "classifier_weight": 1,
                "classifier_bias": 1,
                "conv3_B01_conv-m2_bn_gamma": 0.5,
                "tail_bn_beta": 0.5,
            },
        ),
        (None, {"anything": 1}),
    ],
)
def test_rule_sets(rules, expected):
    assert {name: by_rule(rules, name) for name in expected} == expected


def test_multipliers_reach_the_parameters_and_the_update():
    block = build_block(net(), CONF, lr_mult=KINETICS_LR_MULT, wd_mult=KINETICS_WD_MULT)
    params = block.collect_params()
    assert params["conv2_B01_conv-m2_conv_weight"].lr_mult == 0.5
    assert params["conv2_B01_conv-m3_bn_gamma"].wd_mult == 1
    assert params["conv2_B01_conv-m3_bn_beta"].wd_mult == 0
    assert params["classifier_bias"].wd_mult == 0
    before = values_of(block)
    trainer = mx.gluon.Trainer(params, "sgd", {"learning_rate": 0.1, "wd": 0.01}, kvstore=None)
    label = mx.nd.array([0, 1])
    step(block, clips(), label, trainer)
    after = values_of(block)
    for name in block.arg_names:
        grad = params[name].grad().asnumpy() / 2
        rate, decay = 0.1 * params[name].lr_mult, 0.01 * params[name].wd_mult
        np.testing.assert_allclose(
            after[name], before[name] - rate * (grad + decay * before[name]), atol=1e-6
        )


def test_moving_statistics_change_in_training_only_and_rightly():
    block = build_block(net(), CONF)
    name = "conv2_B01_conv-m3_bn_moving_"
    data = clips()
    block(data).wait_to_read()
    with mx.autograd.record(train_mode=False):
        block(data).wait_to_read()
    values = values_of(block)
    assert (values[name + "mean"] == 0).all()
    assert (values[name + "var"] == 1).all()
    step(block, data, mx.nd.array([0, 1]))
    middle = np.einsum(
        "oi,nithw->nothw", values["conv2_B01_conv-m2_conv_weight"][:, :, 0, 0, 0], data.asnumpy()
    )
    after = values_of(block)
    share = 1 - BN_MOMENTUM
    np.testing.assert_allclose(after[name + "mean"], share * middle.mean((0, 2, 3, 4)), atol=1e-6)
    np.testing.assert_allclose(
        after[name + "var"], BN_MOMENTUM + share * middle.var((0, 2, 3, 4)), rtol=1e-4
    )


def test_logits_are_those_of_the_symbol():
    block = build_block(net(), CONF, seed=5)
    args, auxs = block.arg_aux_params()
    data = clips()
    executor = block.symbol.bind(
        mx.cpu(), dict(args, data=data, softmax_label=mx.nd.zeros(2)), aux_states=auxs
    )
    probabilities = executor.forward()[0].asnumpy()
    logits = block(data)
    np.testing.assert_allclose(mx.nd.softmax(logits).asnumpy(), probabilities, atol=1e-6)
    assert not np.allclose(logits.asnumpy().sum(1), 1)


def test_real_network_trains_and_its_units_start_as_the_identity():
    symbol, conf = get_symbol("TINY_GLORE", num_classes=4, crop_size=32, dropout=0.0)
    block = build_block(symbol, conf, wd_mult=KINETICS_WD_MULT, lr_mult=KINETICS_LR_MULT, seed=1)
    value = np.random.RandomState(0).standard_normal((2, *conf.data_shape)).astype("float32")
    data = mx.nd.array(value)
    unit = build_block(symbol, conf, seed=1, output="conv3_B01_extra_sum", training=False)
    before = build_block(symbol, conf, seed=1, output="conv3_B01_sum", training=False)
    np.testing.assert_array_equal(unit(data).asnumpy(), before(data).asnumpy())
    trainer = mx.gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.05})
    label = mx.nd.array([0, 3])
    losses = [step(block, data, label, trainer) for _ in range(6)]
    assert losses[-1] < losses[0]
    # From the second step on the unit takes part.
    assert values_of(block)["conv3_B01_extra_blocker_bn_gamma"].any()


def test_released_unit_can_start_as_the_identity():
    from network import GloRe_Unit

    unit = GloRe_Unit(mx.sym.var("data"), num_in=8, name="unit", num_node=4, num_state=8, ndim=2)
    symbol = mx.sym.FullyConnected(mx.sym.flatten(unit), num_hidden=2, name="classifier")
    data = mx.nd.array(np.random.RandomState(0).standard_normal((2, 8, 5, 5)))
    node = unit.name
    made = build_block(
        symbol, Conf((8, 5, 5)), initializer=identity_units(symbol), output=node, training=False
    )
    np.testing.assert_array_equal(made(data).asnumpy(), data.asnumpy())
    default = build_block(symbol, Conf((8, 5, 5)), output=node, training=False)
    assert not np.allclose(default(data).asnumpy(), data.asnumpy())


def test_several_contexts():
    contexts = [mx.cpu(0), mx.cpu(1)]
    block = build_block(net(), CONF, ctx=contexts, seed=2)
    assert block.contexts == (mx.cpu(0), mx.cpu(1))
    single = build_block(net(), CONF, ctx=mx.cpu(1), seed=2)
    data = clips()
    for ctx in contexts:
        np.testing.assert_array_equal(
            block(data.as_in_context(ctx)).asnumpy(),
            single(data.as_in_context(mx.cpu(1))).asnumpy(),
        )
    with mx.autograd.record():
        losses = [block(clips(2, seed, ctx)).sum() for seed, ctx in enumerate(contexts)]
    mx.autograd.backward(losses)
    name = "conv2_B01_conv-m3_bn_moving_mean"
    parts = [part.asnumpy() for part in block.collect_params()[name].list_data()]
    assert not np.allclose(*parts)
    np.testing.assert_allclose(values_of(block)[name], (parts[0] + parts[1]) / 2, atol=1e-7)
    args, auxs = block.arg_aux_params()
    assert {value.context for value in [*args.values(), *auxs.values()]} == {mx.cpu(0)}
    auxs[name] = mx.nd.ones(8) * 7
    block.load_arg_aux(args, auxs)
    for part in block.collect_params()[name].list_data():
        assert (part.asnumpy() == 7).all()


def test_what_is_taken_out_is_a_copy():
    block = build_block(net(), CONF)
    args, _ = block.arg_aux_params()
    args["classifier_bias"][:] = 5
    assert (values_of(block)["classifier_bias"] == 0).all()


def test_parameters_given_are_used_and_checked():
    source = build_block(net(), CONF, seed=6)
    args, auxs = source.arg_aux_params()
    for given in [(args, auxs), {**args, **auxs}]:
        block = build_block(net(), CONF, params=given, seed=7)
        assert all(np.array_equal(v, values_of(source)[n]) for n, v in values_of(block).items())
    broken = dict(args, stray_weight=mx.nd.ones(2), classifier_bias=mx.nd.ones(3))
    del broken["classifier_weight"]
    with pytest.raises(CheckpointError) as caught:
        build_block(net(), CONF, params=(broken, auxs))
    for part in ["classifier_weight", "stray_weight", "classifier_bias is (3,)"]:
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="stray_weight"):
        source.load_arg_aux(broken, auxs)
    assert (values_of(source)["classifier_bias"] == 0).all()
    # A block of an inner output takes the parameters of the whole network.
    inner = build_block(net(), CONF, params=(args, auxs), output="pool")
    assert "classifier_weight" not in inner.arg_names


def test_own_initial_rules_come_first():
    block = build_block(net(), CONF, initializer=((r"^classifier_", ones),))
    values = values_of(block)
    assert (values["classifier_bias"] == 1).all()
    assert (values["conv2_B01_conv-m3_bn_beta"] == 0).all()
    assert xavier_uniform((2, 2), np.random.default_rng(0)).shape == (2, 2)


def test_the_graph_is_rewritten_for_training_on_a_cpu_only():
    def nodes(**options):
        return build_block(net(), CONF, **options)._cached_graph[1].tojson()

    assert "_to-4d" in nodes()
    assert "_to-4d" in nodes(ctx=[mx.cpu(1), mx.cpu(0)])
    assert "_to-4d" not in nodes(training=False)
    assert "_to-4d" not in build_block(net(), CONF).symbol.tojson()


def test_no_gradients_without_training():
    block = build_block(net(), CONF, training=False)
    assert {p.grad_req for p in block.collect_params().values()} == {"null"}


def test_usage_errors():
    with pytest.raises(UsageError, match="no node classifer; near it: classifier"):
        build_block(net(), CONF, output="classifer")
    with pytest.raises(UsageError, match="not both"):
        build_block(net(), CONF, params={}, initializer=())
    with pytest.raises(UsageError, match="twice"):
        build_block(net(), CONF, ctx=[mx.cpu(), mx.cpu()])
    with pytest.raises(UsageError, match="context"):
        build_block(net(), CONF, ctx="cpu")
    with pytest.raises(UsageError, match="does not take inputs"):
        build_block(net(), Conf((3, 6, 6)))
