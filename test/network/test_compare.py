"""network.compare: matching of parameters, differences of outputs and layers."""

import math

import numpy as np
import pytest

from network.compare import compare_outputs, layer_distances, match_params, squeezed

EXPECTED = {
    "conv1_weight": (4, 3, 3, 3),
    "bn1_gamma": (4,),
    "bn1_beta": (4,),
    "conv2_weight": (4, 4, 3, 3),
    "bn2_gamma": (4,),
    "bn2_beta": (4,),
    "fc_weight": (5, 4),
    "fc_bias": (5,),
}


def arrays(shapes):
    return {name: np.full(shape, rank, "f4") for rank, (name, shape) in enumerate(shapes.items())}


def renamed(pairs):
    return arrays({pairs.get(name, name): shape for name, shape in EXPECTED.items()})


def test_equal_parameters_match():
    match = match_params(EXPECTED, arrays(EXPECTED))
    assert match.is_exact
    assert match.is_complete
    assert (len(match.matched), match.total) == (8, 8)


def test_missing_extra_and_reshaped_are_told_apart():
    given = arrays({**EXPECTED, "bn2_gamma": (9,), "other_weight": (7, 7)})
    del given["fc_bias"]
    match = match_params(EXPECTED, given)
    assert match.missing == ("fc_bias",)
    assert match.extra == ("other_weight",)
    assert match.reshaped == {"bn2_gamma": ((9,), (4,))}
    assert match.renamed == {}
    assert (len(match.matched), match.total) == (6, 8)
    assert not match.is_exact
    assert not match.is_complete


@pytest.mark.parametrize(
    "pairs",
    [
        {"bn1_gamma": "BN1.Gamma"},
        {"conv2_weight": "middle_kernel"},
        {"bn1_gamma": "norm_a_gamma", "bn1_beta": "norm_a_beta"},
        {name: f"module.net.{name}" for name in EXPECTED},
        {name: f"layer{rank}.{name.split('_')[1]}" for rank, name in enumerate(EXPECTED)},
    ],
)
def test_renamed_parameters_are_found_by_spelling_place_and_shape(pairs):
    given = renamed(pairs)
    match = match_params(EXPECTED, given)
    assert match.renamed == pairs
    assert match.is_complete
    assert not match.is_exact
    values = match.values(given, EXPECTED)
    assert [values[name].flat[0] for name in EXPECTED] == list(range(8))


def test_place_in_the_graph_counts_and_not_in_the_file():
    pairs = {"bn1_gamma": "first_gamma", "bn2_gamma": "second_gamma"}
    order = [pairs.get(name, name) for name in EXPECTED]
    given = renamed(pairs)
    given = {name: given[name] for name in sorted(given, reverse=True)}
    assert match_params(EXPECTED, given, ["data", *order]).renamed == pairs


def test_the_only_one_of_its_shape_is_found_whatever_its_name_and_place():
    rest = {name: shape for name, shape in EXPECTED.items() if name != "fc_weight"}
    rest["fc_bias"] = (99,)  # another difference, elsewhere
    match = match_params(EXPECTED, arrays({"zzz_kernel": (5, 4), **rest}))
    assert match.renamed == {"fc_weight": "zzz_kernel"}
    assert set(match.reshaped) == {"fc_bias"}
    match = match_params(EXPECTED, arrays({"zzz_kernel": (5, 4), "yyy_kernel": (5, 4), **rest}))
    assert match.renamed == {}
    assert match.missing == ("fc_weight",)


def test_a_renamed_one_at_the_end_of_the_file_is_found_by_likeness():
    given = arrays(EXPECTED)
    given["bn1_gammma"] = given.pop("bn1_gamma")
    del given["bn2_gamma"]
    match = match_params(EXPECTED, given)
    assert match.renamed == {"bn1_gamma": "bn1_gammma"}
    assert match.missing == ("bn2_gamma",)


def test_a_gamma_is_never_taken_for_a_beta():
    given = renamed({"bn1_gamma": "norm_beta"})
    match = match_params(EXPECTED, given)
    assert (match.missing, match.extra, match.renamed) == (("bn1_gamma",), ("norm_beta",), {})


def test_dense_layers_match_one_by_one_convolutions():
    assert squeezed((5, 4, 1, 1)) == squeezed((5, 4)) == (5, 4)
    given = arrays({**EXPECTED, "fc_weight": (5, 4)})
    given["fc_conv_weight"] = given.pop("fc_weight").reshape((5, 4, 1, 1))
    match = match_params(EXPECTED, given)
    assert match.renamed == {"fc_weight": "fc_conv_weight"}
    assert match.values(given, EXPECTED)["fc_weight"].shape == (5, 4)


def test_outputs_are_compared_relative_to_the_largest_logit():
    theirs = np.array([[1.0, 2.0, -8.0, 0, 0.5, 0.1], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "f4")
    ours = theirs.copy()
    ours[0, 1] = 0.75
    found = compare_outputs(theirs, ours, 0.2)
    assert found["largest_difference"] == 1.25
    assert found["largest_relative_difference"] == 1.25 / 8
    assert found["equal"]
    assert found["top1_agreement"] == 0.5
    assert found["top5_agreement"] == 1.0
    assert found["top5"][1] == {"checkpoint": [5, 4, 3, 2, 1], "network": [5, 4, 3, 2, 1]}
    assert not compare_outputs(theirs, ours, 0.1)["equal"]
    assert compare_outputs(theirs, theirs, 1e-9)["equal"]


def test_what_is_not_finite_is_never_equal():
    logits = np.ones((1, 6), "f4")
    for bad in (np.nan, np.inf):
        broken = logits.copy()
        broken[0, 3] = bad
        for pair in ((logits, broken), (broken, logits), (broken, broken)):
            found = compare_outputs(*pair, 1e9)
            assert not found["equal"]
            assert found["largest_difference"] is None


def test_layers_are_compared_by_distance_and_statistics():
    base = {
        "a_weight": np.array([3.0, 0.0]),
        "a_bias": np.array([4.0]),
        "n_bn_gamma": np.array([0.0, 0.0]),
        "n_bn_moving_mean": np.array([1.0, 2.0]),
        "n_bn_moving_var": np.array([4.0, 1.0]),
        "gone_weight": np.ones(2),
    }
    other = {
        "a_weight": np.array([3.0, 3.0]),
        "a_bias": np.array([8.0]),
        "n_bn_gamma": np.array([0.0, 1.0]),
        "n_bn_moving_mean": np.array([2.0, 0.0]),
        "n_bn_moving_var": np.array([8.0, 0.5]),
        "gone_weight": np.ones(3),
    }
    weights, statistics = layer_distances(base, other)
    assert weights == [
        {
            "layer": "a",
            "relative_distance": 1.0,
            "cosine": pytest.approx((9 + 32) / (5 * math.sqrt(82))),
        },
        {"layer": "n_bn", "relative_distance": None, "cosine": None},
    ]
    assert statistics == [
        {
            "layer": "n_bn",
            "mean_shift": (0.5 + 2.0) / 2,
            "var_log_ratio": pytest.approx(math.log(2)),
        }
    ]
