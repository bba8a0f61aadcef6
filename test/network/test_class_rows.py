"""A classifier for other classes keeps the rows of those that have the same name."""

import numpy as np
import pytest

from checkpoint.params import CheckpointError, param_shapes, write_params
from network.builder import get_symbol
from network.initializer import initial_value
from network.pretrained import load_pretrained

SHAPES = {"data": (1, 3, 8, 32, 32)}


@pytest.fixture
def source(tmp_path):
    """Return (path of the weights of three classes, their classifier's weight and bias)."""
    symbol, _ = get_symbol("TINY_3D", 3, clip_length=8, crop_size=32)
    args, auxs = param_shapes(symbol, SHAPES)
    params = {name: initial_value(name, shape) for name, shape in {**args, **auxs}.items()}
    params["classifier_bias"] = np.arange(1, 4, dtype=np.float32)
    kinds = {**{f"arg:{n}": params[n] for n in args}, **{f"aux:{n}": params[n] for n in auxs}}
    write_params(tmp_path / "three.params", kinds)
    return tmp_path / "three.params", params["classifier_weight"]


def load(path, classes, count):
    symbol, _ = get_symbol("TINY_3D", count, clip_length=8, crop_size=32)
    return load_pretrained(symbol, path, SHAPES, classes=classes)[0]


def test_rows_go_where_their_class_is_now(source, caplog):
    path, weight = source
    caplog.set_level("INFO")
    names = ["dark dog", "grey cat", "pale cow"]
    params = load(path, (names, ["a hen", "Pale_Cow", "a pig", "dark_dog"]), 4)
    np.testing.assert_array_equal(params["classifier_weight"][[1, 3]], weight[[2, 0]])
    np.testing.assert_array_equal(params["classifier_bias"], [0, 3, 0, 1])
    assert "2 of 4 classes keep their part of the classifier" in caplog.text
    # As many classes in another order
    params = load(path, (names, names[::-1]), 3)
    np.testing.assert_array_equal(params["classifier_weight"], weight[::-1])
    # The same classes, and unknown ones, are taken as they are.
    for classes in ((names, names), None):
        np.testing.assert_array_equal(load(path, classes, 3)["classifier_weight"], weight)
    with pytest.raises(CheckpointError, match="is for 3 classes, 2 names are given"):
        load(path, (names[:2], names), 3)
