"""Internals of a network by node, and the statistics of blocks, against NumPy."""

import math

import numpy as np
import pytest

from checkpoint.graph import read_symbol
from checkpoint.params import param_shapes
from glore_common import UsageError
from network.block_statistics import (
    cosine_distance,
    divergence,
    drift,
    effective_rank,
    random_rows,
    random_vectors,
    statistics,
)
from network.builder import get_symbol, list_networks, logits
from network.initializer import DEFAULT_RULES, initial_params, xavier_uniform
from network.internals import compute, inserted_blocks, views

# The last layers drawn as well, so that all blocks have an effect.
RULES = ((r"_(add|add-2|out)_conv_weight$", xavier_uniform), *DEFAULT_RULES)


def network(name, block, **overrides):
    symbol, conf = get_symbol(name, 5, block=block, **overrides)
    args, auxs = initial_params(logits(symbol), {"data": (1, *conf.data_shape)}, 3, RULES)
    rng = np.random.default_rng(0)
    return symbol, {**args, **auxs}, rng.standard_normal((2, *conf.data_shape)).astype("float32")


def conv(data, params, name):
    """A 1x1 convolution of (n, c, L) in float64."""
    weight = params[f"{name}_conv_weight"].astype("float64")
    out = np.einsum("oc,ncl->nol", weight.reshape(weight.shape[:2]), data)
    bias = params.get(f"{name}_conv_bias")
    return out if bias is None else out + bias[:, None]


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", list_networks(study=True))
def test_every_block_of_every_network_is_found(name):
    from network.builder import get_spec

    symbol, _ = get_symbol(name)
    spec, found = get_spec(name), inserted_blocks(symbol)
    positions = dict(spec.glore)
    assert sum(block.kind == "glore" for block in found) == sum(map(len, positions.values()))
    for context in spec.context:
        blocks = context.positions or spec.every_block((2, 3, 4, 5))
        expected = sum(len(numbers) for _, numbers in blocks)
        assert sum(block.kind == context.kind for block in found) == expected


def test_a_released_graph_needs_nothing_but_itself():
    symbol = read_symbol("test/golden/released_resnet50_w-glore_2-3-symbol.json")
    found = inserted_blocks(symbol)
    assert [block.name for block in found] == [
        "conv3_B01_extra", "conv3_B03_extra", "conv4_B01_extra", "conv4_B03_extra",
        "conv4_B05_extra",
    ]  # fmt: skip
    args, _ = param_shapes(logits(symbol), {"data": (1, 3, 224, 224)})
    assert all(block.relation in args for block in found)


def test_video_units_maps_are_what_weights_and_activations_give():
    symbol, params, data = network("TINY_GLORE", None, crop_size=32, clip_length=4)
    for view in views(symbol, params, data):
        name = view.block.name
        b = conv(view.data, params, f"{name}_conv-proj")
        x = conv(view.data, params, f"{name}_conv-state")
        np.testing.assert_allclose(view.weights, b, atol=1e-4 * abs(b).max())
        nodes = np.einsum("nsl,nkl->nsk", x, b)
        np.testing.assert_allclose(view.nodes, nodes, atol=1e-4 * abs(nodes).max())
        assert view.relation.shape == (view.weights.shape[1],) * 2
        assert np.prod(view.shape) == view.weights.shape[2]


def test_released_units_maps_are_what_weights_and_activations_give():
    symbol, params, data = network("local39", "glore@4:1", crop_size=32)
    (view,) = views(symbol, params, data)
    name = f"{view.block.name}_conv-proj"
    gamma, beta, mean, var = (
        params[f"{name}_bn_{part}"][:, None]
        for part in ("gamma", "beta", "moving_mean", "moving_var")
    )
    normal = (view.data - mean) / np.sqrt(var + 1e-4)
    b = conv(np.maximum(normal * gamma + beta, 0), params, name)
    np.testing.assert_allclose(view.weights, b, atol=1e-4 * abs(b).max())


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("sub_sample", ["false", "true"])
def test_non_local_attention_is_what_weights_and_activations_give(mode, sub_sample):
    block = f"nl@4:1:mode={mode},sub_sample={sub_sample}"
    symbol, params, data = network("local39", block, crop_size=32)
    (view,) = views(symbol, params, data)
    name, source = view.block.name, view.data

    def pooled(value):
        if sub_sample == "false":
            return value
        maps = value.reshape(*value.shape[:2], 4, 2, 4, 2)
        return maps.max((3, 5)).reshape(*value.shape[:2], -1)

    assert view.shape == (8, 8)
    assert view.key_shape == ((4, 4) if sub_sample == "true" else (8, 8))
    theta = source if mode == "gaussian" else conv(source, params, f"{name}_theta")
    phi = pooled(source if mode == "gaussian" else conv(source, params, f"{name}_phi"))
    if mode == "concatenation":
        left = conv(theta, params, f"{name}_theta-score").transpose(0, 2, 1)
        scores = np.maximum(left + conv(phi, params, f"{name}_phi-score"), 0)
    else:
        scores = np.einsum("ncl,nck->nlk", theta, phi)
    rows = softmax(scores) if mode.endswith("gaussian") else scores / scores.shape[-1]
    np.testing.assert_allclose(view.weights, rows, atol=1e-5 * max(1, abs(rows).max()))
    # Rows are queries: the block's output at position i is gathered with row i.
    gathered = np.einsum("nck,nlk->ncl", pooled(conv(source, params, f"{name}_g")), rows)
    added = conv(gathered, params, f"{name}_out")
    np.testing.assert_allclose(view.added, added, atol=1e-4 * abs(added).max())
    found = statistics(view)
    assert (found.divergence is None) == (mode in ("dot_product", "concatenation"))


def test_attention_and_factors_of_the_other_blocks():
    symbol, params, data = network("local39", "gc@4:1:ratio=1/4,snl@3:1,se@5:1:ratio=1/4")
    found = {view.block.kind: view for view in views(symbol, params, data)}
    for kind in ("gc", "snl"):
        view = found[kind]
        rows = softmax(conv(view.data, params, f"{view.block.name}_mask"))
        np.testing.assert_allclose(view.weights, rows, atol=1e-6)
        assert statistics(view).attention == statistics(view).divergence == 0
    view = found["se"]
    assert view.weights.shape == (2, 32)
    assert ((view.weights > 0) & (view.weights < 1)).all()
    means = view.data.mean(2)
    hidden = means @ params["conv5_B01_se_fc1_weight"].T + params["conv5_B01_se_fc1_bias"]
    out = np.maximum(hidden, 0) @ params["conv5_B01_se_fc2_weight"].T
    expected = 1 / (1 + np.exp(-out - params["conv5_B01_se_fc2_bias"]))
    np.testing.assert_allclose(view.weights, expected, atol=1e-5)


def test_wrong_requests_are_named():
    symbol, params, data = network("local39", "gc@4:1:ratio=1/4")
    with pytest.raises(UsageError, match="no node conv4_B01_gc_musk; near it: conv4_B01_gc_mask"):
        compute(symbol, params, data, ["conv4_B01_gc_musk"])
    with pytest.raises(UsageError, match="lack conv1_conv_weight"):
        compute(symbol, {}, data, ["conv1_conv"])
    with pytest.raises(UsageError, match="does not take"):
        compute(symbol, params, data[:, :2], ["conv1_conv"])


# --- statistics -----------------------------------------------------------------------------------


def rows_like_features():
    return np.random.default_rng(1).standard_normal((40, 12)) + 0.5


def test_the_closed_form_of_the_cosine_is_the_double_loop():
    vectors = rows_like_features()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [(1 - float(a @ b)) / 2 for a in unit for b in unit]
    assert cosine_distance(vectors) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_the_divergence_is_its_definition():
    rows = softmax(rows_like_features())

    def jsd(v, w):
        return 0.5 * (v * np.log(2 * v / (v + w)) + w * np.log(2 * w / (v + w))).sum()

    assert divergence(rows) == pytest.approx(np.mean([jsd(v, w) for v in rows for w in rows]))


def test_equal_rows_have_no_distance():
    rows = np.tile(softmax(np.arange(9.0)), (30, 1))
    assert cosine_distance(rows) == pytest.approx(0, abs=1e-12)
    assert divergence(rows) == pytest.approx(0, abs=1e-12)


def test_one_hot_rows_have_the_largest():
    rows = np.eye(49)
    assert cosine_distance(rows) == pytest.approx((1 - 1 / 49) / 2)
    assert divergence(rows) == pytest.approx(math.log(2) * (1 - 1 / 49))


def test_vectors_without_negative_numbers_never_exceed_a_half():
    assert cosine_distance(np.random.default_rng(0).random((500, 2)) ** 9) <= 0.5


@pytest.mark.parametrize(
    ("positions", "cosine", "jsd"), [(49, 0.269, 0.183), (196, 0.301, 0.197), (784, 0.310, 0.201)]
)
def test_reference_lines(positions, cosine, jsd):
    assert random_rows(positions, positions) == pytest.approx((cosine, jsd), abs=0.012)
    assert random_vectors(positions, 64, rectified=False) == pytest.approx(0.495, abs=0.008)
    assert random_vectors(positions, 64, rectified=True) == pytest.approx(0.335, abs=0.012)


def test_an_untrained_block_has_no_figure():
    assert math.isnan(cosine_distance(np.zeros((5, 3))))
    symbol, conf = get_symbol("local39", 2, block="nl@4:1")
    args, auxs = initial_params(logits(symbol), {"data": (1, *conf.data_shape)}, 0)
    data = np.random.default_rng(0).standard_normal((1, *conf.data_shape)).astype("float32")
    (view,) = views(symbol, {**args, **auxs}, data)
    assert math.isnan(statistics(view).output)


def test_rows_of_zeros_are_left_out():
    vectors = rows_like_features()
    assert cosine_distance(np.vstack([vectors, 0 * vectors])) == cosine_distance(vectors)


def test_effective_rank_and_drift():
    assert effective_rank(np.eye(4, 9)) == pytest.approx(4)
    assert effective_rank(np.outer([1, 2, 3], np.arange(1, 6))) == pytest.approx(1)
    assert effective_rank(np.zeros((2, 3))) == 0
    maps = np.random.default_rng(0).standard_normal((2, 3, 50))
    assert drift(maps, 5 * maps) == pytest.approx(0, abs=1e-12)
    assert drift(maps, -maps) == pytest.approx(2)
