"""Checkpoints: round trips, strictness, damaged files, PyTorch names and files."""

import logging
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from golden_weights import read_table, seeded
from torch_files import as_stream, as_zip, p_dict, p_global, p_int, p_str, p_tensor, p_tuple, whole

from checkpoint.graph import load, save
from checkpoint.params import LISTED, STREAM_START, CheckpointError, check, read_params
from checkpoint.paths import Files, epochs, find
from checkpoint.torch_file import read_torch_file, read_with_torch
from checkpoint.torch_names import to_mxnet_name, to_torch_name, to_torch_names
from glore_common import UsageError, run_main
from mxnet_compat import mx
from network import GloRe_Unit, get_symbol
from network.initializer import initial_params, initial_value
from network.pretrained import from_torch, load_pretrained, main, read_source

INPUTS = {"data": (1, 3, 6, 6)}


def net(classes=5, name="conv1"):
    data = mx.sym.Convolution(
        mx.sym.var("data"), num_filter=4, kernel=(3, 3), no_bias=True, name=f"{name}_conv"
    )
    data = mx.sym.BatchNorm(data, fix_gamma=False, name=f"{name}_bn")
    data = mx.sym.Pooling(data, global_pool=True, kernel=(1, 1), pool_type="avg")
    data = mx.sym.FullyConnected(mx.sym.flatten(data), num_hidden=classes, name="classifier")
    return mx.sym.SoftmaxOutput(data, name="softmax")


def some(symbol, inputs=INPUTS, salt=0):
    args, auxs = initial_params(symbol, inputs)
    return tuple(
        {n: seeded(n, v.shape, salt, gentle=False) for n, v in part.items()}
        for part in (args, auxs)
    )


def same(first, second):
    def array(value):
        return value.asnumpy() if isinstance(value, mx.nd.NDArray) else value

    return list(first) == list(second) and all(
        np.array_equal(array(first[n]), array(second[n]))
        and array(first[n]).dtype == array(second[n]).dtype
        for n in first
    )


@pytest.fixture
def saved(tmp_path):
    """Return (prefix, symbol, args, auxs) of a small checkpoint."""
    symbol = net()
    args, auxs = some(symbol)
    prefix = str(tmp_path / "some-net")
    save(prefix, 3, symbol, args, auxs)
    return prefix, symbol, args, auxs


# --- MXNet's own form ---------------------------------------------------------------------------


def test_round_trip(saved):
    prefix, symbol, args, auxs = saved
    assert sorted(os.listdir(os.path.dirname(prefix))) == [
        "some-net-0003.params",
        "some-net-symbol.json",
    ]
    for source in [(prefix, 3), (prefix, None), (f"{prefix}-0003.params", None)]:
        other, new_args, new_auxs = load(*source)
        assert other.tojson() == symbol.tojson()
        assert same(new_args, args)
        assert same(new_auxs, auxs)
        assert isinstance(new_args["classifier_bias"], mx.nd.NDArray)


def test_mxnet_reads_what_we_write_and_we_read_what_mxnet_writes(saved, tmp_path):
    prefix, symbol, args, auxs = saved
    other, their_args, their_auxs = mx.model.load_checkpoint(prefix, 3)
    assert same(their_args, args)
    assert same(their_auxs, auxs)
    module = mx.mod.Module(other)
    module.bind([("data", (2, 3, 6, 6))], [("softmax_label", (2,))])
    module.set_params(their_args, their_auxs)
    theirs = str(tmp_path / "theirs")
    module.save_checkpoint(theirs, 12)
    _, new_args, new_auxs = load(theirs)
    assert {n: v.asnumpy().tolist() for n, v in new_args.items()} == {
        n: v.tolist() for n, v in args.items()
    }
    assert set(new_auxs) == set(auxs)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "uint8", "int32", "int8", "int64"]
)
def test_our_reader_equals_mxnets(tmp_path, dtype):
    path = str(tmp_path / "a.params")
    generator = np.random.RandomState(0)
    arrays = {
        f"arg:{i}é": mx.nd.array(generator.uniform(0, 100, shape), dtype=dtype)
        for i, shape in enumerate([(1,), (3, 4), (2, 3, 4, 5, 6)])
    }
    mx.nd.save(path, arrays)
    found = read_params(path)
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value.asnumpy())


def test_older_array_forms_are_read(tmp_path):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    rest = struct.pack("<iii", 1, 0, 0) + values.tobytes()
    forms = {
        "legacy": struct.pack("<III", 2, 2, 3) + rest,
        "v1": struct.pack("<IIqq", 0xF993FAC8, 2, 2, 3) + rest,
        "v2": struct.pack("<Iiiqq", 0xF993FAC9, 0, 2, 2, 3) + rest,
    }
    for form, content in forms.items():
        path = tmp_path / f"{form}.params"
        name = b"arg:a"
        path.write_bytes(
            struct.pack("<QQQ", 0x112, 0, 1) + content + struct.pack("<QQ", 1, len(name)) + name
        )
        np.testing.assert_array_equal(read_params(str(path))["arg:a"], values)
        np.testing.assert_array_equal(mx.nd.load(str(path))["arg:a"].asnumpy(), values)


def test_save_takes_one_dictionary_and_replaces(saved):
    prefix, symbol, args, auxs = saved
    changed = dict(args, classifier_bias=np.full(5, 2, "float32"))
    path = save(prefix, 3, symbol, {**auxs, **changed})
    assert path == f"{prefix}-0003.params"
    assert same(load(path)[1], changed)


def test_save_refuses_what_does_not_fit_and_keeps_the_old_file(saved):
    prefix, symbol, args, auxs = saved
    with open(f"{prefix}-0003.params", "rb") as stream:
        before = stream.read()
    broken = {n: v for n, v in args.items() if n != "classifier_bias"}
    with pytest.raises(CheckpointError, match=r"missing \(1\): classifier_bias"):
        save(prefix, 3, symbol, broken, auxs)
    with pytest.raises(CheckpointError, match="no array but a str"):
        save(prefix, 3, symbol, {**args, **auxs, "classifier_bias": "text"})
    with open(f"{prefix}-0003.params", "rb") as stream:
        assert stream.read() == before


def test_newest_epoch(saved):
    prefix, symbol, args, auxs = saved
    for epoch in (0, 11, 10000):
        save(prefix, epoch, symbol, dict(args, classifier_bias=np.full(5, epoch, "f4")), auxs)
    save(prefix + "-b", 20000, symbol, args, auxs)
    assert epochs(prefix) == [0, 3, 11, 10000]
    assert load(prefix)[1]["classifier_bias"].asnumpy()[0] == 10000
    assert load(prefix, 11)[1]["classifier_bias"].asnumpy()[0] == 11
    with pytest.raises(CheckpointError, match="0007.params cannot be read: No such file"):
        load(prefix, 7)
    with pytest.raises(CheckpointError, match="neither a file .*nowhere"):
        load(prefix + "nowhere")
    with pytest.raises(UsageError, match="no epoch 3"):
        load(f"{prefix}-0003.params", 3)


def test_a_checkpoint_within_an_epoch_uses_the_graph_of_those_at_its_end(tmp_path):
    symbol = net()
    args, auxs = some(symbol)
    prefix = str(tmp_path / "task_ep")
    save(prefix, 1, symbol, args, auxs)
    step = str(tmp_path / "task_step-0000012.params")
    os.rename(f"{prefix}-0001.params", step)
    loaded, loaded_args, _ = load(step)
    assert loaded.tojson() == symbol.tojson()
    np.testing.assert_array_equal(loaded_args["classifier_bias"].asnumpy(), args["classifier_bias"])


def test_one_grammar_of_names(tmp_path, saved):
    prefix = saved[0]
    one = f"{prefix}-0003"
    for text in (prefix, f"{prefix}-symbol.json", one, f"{one}.params", f"{one}.json"):
        files = find(text)
        assert files == Files(one), text
        assert files.symbol == f"{prefix}-symbol.json"
    assert (files.params, files.states) == (f"{one}.params", f"{one}.states")
    assert find(prefix, 12) == Files(f"{prefix}-0012")
    with pytest.raises(UsageError, match="no epoch 3"):
        find(one, 3)


def test_brackets_in_a_path(tmp_path):
    symbol = net()
    prefix = str(tmp_path / "a [1] *" / "net")
    save(prefix, 1, symbol, *some(symbol))
    assert epochs(prefix) == [1]
    load(prefix)


def test_check_lists_everything():
    symbol = net()
    args, auxs = some(symbol)
    args["stray"] = args.pop("conv1_conv_weight")
    args["classifier_weight"] = np.zeros((5, 9), "f4")
    auxs["conv1_bn_moving_var"] = np.zeros(7, "f4")
    auxs["classifier_bias"] = args.pop("classifier_bias")
    with pytest.raises(CheckpointError) as caught:
        check(symbol, args, auxs, INPUTS, where="file.params")
    assert str(caught.value).splitlines() == [
        "file.params do not fit the network:",
        "  arguments, missing (2): conv1_conv_weight, classifier_bias",
        "  arguments, extra (1): stray",
        "  arguments, of another shape (1): classifier_weight is (5, 9), the network has (5, 4)",
        "  auxiliary states, extra (1): classifier_bias",
        "  auxiliary states, of another shape (1): conv1_bn_moving_var is (7,), the network has "
        "(4,)",
    ]
    allowed = {"allow_missing": ("conv1_conv", "_bias$"), "allow_extra": ("stray", "_bias$")}
    with pytest.raises(CheckpointError) as caught:
        check(symbol, args, auxs, INPUTS, **allowed)
    assert "missing" not in str(caught.value)
    assert "extra" not in str(caught.value)


def test_check_truncates_long_lists():
    symbol, conf = get_symbol("TINY_GLORE", num_classes=5)
    inputs = {"data": (1, *conf.data_shape)}
    args, auxs = some(symbol, inputs)
    check(symbol, args, auxs, inputs)
    with pytest.raises(CheckpointError) as caught:
        check(symbol, {}, auxs, inputs)
    assert f"missing ({len(args)})" in str(caught.value)
    assert f"and {len(args) - LISTED} more" in str(caught.value)
    with pytest.raises(UsageError, match="no input image"):
        check(symbol, args, auxs, {"image": (1, 3)})
    with pytest.raises(UsageError, match="does not take inputs"):
        check(symbol, args, auxs, {"data": (1, 3, 8, 8)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"garbage that is long enough", "no MXNet .params file"),
        (b"abc", "no MXNet .params file"),
        (pickle.dumps({"a": 1}), "looks like a pickle"),
        (b"PK\x03\x04" + b"0" * 50, "looks like a PyTorch file"),
        (STREAM_START + b"0" * 50, "looks like a PyTorch file"),
        (b'{"nodes": []}', "it is text"),
        (struct.pack("<QQQ", 0x112, 0, 2**60), "truncated or damaged"),
        (struct.pack("<QQQIii", 0x112, 0, 1, 0xF993FAC9, 0, 2**30), "dimensions"),
        (
            struct.pack("<QQQIiiqqiii", 0x112, 0, 1, 0xF993FAC9, 0, 2, 2**40, 2**40, 1, 0, 0),
            "truncated or damaged",
        ),
        (struct.pack("<QQQIiiqiii", 0x112, 0, 1, 0xF993FAC9, 0, 1, -4, 1, 0, 0), "damaged: shape"),
        (struct.pack("<QQQIiiqiii", 0x112, 0, 1, 0xF993FAC9, 0, 1, 4, 1, 0, 99), "type 99"),
        (struct.pack("<QQQIii", 0x112, 0, 1, 0xF993FAC9, 1, 1), "sparse"),
        (struct.pack("<QQQQQ", 0x112, 0, 0, 1, 2**62), "truncated or damaged"),
        (struct.pack("<QQQQQ", 0x112, 0, 0, 1, 2) + b"\xff\xfe", "codec"),
        (struct.pack("<QQQQQ", 0x112, 0, 0, 1, 1) + b"a", "0 arrays, 1 names"),
    ],
)
def test_foreign_and_damaged_params(tmp_path, content, message):
    path = tmp_path / "bad-0000.params"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_params(str(path))
    assert str(path) in str(caught.value)


def test_every_truncation_and_any_addition_is_an_error(saved):
    prefix, *_ = saved
    path = f"{prefix}-0003.params"
    with open(path, "rb") as stream:
        content = stream.read()
    for length in range(len(content)):
        with open(path, "wb") as stream:
            stream.write(content[:length])
        with pytest.raises(CheckpointError):
            read_params(path)
    with open(path, "wb") as stream:
        stream.write(content + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow its end"):
        load(path)


def test_flipped_bytes_never_raise_anything_else(saved):
    prefix, *_ = saved
    path = f"{prefix}-0003.params"
    with open(path, "rb") as stream:
        content = stream.read()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        with open(path, "wb") as stream:
            stream.write(damaged)
        try:
            load(path)
        except CheckpointError:
            continue


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "truncated or no JSON"),
        (lambda text: "", "truncated or no JSON"),
        (lambda text: "[1, 2]", "no graph of MXNet"),
        (lambda text: '{"nodes": []}', "has no nodes"),
        (lambda text: text.replace('"heads": [[', '"heads": [[9'), "refer to nodes"),
        (lambda text: text.replace('"inputs": [[0, 0, 0]', '"inputs": [[50, 0, 0]'), "refers to"),
        (lambda text: text.replace('"BatchNorm"', '"NoSuchOperator"'), "not understood by MXNet"),
        # What ended the process: a segmentation fault, a division by zero, a stack that overflows.
        (lambda text: text.replace('"heads": [[', '"heads": [[-1, 0, 0], ['), "are not there"),
        (lambda text: re.sub(r'("inputs": \[\[\d+), 0,', r"\1, -1,", text), "not there"),
        (lambda text: re.sub(r'("inputs": \[\[\d+), 0,', r"\1, 7,", text), "not there"),
        (
            lambda text: text.replace('"num_filter"', '"num_group": "0", "num_filter"'),
            "num_group 0",
        ),
        (lambda text: re.sub(r'"kernel": "[^"]*"', '"kernel": "(-5, 3)"', text), "out of range"),
        (lambda text: "[" * 200_000, "truncated or no JSON"),
    ],
)
def test_damaged_graphs(saved, damage, message):
    prefix, symbol, *_ = saved
    damaged = damage(symbol.tojson())
    assert damaged != symbol.tojson()
    with open(f"{prefix}-symbol.json", "w") as stream:
        stream.write(damaged)
    with pytest.raises(CheckpointError, match=message):
        load(prefix)


def test_names_without_kind(tmp_path):
    symbol = net()
    args, auxs = some(symbol)
    path = str(tmp_path / "gluon.params")
    mx.nd.save(path, {n: mx.nd.array(v) for n, v in {**args, **auxs}.items()})
    new_args, new_auxs = load_pretrained(symbol, path, INPUTS)
    assert same(new_args, args)
    assert same(new_auxs, auxs)


# --- PyTorch names ------------------------------------------------------------------------------

EXPECTED = {
    "conv1.conv.weight": "conv1_conv_weight",
    "conv1.bn.running_mean": "conv1_bn_moving_mean",
    "conv3.B01.conv_m1.bn.weight": "conv3_B01_conv-m1_bn_gamma",
    "conv3.B01.conv_m2.bn.bias": "conv3_B01_conv-m2_bn_beta",
    "conv2.B01.conv_w1.conv.weight": "conv2_B01_conv-w1_conv_weight",
    "conv3.B01_extra.conv_state.weight": "conv3_B01_extra_conv-state_conv_weight",
    "conv3.B01_extra.conv_proj.bias": "conv3_B01_extra_conv-proj_conv_bias",
    "conv3.B01_extra.gcn.conv1.bias": "conv3_B01_extra_GCN-G_conv_bias",
    "conv3.B01_extra.gcn.conv2.weight": "conv3_B01_extra_GCN-GHW_conv_weight",
    "conv3.B01_extra.conv_extend.weight": "conv3_B01_extra_fc-2_conv_weight",
    "conv3.B01_extra.blocker.weight": "conv3_B01_extra_blocker_bn_gamma",
    "conv3.B01_extra.blocker.running_var": "conv3_B01_extra_blocker_bn_moving_var",
    "tail.bn.bias": "tail_bn_beta",
    "classifier.weight": "classifier_weight",
    "classifier.bias": "classifier_bias",
}


@pytest.mark.parametrize(("theirs", "ours"), EXPECTED.items())
def test_names(theirs, ours):
    assert to_mxnet_name(theirs) == ours
    assert to_mxnet_name("module." + theirs) == ours
    assert to_mxnet_name("module.module." + theirs) == ours
    assert to_torch_name(ours) == theirs


def test_names_that_are_none():
    with pytest.raises(CheckpointError, match="softmax_label is no parameter name"):
        to_torch_names(["conv1_conv_weight", "softmax_label"])
    assert to_mxnet_name("strange.thing") == "strange_thing"


@pytest.mark.parametrize(
    ("table", "count"), [("RESNET50_3D_GCN_X5", 331), ("RESNET101_3D_GCN_X5", 586)]
)
@pytest.mark.parametrize("before", ["", "module."])
def test_golden_tables_map_one_to_one(table, count, before):
    rows = dict(read_table(f"torch_{table}.tsv"))
    assert len(rows) == count
    symbol, conf = get_symbol(table)
    inputs = {"data": (1, *conf.data_shape)}
    # Broadcast views: the values do not matter, and take no memory.
    state = {before + n: np.broadcast_to(np.float32(0), shape) for n, shape in rows.items()}
    state[before + "tail.bn.num_batches_tracked"] = np.array(1)
    args, auxs = from_torch(state, symbol, inputs)
    assert len(args) + len(auxs) == count
    assert {to_torch_name(name): value.shape for name, value in {**args, **auxs}.items()} == rows
    assert set(to_torch_names(symbol).values()) == set(rows)
    assert len(to_torch_names(symbol)) == count


def unit_state(before=""):
    names = {
        "conv_state.weight": (8, 6, 1, 1),
        "conv_state.bias": (8,),
        "conv_proj.weight": (4, 6, 1, 1),
        "conv_proj.bias": (4,),
        "gcn.conv1.weight": (4, 4, 1),
        "gcn.conv1.bias": (4,),
        "gcn.conv2.weight": (8, 8, 1),
        "conv_extend.weight": (6, 8, 1, 1),
        "blocker.weight": (6,),
        "blocker.bias": (6,),
        "blocker.running_mean": (6,),
        "blocker.running_var": (6,),
    }
    state = {before + n: seeded(n, shape, gentle=False) for n, shape in names.items()}
    state[before + "blocker.num_batches_tracked"] = np.array(3)
    return state


@pytest.mark.parametrize("name", ["unit", "my_own_name", "conv3_B01_extra"])
@pytest.mark.parametrize("before", ["", "module."])
def test_a_unit_alone(name, before):
    unit = GloRe_Unit(
        mx.sym.var("data"), num_in=6, num_node=4, num_state=8, name=name, flavour="video"
    )
    args, auxs = from_torch(unit_state(before), unit, {"data": (2, 6, 5, 5)})
    state = unit_state()
    expected = {
        f"{name}_conv-state_conv_weight": "conv_state.weight",
        f"{name}_GCN-GHW_conv_weight": "gcn.conv2.weight",
        f"{name}_blocker_bn_beta": "blocker.bias",
    }
    for ours, theirs in expected.items():
        np.testing.assert_array_equal(args[ours], state[theirs])
    np.testing.assert_array_equal(
        auxs[f"{name}_blocker_bn_moving_var"], state["blocker.running_var"]
    )
    assert len(args) + len(auxs) == 12


def test_a_unit_does_not_pass_for_a_network():
    symbol, conf = get_symbol("TINY_GLORE", num_classes=5)
    with pytest.raises(CheckpointError, match="conv-state_conv_weight"):
        from_torch(unit_state(), symbol, {"data": (1, *conf.data_shape)})


def test_from_torch_is_strict():
    unit = GloRe_Unit(
        mx.sym.var("data"), num_in=6, num_node=4, num_state=8, name="unit", flavour="video"
    )
    inputs = {"data": (2, 6, 5, 5)}
    state = unit_state()
    del state["conv_proj.bias"]
    state["conv_extra.weight"] = np.zeros(3, "f4")
    state["gcn.conv2.weight"] = np.zeros((8, 9, 1), "f4")
    with pytest.raises(CheckpointError) as caught:
        from_torch(state, unit, inputs)
    message = str(caught.value)
    assert "missing (1): unit_conv-proj_conv_bias" in message
    assert "extra (1): unit_conv_extra_weight" in message
    assert "unit_GCN-GHW_conv_weight is (8, 9, 1), the network has (8, 8, 1)" in message
    state = unit_state()
    state["module.conv_state.bias"] = state["conv_state.bias"]
    with pytest.raises(CheckpointError, match="conv-state_conv_bias twice"):
        from_torch(state, unit, inputs)
    with pytest.raises(CheckpointError, match="no array but a list"):
        from_torch(dict(unit_state(), **{"conv_state.bias": [1, 2]}), unit, inputs)


def test_unit_figures_with_weights_through_from_torch(golden):
    figures = golden("torch_open.npz")
    shapes = {n: v.shape for n, v in unit_state().items() if "tracked" not in n}
    wide = {
        n: tuple({6: 32, 8: 32, 4: 16}.get(size, size) for size in shape)
        for n, shape in shapes.items()
    }
    unit = GloRe_Unit(
        mx.sym.var("data"), num_in=32, num_node=16, num_state=32, name="u", flavour="video"
    )
    state = {n: seeded(n, shape, gentle=False) for n, shape in wide.items()}
    args, auxs = from_torch(state, unit, {"data": (2, 32, 14, 14)})
    data = np.random.RandomState(200).standard_normal((2, 32, 14, 14))
    executor = unit.bind(
        mx.cpu(),
        {n: mx.nd.array(v) for n, v in {**args, "data": data}.items()},
        aux_states={n: mx.nd.array(v) for n, v in auxs.items()},
    )
    want = figures["GloRe_Unit_2D_norm0/out"]
    out = executor.forward()[0].asnumpy()
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())


# --- pretrained ---------------------------------------------------------------------------------


def test_pretrained_with_another_classifier(saved, caplog):
    prefix, _, args, auxs = saved
    with caplog.at_level(logging.INFO, "glore"):
        new_args, new_auxs = load_pretrained(net(9), prefix, INPUTS, seed=4)
    assert "the classifier has 5 classes, the network 9" in caplog.text
    for name in ("classifier_weight", "classifier_bias"):
        fresh = initial_value(name, new_args[name].shape, seed=4)
        np.testing.assert_array_equal(new_args[name], fresh)
    assert new_args["classifier_weight"].shape == (9, 4)
    np.testing.assert_array_equal(new_args["conv1_conv_weight"], args["conv1_conv_weight"])
    assert same(new_auxs, auxs)


def test_pretrained_of_the_same_size_keeps_the_classifier(saved, caplog):
    prefix, symbol, args, _ = saved
    with caplog.at_level(logging.INFO, "glore"):
        new_args, _ = load_pretrained(symbol, prefix, INPUTS)
    assert same(new_args, args)
    assert not caplog.text


def test_pretrained_must_fit_otherwise(saved):
    prefix, _, args, auxs = saved
    with pytest.raises(CheckpointError, match=r"missing \(3\): other_conv_weight"):
        load_pretrained(net(9, name="other"), prefix, INPUTS)
    new_args, _ = load_pretrained(
        net(5, name="other"), prefix, INPUTS, allow_missing=("^other_",), allow_extra=("^conv1_",)
    )
    assert list(new_args) == [n for n in net(5, name="other").list_arguments() if "_" in n][:-1]
    # A classifier that reads other features is no matter of classes.
    save(prefix, 4, net(), dict(args, classifier_weight=np.zeros((9, 3), "f4")), auxs)
    with pytest.raises(CheckpointError, match=r"classifier_weight is \(9, 3\)"):
        load_pretrained(net(9), prefix, INPUTS)


def test_pretrained_2d_weights_are_inflated(tmp_path, caplog):
    def conv(kernel):
        data = mx.sym.var("data")
        data = mx.sym.Convolution(
            data, num_filter=4, kernel=kernel, no_bias=True, name="conv1_conv"
        )
        one = (1,) * len(kernel)
        data = mx.sym.Pooling(data, global_pool=True, kernel=one, pool_type="avg")
        return mx.sym.FullyConnected(mx.sym.flatten(data), num_hidden=5, name="classifier")

    flat = conv((3, 3))
    args, auxs = some(flat)
    prefix = str(tmp_path / "flat")
    save(prefix, 0, flat, args, auxs)
    with caplog.at_level(logging.INFO, "glore"):
        made, _ = load_pretrained(conv((2, 3, 3)), prefix, {"data": (1, 3, 4, 6, 6)})
    np.testing.assert_array_equal(made["conv1_conv_weight"][:, :, 1], args["conv1_conv_weight"] / 2)
    assert "1 kernels inflated, 2 parameters copied" in caplog.text


# --- PyTorch files, made without PyTorch (see torch_files.py) -----------------------------------


def torch_state():
    generator = np.random.RandomState(1)
    base = generator.standard_normal(12).astype("<f4")
    arrays = {
        "0": generator.standard_normal((4, 3, 3, 3)).astype("<f4"),
        "1": np.arange(4, dtype="<i8"),
        "2": generator.standard_normal(5).astype("<f2"),
        "3": base,
    }
    expected = {
        "module.w": arrays["0"],
        "module.i": arrays["1"],
        "module.h": arrays["2"],
        # The transposed 3x4 matrix from its second row on.
        "module.t": base.reshape(3, 4).T[1:],
    }
    view = np.empty((3, 3), "<f4")
    items = [
        ("module.w", p_tensor("0", arrays["0"])),
        ("module.i", p_tensor("1", arrays["1"])),
        ("module.h", p_tensor("2", arrays["2"])),
        ("module.t", p_tensor("3", view, offset=1, strides=[1, 4], count=12)),
    ]
    return items, arrays, expected


@pytest.mark.parametrize("form", [as_zip, as_stream])
@pytest.mark.parametrize("complete", [True, False])
def test_torch_files_of_both_forms(tmp_path, form, complete):
    items, storages, expected = torch_state()
    pickled = whole(items) if complete else b"\x80\x02" + p_dict(items) + b"."
    path = tmp_path / "net.pth"
    path.write_bytes(form(pickled, storages))
    found = read_torch_file(str(path))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("form", [as_zip, as_stream])
@pytest.mark.parametrize("source", [("os", "system"), ("builtins", "eval"), ("torch", "load")])
def test_a_file_cannot_run_anything(tmp_path, form, source):
    mark = tmp_path / "ran"
    call = p_global(*source) + p_tuple([p_str(f"touch {mark}")]) + b"R"
    path = tmp_path / "evil.pth"
    path.write_bytes(form(b"\x80\x02}(" + p_str("state_dict") + call + b"u.", {}))
    with pytest.raises(CheckpointError, match=rf"asks for {source[0]}\.{source[1]}"):
        read_torch_file(str(path))
    assert not mark.exists()


def test_torch_files_that_hold_something_else(tmp_path):
    items, storages, _ = torch_state()
    small = np.zeros(2, "<f4")
    cases = {
        "no state dict": as_zip(b"\x80\x02](K\x01K\x02e.", {}),
        "is no tensor": as_zip(b"\x80\x02" + p_dict([("a", p_int(1))]) + b".", {}),
        "no data.pkl": as_zip(b"", {}).replace(b"data.pkl", b"data.xyz"),
        "is compressed": as_zip(whole(items), storages, compression=zipfile.ZIP_DEFLATED),
        "storage 0 is missing": as_zip(whole(items), {}),
        "not supported: QInt8Storage": as_zip(
            whole(items).replace(b"HalfStorage", b"QInt8Storage"), storages
        ),
        "beyond its storage": as_zip(
            b"\x80\x02" + p_dict([("a", p_tensor("0", small, offset=1))]) + b".", {"0": small}
        ),
        "repeats its values": as_zip(
            b"\x80\x02"
            + p_dict([("a", p_tensor("0", np.zeros((2000, 2000), "f4"), 0, [0, 0], 2))])
            + b".",
            {"0": small},
        ),
        "no PyTorch file": b"garbage",
        "no plain storage": as_zip(
            whole([("a", p_tensor("0", small, view=p_tuple([p_str("v"), p_int(0), p_int(2)])))]),
            {"0": small},
        ),
    }
    path = tmp_path / "other.pth"
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_torch_file(str(path))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_torch_file(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("form", [as_zip, as_stream])
def test_truncated_and_damaged_torch_files(tmp_path, form):
    items, storages, _ = torch_state()
    content = form(whole(items), storages)
    path = tmp_path / "cut.pth"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_torch_file(str(path))
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read_torch_file(str(path))
        except CheckpointError:
            continue


@pytest.mark.parametrize("entry", ["byteorder", "data.pkl", "data/0"])
def test_no_part_of_an_archive_may_unpack_to_more_than_the_file(tmp_path, entry):
    """A few megabytes, compressed, can be gigabytes: no part is read before that is known."""
    pickled = whole([("a", p_tensor("0", np.zeros(8, "<f4")))])
    parts = {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(32)}
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            kind = zipfile.ZIP_DEFLATED if name == entry else zipfile.ZIP_STORED
            size = 50_000_000 if name == entry else 0
            archive.writestr(f"archive/{name}", content + bytes(size), kind)
    assert os.path.getsize(path) < 100_000
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="unpack to more than the file's size"):
        read_torch_file(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_one_damaged_number_does_not_ask_for_much_memory(tmp_path):
    # LONG_BINPUT 2**31: the place of a remembered object, reserved as such by pickle's C form.
    pickled = b"\x80\x02" + b"]r" + struct.pack("<I", 2**31) + b"."
    path = tmp_path / "large.pth"
    path.write_bytes(as_zip(pickled, {}))
    with pytest.raises(CheckpointError, match="no state dict"):
        read_torch_file(str(path))


def write_pth(path, state, form=as_zip):
    storages = {str(i): np.ascontiguousarray(v) for i, v in enumerate(state.values())}
    items = [(name, p_tensor(key, array)) for name, (key, array) in zip(state, storages.items())]
    path.write_bytes(form(whole(items), storages))


def tiny_state(classes=5):
    symbol, conf = get_symbol("TINY_3D", num_classes=classes)
    args, auxs = some(symbol, {"data": (1, *conf.data_shape)})
    state = {"module." + to_torch_name(n): v for n, v in {**args, **auxs}.items()}
    state["module.tail.bn.num_batches_tracked"] = np.array([3], "<i8")
    return symbol, conf, args, auxs, state


@pytest.mark.parametrize("form", [as_zip, as_stream])
def test_pth_as_pretrained_weights(tmp_path, form):
    symbol, conf, args, auxs, state = tiny_state()
    path = tmp_path / "net.pth"
    write_pth(path, state, form)
    inputs = {"data": (1, *conf.data_shape)}
    new_args, new_auxs = load_pretrained(symbol, str(path), inputs)
    assert same(new_args, args)
    assert same(new_auxs, auxs)
    raw_args, raw_auxs, found = read_source(str(path), symbol)
    assert found == str(path)
    assert set(raw_args) == set(args)
    assert set(raw_auxs) == set(auxs)
    other, _ = get_symbol("TINY_3D", num_classes=8)
    fewer, _ = load_pretrained(other, str(path), inputs)
    assert fewer["classifier_weight"].shape[0] == 8
    np.testing.assert_array_equal(fewer["conv1_conv_weight"], args["conv1_conv_weight"])


def command(root, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "network.pretrained", *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
    )


def test_convert_and_verify_commands(tmp_path, root):
    symbol, conf, args, auxs, state = tiny_state(classes=6)
    path, prefix = tmp_path / "net.pth", tmp_path / "made"
    write_pth(path, state)
    done = command(root, "convert", path, prefix, "--network", "TINY_3D", "--epoch", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {prefix}-0002.params" in done.stdout
    other, new_args, new_auxs = load(str(prefix))
    assert other.tojson() == symbol.tojson()
    assert {n: v.asnumpy().tolist() for n, v in new_args.items()} == {
        n: args[n].tolist() for n in new_args
    }
    assert set(new_auxs) == set(auxs)
    shape = ",".join(map(str, conf.data_shape))
    done = command(root, "verify", prefix, 2, "--data-shape", shape)
    assert done.returncode == 0
    assert f"{sum(v.size for v in args.values()):,} parameter values, all finite" in done.stdout


def test_convert_refuses(tmp_path, capsys):
    *_, state = tiny_state()
    path, prefix = tmp_path / "net.pth", str(tmp_path / "made")

    def convert(*options):
        return run_main(main, ["convert", str(path), prefix, "--network", "TINY_3D", *options])

    path.write_bytes(pickle.dumps({"state_dict": OrderedDict(a=1)}))
    assert convert() == 1
    assert "no PyTorch file" in capsys.readouterr().err
    write_pth(path, state)
    assert convert("--num-classes", "7") == 1
    message = capsys.readouterr().err
    assert "does not fit TINY_3D" in message
    assert "classifier_weight is (5," in message
    del state["module.classifier.bias"]
    state["module.stray.weight"] = np.zeros(3, "<f4")
    write_pth(path, state)
    assert convert("--num-classes", "5") == 1
    message = capsys.readouterr().err
    assert "missing (1): classifier_bias" in message
    assert "extra (1): stray_weight" in message
    assert not os.path.exists(prefix + "-0000.params")


def test_verify_finds_values_that_are_not_finite(saved, capsys):
    prefix, symbol, args, auxs = saved
    args["classifier_bias"][2] = np.nan
    save(prefix, 3, symbol, args, auxs)
    assert run_main(main, ["verify", prefix, "3"]) == 1
    assert "not finite in classifier_bias" in capsys.readouterr().err
    args["classifier_bias"][2] = 0
    save(prefix, 3, symbol, args, auxs)
    arguments = ["verify", prefix, "--data-shape", "3,6"]
    assert run_main(main, arguments) == 2


def test_reading_with_torch_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install torch"):
        read_with_torch(str(tmp_path / "net.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_our_reader_equals_torch(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    layers = OrderedDict(conv=torch.nn.Conv3d(3, 4, 2), bn=torch.nn.BatchNorm3d(4))
    state = torch.nn.Sequential(layers).state_dict()
    state["t"] = torch.arange(12.0).reshape(3, 4).t()[1:]
    path = str(tmp_path / "net.pth")
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    ours, theirs = read_torch_file(path), read_with_torch(path)
    assert same(ours, theirs)
