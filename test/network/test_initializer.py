"""Initial values by rule, and inflation of 2D weights."""

import logging

import numpy as np
import pytest

from checkpoint.params import CheckpointError
from checkpoint.torch_names import to_torch_name
from mxnet_compat import mx
from network import get_symbol, list_networks
from network.initializer import (
    DEFAULT_RULES,
    UNITS,
    generator_for,
    identity_units,
    inflate_2d,
    initial_params,
    initial_value,
    ones,
    xavier_uniform,
    zeros,
)

INPUT_3D = {"data": (1, 3, 4, 8, 8)}
INPUT_2D = {"data": (1, 3, 8, 8)}


def net(kernels, classes=5, unit=False):
    """A small network in 2D or 3D with the names of the real ones."""
    data = mx.sym.var("data")
    for stage, kernel in enumerate(kernels, 2):
        pad = tuple(size // 2 for size in kernel)
        data = mx.sym.BatchNorm(data, fix_gamma=False, name=f"conv{stage}_B01_conv-m1_bn")
        data = mx.sym.Convolution(
            data,
            num_filter=6,
            kernel=kernel,
            pad=pad,
            no_bias=True,
            name=f"conv{stage}_B01_conv-m1_conv",
        )
    if unit:
        data = mx.sym.BatchNorm(data, fix_gamma=False, name="conv3_B01_extra_blocker_bn")
    one = (1,) * len(kernels[0])
    data = mx.sym.Pooling(data, global_pool=True, kernel=one, pool_type="avg")
    data = mx.sym.FullyConnected(mx.sym.flatten(data), num_hidden=classes, name="classifier")
    return mx.sym.SoftmaxOutput(data, name="softmax")


IMAGE = net([(3, 3), (1, 1)])
CLIP = net([(3, 3, 3), (1, 1, 1)])


def filled(symbol, inputs):
    """Every parameter with values of its own."""
    generator = np.random.RandomState(5)
    args, auxs = initial_params(symbol, inputs)
    return {
        n: generator.uniform(0.5, 1.5, v.shape).astype("float32")
        for n, v in {**args, **auxs}.items()
    }


@pytest.mark.parametrize(
    ("shape", "bound"),
    [
        ((64, 16, 3, 3, 3), np.sqrt(6 / (16 * 27 + 64 * 27))),
        ((400, 2048), np.sqrt(6 / 2448)),
        # 32 groups: one input channel of 4 per group, all 128 outputs
        ((128, 4, 3, 3), np.sqrt(6 / (4 * 9 + 128 * 9))),
    ],
)
def test_xavier_bounds(shape, bound):
    value = xavier_uniform(shape, np.random.default_rng(0))
    assert value.dtype == np.float32
    assert value.shape == shape
    assert 0.995 * bound < np.abs(value).max() <= bound * (1 + 1e-6)
    # uniform: the standard deviation is bound / sqrt(3), the mean 0
    assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)
    assert abs(value.mean()) < 0.03 * bound
    doubled = xavier_uniform(shape, np.random.default_rng(0), gain=2.0)
    np.testing.assert_allclose(doubled, 2 * value, rtol=1e-5, atol=1e-7)


def test_xavier_equals_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Conv3d(8, 16, (1, 3, 3), groups=4)
    torch.nn.init.xavier_uniform_(layer.weight)
    shape = tuple(layer.weight.shape)
    ours = np.abs(xavier_uniform(shape, np.random.default_rng(0))).max()
    assert float(layer.weight.detach().abs().max()) == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1_bn_gamma", 1),
        ("conv1_bn_beta", 0),
        ("classifier_bias", 0),
        ("conv3_B01_extra_blocker_bn_gamma", 0),
        ("blocker_bn_gamma", 0),
        ("conv3_B01_extra_blocker_bn_moving_var", 1),
        ("tail_bn_moving_mean", 0),
    ],
)
def test_constant_rules(name, value):
    assert (initial_value(name, (7,)) == value).all()


def test_values_depend_on_seed_and_name_only():
    shape = (4, 3, 3, 3)
    first = initial_value("a_weight", shape, seed=1)
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    initial_value("b_weight", shape, seed=1)
    np.testing.assert_array_equal(first, initial_value("a_weight", shape, seed=1))
    assert not np.array_equal(first, initial_value("a_weight", shape, seed=2))
    assert not np.array_equal(first, initial_value("b_weight", shape, seed=1))
    # Recorded when this was written: a later version must not start old seeds elsewhere.
    drawn = generator_for(1, "a_weight").random(2)
    np.testing.assert_allclose(drawn, [0.60050797, 0.20123178], atol=1e-8)


def test_own_rules_and_their_errors():
    rules = ((r"^a_", ones), *DEFAULT_RULES)
    assert (initial_value("a_weight", (2, 2), rules=rules) == 1).all()
    with pytest.raises(CheckpointError, match="no rule says how a_something starts"):
        initial_value("a_something", (2,))
    with pytest.raises(CheckpointError, match=r"gives a_weight the shape \(3,\)"):
        initial_value("a_weight", (2,), rules=((r"", lambda shape, generator: zeros((3,))),))
    with pytest.raises(ValueError, match="two dimensions"):
        initial_value("a_weight", (2,))


@pytest.mark.parametrize("name", list_networks(study=True))
def test_rules_cover_every_network(name):
    symbol, _ = get_symbol(name)
    names = symbol.list_arguments() + symbol.list_auxiliary_states()
    for parameter in names:
        if parameter not in ("data", "softmax_label"):
            initial_value(parameter, (1, 1) if parameter.endswith("weight") else (1,))


def test_identity_units():
    released, _ = get_symbol("resnet50_w-glore_0-3")
    rules = identity_units(released)
    assert len(rules) == 3
    for place in ("01", "03", "05"):
        name = f"conv4_B{place}_extra_fc-2_conv_weight"
        assert (initial_value(name, (4, 4, 1, 1), rules=(*rules, *DEFAULT_RULES)) == 0).all()
        assert initial_value(name, (4, 4, 1, 1)).any()
    video, _ = get_symbol("TINY_GLORE", num_classes=5)
    assert identity_units(video) == ()


def test_initial_params_are_complete():
    args, auxs = initial_params(CLIP, INPUT_3D)
    assert list(args) == [n for n in CLIP.list_arguments() if n not in ("data", "softmax_label")]
    assert list(auxs) == CLIP.list_auxiliary_states()
    assert args["conv2_B01_conv-m1_conv_weight"].shape == (6, 3, 3, 3, 3)


@pytest.mark.parametrize("names", ["mxnet", "torch", "module"])
def test_inflation(names):
    source = filled(IMAGE, INPUT_2D)
    given = dict(source)
    if names != "mxnet":
        before = "module." if names == "module" else ""
        given = {before + to_torch_name(name): value for name, value in source.items()}
        given[f"{before}conv2.B01.conv_m1.bn.num_batches_tracked"] = np.array(7)
    made = inflate_2d(given, CLIP, INPUT_3D)
    kernel = made.arg_params["conv2_B01_conv-m1_conv_weight"]
    assert kernel.shape == (6, 3, 3, 3, 3)
    for time in range(3):
        np.testing.assert_array_equal(
            kernel[:, :, time], source["conv2_B01_conv-m1_conv_weight"] / np.float32(3)
        )
    assert sorted(made.inflated) == [
        "conv2_B01_conv-m1_conv_weight",
        "conv3_B01_conv-m1_conv_weight",
    ]
    assert made.fresh == []
    for name in made.copied:
        value = {**made.arg_params, **made.aux_params}[name]
        np.testing.assert_array_equal(value, source[name])
    assert len(made.copied) + 2 == len(source)


def test_inflated_network_gives_the_same_on_a_still_clip():
    """Without padding in time, a clip of one repeated frame is that frame."""
    image, clip = net([(3, 3)]), net([(3, 3, 3)])
    source = filled(image, INPUT_2D)
    made = inflate_2d(source, clip, INPUT_3D)
    frame = np.random.RandomState(2).standard_normal((1, 3, 8, 8)).astype("float32")

    def outputs(symbol, params, data):
        middle = symbol.get_internals()["conv2_B01_conv-m1_conv_output"]
        known = middle.list_arguments() + middle.list_auxiliary_states()
        params = {n: mx.nd.array(v) for n, v in params.items() if n in known}
        states = {n: params.pop(n) for n in middle.list_auxiliary_states()}
        executor = middle.bind(mx.cpu(), dict(params, data=mx.nd.array(data)), aux_states=states)
        return executor.forward()[0].asnumpy()

    still = np.repeat(frame[:, :, None], 4, axis=2)
    deep = outputs(clip, {**made.arg_params, **made.aux_params}, still)
    flat = outputs(image, source, frame)
    # The first and last frame see the padding in time.
    for time in (1, 2):
        np.testing.assert_allclose(deep[:, :, time], flat, rtol=1e-4)


def test_inflation_skips_another_classifier_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "glore"):
        made = inflate_2d(filled(IMAGE, INPUT_2D), net([(3, 3, 3), (1, 1, 1)], 9), INPUT_3D, seed=4)
    assert made.fresh == ["classifier_weight", "classifier_bias"]
    assert made.arg_params["classifier_weight"].shape == (9, 6)
    np.testing.assert_array_equal(
        made.arg_params["classifier_weight"], initial_value("classifier_weight", (9, 6), seed=4)
    )
    assert "classifier_weight and classifier_bias" in caplog.text


def test_inflation_starts_units_afresh():
    made = inflate_2d(filled(IMAGE, INPUT_2D), net([(3, 3, 3), (1, 1, 1)], unit=True), INPUT_3D)
    assert len(made.fresh) == 4
    assert all("_extra_" in name for name in made.fresh)
    assert (made.arg_params["conv3_B01_extra_blocker_bn_gamma"] == 0).all()


def test_inflation_lists_all_that_does_not_fit():
    source = filled(IMAGE, INPUT_2D)
    del source["conv3_B01_conv-m1_bn_gamma"]
    source["stray_weight"] = np.ones((2, 2), "float32")
    source["conv2_B01_conv-m1_conv_weight"] = np.ones((6, 3, 5, 5), "float32")
    source["classifier_weight"] = np.ones((5, 99), "float32")
    with pytest.raises(CheckpointError) as caught:
        inflate_2d(source, CLIP, INPUT_3D)
    message = str(caught.value)
    assert "missing (1): conv3_B01_conv-m1_bn_gamma" in message
    assert "extra (1): stray_weight" in message
    assert "of another shape (2)" in message
    assert (
        "conv2_B01_conv-m1_conv_weight is (6, 3, 5, 5), the network has (6, 3, 3, 3, 3)" in message
    )
    unit = net([(3, 3, 3), (1, 1, 1)], unit=True)
    with pytest.raises(CheckpointError, match=r"missing \(4\)"):
        inflate_2d(filled(IMAGE, INPUT_2D), unit, INPUT_3D, allow_missing=())
    assert UNITS == r"_extra_"
