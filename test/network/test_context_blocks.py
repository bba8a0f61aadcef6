"""Context blocks alone and in the table's networks: golden figures, NumPy references, options."""

import numpy as np
import pytest
from golden_weights import seeded
from test_glore_unit import evaluate, inferred, input_gradient, random_values, relative

from glore_common import UsageError
from mxnet_compat import mx
from network import (
    Context,
    GC_Block,
    NL_Block,
    SE_Block,
    SNL_Block,
    context_block,
    get_symbol,
    memory,
    summary,
)
from network.block import build_block
from network.builder import resolve
from network.initializer import initial_params
from network.memory import MemoryProblem, activation_bytes, check_memory
from network.symbol_context import CONTEXT_KINDS, MODES

SHAPES = {1: (2, 12, 10), 2: (2, 12, 4, 5), 3: (2, 12, 3, 4, 5)}
DATA = mx.sym.Variable("data")


def noise(shape, seed):
    return np.random.RandomState(seed).standard_normal(shape).astype("float32")


def golden_name(name):
    """Return what the reference implementation calls a parameter of a block named "block"."""
    tag, _, leaf = name[len("block_") :].rpartition("_")
    leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    modules = {"mask_conv": "conv_mask", "out_conv": "conv_out.conv"}
    for kind in ("add", "mul"):
        for ours, theirs in (("-1_conv", "0"), ("-ln", "1"), ("-2_conv", "3")):
            modules[kind + ours] = f"channel_{kind}_conv.{theirs}"
    return f"{modules.get(tag, tag.replace('_conv', '.conv'))}.{leaf}"


def golden_values(block):
    shapes = inferred(block, data=(2, 32, 7, 9))
    values = {}
    for name, shape in shapes.items():
        # The reference's LayerNorm has trailing axes of length 1, which the seeded value knows.
        wide = (*shape, 1, 1) if "-ln_" in name else shape
        values[name] = seeded(golden_name(name), wide, 0, False).reshape(shape)
    return values


# Golden figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["add", "mul", "add+mul"])
@pytest.mark.parametrize("pooling", ["att", "avg"])
def test_context_block_matches_golden(golden, pooling, fusion):
    block = context_block(
        DATA, num_in=32, name="block", ratio=0.25, pooling=pooling, fusion=fusion.split("+")
    )
    values, data = golden_values(block), noise((2, 32, 7, 9), 400)
    figures, key = golden("gcnet_open.npz"), f"gc_{pooling}_{fusion}"
    (out,) = evaluate(block, values, {"data": data})
    assert relative(out, figures[f"{key}/out"]) < 1e-5
    assert relative(input_gradient(block, values, data), figures[f"{key}/grad"]) < 1e-5


@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
def test_non_local_matches_golden(golden, mode):
    block = NL_Block(DATA, num_in=32, name="block", mode=mode)
    values, data = golden_values(block), noise((2, 32, 7, 9), 500)
    figures = golden("gcnet_open.npz")
    (out,) = evaluate(block, values, {"data": data})
    assert relative(out, figures[f"nl_{mode}/out"]) < 1e-5
    assert relative(input_gradient(block, values, data), figures[f"nl_{mode}/grad"]) < 1e-5


# NumPy references, in float64 ---------------------------------------------------------------------


def linear(values, tag, x):
    """Apply a 1x1 convolution or dense layer to (n, c, L)."""
    weight = values[f"block_{tag}_weight"].astype("f8")
    out = np.einsum("oc,ncl->nol", weight.reshape(weight.shape[:2]), x)
    bias = values.get(f"block_{tag}_bias")
    return out if bias is None else out + bias[:, None]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_context(x, values, pooling, fusion, transform, layer_norm):
    if pooling == "att":
        context = np.einsum("ncl,nl->nc", x, softmax(linear(values, "mask_conv", x)[:, 0]))
    else:
        context = x.mean(-1)
    context = context[..., None]
    for kind in ("mul", "add"):
        if kind not in fusion:
            continue
        if transform == "1x1":
            t = linear(values, f"{kind}_conv", context)
        else:
            t = linear(values, f"{kind}-1_conv", context)
            if layer_norm:
                t = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-5)
                gamma, beta = (values[f"block_{kind}-ln_{k}"][:, None] for k in ("gamma", "beta"))
                t = t * gamma + beta
            t = linear(values, f"{kind}-2_conv", np.maximum(t, 0))
        x = x * sigmoid(t) if kind == "mul" else x + t
    return x


def pooled(x, shape):
    """Max-pool (n, c, L) over windows of 2 along all axes but time."""
    spatial = shape[2:]
    x = x.reshape(*x.shape[:2], *spatial)
    time = spatial[:1] if len(spatial) == 3 else ()
    sides = [side // 2 for side in spatial[len(time) :]]
    x = x[(..., *(slice(2 * side) for side in sides))]
    split = [size for side in sides for size in (side, 2)]
    axes = tuple(2 + len(time) + 1 + 2 * index for index in range(len(sides)))
    return x.reshape(*x.shape[:2], *time, *split).max(axes).reshape(*x.shape[:2], -1)


def numpy_non_local(data, values, mode, sub_sample):
    x = data.reshape(*data.shape[:2], -1).astype("f8")
    sample = (lambda v: pooled(v, data.shape)) if sub_sample else (lambda v: v)
    g = sample(linear(values, "g_conv", x))
    gaussian = mode == "gaussian"
    theta = x if gaussian else linear(values, "theta_conv", x)
    phi = sample(x if gaussian else linear(values, "phi_conv", x))
    if mode == "concatenation":
        left = linear(values, "theta-score_conv", theta)
        right = linear(values, "phi-score_conv", phi)
        weights = np.maximum(left.transpose(0, 2, 1) + right, 0) / phi.shape[-1]
    else:
        weights = np.einsum("ncl,ncm->nlm", theta, phi)
        weights = weights / phi.shape[-1] if mode == "dot_product" else softmax(weights)
    return x + linear(values, "out_conv", np.einsum("ncm,nlm->ncl", g, weights))


def check_against(block, data, expected):
    values = random_values(block, data=data.shape)
    (out,) = evaluate(block, values, {"data": data})
    reference = expected(values)
    assert relative(out.reshape(reference.shape), reference) < 1e-5
    return values


@pytest.mark.parametrize(
    ("pooling", "fusion", "transform", "layer_norm"),
    [
        ("att", ("add",), "bottleneck", True),
        ("att", ("mul", "add"), "bottleneck", True),
        ("att", ("add",), "1x1", True),
        ("avg", ("mul",), "bottleneck", False),
        ("avg", ("add", "mul"), "1x1", False),
    ],
)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_context_block_equals_numpy(ndim, pooling, fusion, transform, layer_norm):
    settings = {
        "pooling": pooling,
        "fusion": fusion,
        "transform": transform,
        "layer_norm": layer_norm,
    }
    data = noise(SHAPES[ndim], 1)
    block = context_block(DATA, num_in=12, name="block", ratio=1 / 3, ndim=ndim, **settings)
    flat = data.reshape(2, 12, -1).astype("f8")
    values = check_against(block, data, lambda values: numpy_context(flat, values, **settings))
    if transform == "bottleneck":
        assert values[f"block_{fusion[0]}-1_conv_weight"].shape == (4, 12, *(1,) * ndim)


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_non_local_equals_numpy(ndim, mode, sub_sample):
    data = noise(SHAPES[ndim], 2)
    block = NL_Block(
        DATA, num_in=12, name="block", mode=mode, ratio=1 / 3, sub_sample=sub_sample, ndim=ndim
    )
    values = check_against(
        block, data, lambda values: numpy_non_local(data, values, mode, sub_sample)
    )
    assert values["block_g_conv_weight"].shape == (4, 12, *(1,) * ndim)
    scores = block.get_internals()["block_affinity_output"].infer_shape(data=data.shape)[1][0]
    positions = int(np.prod(data.shape[2:]))
    others = {1: 5, 2: 4, 3: 12}[ndim] if sub_sample else positions
    assert scores == (2, positions, others)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("make", [GC_Block, SNL_Block, SE_Block, NL_Block])
def test_gradients_agree_with_differences(make, ndim):
    data = noise(SHAPES[ndim], 3)
    options = {"ratio": 1 / 3} if make in (GC_Block, SE_Block) else {}
    block = make(DATA, num_in=12, name="block", ndim=ndim, **options)
    values = random_values(block, data=data.shape)
    gradient = input_gradient(block, values, data)
    direction, step = noise(data.shape, 4), 2e-3
    totals = [
        float((evaluate(block, values, {"data": data + s * direction})[0].astype("f8") ** 2).sum())
        for s in (-step, step)
    ]
    slope = (totals[1] - totals[0]) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-2)


def test_the_dense_form_of_se_is_the_same_function():
    data = noise((2, 12, 4, 5), 5)
    dense, plain = (
        SE_Block(DATA, num_in=12, name="block", ratio=1 / 3, dense=d) for d in (True, False)
    )
    values = random_values(dense, data=data.shape)
    assert {n: v.shape for n, v in values.items()} == {
        "block_fc1_weight": (4, 12),
        "block_fc1_bias": (4,),
        "block_fc2_weight": (12, 4),
        "block_fc2_bias": (12,),
    }
    names = {"fc1": "mul-1_conv", "fc2": "mul-2_conv"}
    others = {
        f"block_{names[key.split('_')[1]]}_{key.split('_')[2]}": value.reshape(
            value.shape + (1, 1) * (value.ndim - 1)
        )
        for key, value in values.items()
    }
    out = [evaluate(b, v, {"data": data})[0] for b, v in ((dense, values), (plain, others))]
    assert relative(out[0], out[1]) < 1e-6


def test_attention_over_many_positions_keeps_its_precision():
    # Equal scores: the context is the mean, whatever the number of positions.
    data = noise((1, 4, 300_000), 6) + 3
    block = context_block(DATA, num_in=4, name="block", transform="1x1", ndim=1)
    values = random_values(block, data=data.shape)
    values["block_mask_conv_weight"][:] = 0
    values["block_add_conv_weight"] = np.eye(4, dtype="float32")[..., None]
    values["block_add_conv_bias"][:] = 0
    (out,) = evaluate(block, values, {"data": data})
    assert np.abs((out - data)[0, :, 0] - data[0].astype("f8").mean(-1)).max() < 1e-4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: GC_Block(DATA, num_in=8, name="b"),
            "ratio of 0.0625 leaves no hidden unit for 8 channels",
        ),
        (
            lambda: context_block(DATA, num_in=8, name="b", pooling="max"),
            "pooling 'max' is not one of: att",
        ),
        (
            lambda: context_block(DATA, num_in=8, name="b", fusion="sum"),
            "fusion 'sum' is not one of",
        ),
        (
            lambda: context_block(DATA, num_in=8, name="b", fusion=()),
            "must name 'add', 'mul' or each once",
        ),
        (
            lambda: context_block(DATA, num_in=8, name="b", transform="3x3"),
            "transform '3x3' is not one of",
        ),
        (
            lambda: context_block(
                DATA, num_in=8, name="b", ratio=1, fusion=("add", "mul"), dense=True
            ),
            "one fusion",
        ),
        (
            lambda: NL_Block(DATA, num_in=8, name="b", mode="dot"),
            "mode 'dot' is not one of: embedded_gaussian",
        ),
        (lambda: NL_Block(DATA, num_in=8, name="b", ratio=0), "ratio must be above 0"),
        (lambda: NL_Block(DATA, num_in=8, name="b", ratio=1 / 9), "leaves no hidden unit"),
        (lambda: SNL_Block(DATA, num_in=8, name="b", ndim=4), "ndim 4 is not 1, 2 or 3"),
        (lambda: SNL_Block(DATA, num_in=8.0, name="b"), "num_in must be a positive integer"),
    ],
)
def test_wrong_settings_are_named(build, message):
    with pytest.raises(UsageError, match=message):
        build()


# Initial values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("make", [GC_Block, SNL_Block, NL_Block])
def test_blocks_that_add_start_as_the_identity_and_learn(make, ndim):
    shape = (2, 32) + (6,) * ndim
    block = make(DATA, num_in=32, name="block", ndim=ndim)
    values, _ = initial_params(block, {"data": shape}, seed=3)
    data = noise(shape, 7)
    assert np.array_equal(evaluate(block, values, {"data": data})[0], data)
    for name, value in values.items():
        if name.endswith(("bias", "beta")) or name in (
            "block_add-2_conv_weight",
            "block_add_conv_weight",
            "block_out_conv_weight",
        ):
            assert not value.any(), name
        elif name.endswith("gamma"):
            assert (value == 1).all()
        else:
            assert value.any(), name


def test_weights_start_with_the_spread_of_gcnet():
    block = GC_Block(NL_Block(DATA, num_in=2048, name="nl"), num_in=2048, name="gc")
    values, _ = initial_params(block, {"data": (1, 2048, 2, 2)})
    assert values["gc_mask_conv_weight"].std() == pytest.approx((2 / 2048) ** 0.5, rel=0.05)
    for tag in ("theta", "phi", "g"):
        assert values[f"nl_{tag}_conv_weight"].std() == pytest.approx(0.01, rel=0.01)


# In networks --------------------------------------------------------------------------------------


def blocks_of(name, **overrides):
    """Return the names of the inserted blocks."""
    symbol, conf = get_symbol(name, **overrides)
    return sorted(summary.parts(symbol, conf)[1])


def contexts_of(name, **overrides):
    spec = resolve(name, **overrides)
    return [
        (c.kind, c.all_settings().get("ratio"), dict(c.positions), c.inside) for c in spec.context
    ]


EVERY = {3: (1, 2, 3, 4), 4: (1, 2, 3, 4, 5, 6), 5: (1, 2, 3)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"block": "gc"}, [("gc", 1 / 16, EVERY, True)]),
        ({"block": "GC:ratio=1/4"}, [("gc", 1 / 4, EVERY, True)]),
        ({"block": "se"}, [("se", 1 / 16, {2: (1, 2, 3), **EVERY}, True)]),
        ({"block": "nl"}, [("nl", 1 / 2, {4: (5,)}, False)]),
        ({"block": "snl"}, [("snl", None, {4: (5,)}, False)]),
        (
            {"block": "gc:ratio=0.125,nl:ratio=1/8"},
            [("gc", 0.125, EVERY, True), ("nl", 0.125, {4: (5,)}, False)],
        ),
        (
            {"block": "gc@c4-c5, nl@3:1,3;4:2/after"},
            [
                ("gc", 1 / 16, {4: EVERY[4], 5: EVERY[5]}, True),
                ("nl", 1 / 2, {3: (1, 3), 4: (2,)}, False),
            ],
        ),
        ({"block": "gc@4:5/after"}, [("gc", 1 / 16, {4: (5,)}, False)]),
        ({"block": "nl@c5"}, [("nl", 1 / 2, {5: (1, 2, 3)}, True)]),
        ({"block": "nl@c3-c5"}, [("nl", 1 / 2, EVERY, True)]),
        ({"block": Context("nl", positions={4: [5, 1]})}, [("nl", 1 / 2, {4: (1, 5)}, False)]),
        (
            {"block": Context("gc", {"ratio": "1/8"}, ((4, (2,)),), "after")},
            [("gc", 1 / 8, {4: (2,)}, False)],
        ),
        (
            {"block": ["se@5:3", Context("snl")]},
            [("se", 1 / 16, {5: (3,)}, True), ("snl", None, {4: (5,)}, False)],
        ),
        ({"block": None}, []),
        ({"block": "none"}, []),
    ],
)
def test_block_text_and_tuples(overrides, expected):
    assert contexts_of("resnet50", **overrides) == expected


def test_glore_is_a_kind_of_block_too():
    released = get_symbol("resnet50_w-glore_2-3")[0].tojson()
    assert get_symbol("resnet50", block="glore")[0].tojson() == released
    assert get_symbol("resnet50", block="glore@2-3")[0].tojson() == released
    assert get_symbol("resnet50", glore="2-3", block="glore")[0].tojson() == released
    assert dict(resolve("resnet50", block="glore@c5").glore) == {5: (1, 2, 3)}
    assert dict(resolve("resnet152", block="glore").glore) == {3: (3, 6), 4: (16, 24, 32)}
    spec = resolve("resnet18", block="gc,glore@4:1")
    assert (dict(spec.glore), [c.kind for c in spec.context]) == ({4: (1,)}, ["gc"])


def test_rows_are_their_base_with_blocks():
    for row, base, block in (
        ("resnet50_w-gc", "resnet50", "gc"),
        ("resnet50_w-gc_0-1", "resnet50", "gc@4:5/after"),
        ("resnet50_w-nl_0-1", "resnet50", "nl"),
        ("resnet50_w-nl_0-3", "resnet50", "nl@4:1,3,5"),
        ("resnet50_w-snl_0-1", "resnet50", "snl"),
        ("resnet50_w-se", "resnet50", "se"),
        ("RESNET50_SLOWONLY_NL5", "RESNET50_SLOWONLY", "nl@3:2,4;4:2,4,6"),
        ("RESNET50_SLOWONLY_SNL5", "RESNET50_SLOWONLY", "snl@3:2,4;4:2,4,6"),
    ):
        assert get_symbol(row)[0].tojson() == get_symbol(base, block=block)[0].tojson(), row
    for row, block in (
        ("RESNET50_SLOWONLY_GC5", "gc@3:2,4;4:2,4,6/after"),
        ("RESNET50_SLOWONLY_GC", "gc"),
    ):
        graph, _ = get_symbol("RESNET50_SLOWONLY", block=f"{block}:ratio=1/4")
        assert get_symbol(row)[0].tojson() == graph.tojson(), row


def neighbours(symbol, first, last):
    """Return (what the node ``first`` reads, who reads the node ``last``)."""
    conf = {"data": (1, 3, 64, 64)}
    nodes = summary.operations(symbol, conf)
    reads = next(node.inputs[0] for node in nodes if node.name == first)
    return reads, [node.name for node in nodes if last in node.inputs]


def test_blocks_sit_before_the_sum_or_behind_it():
    symbol, _ = get_symbol("resnet50", block="gc@4:5")
    found = neighbours(symbol, "conv4_B05_gc_mask_conv", "conv4_B05_gc_add")
    assert found == ("conv4_B05_conv-m3_conv", ["conv4_B05_sum"])
    symbol, _ = get_symbol("resnet50", block="gc@4:5/after", glore="4:5")
    reads, readers = neighbours(symbol, "conv4_B05_gc_mask_conv", "conv4_B05_gc_add")
    assert reads == "conv4_B05_sum"
    assert "conv4_B05_extra_sum" in readers
    symbol, _ = get_symbol("resnet18", block="nl@4:1")
    reads, readers = neighbours(symbol, "conv4_B01_nl_g_conv", "conv4_B01_nl_sum")
    assert reads == "conv4_B01_sum"
    assert readers == ["conv4_B02_conv-m1_bn", "conv4_B02_sum"]


def test_a_block_behind_a_dual_path_block_is_the_identity_on_both_paths():
    symbol, conf = get_symbol("dpn92", num_classes=3, crop_size=32, block="nl@4:3", glore="4:3")
    plain, _ = get_symbol("dpn92", num_classes=3, crop_size=32, glore="4:3")
    x = mx.nd.array(noise((1, *conf.data_shape), 8))
    outs = [build_block(s, conf, seed=2, training=False)(x).asnumpy() for s in (symbol, plain)]
    assert np.array_equal(*outs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block": "cg"}, "'cg' is not one of: gc"),
        ({"block": "gc@c3-c6"}, "'c3-c6' are not understood"),
        ({"block": "gc@2-3"}, "'2-3' are not understood"),
        ({"block": "gc@3:9"}, "no block 9 in stage 3"),
        ({"block": "gc@3:1;3:2"}, "names a stage twice"),
        ({"block": "gc@c5-c3"}, "name no block"),
        ({"block": "gc,gc"}, "names a kind twice"),
        ({"block": "gc/before"}, "placement 'before' is not one of: after, inside"),
        ({"block": "glore/after"}, "takes no placement"),
        ({"block": "gc nl"}, "is not understood at 'gc nl'"),
        ({"block": 3.5}, "3.5 is neither a kind of block nor a Context"),
        ({"block": [7]}, "7 is neither a kind of block nor a Context"),
        ({"block": "gc:ratio=1/0"}, "ratio must be a number or a fraction"),
        ({"block": "gc:ratio=wide"}, "ratio must be a number or a fraction"),
        ({"block": "gc:ratio=0"}, "ratio must be a number from"),
        ({"block": "snl:ratio=0.5"}, "snl has no setting 'ratio'; it takes none"),
        ({"block": Context("snl", {"ratio": 0.5})}, "snl has no setting 'ratio'"),
        ({"block_ratio": 0.5}, "Unknown option 'block_ratio'. Did you mean block"),
        ({"block": "gc:mode=gaussian"}, "gc has no setting 'mode'; it takes ratio"),
        ({"block": "nl:mode=gauss"}, "nl: mode 'gauss' is not one of: gaussian"),
        ({"block": Context("nl", {"sub_sample": 1})}, "sub_sample must be True or False, not 1"),
        ({"block": Context("gc", positions=4)}, "must be text such as 'c3-c5' or a mapping"),
    ],
)
def test_wrong_block_options_are_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        get_symbol("resnet50", **overrides)


def test_every_kind_has_a_row_of_defaults_and_a_builder():
    for kind in CONTEXT_KINDS:
        assert blocks_of("resnet18", block=f"{kind}@4:1") == [f"conv4_B01_{kind}"]


def test_non_local_options_reach_the_graph():
    symbol, _ = get_symbol("resnet50", block="nl:mode=concatenation,sub_sample=true")
    names = symbol.get_internals().list_outputs()
    assert "conv4_B05_nl_theta-score_conv_weight" in names
    assert "conv4_B05_nl_phi-pool_output" in names


# Published figures --------------------------------------------------------------------------------


def test_all_gc_resnet50_has_the_published_parameters_and_cost():
    """GCNet: 28.08 M parameters and 3.87 GFLOPs (recalled), for a post-activation ResNet-50.

    That network strides in the first 1x1 convolution of a stage and counts 25.557 M parameters
    (torchvision's ResNet-50 has as many); the pre-activation one here has 3,840 fewer in its
    BatchNorms and strides in the 3x3 convolution.
    """
    (plain, conf), (blocks, _) = get_symbol("resnet50"), get_symbol("resnet50_w-gc")
    counts = [summary.count(symbol, conf) for symbol in (plain, blocks)]
    added = counts[1].params - counts[0].params
    assert counts[1].params == 28_074_933
    assert round((25_557_032 + added) / 1e6, 2) == 28.08
    # With the stride in m1, that convolution and no other sees a quarter of the positions.
    moved = sum(counts[0].macs_of[f"conv{stage}_B01_conv-m1_conv"] * 3 // 4 for stage in (3, 4, 5))
    assert [round((c.macs - moved) / 1e9, 2) for c in counts] == [3.86, 3.87]


# Memory -------------------------------------------------------------------------------------------


def test_scores_are_counted_and_limited():
    symbol, conf = get_symbol("RESNET50_SLOWONLY_NL5")
    # conv3: 8 x 28 x 28 positions, twice; conv4: 8 x 14 x 14, three times. A softmax's gradient
    # takes two more of the largest.
    large, small = (4 * (8 * side * side) ** 2 for side in (28, 14))
    assert check_memory(symbol, conf, limit=2**40) == 2 * large + 3 * small + 2 * large
    assert check_memory(symbol, conf, batch_size=2, limit=2**40) == 2 * (4 * large + 3 * small)
    assert check_memory(symbol, conf, training=False, limit=large) == large
    with pytest.raises(MemoryProblem) as caught:
        check_memory(symbol, conf, batch_size=16, limit=2**30)
    message = str(caught.value)
    assert "5 Non-local blocks need at least 9.82 GiB to train, 1.00 GiB are free" in message
    assert "conv3_B02_nl, compares 6272 with 6272 positions for each of 16 samples" in message
    assert "sub_sample" in message
    sampled, _ = get_symbol("RESNET50_SLOWONLY", block="nl@3:2,4;4:2,4,6:sub_sample=true")
    quarter = check_memory(sampled, conf, limit=2**40)
    assert quarter == large + 3 * small // 4
    with pytest.raises(MemoryProblem) as caught:
        check_memory(sampled, conf, limit=1)
    assert "sub_sample" not in str(caught.value)
    assert check_memory(*get_symbol("resnet50"), limit=0) == 0


def test_building_or_running_what_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda ctx=None: 10_000)
    symbol, conf = get_symbol("resnet18", num_classes=3, block="nl@4:1", crop_size=64)
    # 4 x 4 positions: 16 x 16 scores of 4 bytes, thrice for training.
    block = build_block(symbol, conf)
    with mx.autograd.record():
        block(mx.nd.zeros((3, 3, 64, 64))).wait_to_read()
    with mx.autograd.record(), pytest.raises(MemoryProblem, match="to train, .* of 4 samples"):
        block(mx.nd.zeros((4, 3, 64, 64)))
    block(mx.nd.zeros((4, 3, 64, 64))).wait_to_read()
    with pytest.raises(MemoryProblem, match="to run"):
        block(mx.nd.zeros((1, 3, 256, 256)))
    monkeypatch.setattr(memory, "available_memory", lambda ctx=None: 3000)
    with pytest.raises(MemoryProblem, match="conv4_B01_nl"):
        build_block(symbol, conf)


def test_free_memory_is_told():
    free = memory.available_memory(mx.cpu())
    assert free is None or 2**20 < free < 2**50


def test_activations_are_counted_by_hand():
    # relu: 6 numbers; the view is free; the sum reads relu and view: 6 more; fc: 2.
    out = mx.sym.Activation(DATA, act_type="relu", name="relu")
    out = mx.sym.add_n(
        mx.sym.Reshape(out, shape=(0, 6), name="view"), mx.sym.Flatten(out), name="sum"
    )
    out = mx.sym.FullyConnected(out, num_hidden=2, name="fc")
    found = activation_bytes(out, {"data": (1, 2, 3)})
    assert found == (4 * 14, 4 * 12, 0)
