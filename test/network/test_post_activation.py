"""Post-activation ResNets, gluoncv's names of their weights, and the reproduction's GloRe unit."""

import numpy as np
import pytest

from checkpoint.gluoncv_names import from_gluoncv, our_name, zoo_weights
from checkpoint.params import CheckpointError, param_shapes
from glore_common import GloReError, UsageError
from mxnet_compat import mx
from network import GloRe_Unit, get_symbol
from network.block import build_block
from network.identify import identify_network
from network.initializer import UNITS, initial_params
from network.pretrained import load_pretrained
from network.summary import count

SLIM = "resnet18_v1_slim"
INPUTS = {"data": (1, 3, 64, 64)}


def randomize(net, seed=0):
    """Give every parameter values of its own, running statistics too: no two layers are alike."""
    generator = np.random.RandomState(seed)
    for name, parameter in net.collect_params().items():
        value = generator.uniform(0.5, 1.5, parameter.shape)
        if not name.endswith(("gamma", "var")):
            value = (value - 1) * (0.2 if name.endswith("weight") else 1)
        parameter.set_data(mx.nd.array(value))


def slim_of_gluon():
    """Return MXNet's own network of the slim row's sizes; names are those of gluoncv's zoo."""
    vision = mx.gluon.model_zoo.vision
    net = vision.ResNetV1(vision.BasicBlockV1, [2, 2, 2, 2], [16, 16, 32, 64, 128], classes=10)
    net.initialize()
    return net


def files_of(net, folder, data):
    """Write a network's weights in all the ways that MXNet has; return the paths."""
    net.hybridize()
    net(data)
    paths = [str(folder / f"{name}.params") for name in ("attributes", "named", "stripped")]
    net.save_parameters(paths[0])
    net.collect_params().save(paths[1])
    net.collect_params().save(paths[2], strip_prefix=net.prefix)
    net.export(str(folder / "exported"))
    return [*paths, str(folder / "exported-0000.params")]


def assert_loads(net, row, folder, classes):
    data = mx.nd.random.normal(shape=(2, 3, 64, 64))
    net(data)
    randomize(net)
    expected = net(data).asnumpy()
    symbol, input_conf = get_symbol(row, classes, crop_size=64)
    for path in files_of(net, folder, data):
        block = build_block(symbol, input_conf, params=load_pretrained(symbol, path, INPUTS))
        difference = np.abs(block(data).asnumpy() - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max(), path


def test_resnet_v1_is_gluons_under_every_form_of_its_names(tmp_path):
    assert_loads(slim_of_gluon(), SLIM, tmp_path, 10)


def test_resnet18_v1b_of_gluoncv_loads_by_name(tmp_path):
    from gluoncv import model_zoo

    net = model_zoo.get_model("resnet18_v1b", pretrained=False, classes=7)
    net.initialize()
    assert_loads(net, "resnet18_v1", tmp_path, 7)


@pytest.mark.parametrize("name", ["resnet18_v1", "resnet34_v1"])
def test_all_names_of_the_zoo_are_ours(name):
    from gluoncv import model_zoo

    net = model_zoo.get_model(name, pretrained=False)
    symbol, _ = get_symbol(name)
    ours = {*symbol.list_arguments(), *symbol.list_auxiliary_states()} - {"data", "softmax_label"}
    assert {our_name(found) for found in net._collect_params_with_prefix()} == ours
    assert {our_name(found) for found in net.collect_params()} == ours


def test_a_unit_and_another_classifier_start_afresh_and_nothing_else(tmp_path):
    net = slim_of_gluon()
    net(mx.nd.zeros((1, 3, 64, 64)))
    path = str(tmp_path / "net.params")
    net.save_parameters(path)
    symbol, _ = get_symbol(SLIM, 5, crop_size=64, glore={5: (2,)}, glore_flavour="video")
    args, _ = load_pretrained(symbol, path, INPUTS, allow_missing=(UNITS,))
    weight = net.features[5][1].body[3].weight.data().asnumpy()
    np.testing.assert_array_equal(args["conv3_B02_conv-m2_conv_weight"], weight)
    assert args["classifier_weight"].shape == (5, 128)
    with pytest.raises(CheckpointError, match="missing .*conv5_B02_extra_conv-state_conv_weight"):
        load_pretrained(symbol, path, INPUTS)
    deeper, _ = get_symbol("resnet34_v1", 5, crop_size=64)
    with pytest.raises(CheckpointError, match="missing .*conv2_B03_conv-m1_conv_weight"):
        load_pretrained(deeper, path, INPUTS)


def test_other_files_keep_their_names():
    params = {"arg:conv1_conv_weight": 1, "aux:conv1_bn_moving_mean": 2}
    assert from_gluoncv(params) is params
    marked = {"features.5.0.body.0.weight": 1, "features.9.weight": 2, "features.4.0.body.2.x": 3}
    assert from_gluoncv(marked) == {
        "conv3_B01_conv-m1_conv_weight": 1,
        "features.9.weight": 2,
        "features.4.0.body.2.x": 3,
    }


def test_missing_zoo_weights_say_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    # Nobody listens there: what a machine without a network sees.
    monkeypatch.setenv("MXNET_GLUON_REPO", "http://127.0.0.1:9/")
    with pytest.raises(GloReError) as caught:
        zoo_weights("resnet18_v1")
    assert "gluon/models/resnet18_v1-a0666292.zip" in str(caught.value)
    assert f"resnet18_v1-a0666292.params into {tmp_path}/models" in str(caught.value)
    with pytest.raises(UsageError, match="no weights for resnet18_v1_slim"):
        zoo_weights(SLIM)


@pytest.mark.parametrize(
    ("overrides", "params"),
    [
        ({}, 11_279_112),
        # 256 channels: state, mixing and last convolution of 256 x 256, projection 256 x 16,
        # nodes 16 x 16, three biases, one batch normalisation.
        (
            {"glore": {4: (2,)}, "glore_flavour": "report", "num_node": 16},
            11_279_112 + 3 * 256**2 + 256 * 16 + 16**2 + (256 + 16 + 16) + 2 * 256,
        ),
        (
            {"glore": {5: (2,)}, "glore_flavour": "report", "num_node": 16},
            11_279_112 + 3 * 512**2 + 512 * 16 + 16**2 + (512 + 16 + 16) + 2 * 512,
        ),
        # The 11.53 M that the reproduction reported.
        ({"glore": {4: (2,)}, "glore_flavour": "report", "num_node": 128}, 11_525_896),
    ],
)
def test_parameters_of_resnet18_with_200_classes(overrides, params):
    assert count(*get_symbol("resnet18_v1", 200, **overrides)).params == params


@pytest.mark.parametrize(
    "overrides",
    [
        {"glore": {5: (2,)}, "glore_flavour": "report", "num_node": 16},
        {"glore": {4: (2,), 5: (2,)}, "glore_flavour": "video", "num_node": 16},
        {"glore": {4: (1,)}, "glore_flavour": "report", "num_state": 32, "num_node": 8},
    ],
)
def test_a_checkpoint_shows_which_unit_it_has(overrides):
    symbol, input_conf = get_symbol(SLIM, 10, **overrides)
    args, auxs = param_shapes(symbol, {"data": (1, *input_conf.data_shape)})
    found = identify_network({**args, **auxs}, symbol)
    assert (found.name, found.num_classes, found.overrides) == (SLIM, 10, overrides)


def unit_output(flavour, x, normalize=False, seed=0, values=None):
    """Return (output of a fresh unit with running statistics, its parameters)."""
    unit = GloRe_Unit(
        mx.sym.Variable("data"),
        num_in=x.shape[1],
        name="unit",
        flavour=flavour,
        normalize=normalize,
        num_state=x.shape[1],
        num_node=3,
    )
    if values is None:
        args, auxs = initial_params(unit, {"data": x.shape}, seed)
        values = {**args, **auxs}
    arrays = {name: mx.nd.array(value) for name, value in values.items()}
    auxs = {name: arrays.pop(name) for name in unit.list_auxiliary_states()}
    executor = unit.bind(mx.cpu(), {"data": mx.nd.array(x), **arrays}, aux_states=auxs)
    return executor.forward(is_train=False)[0].asnumpy(), values


def test_the_reproductions_unit_in_numpy():
    generator = np.random.RandomState(3)
    x = generator.normal(size=(2, 4, 3, 5)).astype("float32")
    _, values = unit_output("report", x)
    for name in values:
        if not name.endswith("weight"):
            values[name] = generator.uniform(0.5, 1.5, values[name].shape).astype("float32")
    found, _ = unit_output("report", x, values=values)

    def weight(tag):
        return values[f"unit_{tag}_conv_weight"].reshape(
            values[f"unit_{tag}_conv_weight"].shape[:2]
        )

    def bias(tag):
        return values[f"unit_{tag}_conv_bias"][:, None]

    flat = x.reshape(2, 4, 15)
    state = weight("conv-state") @ flat + bias("conv-state")
    projection = weight("conv-proj") @ flat + bias("conv-proj")
    nodes = state @ projection.transpose(0, 2, 1)
    mixed = weight("GCN-GHW") @ nodes
    related = (weight("GCN-G") @ mixed.transpose(0, 2, 1) + bias("GCN-G")).transpose(0, 2, 1)
    out = weight("fc-2") @ (related @ projection)
    gamma, beta, mean, var = (
        values[f"unit_last_bn_{leaf}"][:, None]
        for leaf in ("gamma", "beta", "moving_mean", "moving_var")
    )
    expected = flat + gamma * (out - mean) / np.sqrt(var + 1e-4) + beta
    np.testing.assert_allclose(found, expected.reshape(x.shape), rtol=1e-4, atol=1e-4)


def test_the_reproductions_unit_is_no_identity_and_grows_with_the_cube():
    x = np.random.RandomState(0).normal(size=(2, 8, 4, 4)).astype("float32")
    np.testing.assert_array_equal(unit_output("video", x)[0], x)
    branch = unit_output("report", x)[0] - x
    assert np.abs(branch).max() > 0.1
    # With running statistics, twice the input is eight times the branch ...
    np.testing.assert_allclose(unit_output("report", 2 * x)[0] - 2 * x, 8 * branch, rtol=1e-3)
    # ... and without the normalisation it is L = 16 times as large as with it.
    normalised = unit_output("report", x, normalize=True)[0] - x
    np.testing.assert_allclose(16 * normalised, branch, rtol=1e-3, atol=1e-4)


def test_post_activation_rows_train():
    symbol, input_conf = get_symbol(SLIM, 4, crop_size=32, glore={5: (2,)}, glore_flavour="report")
    block = build_block(symbol, input_conf, ctx=mx.cpu())
    trainer = mx.gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.05})
    data, label = mx.nd.random.normal(shape=(8, 3, 32, 32)), mx.nd.arange(8) % 4
    loss_of = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    losses = []
    for _ in range(8):
        with mx.autograd.record():
            loss = loss_of(block(data), label)
        loss.backward()
        trainer.step(8)
        losses.append(float(loss.mean().asscalar()))
    assert losses[-1] < 0.5 * losses[0]
