"""Names, shapes and values of parameters: what is compared, and what is said."""

import os
import re

import numpy as np
import pytest

from checkpoint.params import (
    CheckpointError,
    check,
    check_finite,
    compare,
    infer_shapes,
    is_label,
    listing,
    numpy_of,
    param_shapes,
    read_params,
    split,
    write_params,
)
from glore_common import UsageError
from mxnet_compat import mx


@pytest.fixture
def symbol():
    data = mx.sym.Variable("data")
    data = mx.sym.BatchNorm(data, name="bn")
    data = mx.sym.FullyConnected(data, num_hidden=3, name="fc")
    return mx.sym.SoftmaxOutput(data, name="softmax")


INPUTS = {"data": (2, 5)}
ARGS = {"bn_gamma": (5,), "bn_beta": (5,), "fc_weight": (3, 5), "fc_bias": (3,)}
AUXS = {"bn_moving_mean": (5,), "bn_moving_var": (5,)}


def zeros(shapes, **changes):
    return {name: np.zeros(shape) for name, shape in {**shapes, **changes}.items()}


def test_shapes_are_those_of_parameters_alone(symbol):
    assert param_shapes(symbol, INPUTS) == (ARGS, AUXS)
    assert list(param_shapes(symbol, INPUTS)[0]) == list(ARGS)
    assert dict(infer_shapes(symbol, INPUTS))["softmax_label"] == (2,)
    assert dict(infer_shapes(symbol, INPUTS))["softmax_output"] == (2, 3)
    with pytest.raises(UsageError, match="no input clip"):
        infer_shapes(symbol, {"data": (2, 5), "clip": (1,)})
    with pytest.raises(UsageError, match="give the shape of every input"):
        param_shapes(symbol, {})
    with pytest.raises(UsageError, match="does not take inputs of shapes"):
        infer_shapes(symbol, {"data": (2, 5), "fc_weight": (3, 6)})


def test_labels_are_told_by_their_names():
    assert is_label("softmax_label")
    assert not is_label("label_weight")


def test_a_listing_has_ten_names():
    names = [f"n{index}" for index in range(11)]
    assert listing(names[:10]) == ", ".join(names[:10])
    assert listing(names) == ", ".join(names[:10]) + " and 1 more"
    assert listing(names, None) == ", ".join(names)


def test_each_kind_of_difference_is_a_line():
    given = zeros({"a": (1,), "b": (2,), "d": (4,)})
    expected = {"a": (1,), "b": (3,), "c": (3,)}
    assert compare(expected, given) == [
        "missing (1): c",
        "extra (1): d",
        "of another shape (1): b is (2,), the network has (3,)",
    ]
    assert compare({**expected, "b": None}, given, ["^c$"], ["^d"]) == []
    assert compare({"a": (1,)}, {"a": np.zeros(1)}) == []


def test_what_fits_and_what_does_not(symbol):
    check(symbol, zeros(ARGS), zeros(AUXS), INPUTS)
    check(symbol, zeros(ARGS, fc_bias=(9,)), zeros(AUXS), None)
    check(symbol, zeros({}), zeros(AUXS, more=(1,)), None, [""], ["more"])
    with pytest.raises(CheckpointError, match=r"them do not fit .*\n  arguments, missing \(4\)"):
        check(symbol, {}, zeros(AUXS), INPUTS, where="them")
    with pytest.raises(CheckpointError, match=r"auxiliary states, of another .* is \(6,\)"):
        check(symbol, zeros(ARGS), zeros(AUXS, bn_moving_mean=(6,)), INPUTS)


def test_more_than_ten_names_go_to_a_file(symbol):
    extra = zeros(ARGS, **{f"n{index}": (1,) for index in range(12)})
    with pytest.raises(CheckpointError, match=r"extra \(12\): n0, .* and 2 more") as info:
        check(symbol, extra, zeros(AUXS), INPUTS)
    path = re.search(r"All names are in (\S+)", str(info.value))[1]
    with open(path) as stream:
        assert "n10, n11" in stream.read()
    os.remove(path)
    assert len(str(info.value).splitlines()) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    params = {"good": np.zeros(3), "bad": np.array([0.0, value]), "count": np.array([1])}
    with pytest.raises(CheckpointError, match="x.params .* in bad: "):
        check_finite(params, "x.params")
    check_finite({"good": np.zeros(3)}, "x")


def test_arrays_of_any_kind_are_taken(tmp_path):
    path = str(tmp_path / "x.params")
    write_params(
        path, {"a": mx.nd.ones((2,)), "b": np.array(np.float32(3)), "c": np.ones((2, 2)).T}
    )
    found = read_params(path)
    assert {name: value.shape for name, value in found.items()} == {
        **{"a": (2,), "b": (1,), "c": (2, 2)}
    }
    assert found["c"].dtype == np.float64
    with pytest.raises(CheckpointError, match="w is no array but a str"):
        numpy_of("x", "w")
    for value in (np.zeros((0, 3), "float32"), np.zeros(2, "complex64")):
        with pytest.raises(CheckpointError, match="w: MXNet has no file form"):
            write_params(path, {"w": value})
    assert list(read_params(path)) == ["a", "b", "c"]


def test_kinds_are_told_apart(symbol):
    params = {"arg:fc_bias": 1, "aux:bn_moving_mean": 2}
    assert split(params, "x") == ({"fc_bias": 1}, {"bn_moving_mean": 2})
    plain = {"fc_bias": 1, "bn_moving_mean": 2}
    assert split(plain, "x", symbol) == ({"fc_bias": 1}, {"bn_moving_mean": 2})
    with pytest.raises(CheckpointError, match="begins with neither arg: nor aux:"):
        split(plain, "x")
    with pytest.raises(CheckpointError, match="fc_bias is there twice"):
        split({"arg:fc_bias": 1, "fc_bias": 1}, "x", symbol)
