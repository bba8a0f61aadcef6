"""The graph for training on a CPU equals the plain one, and trains where that one fails."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mxnet_compat import mx
from network import get_symbol
from network.cpu_graph import GraphError, for_cpu_training

EPS, MOMENTUM = 1e-4, 0.9


def conv_bn_conv(width, kernel, name="bn"):
    """1-D, 2-D or 3-D: convolution, BatchNorm, relu, convolution."""
    one = (1,) * len(kernel)
    data = mx.sym.Convolution(
        mx.sym.var("data"), num_filter=width, kernel=kernel, no_bias=True, name="first"
    )
    data = mx.sym.BatchNorm(data, eps=EPS, momentum=MOMENTUM, fix_gamma=False, name=name)
    data = mx.sym.Activation(data, act_type="relu", name="relu")
    return mx.sym.Convolution(data, num_filter=4, kernel=one, no_bias=True, name="last")


def run(symbol, values, states, head=None):
    """Return (output, gradients by name, new states) of a forward and a backward pass."""
    grads = {name: mx.nd.zeros(value.shape) for name, value in values.items()}
    states = {name: mx.nd.array(value) for name, value in states.items()}
    executor = symbol.bind(
        mx.cpu(), {n: mx.nd.array(v) for n, v in values.items()}, args_grad=grads, aux_states=states
    )
    (out,) = executor.forward(is_train=True)
    executor.backward(mx.nd.array(head))
    return (
        out.asnumpy(),
        {n: g.asnumpy() for n, g in grads.items()},
        {n: s.asnumpy() for n, s in states.items()},
    )


def reference(values, states, head):
    """The network of ``conv_bn_conv`` with kernels of one point, in NumPy, float64."""
    values = {n: v.astype("float64") for n, v in values.items()}
    shape = values["data"].shape
    flat = values["data"].reshape(shape[0], shape[1], -1)
    first = values["first_weight"].reshape(values["first_weight"].shape[:2])
    last = values["last_weight"].reshape(values["last_weight"].shape[:2])
    head = head.astype("float64").reshape(shape[0], 4, -1)
    mid = np.einsum("oi,nip->nop", first, flat)
    mean, var = mid.mean((0, 2)), mid.var((0, 2))
    inv = 1 / np.sqrt(var + EPS)
    hat = (mid - mean[:, None]) * inv[:, None]
    gamma, beta = values["bn_gamma"][:, None], values["bn_beta"][:, None]
    normal = hat * gamma + beta
    act = np.maximum(normal, 0)
    d_act = np.einsum("oi,nop->nip", last, head) * (normal > 0)
    d_hat = d_act * gamma
    centred = d_hat - d_hat.mean((0, 2))[:, None]
    d_mid = inv[:, None] * (centred - hat * (d_hat * hat).mean((0, 2))[:, None])
    grads = {
        "data": np.einsum("oi,nop->nip", first, d_mid).reshape(shape),
        "first_weight": np.einsum("nop,nip->oi", d_mid, flat),
        "bn_gamma": (d_act * hat).sum((0, 2)),
        "bn_beta": d_act.sum((0, 2)),
        "last_weight": np.einsum("nop,nip->oi", head, act),
    }
    new = {
        "bn_moving_mean": MOMENTUM * states["bn_moving_mean"] + (1 - MOMENTUM) * mean,
        "bn_moving_var": MOMENTUM * states["bn_moving_var"] + (1 - MOMENTUM) * var,
    }
    return np.einsum("oi,nip->nop", last, act), grads, new


def seeded_values(symbol, data_shape):
    generator = np.random.RandomState(7)
    args, _, auxs = symbol.infer_shape(data=data_shape)
    values = {
        n: generator.standard_normal(s).astype("float32")
        for n, s in zip(symbol.list_arguments(), args)
    }
    states = {
        n: generator.uniform(0.5, 1.5, s).astype("float32")
        for n, s in zip(symbol.list_auxiliary_states(), auxs)
    }
    return values, states


@pytest.mark.parametrize("width", [16, 32, 5])
@pytest.mark.parametrize("spatial", [(9,), (3, 4, 5), (6, 5)])
def test_equals_numpy(width, spatial):
    symbol = conv_bn_conv(width, (1,) * len(spatial))
    shape = (2, 3, *spatial)
    values, states = seeded_values(symbol, shape)
    head = np.random.RandomState(8).standard_normal((2, 4, *spatial)).astype("float32")
    out, grads, new = run(for_cpu_training(symbol, {"data": shape}), values, states, head)
    want, want_grads, want_new = reference(values, states, head)
    np.testing.assert_allclose(out.reshape(want.shape), want, rtol=1e-4, atol=1e-4)
    for name, grad in want_grads.items():
        scale = np.abs(grad).max()
        np.testing.assert_allclose(grads[name].reshape(grad.shape), grad, atol=1e-4 * scale)
    for name, state in want_new.items():
        # Biased or not, the variance over this many positions must be that of MXNet's definition.
        np.testing.assert_allclose(new[name], state, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("width", [16, 32])
def test_the_plain_graph_fails_where_this_one_trains(width):
    """When MXNet's own backward works one day, this module has no purpose and can go."""
    if os.environ.get("MXNET_MKLDNN_ENABLED") == "0":
        pytest.skip("oneDNN is off")
    symbol = conv_bn_conv(width, (1, 1, 1))
    shape = (2, 3, 3, 4, 5)
    values, states = seeded_values(symbol, shape)
    head = np.ones((2, 4, 3, 4, 5), "float32")
    with pytest.raises(mx.MXNetError, match="is_view"):
        run(symbol, values, states, head)
    run(for_cpu_training(symbol, {"data": shape}), values, states, head)


KERNELS = """
import sys
sys.path[:0] = [FOLDER]
from test_cpu_graph import for_cpu_training, mx, np, run, seeded_values
norm = mx.sym.BatchNorm(mx.sym.var("data"), fix_gamma=False, name="bn")
relu = mx.sym.Activation(norm, act_type="relu", name="relu")
plain = mx.sym.Convolution(relu, num_filter=16, kernel=(1,), no_bias=True, name="last")
values, states = seeded_values(plain, (2, 32, 24))
# Without the copy, and with it.
graph = for_cpu_training(plain, {"data": (2, 32, 24)})
internals = graph.get_internals()
no_copy = mx.sym.Convolution(
    internals["relu_output"], mx.sym.var("last_weight"), num_filter=16, kernel=(1,), no_bias=True
)
for symbol in (no_copy, graph):
    print("begin", flush=True)
    run(symbol, values, states, np.ones((2, 16, 24), "float32"))
"""


def test_lines_are_not_normalised_by_the_reference_kernel():
    """oneDNN's own word on which kernel computes the gradient of a BatchNorm of (n, c, l)."""
    folder = os.path.dirname(os.path.abspath(__file__))
    output = subprocess.run(
        [sys.executable, "-c", KERNELS.replace("FOLDER", repr(folder))],
        env={**os.environ, "DNNL_VERBOSE": "1"},
        cwd=os.path.dirname(os.path.dirname(folder)),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    runs = [
        [line.split(",")[4] for line in part.splitlines() if ",backward,data" in line]
        for part in output.split("begin\n")[1:]
    ]
    without, with_copy = runs
    assert without == ["bnorm_ref:any"]
    assert len(with_copy) == 1
    assert with_copy != without


def test_one_4d_reference_of_a_3d_network():
    """A kernel of 1x3x3 on a clip is a 2-D convolution on its frames."""
    width, clip = 16, (2, 3, 4, 6, 6)
    symbol = for_cpu_training(conv_bn_conv(width, (1, 3, 3)), {"data": clip})
    values, states = seeded_values(symbol, clip)
    head = np.random.RandomState(9).standard_normal((2, 4, 4, 4, 4)).astype("float32")
    out, grads, new = run(symbol, values, states, head)
    flat = dict(values, first_weight=values["first_weight"][:, :, 0])
    flat["last_weight"] = values["last_weight"][:, :, 0]
    flat["data"] = values["data"].transpose(0, 2, 1, 3, 4).reshape(8, 3, 6, 6)
    heads = head.transpose(0, 2, 1, 3, 4).reshape(8, 4, 4, 4)
    want, want_grads, want_new = run(conv_bn_conv(width, (3, 3)), flat, states, heads)
    np.testing.assert_allclose(
        out.transpose(0, 2, 1, 3, 4).reshape(want.shape), want, rtol=1e-4, atol=1e-4
    )
    for name in ["first_weight", "last_weight", "bn_gamma", "bn_beta"]:
        grad = want_grads[name].reshape(grads[name].shape)
        np.testing.assert_allclose(grads[name], grad, atol=1e-4 * np.abs(grad).max())
    for name, state in want_new.items():
        np.testing.assert_allclose(new[name], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [16, 32])
def test_training_reduces_the_loss(width):
    symbol = mx.sym.Pooling(
        conv_bn_conv(width, (3, 3, 3)), global_pool=True, kernel=(1, 1, 1), pool_type="avg"
    )
    symbol = mx.sym.SoftmaxOutput(mx.sym.flatten(symbol), name="softmax")
    shape = (8, 3, 4, 6, 6)
    module = mx.mod.Module(for_cpu_training(symbol, {"data": shape}))
    module.bind([("data", shape)], [("softmax_label", (8,))])
    mx.random.seed(1)
    module.init_params(mx.init.Xavier())
    module.init_optimizer(optimizer_params={"learning_rate": 0.3, "rescale_grad": 1 / 8})
    generator = np.random.RandomState(3)
    label = generator.randint(0, 4, 8)
    data = generator.standard_normal(shape) + label[:, None, None, None, None] * 0.5
    batch = mx.io.DataBatch([mx.nd.array(data)], [mx.nd.array(label)])
    losses = []
    for _ in range(12):
        module.forward(batch, is_train=True)
        probabilities = module.get_outputs()[0].asnumpy()
        losses.append(-np.log(probabilities[np.arange(8), label]).mean())
        module.backward()
        module.update()
    assert losses[-1] < 0.7 * losses[0]


def test_names_order_attributes_and_outputs_are_kept():
    symbol, conf = get_symbol("TINY_GLORE", num_classes=5)
    shape = (1, *conf.data_shape)
    rewritten = for_cpu_training(symbol, {"data": shape})
    assert rewritten.list_arguments() == symbol.list_arguments()
    assert rewritten.list_auxiliary_states() == symbol.list_auxiliary_states()
    assert rewritten.list_outputs() == symbol.list_outputs()
    assert set(symbol.get_internals().list_outputs()) <= set(
        rewritten.get_internals().list_outputs()
    )
    before, after = symbol.attr_dict(), rewritten.attr_dict()
    norms = [n["name"] for n in json.loads(symbol.tojson())["nodes"] if n["op"] == "BatchNorm"]
    assert norms
    means = [name for name in before if f"{name}_mean" in after]
    assert means == ["global-pool"]
    for name in before.keys() - means:
        assert after[f"{name}_4d" if name in norms else name] == before[name]
    assert rewritten.infer_shape(data=shape) == symbol.infer_shape(data=shape)
    again = for_cpu_training(rewritten, {"data": shape})
    assert again.tojson() == rewritten.tojson()


def test_4d_norms_stay_as_they_are(golden):
    symbol = mx.sym.load(golden("released_resnet50_w-glore_2-3-symbol.json"))
    rewritten = for_cpu_training(symbol, {"data": (1, 3, 224, 224)})
    assert rewritten.list_arguments() == symbol.list_arguments()
    changed = [
        node["name"]
        for node in json.loads(rewritten.tojson())["nodes"]
        if node["name"].endswith("_4d")
    ]
    # The graph convolutions alone work on 3-D data: two in each of the five units.
    assert len(changed) == 10
    assert all("_GCN-" in name for name in changed)
    image = conv_bn_conv(16, (1, 1))
    assert for_cpu_training(image, {"data": (1, 3, 4, 4)}) is image


def test_heads_of_a_norm_and_of_several_outputs():
    data = mx.sym.var("data")
    norm = mx.sym.BatchNorm(data, fix_gamma=False, output_mean_var=True, name="bn")
    group = mx.sym.Group([data * 2, norm[0], norm[1]])
    rewritten = for_cpu_training(group, {"data": (2, 8, 3, 4, 5)})
    assert len(rewritten.list_outputs()) == 3
    value = np.random.RandomState(0).standard_normal((2, 8, 3, 4, 5)).astype("float32")
    results = []
    for symbol in (group, rewritten):
        executor = symbol.simple_bind(mx.cpu(), grad_req="null", data=value.shape)
        executor.arg_dict["bn_gamma"][:] = 1
        results.append(
            [out.asnumpy() for out in executor.forward(is_train=True, data=mx.nd.array(value))]
        )
    for plain, other in zip(*results):
        assert plain.shape == other.shape
        np.testing.assert_allclose(plain, other, atol=1e-5)


def test_errors():
    data = mx.sym.var("data")
    norm = mx.sym.BatchNorm(data, name="odd", axis=2)
    with pytest.raises(GraphError, match="odd normalises axis 2"):
        for_cpu_training(norm, {"data": (2, 8, 4)})
    with pytest.raises(GraphError, match="odd.*give the shape of every input"):
        for_cpu_training(norm, {})
    with pytest.raises(GraphError, match="does not take inputs"):
        for_cpu_training(conv_bn_conv(4, (1, 1)), {"data": (2, 3, 4, 4, 4)})


@pytest.mark.parametrize("spatial", [(9,), (4, 5), (2, 3, 4)])
def test_a_factor_per_channel_becomes_a_matrix_product(spatial):
    data, factor = mx.sym.var("data"), mx.sym.var("factor")
    plain = mx.sym.broadcast_mul(data, factor, name="scaled")
    shapes = {"data": (2, 8, *spatial), "factor": (2, 8, *(1,) * len(spatial))}
    graph = for_cpu_training(plain, shapes)
    operators = [node["op"] for node in json.loads(graph.tojson())["nodes"]]
    assert "batch_dot" in operators
    assert "broadcast_mul" not in operators
    assert graph.list_arguments() == ["data", "factor"]
    assert graph.list_outputs() == ["scaled_output"]

    rng = np.random.RandomState(3)
    values = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    head = rng.standard_normal(shapes["data"]).astype("float32")
    out, grads, _ = run(graph, values, {}, head)
    np.testing.assert_allclose(out, values["data"] * values["factor"], rtol=1e-6)
    np.testing.assert_allclose(grads["data"], head * values["factor"], rtol=1e-6)
    axes = tuple(range(2, 2 + len(spatial)))
    expected = (head * values["data"]).astype("float64").sum(axes, keepdims=True)
    np.testing.assert_allclose(grads["factor"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [(2, 8, 4, 5), (1, 8, 1, 1), (2, 1, 4, 5)])
def test_other_products_stay(factor):
    plain = mx.sym.broadcast_mul(mx.sym.var("data"), mx.sym.var("factor"), name="scaled")
    assert for_cpu_training(plain, {"data": (2, 8, 4, 5), "factor": factor}) is plain


def test_the_average_of_a_clip_becomes_a_mean():
    data = mx.sym.var("data")
    plain = mx.sym.Pooling(
        data, global_pool=True, kernel=(1, 1, 1), pool_type="avg", name="average"
    )
    graph = for_cpu_training(plain, {"data": (2, 8, 3, 4, 5)})
    assert "Pooling" not in graph.tojson()
    assert graph.list_outputs() == ["average_output"]
    # Of other sizes as well.
    value = np.random.RandomState(0).standard_normal((3, 8, 2, 6, 7)).astype("float32")
    head = np.random.RandomState(1).standard_normal((3, 8, 1, 1, 1)).astype("float32")
    gradient = mx.nd.zeros(value.shape)
    executor = graph.bind(mx.cpu(), {"data": mx.nd.array(value)}, {"data": gradient})
    (output,) = executor.forward(is_train=True)
    executor.backward(mx.nd.array(head))
    expected = value.mean(axis=(2, 3, 4), keepdims=True)
    np.testing.assert_allclose(output.asnumpy(), expected, rtol=0, atol=1e-6)
    shares = np.broadcast_to(head / (2 * 6 * 7), value.shape)
    np.testing.assert_allclose(gradient.asnumpy(), shares, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 8, 4, 5), {"global_pool": True, "pool_type": "avg", "kernel": (1, 1)}),
        ((2, 8, 3, 4, 5), {"global_pool": True, "pool_type": "max", "kernel": (1, 1, 1)}),
        ((2, 8, 3, 4, 5), {"pool_type": "avg", "kernel": (1, 2, 2), "stride": (1, 2, 2)}),
    ],
)
def test_other_poolings_stay(shape, settings):
    plain = mx.sym.Pooling(mx.sym.var("data"), **settings)
    assert for_cpu_training(plain, {"data": shape}) is plain


@pytest.mark.parametrize(("size", "new"), [((3, 5), (17, 40)), ((1, 1), (4, 3)), ((6, 4), (6, 9))])
def test_bilinear_resize_becomes_matrix_products(size, new):
    """Forwards and backwards as MXNet's own, which takes five times as long as a small network."""
    data, image = mx.sym.Variable("data"), mx.sym.Variable("image")
    plain = mx.sym.contrib.BilinearResize2D(
        data, image, mode="like", align_corners=False, name="up"
    )
    shapes = {"data": (2, 3, *size), "image": (2, 1, *new)}
    fast = for_cpu_training(plain, shapes)
    assert "BilinearResize2D" not in fast.tojson()
    assert fast.list_outputs() == plain.list_outputs()
    assert fast.list_arguments() == plain.list_arguments()
    generator = np.random.RandomState(0)
    values = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    head = generator.standard_normal((2, 3, *new))
    (expected, gradients, _), (found, others, _) = (
        run(symbol, values, {}, head) for symbol in (plain, fast)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(others["data"], gradients["data"], atol=1e-5 * new[0] * new[1])
    assert (others["image"] == 0).all()


def test_other_resizes_stay():
    data = mx.sym.Variable("data")
    aligned = mx.sym.contrib.BilinearResize2D(data, height=6, width=6, name="up")
    assert for_cpu_training(aligned, {"data": (1, 2, 3, 3)}) is aligned
