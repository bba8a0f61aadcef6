"""INT8 forms of networks: which layers are rounded, over which ranges, how near they come."""

import numpy as np
import pytest
from test_inference import NETWORKS, case

from checkpoint.params import CheckpointError
from glore_common import GloReError
from mxnet_compat import mx
from network.inference import FusedNet, calibrated, optimize
from network.quantization import Int8, calibrate, joined, layers_of, quantize
from network.rewriting import Graph


def forms(kind, **changes):
    """Return data, the fused network in float32, its INT8 form's ranges, and how to make one."""
    symbol, conf, data, params = case(kind)
    data = mx.nd.array(data)
    plain = FusedNet(symbol, params, conf.data_shape, [mx.cpu()])
    int8 = calibrated(symbol, params, conf.data_shape, [data[:1], data[1:]], **changes)

    def made(int8):
        return FusedNet(symbol, params, conf.data_shape, [mx.cpu()], int8=int8)

    return data, plain, int8, made


@pytest.mark.parametrize("kind", NETWORKS)
def test_comes_near_the_network(kind):
    data, plain, int8, made = forms(kind)
    net = made(int8)
    want, got = plain(data).asnumpy(), net(data).asnumpy()
    # 255 steps a layer: not equal, and not another function. Random weights are the worst case, and
    # deep networks with them.
    assert not np.array_equal(want, got)
    deep = kind in ("study", "groups", "dual path")
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > (0.9 if deep else 0.99)


def test_mxnet_does_not_complain_of_sigmoids(capfd):
    data, _, int8, made = forms("3D SE")
    made(int8)(data).wait_to_read()
    assert "sigmoid" not in capfd.readouterr().err


def rounded(net):
    """Return (layers computed in INT8, all layers) of a net."""
    symbol = net.net(mx.sym.var("data"))
    nodes = [node for node in Graph(symbol).nodes() if node.op.startswith("_sg_mkldnn")]
    return sum(node.flag("quantized") for node in nodes), len(nodes)


@pytest.mark.parametrize("kind", ["3D", "2D"])
def test_every_layer_but_those_left_out_is_rounded(kind):
    data, plain, int8, made = forms(kind)
    names = list(layers_of(joined(plain.optimized)))
    every = len(names)
    assert rounded(made(int8)) == (every, every)
    kept = Int8(int8.ranges, tuple(names[3:5]))
    assert rounded(made(kept)) == (every - 2, every)
    # With all layers in float32 nothing is left of INT8.
    want = plain(data).asnumpy()
    got = made(Int8(int8.ranges, tuple(names)))(data).asnumpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_ranges_are_those_of_the_samples():
    data, _, int8, _ = forms("2D basic")
    low, high = int8.ranges["data"]
    assert (low, high) == (data.min().asscalar(), data.max().asscalar())
    # A relu's output has no other sign.
    assert int8.ranges["sg_mkldnn_conv_act_0_output"][0] == 0


def test_entropy_leaves_outliers_out():
    symbol, conf, data, params = case("3D released units")
    data[0, 0, 0, 0, 0] = 200.0
    naive, entropy = (
        calibrated(symbol, params, conf.data_shape, [mx.nd.array(data[:1])], mode=mode)
        for mode in ("naive", "entropy")
    )
    assert naive.ranges["data"][1] == 200.0
    assert 2.0 < entropy.ranges["data"][1] < 50.0


def test_mistakes():
    symbol, conf, data, params = case("2D basic")
    graph, args, auxs = optimize(symbol, params, {}, {"data": (1, *conf.data_shape)})
    graph = joined(graph)
    args, auxs = ({n: mx.nd.array(v) for n, v in part.items()} for part in (args, auxs))
    with pytest.raises(GloReError, match="no samples"):
        calibrate(graph, args, auxs, [])
    with pytest.raises(GloReError, match="not finite"):
        calibrate(graph, args, auxs, [mx.nd.full((1, *conf.data_shape), np.nan)])
    int8 = calibrate(graph, args, auxs, [mx.nd.array(data[:1])])
    with pytest.raises(CheckpointError, match="no ranges for 1 .* data"):
        quantize(graph, args, auxs, Int8({n: r for n, r in int8.ranges.items() if n != "data"}))
    with pytest.raises(CheckpointError, match="no layers conv9 to leave"):
        quantize(graph, args, auxs, Int8(int8.ranges, ("conv9",)))
