"""What a checkpoint's own graph says of its BatchNorms and types, when its weights go into ours."""

import json
import os

import numpy as np
import pytest
from image_runs import NETWORK, add_tiny_network

from checkpoint.graph import normalisations
from checkpoint.params import CheckpointError, write_params
from jobs.model import open_model
from mxnet_compat import mx
from network.builder import get_symbol
from network.initializer import initial_params
from network.pretrained import load_pretrained

FOREIGN = os.path.join(os.path.dirname(__file__), "..", "inputs", "checkpoints", "foreign16")
SIDE = 64


@pytest.fixture(autouse=True)
def small(monkeypatch):
    add_tiny_network(monkeypatch)


def written(folder, change=None, dtype="float32", small_variances=False):
    """Write a checkpoint whose BatchNorms ``change`` altered; return its prefix."""
    symbol, _ = get_symbol(NETWORK, 3, crop_size=SIDE)
    graph = json.loads(symbol.tojson())
    for node in graph["nodes"]:
        if node["op"] == "BatchNorm" and change:
            change(node["attrs"])
    rng = np.random.RandomState(0)
    arrays = {}
    for kind, part in zip(("arg", "aux"), initial_params(symbol, {"data": (1, 3, SIDE, SIDE)})):
        for name, value in part.items():
            if name.endswith(("gamma", "var")):
                value = rng.uniform(0.5, 1.5, value.shape)
            elif name.endswith(("beta", "mean")):
                value = rng.uniform(-0.2, 0.2, value.shape)
            if small_variances and name.endswith("var"):
                value = np.zeros(value.shape)
            arrays[f"{kind}:{name}"] = value.astype(dtype)
    (folder / "net-symbol.json").write_text(json.dumps(graph))
    write_params(str(folder / "net-0000.params"), arrays)
    return str(folder / "net")


def outputs(prefix, data, **more):
    return open_model(prefix, crop_size=SIDE, **more).block([mx.cpu()])(data).asnumpy()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda given: given.update(fix_gamma="True"), "gammas count as 1"),
        (lambda given: given.pop("fix_gamma"), "gammas count as 1"),
        (lambda given: given.update(eps="0.01"), "another eps"),
        (lambda given: given.update(eps="1e-05"), "another eps"),
        (lambda given: given.pop("eps"), "another eps"),
        (None, ""),
    ],
)
def test_our_graph_gives_what_its_own_gives(tmp_path, change, says, caplog):
    prefix = written(tmp_path, change)
    data = mx.nd.random.normal(shape=(2, 3, SIDE, SIDE))
    own = outputs(prefix, data)
    caplog.set_level("INFO", "glore")
    ours = outputs(prefix, data, network=NETWORK)
    np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-5 * np.abs(own).max())
    assert says in caplog.text
    if change is None:
        assert "gammas" not in caplog.text
        assert "eps" not in caplog.text
    # The same for --pretrained.
    symbol, conf = get_symbol(NETWORK, 3, crop_size=SIDE)
    args, auxs = load_pretrained(symbol, prefix, {"data": (1, 3, SIDE, SIDE)})
    model = open_model(prefix, network=NETWORK, crop_size=SIDE)
    for name, value in {**args, **auxs}.items():
        np.testing.assert_array_equal(value, {**model.arg_params, **model.aux_params}[name])


def test_what_cannot_be_carried_over_is_an_error(tmp_path):
    prefix = written(tmp_path, lambda given: given.update(eps="1e-09"), small_variances=True)
    with pytest.raises(CheckpointError, match=r"conv1_bn_gamma \(1e-09, ours 0\.0001\)"):
        open_model(prefix, network=NETWORK, crop_size=SIDE)


def test_a_graph_that_cannot_be_read_is_said(tmp_path, caplog):
    prefix = written(tmp_path)
    with open(f"{prefix}-symbol.json", "w") as stream:
        stream.write("{")
    open_model(prefix, network=NETWORK, crop_size=SIDE)
    assert "its own graph is not compared with ours" in caplog.text


def test_the_constants_of_a_graph():
    data = mx.sym.BatchNorm(mx.sym.var("data"), name="a")
    data = mx.sym.BatchNorm(data, name="b", fix_gamma=False, eps=1e-5)
    found = normalisations(data)
    assert found["a_gamma"] == (True, pytest.approx(1e-3), "a_moving_var")
    assert found["b_gamma"] == (False, pytest.approx(1e-5), "b_moving_var")


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_of_other_types(tmp_path, dtype):
    data = mx.nd.random.normal(shape=(1, 3, SIDE, SIDE))
    prefix = written(tmp_path, dtype=dtype)
    own = outputs(prefix, data)
    assert own.dtype == np.float32
    np.testing.assert_allclose(outputs(prefix, data, network=NETWORK), own, rtol=1e-3)


def test_a_float16_graph_is_computed_in_float32():
    model = open_model(FOREIGN, crop_size=32)
    assert "computed in float32, not float16" in model.origin
    assert model.facts.num_classes == 2
    scores = model.block([mx.cpu()])(mx.nd.ones((2, 3, 32, 32))).asnumpy()
    assert scores.shape == (2, 2)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()


def test_a_float16_variable_becomes_float32():
    from checkpoint.graph import as_float32

    data = mx.sym.var("data")
    weight = mx.sym.var("w", dtype="float16")
    half = mx.sym.FullyConnected(
        mx.sym.cast(data, dtype="float16"), weight, num_hidden=2, no_bias=True
    )
    symbol = as_float32(half)
    executor = symbol.simple_bind(mx.cpu(), "null", data=(1, 3))
    assert executor.arg_dict["w"].dtype == np.float32
    assert executor.forward()[0].dtype == np.float32
    assert as_float32(symbol) is None
