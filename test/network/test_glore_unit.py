"""The global reasoning unit alone: golden outputs and gradients, flavours, strides, dual paths."""

import numpy as np
import pytest
from golden_weights import seeded

from glore_common import UsageError
from mxnet_compat import mx
from network import GloRe_Unit
from network.cpu_graph import for_cpu_training
from network.symbol_glore import FLAVOURS

SHAPES = {1: (2, 32, 49), 2: (2, 32, 14, 14), 3: (2, 32, 4, 7, 7)}
# Our names of the reference's parameters (video flavour), for a unit named "unit".
VIDEO_NAMES = {
    "unit_conv-state_conv_weight": "conv_state.weight",
    "unit_conv-state_conv_bias": "conv_state.bias",
    "unit_conv-proj_conv_weight": "conv_proj.weight",
    "unit_conv-proj_conv_bias": "conv_proj.bias",
    "unit_GCN-G_conv_weight": "gcn.conv1.weight",
    "unit_GCN-G_conv_bias": "gcn.conv1.bias",
    "unit_GCN-GHW_conv_weight": "gcn.conv2.weight",
    "unit_fc-2_conv_weight": "conv_extend.weight",
    "unit_blocker_bn_gamma": "blocker.weight",
    "unit_blocker_bn_beta": "blocker.bias",
    "unit_blocker_bn_moving_mean": "blocker.running_mean",
    "unit_blocker_bn_moving_var": "blocker.running_var",
}


def inferred(symbol, **inputs):
    """Return {parameter: shape}."""
    args, _, auxs = symbol.infer_shape(**inputs)
    shapes = dict(zip(symbol.list_arguments() + symbol.list_auxiliary_states(), args + auxs))
    return {name: shape for name, shape in shapes.items() if name not in inputs}


def block_of(symbol, values, inputs):
    """Return a hybridized Gluon block of a graph with these parameters."""
    variables = [mx.sym.Variable(name, shape=array.shape) for name, array in inputs.items()]
    block = mx.gluon.SymbolBlock(symbol, variables)
    for name, parameter in block.collect_params().items():
        parameter.shape = values[name].shape
        parameter.initialize(mx.init.Zero())
        parameter.set_data(mx.nd.array(values[name]))
    block.hybridize()
    return block


def evaluate(symbol, values, inputs):
    """Return the outputs in evaluation mode."""
    outputs = block_of(symbol, values, inputs)(*map(mx.nd.array, inputs.values()))
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [out.asnumpy() for out in outputs]


def input_gradient(symbol, values, data):
    """Return d sum(out²) / d data in evaluation mode."""
    block = block_of(for_cpu_training(symbol, {"data": data.shape}), values, {"data": data})
    array = mx.nd.array(data)
    array.attach_grad()
    with mx.autograd.record(train_mode=False):
        loss = (block(array) ** 2).sum()
    loss.backward(train_mode=False)
    return array.grad.asnumpy()


def relative(value, reference):
    return np.abs(value - reference).max() / np.abs(reference).max()


def random_values(symbol, **inputs):
    return {
        name: seeded(name, shape, 7, False) for name, shape in inferred(symbol, **inputs).items()
    }


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_video_unit_matches_golden(golden, ndim, normalize):
    unit = GloRe_Unit(
        mx.sym.Variable("data"),
        num_in=32,
        name="unit",
        num_node=16,
        num_state=32,
        ndim=ndim,
        flavour="video",
        normalize=normalize,
    )
    data = np.random.RandomState(200).standard_normal(SHAPES[ndim]).astype("float32")
    shapes = inferred(unit, data=data.shape)
    assert set(shapes) == set(VIDEO_NAMES)
    values = {name: seeded(VIDEO_NAMES[name], shapes[name], 0, False) for name in shapes}
    (out,) = evaluate(unit, values, {"data": data})
    figures = golden("torch_open.npz")
    key = f"GloRe_Unit_{ndim}D_norm{int(normalize)}"
    assert relative(out, figures[f"{key}/out"]) < 1e-5
    assert relative(input_gradient(unit, values, data), figures[f"{key}/grad"]) < 1e-5


def numpy_released(data, values, pooled=None):
    """Compute the released flavour of a unit named "unit" in NumPy, on (n, c, L) arrays.

    ``pooled`` averages positions: (n, c, L) -> (n, c, L').
    """

    def convolve(x, tag):
        shape = (1, -1, 1)
        prefix = f"unit_{tag}"
        x = (x - values[f"{prefix}_bn_moving_mean"].reshape(shape)) / np.sqrt(
            values[f"{prefix}_bn_moving_var"].reshape(shape) + 1e-4
        )
        x = x * values[f"{prefix}_bn_gamma"].reshape(shape)
        x = np.maximum(x + values[f"{prefix}_bn_beta"].reshape(shape), 0)
        weight = values[f"{prefix}_conv_weight"]
        return np.einsum("oc,ncl->nol", weight.reshape(weight.shape[:2]), x)

    pooled = pooled or (lambda x: x)
    whole = np.concatenate(data, 1) if isinstance(data, list) else data
    spread = convolve(whole, "conv-proj")
    nodes = np.einsum("nsl,nkl->nsk", convolve(pooled(whole), "conv-state"), pooled(spread))
    moved = convolve(nodes.transpose(0, 2, 1), "GCN-G").transpose(0, 2, 1)
    out = np.einsum("nsk,nkl->nsl", convolve(nodes + moved, "GCN-GHW"), spread)
    if isinstance(data, list):
        return [x + convolve(out, f"conv-tail-{p}") for x, p in zip(data, ("res", "den"))]
    return data + convolve(out, "fc-2")


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_released_unit_equals_a_numpy_reference(ndim):
    data = np.random.RandomState(1).standard_normal(SHAPES[ndim]).astype("float32")
    unit = GloRe_Unit(
        mx.sym.Variable("data"), num_in=32, name="unit", ndim=ndim, num_state=12, num_node=5
    )
    values = random_values(unit, data=data.shape)
    assert values["unit_conv-state_conv_weight"].shape[:2] == (12, 32)
    assert values["unit_conv-proj_conv_weight"].shape[:2] == (5, 32)
    (out,) = evaluate(unit, values, {"data": data})
    expected = numpy_released(data.reshape(2, 32, -1), values)
    assert relative(out.reshape(2, 32, -1), expected) < 1e-5


def test_stride_pools_what_is_gathered_and_keeps_the_size():
    # 7 x 6 with windows of 2 x 3: the last row fills no window.
    data = np.random.RandomState(2).standard_normal((2, 32, 7, 6)).astype("float32")
    unit = GloRe_Unit(mx.sym.Variable("data"), num_in=32, name="unit", stride=(2, 3))
    values = random_values(unit, data=data.shape)
    (out,) = evaluate(unit, values, {"data": data})

    def pooled(x):
        grid = x.reshape(2, -1, 7, 6)[:, :, :6]
        return grid.reshape(2, -1, 3, 2, 2, 3).mean((3, 5)).reshape(2, -1, 6)

    expected = numpy_released(data.reshape(2, 32, -1), values, pooled)
    assert relative(out.reshape(2, 32, -1), expected) < 1e-5


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_strided_unit_trains(ndim, flavour):
    unit = GloRe_Unit(
        mx.sym.Variable("data"),
        num_in=32,
        name="unit",
        num_node=3,
        num_state=6,
        ndim=ndim,
        flavour=flavour,
        normalize=True,
        stride=(2,) * ndim,
    )
    data = np.random.RandomState(3).standard_normal(SHAPES[ndim]).astype("float32")
    values = random_values(unit, data=data.shape)
    gradient = input_gradient(unit, values, data)
    # The gradient agrees with a central difference of sum(out²) along a random direction.
    direction = np.random.RandomState(4).standard_normal(data.shape).astype("float32")
    step = 2e-3
    total = [
        float((evaluate(unit, values, {"data": data + s * direction})[0].astype("f8") ** 2).sum())
        for s in (-step, step)
    ]
    slope = (total[1] - total[0]) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-2)


def test_stride_of_one_builds_the_plain_unit():
    data = mx.sym.Variable("data")
    plain, strided = (
        GloRe_Unit(data, num_in=32, name="unit", stride=stride) for stride in (None, (1, 1))
    )
    assert plain.tojson() == strided.tojson()


def test_dual_path_unit_reads_both_maps_and_adds_to_each():
    variables = [mx.sym.Variable("res"), mx.sym.Variable("den")]
    rng = np.random.RandomState(5)
    data = [rng.standard_normal((2, c, 5, 4)).astype("float32") for c in (16, 8)]
    unit = mx.sym.Group(GloRe_Unit(variables, num_in=(16, 8), name="unit"))
    inputs = dict(zip(("res", "den"), data))
    values = random_values(unit, **{name: array.shape for name, array in inputs.items()})
    assert {n for n in values if n.endswith("conv_weight")} == {
        f"unit_{tag}_conv_weight"
        for tag in (
            "conv-state",
            "conv-proj",
            "GCN-G",
            "GCN-GHW",
            "conv-tail-res",
            "conv-tail-den",
        )
    }
    outputs = evaluate(unit, values, inputs)
    expected = numpy_released([x.reshape(2, x.shape[1], -1) for x in data], values)
    for out, array in zip(outputs, expected):
        assert relative(out.reshape(array.shape), array) < 1e-5


def test_dual_path_video_unit_has_a_blocker_per_path():
    variables = [mx.sym.Variable("res"), mx.sym.Variable("den")]
    unit = mx.sym.Group(GloRe_Unit(variables, num_in=(16, 8), name="unit", flavour="video"))
    shapes = inferred(unit, res=(2, 16, 5, 4), den=(2, 8, 5, 4))
    assert shapes["unit_res_blocker_bn_gamma"] == (16,)
    assert shapes["unit_den_blocker_bn_gamma"] == (8,)
    # With both gammas at 0 the unit is the identity.
    values = {name: seeded(name, shape, 0, False) for name, shape in shapes.items()}
    for name in values:
        if name.endswith(("blocker_bn_gamma", "blocker_bn_beta")):
            values[name] = np.zeros_like(values[name])
    inputs = {"res": np.ones((2, 16, 5, 4), "float32"), "den": np.ones((2, 8, 5, 4), "float32")}
    for out in evaluate(unit, values, inputs):
        assert (out == 1).all()


def test_normalized_states_do_not_depend_on_the_size_of_the_map():
    unit = GloRe_Unit(
        mx.sym.Variable("data"),
        num_in=8,
        name="unit",
        num_node=4,
        num_state=8,
        flavour="video",
        normalize=True,
    )
    nodes = unit.get_internals()["unit_proj_output"]
    tile = np.random.RandomState(6).standard_normal((1, 8, 3, 3)).astype("float32")
    values = random_values(nodes, data=tile.shape)
    (small,) = evaluate(nodes, values, {"data": tile})
    (large,) = evaluate(nodes, values, {"data": np.tile(tile, (1, 1, 2, 3))})
    assert relative(large, small) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flavour": "videos"}, "flavour 'videos' is not one of released, video"),
        ({"ndim": 4}, "ndim 4 is not 1, 2 or 3"),
        ({"num_node": 0}, "num_node must be a positive integer, not 0"),
        ({"num_state": 2.5}, "num_state must be a positive integer, not 2.5"),
        ({"stride": (2,)}, r"stride \(2,\) must hold 2 positive integers"),
        ({"stride": (2, 0)}, "must hold 2 positive integers"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=f"unit: .*{message}"):
        GloRe_Unit(mx.sym.Variable("data"), num_in=32, name="unit", **arguments)
