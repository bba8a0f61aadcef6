"""PyTorch files of other projects: what lies beside weights, where they lie, names of wrappers.

``test/inputs/torch`` was written by PyTorch 2.13 (``pytorch03.pth``: in the form of PyTorch 0.3, by
hand); what is made here is written opcode by opcode.
"""

import contextlib
import io
import logging
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from torch_files import as_stream, as_zip, p_dict, p_global, p_int, p_str, p_tensor, p_tuple

from checkpoint.graph import save
from checkpoint.params import CheckpointError
from checkpoint.paths import split_key
from checkpoint.released import locate
from checkpoint.torch_file import read_torch_file
from checkpoint.torch_names import strip_module, to_mxnet_name
from mxnet_compat import mx
from network import get_symbol
from network.initializer import initial_params
from network.pretrained import load_pretrained, read_source

INPUTS = os.path.join(os.path.dirname(__file__), "..", "inputs", "torch")
VALUES = {"conv1_conv_weight": np.zeros((2, 3, 1, 1)), "conv1_bn_gamma": np.ones(2)}


def dictionary(*items):
    """A plain dictionary of (name, opcodes)."""
    return b"\x80\x02}(" + b"".join(p_str(name) + value for name, value in items) + b"u."


def call(module, name, *arguments):
    return p_global(module, name) + p_tuple(arguments) + b"R"


@pytest.fixture
def state():
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    return array, p_dict([("a.weight", p_tensor("0", array))]), {"0": array}


def write(tmp_path, content, name="net.pth"):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", sorted(os.listdir(INPUTS)))
def test_given_files(name, caplog):
    caplog.set_level(logging.INFO)
    path = os.path.join(INPUTS, name)
    assert locate(path) == path
    found = {to_mxnet_name(n): value for n, value in read_torch_file(path).items()}
    assert found.keys() == VALUES.keys()
    for key, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, VALUES[key])
    if name.startswith("nested_"):
        key = name[len("nested_") : -len(".pth")]
        assert f"the weights under '{key}' are taken" in caplog.text


# --- what lies beside the weights -----------------------------------------------------------------

BESIDE = {
    "size": call("torch", "Size", p_tuple([p_int(3), p_int(4)])),
    "counter": call("collections", "Counter", b"}" + p_int(1) + p_int(2) + b"s"),
    "device": call("torch", "device", p_str("cuda"), p_int(0)),
    "dtype": p_global("torch", "float8_e5m2"),
    "layout": call("torch.serialization", "_get_layout", p_str("torch.strided")),
    "format": p_global("torch", "channels_last"),
    "set": call("__builtin__", "set", b"]" + p_int(1) + b"a"),
    "complex": call("__builtin__", "complex", p_int(1), p_int(2)),
    "bytes": call("_codecs", "encode", p_str("\xe9"), p_str("latin1")),
    "bytearray": call("__builtin__", "bytearray", p_str("ab"), p_str("latin1")),
    "defaultdict": call("collections", "defaultdict", p_global("__builtin__", "int")),
    "namespace": p_global("argparse", "Namespace") + b")\x81}" + p_str("lr") + p_int(1) + b"sb",
    "path": call("pathlib", "PosixPath", p_str("a"), p_str("b")),
    "scalar": call(
        "numpy.core.multiarray",
        "scalar",
        call("numpy", "dtype", p_str("f8"), p_int(0), p_int(1)) + p_tuple([p_int(3)]) + b"b",
        call("_codecs", "encode", p_str("12345678"), p_str("latin1")),
    ),
    "quantised": call("torch._utils", "_rebuild_qtensor", p_int(0), p_int(0)),
    "sparse": call("torch._utils", "_rebuild_sparse_tensor", p_int(0), p_int(0)),
}


@pytest.mark.parametrize("form", [as_zip, as_stream])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_the_weights_is_passed_over(tmp_path, state, kind, form):
    array, weights, storages = state
    content = dictionary(("state_dict", weights), ("other", BESIDE[kind]), ("epoch", p_int(3)))
    found = read_torch_file(write(tmp_path, form(content, storages)))
    np.testing.assert_array_equal(found.pop("a.weight"), array)
    assert not found


@pytest.mark.parametrize(
    ("module", "name"),
    [("posix", "system"), ("builtins", "getattr"), ("torch.nn.modules.conv", "Conv2d")],
)
def test_other_names_are_refused_and_it_is_said_why(tmp_path, state, module, name):
    _, weights, storages = state
    content = dictionary(("state_dict", weights), ("x", call(module, name, p_str("id"))))
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(write(tmp_path, as_zip(content, storages)))
    assert f"it asks for {module}.{name}, which torch.load(weights_only=True)" in str(caught.value)
    assert "torch.save(model.state_dict(), FILE)" in str(caught.value)


def test_stand_ins_cannot_be_changed_by_a_file(tmp_path, state):
    # BUILD on a function, a class and a stand-in, with attributes that would be set on them.
    array, weights, storages = state
    for target in (
        p_global("torch._utils", "_rebuild_tensor_v2"),
        p_global("argparse", "Namespace"),
        p_global("collections", "OrderedDict"),
        p_global("torch", "FloatStorage"),
    ):
        attributes = b"N}" + p_str("__defaults__") + p_tuple([p_int(1)]) + b"s\x86b"
        content = dictionary(("x", target + attributes), ("state_dict", weights))
        path = write(tmp_path, as_zip(content, storages))
        with contextlib.suppress(CheckpointError):
            read_torch_file(path)
        whole = write(tmp_path, as_zip(dictionary(("state_dict", weights)), storages), "w.pth")
        np.testing.assert_array_equal(read_torch_file(whole)["a.weight"], array)


# --- kinds of tensors -----------------------------------------------------------------------------


def old_tensor(key, array):
    """As PyTorch 0.3 wrote it: no flag, no hooks."""
    whole = p_tensor(key, array).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
    ending = b"\x89" + p_global("collections", "OrderedDict") + b")R" + b"tR"
    assert whole.endswith(ending)
    return whole[: -len(ending)] + b"tR"


@pytest.mark.parametrize("form", [as_zip, as_stream])
def test_tensors_of_old_pytorch_and_their_parameters(tmp_path, form):
    array = np.arange(4, dtype="<f4")
    tensor = old_tensor("0", array)
    parameter = p_global("torch.nn.parameter", "Parameter") + p_tuple([old_tensor("1", array)])
    parameter += b"R" + p_tuple([b"\x88", b"\x89", p_dict([])]) + b"b"
    content = b"\x80\x02" + p_dict([("a", tensor), ("b", parameter)]) + b"."
    found = read_torch_file(write(tmp_path, form(content, {"0": array, "1": array})))
    assert list(found) == ["a", "b"]
    for value in found.values():
        np.testing.assert_array_equal(value, array)


def test_bfloat16_becomes_float32(tmp_path):
    exact = np.array([1.0, -2.5, 3e38, 0.0, np.inf], "<f4")
    exact = (exact.view("<u4") & 0xFFFF0000).view("<f4")
    half = (exact.view("<u4") >> 16).astype("<u2")
    tensor = p_tensor("0", np.zeros(5, "<f2")).replace(b"HalfStorage", b"BFloat16Storage")
    content = b"\x80\x02" + p_dict([("a", tensor)]) + b"."
    found = read_torch_file(write(tmp_path, as_zip(content, {"0": half})))
    np.testing.assert_array_equal(found["a"], exact)


def tensor_v3(key, count, shape, strides, dtype):
    pid = p_tuple(
        [p_str("storage"), p_global("torch.storage", "UntypedStorage"), p_str(key), p_str("cpu")]
        + [p_int(count)]
    )
    arguments = [pid + b"Q", p_int(0), p_tuple(map(p_int, shape)), p_tuple(map(p_int, strides))]
    arguments += [b"\x89", p_global("collections", "OrderedDict") + b")R"]
    return call("torch._utils", "_rebuild_tensor_v3", *arguments, p_global("torch", dtype))


def test_tensors_on_bytes(tmp_path):
    array = np.array([[1, 70000], [2, 3]], "<u4")
    content = b"\x80\x02" + p_dict([("a", tensor_v3("0", 16, (2, 2), (2, 1), "uint32"))]) + b"."
    found = read_torch_file(write(tmp_path, as_zip(content, {"0": array})))
    np.testing.assert_array_equal(found["a"], array)
    assert found["a"].dtype == np.uint32
    content = content.replace(b"uint32", b"float8_e5m2")
    with pytest.raises(CheckpointError, match="type that is not supported: float8_e5m2"):
        read_torch_file(write(tmp_path, as_zip(content, {"0": array})))


def test_views_of_storages_in_the_older_form(tmp_path):
    array = np.arange(10, dtype="<f4")
    view = p_tuple([p_str("v"), p_int(4), p_int(3)])
    tensor = p_tensor("0", np.zeros(3, "<f4"), count=10, view=view)
    content = b"\x80\x02" + p_dict([("a", tensor)]) + b"."
    found = read_torch_file(write(tmp_path, as_stream(content, {"0": array})))
    np.testing.assert_array_equal(found["a"], [4, 5, 6])
    beyond = content.replace(p_int(4) + p_int(3), p_int(8) + p_int(3))
    with pytest.raises(CheckpointError, match="reaches beyond"):
        read_torch_file(write(tmp_path, as_stream(beyond, {"0": array})))


def test_a_weight_that_is_no_plain_tensor_is_named(tmp_path):
    content = b"\x80\x02" + p_dict([("fc.weight", BESIDE["quantised"])]) + b"."
    with pytest.raises(CheckpointError, match=r"fc\.weight is a quantised tensor"):
        read_torch_file(write(tmp_path, as_zip(content, {})))


# --- where the weights lie ------------------------------------------------------------------------


def test_several_state_dicts_are_asked_for(tmp_path, state):
    array, weights, storages = state
    other = p_dict([("b.weight", p_tensor("0", array))])
    content = dictionary(("state_dict", weights), ("state_dict_ema", other))
    path = write(tmp_path, as_zip(content, storages))
    with pytest.raises(CheckpointError, match="under state_dict, state_dict_ema: say which"):
        read_torch_file(path)
    assert list(read_torch_file(f"{path}:state_dict_ema")) == ["b.weight"]
    assert list(read_torch_file(f"{path}:state_dict")) == ["a.weight"]
    with pytest.raises(CheckpointError, match="no state dict under 'ema'"):
        read_torch_file(f"{path}:ema")
    assert locate(f"{path}:state_dict") == f"{path}:state_dict"
    assert split_key(path) == (path, None)
    # A file of that very name goes first.
    assert split_key(write(tmp_path, b"", "net.pth:x")) == (f"{path}:x", None)


def test_extra_state_is_no_weight(tmp_path, state):
    array, _, storages = state
    items = [("a.weight", p_tensor("0", array)), ("a._extra_state", b"N")]
    content = b"\x80\x02" + p_dict(items) + b"."
    assert list(read_torch_file(write(tmp_path, as_zip(content, storages)))) == ["a.weight"]


@pytest.mark.parametrize(
    "name",
    ["module.", "model.", "_orig_mod.", "module._orig_mod.", "module.model.", "_orig_mod.module."],
)
def test_wrappers_leave_no_trace_in_names(name):
    assert strip_module(f"{name}conv1.bn.weight") == "conv1.bn.weight"
    assert to_mxnet_name(f"{name}conv1._orig_mod.bn.weight") == "conv1_bn_gamma"


# --- tars, by content -----------------------------------------------------------------------------


def test_tars_are_told_by_their_content(tmp_path):
    symbol, _ = get_symbol("TINY_3D", 5)
    params = initial_params(symbol, {"data": (1, 3, 4, 32, 32)})
    save(str(tmp_path / "net"), 0, symbol, *params)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("net-symbol.json", "net-0000.params"):
            archive.add(tmp_path / name, name)
    path = write(tmp_path, packed.getvalue(), "weights.bin")
    assert locate(path, str(tmp_path / "root")).endswith("net-0000.params")
    with open(os.path.join(INPUTS, "model_best.pth.tar"), "rb") as stream:
        whole = stream.read()
    for content in (whole, as_stream(pickle.dumps({}, 2), {})):
        path = write(tmp_path, content, "model_best.pth.tar")
        assert locate(path) == path
    path = write(tmp_path, struct.pack("<Q", 7), "broken.tar")
    with pytest.raises(CheckpointError, match=r"broken\.tar is no tar"):
        locate(path, str(tmp_path / "root"))


# --- torchvision and timm -------------------------------------------------------------------------


def torchvision_names(blocks, bottleneck):
    """{torchvision's name: ours} of a ResNet."""
    leaves = {"weight": "gamma", "bias": "beta"}
    leaves |= {f"running_{what}": f"moving_{what}" for what in ("mean", "var")}
    pairs = [("conv1", "bn1", "conv1")]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            theirs, ours = f"layer{stage}.{block}", f"conv{stage + 1}_B{block + 1:02d}_conv"
            branches = range(1, 4 if bottleneck else 3)
            pairs += [(f"{theirs}.conv{n}", f"{theirs}.bn{n}", f"{ours}-m{n}") for n in branches]
            if block == 0 and (bottleneck or stage > 1):
                pairs.append((f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}-w1"))
    names = {"fc.weight": "classifier_weight", "fc.bias": "classifier_bias"}
    for conv, norm, ours in pairs:
        names[f"{conv}.weight"] = f"{ours}_conv_weight"
        names |= {f"{norm}.{leaf}": f"{ours}_bn_{leaves[leaf]}" for leaf in leaves}
    return names


@pytest.mark.parametrize(
    ("row", "blocks", "bottleneck"),
    [
        ("resnet18_v1", (2, 2, 2, 2), False),
        ("resnet34_v1", (3, 4, 6, 3), False),
        ("resnet50_v1b", (3, 4, 6, 3), True),
    ],
)
def test_resnets_of_torchvision_and_timm(tmp_path, row, blocks, bottleneck):
    symbol, conf = get_symbol(row, 10, crop_size=64)
    inputs = {"data": (1, 3, 64, 64)}
    params = {}
    for part in initial_params(symbol, inputs):
        params.update(part)
    names = torchvision_names(blocks, bottleneck)
    assert set(names.values()) == set(params)
    arrays = {str(n): params[ours].astype("<f4") for n, ours in enumerate(names.values())}
    items = [(f"module.{name}", p_tensor(key, arrays[key])) for name, key in zip(names, arrays)]
    count = np.array([3], "<i8")
    items.append(("module.bn1.num_batches_tracked", p_tensor("n", count)))
    content = dictionary(("state_dict", p_dict(items)))
    path = write(tmp_path, as_zip(content, {**arrays, "n": count}))
    args, auxs = load_pretrained(symbol, path, inputs)
    for name, value in {**args, **auxs}.items():
        np.testing.assert_array_equal(value, params[name].astype("float32"), err_msg=name)
    # Without a network to go by, as for finding out which one it is.
    args, auxs, _ = read_source(path, None)
    assert set(args) == set(symbol.list_arguments()) - {"data", "softmax_label"}
    assert set(auxs) == set(symbol.list_auxiliary_states())


def test_the_added_row_computes_what_gluoncvs_network_does(tmp_path):
    from gluoncv import model_zoo

    from network.block import build_block

    net = model_zoo.get_model("resnet50_v1b", pretrained=False, classes=7)
    net.initialize()
    data = mx.nd.random.normal(shape=(1, 3, 64, 64))
    net(data)
    rng = np.random.RandomState(0)
    for name, parameter in net.collect_params().items():
        value = rng.uniform(0.5, 1.5, parameter.shape)
        if not name.endswith(("gamma", "var")):
            value = (value - 1) * (0.1 if name.endswith("weight") else 1)
        parameter.set_data(mx.nd.array(value))
    expected = net(data).asnumpy()
    net.save_parameters(str(tmp_path / "net.params"))
    symbol, conf = get_symbol("resnet50_v1b", 7, crop_size=64)
    params = load_pretrained(symbol, str(tmp_path / "net.params"), {"data": (1, 3, 64, 64)})
    ours = build_block(symbol, conf, params=params)(data).asnumpy()
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
