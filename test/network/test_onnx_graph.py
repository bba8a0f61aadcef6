"""Every network and block as an ONNX model, run by onnxruntime, against MXNet."""

import numpy as np
import pytest
from golden_weights import seeded

from checkpoint.graph import read_symbol
from checkpoint.params import param_shapes
from glore_common import UsageError
from mxnet_compat import mx
from network.block import build_block
from network.builder import InputConf, get_symbol, list_networks, logits
from network.onnx_graph import IR_VERSION, OPSET, OnnxError, OnnxNet, difference, to_onnx
from network.symbol_glore import GloRe_Unit

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# One of each family; the others differ in depth and width.
QUICK = {
    "TINY_GLORE",
    "TINY_3D",
    "resnet18_v1",
    "resnet18_v1_slim",
    "resnet18_w-glore_1-1",
    "resnet50_w-gc",
    "resnet50_w-se",
    "dpn92_w-glore_2-3",
}
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in list_networks(study=True)
]
BLOCKS = (
    "gc",
    "se",
    "snl",
    *(f"nl:mode={mode}" for mode in ("gaussian", "dot_product", "concatenation")),
    "nl@4:1:mode=dot_product,sub_sample=true",
    "nl@4:1:sub_sample=true",
    "gc@c4/after:ratio=1/4,glore@4:1:normalize=true",
    "glore@4:1:flavour=released",
    "glore@4:1:flavour=video",
    "glore@4:1:flavour=report",
)
SIDE = 64


def tame(symbol, inputs):
    """Return parameters that keep outputs finite, and the scores of Non-local blocks flat."""
    args, auxs = param_shapes(logits(symbol), inputs)

    def value(name, shape):
        gain = 0.1 if "_theta_" in name or "_phi_" in name else 1.0
        return (gain * seeded(name, shape)).astype("float32")

    return {n: value(n, s) for n, s in args.items()}, {n: value(n, s) for n, s in auxs.items()}


def check_equal(symbol, conf):
    """Compare both forms of a network in batches of 1 and 3."""
    params = tame(symbol, {"data": (1, *conf.data_shape)})
    net = OnnxNet(to_onnx(symbol, *params, conf.data_shape).SerializeToString())
    block = build_block(symbol, conf, params=params, training=False)
    for n in (1, 3):
        data = np.random.RandomState(n).standard_normal((n, *conf.data_shape)).astype("float32")
        assert difference(net, block, data) <= 1e-5
    rows = net.run(data)
    alone = np.concatenate([net.run(sample[None]) for sample in data])
    assert np.abs(rows - alone).max() <= 1e-5 * np.abs(rows).max()
    # Of the same logits: those of deep networks are in the hundreds, where 1e-5 of them shows.
    softmax = mx.nd.softmax(mx.nd.array(rows)).asnumpy()
    assert np.abs(net.run(data, "probabilities") - softmax).max() < 1e-5
    return net


@pytest.mark.parametrize("name", ROWS)
def test_every_row_equals_mxnet(name):
    symbol, conf = get_symbol(name, 7, crop_size=SIDE)
    check_equal(symbol, conf)


@pytest.mark.parametrize("name", ["TINY_3D", "resnet18_v1_slim"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_equals_mxnet_in_2d_and_3d(name, block):
    symbol, conf = get_symbol(name, 5, crop_size=SIDE, block=block)
    check_equal(symbol, conf)


def test_a_unit_with_a_stride_equals_mxnet():
    data = GloRe_Unit(mx.sym.var("data"), num_in=8, name="unit", stride=(2, 2))
    data = mx.sym.Pooling(data, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="avg")
    out = mx.sym.FullyConnected(mx.sym.Flatten(data), num_hidden=4, name="classifier")
    symbol = mx.sym.SoftmaxOutput(out, name="softmax")
    check_equal(symbol, InputConf((8, 9, 10), (0, 0, 0), (1, 1, 1)))


def test_the_released_graph_equals_mxnet(golden):
    symbol = read_symbol(golden("released_resnet50_w-glore_2-3-symbol.json"))
    params = tame(symbol, {"data": (1, 3, 224, 224)})
    conf = InputConf((3, 224, 224), (0, 0, 0), (1, 1, 1))
    net = OnnxNet(to_onnx(symbol, *params, conf.data_shape).SerializeToString())
    data = np.random.RandomState(0).standard_normal((1, 3, 224, 224)).astype("float32")
    assert difference(net, build_block(symbol, conf, params=params, training=False), data) <= 1e-5


@pytest.fixture(scope="module")
def tiny():
    """Return a small network with its parameters."""
    symbol, conf = get_symbol("TINY_GLORE", 5)
    return symbol, tame(symbol, {"data": (1, *conf.data_shape)}), conf


def test_a_file_says_its_versions_and_keeps_its_weights_as_constants(tiny):
    symbol, params, conf = tiny
    model = to_onnx(symbol, *params, conf.data_shape, {"a": "ä"}, "tiny")
    assert model.ir_version == IR_VERSION == 8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert OPSET == 17
    assert [value.name for value in model.graph.input] == ["data"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    names = {constant.name for constant in model.graph.initializer}
    assert {*params[0], *params[1]} <= names
    net = OnnxNet(model.SerializeToString())
    assert net.metadata == {"a": "ä"}


def test_another_size_is_refused_clearly(tiny):
    symbol, params, conf = tiny
    net = OnnxNet(to_onnx(symbol, *params, conf.data_shape).SerializeToString())
    with pytest.raises(UsageError, match=r"takes inputs of \(3, 8, 64, 64\), not \(3, 8, 65, 64\)"):
        net.run(np.zeros((1, 3, 8, 65, 64), "float32"))


def test_what_is_not_known_is_named(tiny):
    symbol, _, _ = tiny
    softmax = mx.sym.SoftmaxOutput(mx.sym.arcsinh(mx.sym.var("data"), name="odd"), name="softmax")
    with pytest.raises(OnnxError, match="odd: the operator arcsinh"):
        to_onnx(softmax, {}, {}, (3,))
    pooled = mx.sym.Pooling(
        mx.sym.var("data"), kernel=(2, 2), pooling_convention="full", name="pool"
    )
    full = mx.sym.SoftmaxOutput(mx.sym.Flatten(pooled), name="softmax")
    with pytest.raises(OnnxError, match="pool: only the pooling convention 'valid'"):
        to_onnx(full, {}, {}, (3, 8, 8))


def test_a_comparison_that_says_nothing_is_no_comparison(tiny):
    symbol, (args, auxs), conf = tiny
    constant = {**args, "classifier_weight": np.zeros_like(args["classifier_weight"])}
    broken = {**args, "classifier_bias": np.full_like(args["classifier_bias"], np.nan)}
    data = np.random.RandomState(0).standard_normal((2, *conf.data_shape)).astype("float32")
    for changed, reason in ((constant, "same for every input"), (broken, "not finite")):
        net = OnnxNet(to_onnx(symbol, changed, auxs, conf.data_shape).SerializeToString())
        block = build_block(symbol, conf, params=(changed, auxs), training=False)
        with pytest.raises(OnnxError, match=reason):
            difference(net, block, data)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(OnnxError, match=r"bad\.onnx is no ONNX model"):
        OnnxNet(str(tmp_path / "bad.onnx"))
    with pytest.raises(OnnxError, match="does not exist"):
        OnnxNet(str(tmp_path / "absent.onnx"))
