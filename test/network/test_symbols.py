"""All networks of the table: names, golden logits, options, and that they run."""

import json
import os

import numpy as np
import pytest
from golden_weights import GOLDEN, read_table, seeded

from glore_common import UsageError
from mxnet_compat import mx
from network import get_symbol, list_networks, logits
from network.builder import ALL_ROWS as ROWS
from network.builder import resolve
from network.cpu_graph import for_cpu_training
from network.shapes import value_shapes
from network.specs import Context
from network.symbol_context import CONTEXT_KINDS

NAMES = list_networks(study=True)
SMALL = ("TINY_GLORE", "TINY_3D", "resnet18_w-glore_1-1", "resnet50_w-se_w-glore_0-3")


def parameters(symbol, input_conf):
    """Return {name: shape} of arguments, then auxiliary states, in graph order."""
    shapes = value_shapes(symbol, input_conf)
    names = symbol.list_arguments() + symbol.list_auxiliary_states()
    return {name: shapes[name] for name in names if name not in ("data", "softmax_label")}


def block_of(symbol, values):
    """Return a hybridized Gluon block of a graph with these parameters."""
    block = mx.gluon.SymbolBlock(symbol, [mx.sym.Variable("data", dtype="float32")])
    for name, parameter in block.collect_params().items():
        parameter.shape = values[name].shape
        parameter.initialize(mx.init.Zero())
        parameter.set_data(mx.nd.array(values[name]))
    block.hybridize()
    return block


def weights(shapes, torch_name=lambda name: name):
    return {name: seeded(torch_name(name), shape) for name, shape in shapes.items()}


def torch_name(name):
    """Return the PyTorch name of one of our parameters of a Kinetics network."""
    path, leaf = name, ""
    for ours, theirs in (
        ("_bn_gamma", ".bn.weight"),
        ("_bn_beta", ".bn.bias"),
        ("_bn_moving_mean", ".bn.running_mean"),
        ("_bn_moving_var", ".bn.running_var"),
        ("_conv_weight", ".conv.weight"),
        ("_conv_bias", ".conv.bias"),
        ("classifier_weight", "classifier.weight"),
        ("classifier_bias", "classifier.bias"),
    ):
        if name.endswith(ours):
            path, leaf = name[: -len(ours)], theirs
            break
    if "_extra_" in path:
        # The unit's convolutions and its blocker are modules of their own, without ".conv" or
        # ".bn" inside.
        path, _, layer = path.partition("_extra_")
        layer = {
            "conv-state": "conv_state",
            "conv-proj": "conv_proj",
            "GCN-G": "gcn.conv1",
            "GCN-GHW": "gcn.conv2",
            "fc-2": "conv_extend",
            "blocker": "blocker",
        }[layer]
        leaf = leaf.rpartition(".")[2]
        return f"{path.replace('_', '.')}_extra.{layer}.{leaf}"
    return path.replace("_", ".").replace("-", "_") + leaf


# Names, shapes and order ------------------------------------------------------------------------


def test_released_resnet_has_the_released_names_shapes_and_order():
    symbol, conf = get_symbol("resnet50_w-glore_2-3")
    with open(os.path.join(GOLDEN, "released_resnet50_w-glore_2-3.tsv")) as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    assert len(rows) == 396
    shapes = value_shapes(symbol, conf)
    kinds = {"arg": symbol.list_arguments(), "aux": symbol.list_auxiliary_states()}
    ours = [
        [kind, name, ",".join(map(str, shapes[name]))]
        for kind, names in kinds.items()
        for name in names
        if name not in ("data", "softmax_label")
    ]
    assert ours == rows


def test_fixed_pool_gives_the_released_graph_node_by_node():
    symbol, _ = get_symbol("resnet50_w-glore_2-3", fixed_pool=True)
    with open(os.path.join(GOLDEN, "released_resnet50_w-glore_2-3-symbol.json")) as stream:
        released = json.load(stream)
    ours = json.loads(symbol.tojson())
    assert len(ours["nodes"]) == len(released["nodes"]) == 700
    for mine, theirs in zip(ours["nodes"], released["nodes"]):
        assert mine == theirs
    assert ours["heads"] == released["heads"]


@pytest.mark.parametrize("name", ["dpn92", "dpn98", "dpn131"])
def test_legacy_dpn_has_the_released_names_shapes_and_order(name):
    symbol, conf = get_symbol(name, legacy_names=True)
    with open(os.path.join(GOLDEN, f"{name}_names.tsv")) as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream][1:]
    shapes = value_shapes(symbol, conf)
    ours = [
        [name, "x".join(map(str, shapes[name]))]
        for name in symbol.list_arguments() + symbol.list_auxiliary_states()
    ]
    assert ours == [row[:2] for row in rows]
    norms = [node for node in json.loads(symbol.tojson())["nodes"] if node["op"] == "BatchNorm"]
    assert {node["attrs"]["eps"] for node in norms} == {"0.001"}


@pytest.mark.parametrize("name", ["RESNET50_GLORE", "RESNET101_GLORE"])
def test_video_networks_have_the_torch_parameters(name):
    symbol, conf = get_symbol(name)
    table = dict(read_table(f"torch_{name.replace('_GLORE', '_3D_GCN_X5')}.tsv"))
    ours = {torch_name(n): shape for n, shape in parameters(symbol, conf).items()}
    theirs = {n: s for n, s in table.items() if not n.endswith("num_batches_tracked")}
    assert ours == theirs


@pytest.mark.parametrize("name", ["RESNET50_3D", "RESNET101_3D"])
def test_video_networks_without_units_are_the_same_but_for_the_units(name):
    plain = parameters(*get_symbol(name))
    units = parameters(*get_symbol(name.replace("_3D", "_GLORE")))
    assert plain == {n: shape for n, shape in units.items() if "_extra_" not in n}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_units_sit_where_the_row_says(row):
    symbol, conf = get_symbol(row.name)
    shapes = parameters(symbol, conf)
    prefix = "conv{}_x__{}" if row.family == "dpn" else "conv{}_B{:02d}"
    expected = {prefix.format(s, b) for s, blocks in row.glore for b in blocks}
    found = {name.split("_extra_")[0] for name in shapes if "_extra_" in name}
    assert found == expected
    for stage, blocks in row.glore:
        assert blocks[-1] <= row.blocks[stage - 2]
        for block in blocks:
            unit = f"{prefix.format(stage, block)}_extra"
            width = row.num_out[stage - 2]
            # States and nodes: a half and a quarter of the stage's width.
            assert shapes[f"{unit}_conv-state_conv_weight"][0] == width // 2
            assert shapes[f"{unit}_conv-proj_conv_weight"][0] == width // 4
    for kind in CONTEXT_KINDS:
        found = any(f"_{kind}_" in name for name in shapes)
        assert found == any(context.kind == kind for context in row.context)


# Numbers ----------------------------------------------------------------------------------------


def forward(name, shape, seed, rename, **overrides):
    symbol, conf = get_symbol(name, **overrides)
    block = block_of(logits(symbol), weights(parameters(symbol, conf), rename))
    data = np.random.RandomState(seed).standard_normal(shape).astype("float32")
    return block(mx.nd.array(data)).asnumpy()


@pytest.mark.parametrize("fixed_pool", [False, True])
def test_released_resnet_gives_the_golden_logits(golden, fixed_pool):
    name = "resnet50_w-glore_2-3"
    out = forward(name, (1, 3, 224, 224), 300, lambda name: name, fixed_pool=fixed_pool)
    figures = golden("mx_open.npz")["resnet50_w_glore_2_3"]
    assert np.abs(out - figures).max() < 1e-5 * np.abs(figures).max()


@pytest.mark.parametrize("name", ["RESNET50_3D_GCN_X5", "RESNET101_3D_GCN_X5"])
def test_video_networks_give_the_golden_logits(golden, name):
    out = forward(name, (1, 3, 8, 224, 224), 100, torch_name)
    figures = golden("torch_open.npz")[name]
    assert np.abs(out - figures).max() < 1e-4 * np.abs(figures).max()


def step(name, **overrides):
    """Run one training step's forward and backward pass on noise; return logits and gradients."""
    symbol, conf = get_symbol(name, num_classes=5, **overrides)
    shapes = parameters(symbol, conf)
    shape = (2, *conf.data_shape)
    block = block_of(for_cpu_training(logits(symbol), {"data": shape}), weights(shapes))
    data = mx.nd.array(np.random.RandomState(7).standard_normal(shape))
    with mx.autograd.record():
        out = block(data)
        loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(out, mx.nd.array([1, 3]))
    loss.backward()
    gradients = {
        name: parameter.grad().asnumpy()
        for name, parameter in block.collect_params().items()
        if parameter.grad_req != "null"
    }
    return out.asnumpy(), gradients, set(shapes) - set(symbol.list_auxiliary_states())


def small(row):
    return {"crop_size": 64, **({"clip_length": 4} if row.ndim == 3 else {})}


def check_step(row):
    out, gradients, learnt = step(row.name, **small(row))
    assert out.shape == (2, 5)
    assert np.isfinite(out).all()
    assert set(gradients) == learnt
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    # Every weight takes part: none is cut off from the loss.
    idle = [n for n, g in gradients.items() if n.endswith("weight") and not np.abs(g).max() > 0]
    assert idle == []


@pytest.mark.parametrize("row", [r for r in ROWS if r.name in SMALL], ids=lambda row: row.name)
def test_small_networks_run_forward_and_backward(row):
    check_step(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in ROWS if r.name not in SMALL], ids=lambda r: r.name)
def test_all_networks_run_forward_and_backward(row):
    check_step(row)


# Input sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "shape", "last_map"),
    [
        ("RESNET50_GLORE", {}, (3, 8, 224, 224), (4, 7, 7)),
        ("RESNET50_GLORE", {"clip_length": 9, "crop_size": 161}, (3, 9, 161, 161), (5, 6, 6)),
        ("RESNET50_3D", {"clip_length": 32, "crop_size": (96, 160)}, (3, 32, 96, 160), (16, 3, 5)),
        ("TINY_GLORE", {"clip_length": 2, "crop_size": 32}, (3, 2, 32, 32), (1, 1, 1)),
        ("resnet50_w-glore_2-3", {"crop_size": 320}, (3, 320, 320), (10, 10)),
        ("dpn92", {"crop_size": (33, 95)}, (3, 33, 95), (2, 3)),
    ],
)
def test_other_input_sizes(name, overrides, shape, last_map):
    symbol, conf = get_symbol(name, num_classes=7, **overrides)
    assert conf.data_shape == shape
    shapes = value_shapes(symbol, conf)
    assert shapes["tail_relu_output"][2:] == last_map
    assert resolve(name, **overrides).final_map(shape[1:]) == last_map
    assert shapes["softmax_output"] == (1, 7)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("RESNET50_GLORE", {"crop_size": 31}, "8 x 31 x 31 is too small: its height .* least 32"),
        ("RESNET50_GLORE", {"crop_size": (64, 16)}, "its width must be at least 32"),
        ("RESNET50_GLORE", {"clip_length": 1}, "its frames must be at least 2"),
        ("resnet50", {"crop_size": 20}, "20 x 20 is too small"),
        ("resnet50", {"crop_size": 256, "fixed_pool": True}, "window of 7 x 7.* a map of 8 x 8"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, overrides, message):
    with pytest.raises(UsageError, match=message):
        get_symbol(name, **overrides)


# Options ----------------------------------------------------------------------------------------


def units_of(name, **overrides):
    return dict(resolve(name, **overrides).glore)


@pytest.mark.parametrize(
    ("name", "glore", "expected"),
    [
        ("RESNET50_3D", "2-3", {3: (1, 3), 4: (1, 3, 5)}),
        ("RESNET101_3D", "0-3", {4: (6, 12, 18)}),
        ("resnet200", "2-3", {3: (12, 18), 4: (16, 24, 32)}),
        ("resnet50", "1-2", {3: (2,), 4: (2, 4)}),
        ("resnet50", "4-6", {3: (1, 2, 3, 4), 4: (1, 2, 3, 4, 5, 6)}),
        ("resnet50", "3:1,3;4:1,3,5", {3: (1, 3), 4: (1, 3, 5)}),
        ("resnet50", {4: [5, 1]}, {4: (1, 5)}),
        ("resnet50", {2: (3,), 5: (1,)}, {2: (3,), 5: (1,)}),
        ("RESNET50_GLORE", None, {}),
        ("RESNET50_GLORE", "none", {}),
        ("RESNET50_GLORE", "0-0", {}),
    ],
)
def test_unit_placement(name, glore, expected):
    assert units_of(name, glore=glore) == expected


def test_placing_units_gives_the_row_of_that_name():
    for base, row in (
        ("RESNET50_3D", "RESNET50_GLORE"),
        ("resnext101-32x4d", "resnext101-32x4d_w-glore_2-3"),
        ("dpn98", "dpn98_w-glore_2-3"),
        ("resnet50_w-se", "resnet50_w-se_w-glore_0-3"),
    ):
        placed, _ = get_symbol(base, glore="0-3" if row.endswith("0-3") else "2-3")
        assert placed.tojson() == get_symbol(row)[0].tojson()


def test_options_reach_the_graph():
    symbol, conf = get_symbol(
        "TINY_GLORE",
        num_classes=11,
        dropout=0.25,
        normalize=True,
        num_node=5,
        num_state=9,
        bn_eps=1e-3,
        bn_momentum=0.5,
    )
    shapes = parameters(symbol, conf)
    assert shapes["classifier_weight"] == (11, 128)
    assert shapes["conv3_B01_extra_GCN-G_conv_weight"] == (5, 5, 1)
    assert shapes["conv3_B01_extra_GCN-GHW_conv_weight"] == (9, 9, 1)
    nodes = {node["name"]: node for node in json.loads(symbol.tojson())["nodes"]}
    assert nodes["dropout"]["attrs"]["p"] == "0.25"
    assert nodes["conv3_B01_extra_conv-proj-scale"]["op"] == "_contrib_div_sqrt_dim"
    norms = [node["attrs"] for node in nodes.values() if node["op"] == "BatchNorm"]
    assert {(norm["eps"], norm["momentum"]) for norm in norms} == {("0.001", "0.5")}


def test_dropout_sits_before_the_classifier_of_3d_networks_only():
    for name, probability in (("RESNET50_GLORE", "0.5"), ("resnet50", None)):
        nodes = json.loads(get_symbol(name)[0].tojson())["nodes"]
        found = [node["attrs"]["p"] for node in nodes if node["op"] == "Dropout"]
        assert found == ([probability] if probability else [])
    assert "Dropout" not in get_symbol("RESNET50_GLORE", dropout=0)[0].tojson()


def test_flavours_can_be_exchanged():
    video = parameters(*get_symbol("resnet50_w-glore_2-3", glore_flavour="video"))
    assert video["conv4_B05_extra_blocker_bn_gamma"] == (1024,)
    released = parameters(*get_symbol("RESNET50_GLORE", glore_flavour="released"))
    assert released["conv4_B05_extra_fc-2_bn_gamma"] == (512,)


def test_context_blocks_go_into_any_backbone():
    for name in ("TINY_GLORE", "resnext101-32x4d", "dpn92", "resnet18"):
        shapes = parameters(*get_symbol(name, block="se"))
        squeezed = {n: s for n, s in shapes.items() if n.endswith("_se_fc1_weight")}
        assert len(squeezed) == sum(resolve(name).blocks)
        assert all(shape[0] == shape[1] // 16 for shape in squeezed.values())
    chosen = Context("se", {"ratio": 1 / 4}, ((4, (2, 5)),))
    shapes = parameters(*get_symbol("resnet50", block=[chosen]))
    assert {n: s for n, s in shapes.items() if n.endswith("_se_fc1_weight")} == {
        "conv4_B02_se_fc1_weight": (256, 1024),
        "conv4_B05_se_fc1_weight": (256, 1024),
    }
    assert not any("_se_" in n for n in parameters(*get_symbol("resnet50_w-se", block=None)))


def test_se_scales_channels_as_its_formula_says():
    symbol, conf = get_symbol("resnet18", block="se", crop_size=64)
    branch = symbol.get_internals()["conv2_B01_se_mul_output"]
    before = symbol.get_internals()["conv2_B01_conv-m2_conv_output"]
    shapes = parameters(symbol, conf)
    values = {n: seeded(n, shapes[n], 0, False) for n in branch.list_arguments() if n in shapes}
    values.update({n: seeded(n, shapes[n], 0, False) for n in branch.list_auxiliary_states()})
    data = np.random.RandomState(8).standard_normal((2, 3, 64, 64)).astype("float32")
    grouped = block_of(mx.sym.Group([before, branch]), values)
    plain, scaled = (out.asnumpy() for out in grouped(mx.nd.array(data)))
    p = "conv2_B01_se"
    hidden = plain.mean((2, 3)) @ values[f"{p}_fc1_weight"].T + values[f"{p}_fc1_bias"]
    raised = np.maximum(hidden, 0) @ values[f"{p}_fc2_weight"].T + values[f"{p}_fc2_bias"]
    expected = plain / (1 + np.exp(-raised))[:, :, None, None]
    assert np.abs(scaled - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("RESNET50_GLORE", {"nomalize": True}, "'nomalize'. Did you mean normalize?"),
        ("RESNET50_GLORE", {"cliplength": 8}, "Did you mean clip_length?"),
        ("RESNET50_GLORE", {"normalize": 1}, "normalize must be True or False, not 1"),
        ("RESNET50_GLORE", {"num_node": 0}, "num_node must be an integer of at least 1, not 0"),
        ("RESNET50_GLORE", {"num_state": "64"}, "num_state must be an integer .* not '64'"),
        ("RESNET50_GLORE", {"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ("RESNET50_GLORE", {"dropout": float("nan")}, "dropout must be a number"),
        ("RESNET50_GLORE", {"num_classes": 0}, "num_classes must be an integer of at least 1"),
        ("RESNET50_GLORE", {"glore_flavour": "vidoe"}, "'vidoe' is not one of: video, "),
        ("RESNET50_GLORE", {"bn_momentum": 1.5}, "bn_momentum must be a number"),
        ("RESNET50_GLORE", {"bn_eps": 0}, "bn_eps must be a number"),
        ("RESNET50_GLORE", {"legacy_names": True}, "only the DPN rows have"),
        ("RESNET50_3D", {"normalize": True}, "RESNET50_3D has no GloRe units"),
        ("resnet50", {"clip_length": 8}, "resnet50 reads single images"),
        ("resnet50", {"crop_size": (224,)}, "one integer or"),
        ("resnet50", {"crop_size": 224.5}, "crop_size must be an integer"),
        ("resnet50", {"glore": {3: (1, 5)}}, "no block 5 in stage 3, its last one is 4"),
        ("resnet50", {"glore": {3: (0,)}}, "must be an integer of at least 1, not 0"),
        ("resnet50", {"glore": {3: (1, 1)}}, "names a block twice"),
        ("resnet50", {"glore": {6: (1,)}}, "stage 6 is not one of 2, 3, 4, 5"),
        ("resnet50", {"glore": {3: 1}}, "needs a sequence of block numbers"),
        ("resnet50", {"glore": "23"}, "glore='23' is not understood"),
        ("resnet50", {"glore": "3:1;3:2"}, "names a stage twice"),
        ("resnet50", {"glore": 5}, "glore must be a mapping"),
        ("resnet18", {"glore": "2-3"}, "resnet18 has 2 blocks in stage 4, too few for 3 units"),
        ("resnet50", {"block": "es"}, "'es' is not one of: se"),
        ("resnet50", {"block": ["se", "se"]}, "names a kind twice"),
        ("resnet50", {"block": [Context("se", {"ratio": 0})]}, "ratio must be a number"),
        (
            "resnet50",
            {"block": [Context("se", {"ratio": 1 / 4}, ((3, (9,)),))]},
            "no block 9 in stage 3",
        ),
        ("TINY_GLORE", {"block": [Context("se", {"ratio": 1e-3})]}, "leaves no hidden unit"),
    ],
)
def test_wrong_options_are_named(name, overrides, message):
    with pytest.raises(UsageError, match=message):
        get_symbol(name, **overrides)


# The table --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("RESNET5O_GLORE", "RESNET50_GLORE"),
        ("resnet50_w_glore_2_3", "resnet50_w-glore_2-3"),
        ("dpn-98", "dpn98"),
    ],
)
def test_unknown_networks_are_listed_nearest_first(given, nearest):
    with pytest.raises(UsageError) as caught:
        get_symbol(given)
    message = str(caught.value)
    assert f"Did you mean {nearest}?" in message
    assert f"nearest first: {nearest}, " in message
    assert all(name in message for name in list_networks())
    assert "slim" not in message
    with pytest.raises(UsageError, match="Did you mean resnet18_v1_slim"):
        get_symbol("resnet18_v1_slm")


def test_names_do_not_depend_on_letter_case():
    for name in ("resnet50_glore", "ResNet50_3D_gcn_x5"):
        assert get_symbol(name)[0].tojson() == get_symbol("RESNET50_GLORE")[0].tojson()
    assert len({name.lower() for name in NAMES}) == len(NAMES)


def test_rows_say_what_they_read():
    _, conf = get_symbol("RESNET50_GLORE")
    assert conf.data_shape == (3, 8, 224, 224)
    assert conf.mean == pytest.approx((124 / 255, 117 / 255, 104 / 255))
    assert conf.std == pytest.approx((0.2348245,) * 3, abs=1e-6)
    assert get_symbol("dpn98")[1].data_shape == (3, 224, 224)
    assert get_symbol("TINY_GLORE")[1].data_shape == (3, 8, 64, 64)


def test_logits_are_what_the_softmax_reads():
    symbol, _ = get_symbol("TINY_3D")
    assert logits(symbol).list_outputs() == ["classifier_output"]
    assert logits(get_symbol("dpn92", legacy_names=True)[0]).list_outputs() == ["fc6_output"]
    with pytest.raises(UsageError, match="ends in tail_relu_output"):
        logits(symbol.get_internals()["tail_relu_output"])
