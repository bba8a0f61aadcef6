"""The fused form of a network equals the plain one, and is as small as it should be."""

import os
import subprocess
import sys

import numpy as np
import pytest

from mxnet_compat import mx
from network import get_symbol
from network.block import build_block
from network.builder import logits
from network.inference import FusedNet, fuse, optimize
from network.memory import activation_bytes
from network.rewriting import count_operations

# One of each kind: name, overrides, side of the input.
NETWORKS = {
    "3D": ("RESNET50_GLORE", {}, 32),
    "3D bare": ("RESNET101_3D", {}, 32),
    "slow only": ("RESNET50_SLOWONLY_GC", {"clip_length": 2}, 32),
    "3D SE": ("RESNET50_3D", {"block": "se", "clip_length": 4}, 32),
    "3D released units": ("TINY_3D", {"glore": "1-1", "glore_flavour": "released"}, 32),
    "3D NL": ("RESNET50_SLOWONLY_NL5", {"clip_length": 2}, 32),
    "2D": ("resnet50_w-glore_2-3", {}, 64),
    "2D basic": ("resnet18_w-glore_1-1", {}, 64),
    "2D normalised units": ("resnet18", {"glore": "1-1", "normalize": True}, 64),
    "post-activation": ("resnet18_v1", {"glore": "c4", "glore_flavour": "video"}, 64),
    "study": ("resnet18_v1_slim", {"glore": "c4", "glore_flavour": "report"}, 64),
    "SE": ("resnet50_w-se_w-glore_0-3", {}, 64),
    "GC": ("resnet50_w-gc", {}, 64),
    "SNL": ("resnet50_w-snl_0-1", {}, 64),
    "NL": ("resnet50_w-nl_0-3", {}, 64),
    "groups": ("resnext101-32x4d_w-glore_2-3", {}, 32),
    "dual path": ("dpn92_w-glore_2-3", {}, 64),
}


def trained(symbol, data_shape, negative=0.05):
    """Return parameters as training may leave them: some gammas are negative, 0 or next to it.

    Statistics are not those of any data: normalised by them, differences of a bit would grow.
    """
    generator = np.random.RandomState(0)
    shapes, _, states = symbol.infer_shape(data=(1, *data_shape))
    params = {}
    for name, shape in zip(symbol.list_arguments(), shapes):
        if name.endswith("gamma"):
            value = generator.uniform(0.5, 1, shape)
            bad = generator.uniform(size=shape) < negative
            value = np.where(bad, generator.choice([-0.5, 0.0, 1e-5], shape), value)
        elif name.endswith(("beta", "bias")):
            value = generator.uniform(-0.3, 0.3, shape)
        else:
            value = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            # Without a normalisation a unit's output grows with the cube of its weights.
            value *= 0.1 if "_extra_" in name else 1.0
        params[name] = value.astype("float32")
    for name, shape in zip(symbol.list_auxiliary_states(), states):
        value = generator.uniform(*((-0.3, 0.3) if name.endswith("mean") else (0.5, 1.5)), shape)
        params[name] = value.astype("float32")
    del params["data"]
    return params


def case(kind, batch=2):
    name, overrides, side = NETWORKS[kind]
    symbol, conf = get_symbol(name, 10, crop_size=side, **overrides)
    data = np.random.RandomState(1).standard_normal((batch, *conf.data_shape)).astype("float32")
    return symbol, conf, data, trained(logits(symbol), conf.data_shape)


@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_the_plain_network(kind):
    symbol, conf, data, params = case(kind)
    plain = build_block(symbol, conf, mx.cpu(), params=params, training=False)
    fused = FusedNet(symbol, params, conf.data_shape, [mx.cpu()])
    x = mx.nd.array(data)
    want, got = plain(x).asnumpy(), fused(x).asnumpy()
    assert 0.1 < np.ptp(want) < 1e4
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # The second batch must not find the first one's weights or results.
    np.testing.assert_allclose(
        fused(mx.nd.array(data[:1] / 2)).asnumpy(),
        plain(mx.nd.array(data[:1] / 2)).asnumpy(),
        rtol=0,
        atol=1e-5 * np.abs(want).max(),
    )


def test_other_sizes_run_in_turn():
    """What is kept of one size, its memory and its plan, is of no use for another."""
    symbol, conf, _, params = case("3D released units")
    plain = build_block(symbol, conf, mx.cpu(), params=params, training=False)
    fused = FusedNet(symbol, params, conf.data_shape, [mx.cpu()])
    for number, side in enumerate((32, 64, 32)):
        x = mx.nd.random.normal(shape=(1 + number, *conf.data_shape[:2], side, side))
        want = plain(x).asnumpy()
        got = fused(x).asnumpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_arrays_share_memory_in_fused_networks_only(monkeypatch):
    """MXNet reads the variable when it plans: with the first call, and where the size changes."""
    symbol, conf, data, params = case("3D released units")
    fused = FusedNet(symbol, params, conf.data_shape, [mx.cpu()])
    plan, seen = fused.net, []

    def noted(part):
        seen.append(os.environ["NNVM_EXEC_MATCH_RANGE"])
        return plan(part)

    # A Gluon block lets a child be replaced by one of its type only.
    monkeypatch.setitem(fused.__dict__, "net", noted)
    x = mx.nd.array(data[:1])
    larger = mx.nd.concat(x, x, dim=3)
    for part in (x, x, larger, x):
        fused(part)
    assert seen == ["1", "0", "1", "1"]
    assert os.environ["NNVM_EXEC_MATCH_RANGE"] == "0"


PEAK = """
import sys
sys.path[:0] = [FOLDER]
from test_inference import FusedNet, get_symbol, logits, mx, trained
from benchmark.speed_torch import peak_memory
symbol, conf = get_symbol("resnet18_w-glore_1-1", 10)
fused = FusedNet(symbol, trained(logits(symbol), conf.data_shape), conf.data_shape, [mx.cpu()])
x = mx.nd.zeros((8, *conf.data_shape))
x.wait_to_read()
before = peak_memory()
fused(x).asnumpy()
print(peak_memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the peak")
def test_memory_of_a_call():
    """It holds the largest few maps and the reordered weights, not every map once."""
    folder = os.path.dirname(os.path.abspath(__file__))
    output = subprocess.run(
        [sys.executable, "-c", PEAK.replace("FOLDER", repr(folder))],
        cwd=os.path.dirname(os.path.dirname(folder)),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbol, conf = get_symbol("resnet18_w-glore_1-1", 10)
    maps = activation_bytes(logits(symbol), {"data": (8, *conf.data_shape)})
    assert int(output) < maps.training / 2


# What is left of them: of RESNET50_GLORE four BatchNorms of 59, a relu per block, the products.
NODES = {
    "RESNET50_GLORE": {
        "_sg_mkldnn_conv": 70,
        "Activation": 19,
        "BatchNorm": 4,
        "Pooling": 5,
        "batch_dot": 10,
        "Reshape": 10,
        "reshape_like": 5,
        "_sg_mkldnn_fully_connected": 6,
        "Flatten": 1,
    },
    "resnet50_w-glore_2-3": {
        "_sg_mkldnn_conv": 94,
        "Activation": 30,
        "BatchNorm": 10,
        "Pooling": 5,
        "batch_dot": 10,
        "Reshape": 30,
        "transpose": 10,
        "elemwise_add": 5,
        "reshape_like": 5,
        "_sg_mkldnn_fully_connected": 1,
        "Flatten": 1,
    },
    "resnet50_w-se_w-glore_0-3": {
        "_sg_mkldnn_conv": 91,
        "Activation": 13,
        "BatchNorm": 6,
        "Pooling": 21,
        "batch_dot": 6,
        "Reshape": 34,
        "transpose": 6,
        "elemwise_add": 15,
        "broadcast_mul": 16,
        "reshape_like": 3,
        "_sg_mkldnn_fully_connected": 33,
        "Flatten": 1,
    },
}


def fused_graph(name, negative, **overrides):
    symbol, conf = get_symbol(name, 10, **overrides)
    params = trained(logits(symbol), conf.data_shape, negative)
    graph, args, _ = optimize(logits(symbol), params, {}, {"data": (1, *conf.data_shape)})
    return fuse(graph), args


@pytest.mark.parametrize("name", NODES)
def test_nodes_of_the_fused_graph(name):
    graph, _ = fused_graph(name, negative=0)
    counts = count_operations(graph)
    # No node is slower than what it replaced: fewer are welcome, others are not.
    more = {op: count for op, count in counts.items() if count > NODES[name].get(op, 0)}
    assert more == {}


def test_channels_that_go_their_own_way_fill_blocks():
    """oneDNN leaves its layout for convolutions of other numbers of channels."""
    graph, args = fused_graph("RESNET50_GLORE", negative=0.05)
    picks = {name: value.shape for name, value in args.items() if "_pick" in name}
    assert len(picks) > 40
    for name, shape in picks.items():
        channels = shape[1] if name.endswith("_picked_weight") else shape[0]
        assert channels % 16 == 0, name
    # A convolution that picks and one that adds for each, no other node.
    counts = count_operations(graph)
    assert counts.pop("_sg_mkldnn_conv") <= 70 + 2 * len(picks) // 3
    assert counts.items() <= NODES["RESNET50_GLORE"].items()


REORDERS = """
import sys
sys.path[:0] = [FOLDER]
from test_inference import FusedNet, build_block, case, mx
symbol, conf, data, params = case("3D released units", batch=1)
x = mx.nd.array(data)
nets = [
    build_block(symbol, conf, mx.cpu(), params=params, training=False),
    FusedNet(symbol, params, conf.data_shape, [mx.cpu()]),
]
for net in nets:
    net(x).asnumpy()
    print("begin", flush=True)
    net(x).asnumpy()
    print("end", flush=True)
"""


def test_reorders_of_the_fused_network():
    """oneDNN's own word on how often it copies a map or a weight from one layout to another."""
    folder = os.path.dirname(os.path.abspath(__file__))
    result = subprocess.run(
        [sys.executable, "-c", REORDERS.replace("FOLDER", repr(folder))],
        env={**os.environ, "DNNL_VERBOSE": "1", "OMP_NUM_THREADS": "1"},
        cwd=os.path.dirname(os.path.dirname(folder)),
        capture_output=True,
        text=True,
        check=True,
    )
    calls = [part.partition("\nend")[0] for part in result.stdout.split("begin\n")[1:]]
    plain, fused = (call.count("exec,cpu,reorder") for call in calls)
    assert plain > 20, "nothing was counted"
    assert fused <= plain / 2


def test_a_shift_that_somebody_else_sees_is_not_made():
    """The sum is an output too: it must stay what it is, and so must its BatchNorm."""
    x = mx.sym.var("data")
    first = mx.sym.Convolution(x, num_filter=8, kernel=(1, 1), name="a")
    total = first + mx.sym.Convolution(x, num_filter=8, kernel=(1, 1), name="b")
    relu = mx.sym.Activation(
        mx.sym.BatchNorm(total, fix_gamma=False, name="n"), act_type="relu", name="r"
    )
    last = mx.sym.Convolution(relu, num_filter=4, kernel=(1, 1), name="c")
    symbol = mx.sym.Group([last, total])
    params = trained(symbol, (3, 4, 4))
    graph, args, auxs = optimize(symbol, params, {}, {"data": (1, 3, 4, 4)})
    data = np.random.RandomState(2).standard_normal((2, 3, 4, 4)).astype("float32")

    def run(symbol, values):
        values = {name: mx.nd.array(value) for name, value in {**values, "data": data}.items()}
        states = {name: values[name] for name in symbol.list_auxiliary_states()}
        values = {name: values[name] for name in symbol.list_arguments()}
        return [out.asnumpy() for out in symbol.bind(mx.cpu(), values, aux_states=states).forward()]

    for got, want in zip(run(graph, {**args, **auxs}), run(symbol, params)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
