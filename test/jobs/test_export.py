"""export.py: every form against MXNet, and what reads it back."""

import json

import numpy as np
import pytest
from golden_weights import read_table, seeded

from checkpoint.graph import save
from checkpoint.safetensors_file import read_safetensors
from checkpoint.torch_file import read_torch_file
from glore_common import UsageError
from jobs import export
from jobs.model import FACTS, ModelFacts, open_model
from mxnet_compat import mx
from network.builder import get_symbol
from network.initializer import initial_params
from network.onnx_graph import OnnxError, OnnxNet
from network.pretrained import from_torch, load_pretrained

NAMES = ["up", "down", "left", "right", "near", "far", "in", "out"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Return the state dict of the golden figures, and a checkpoint of it in MXNet's form."""
    folder = tmp_path_factory.mktemp("released")
    state = {
        name: seeded(name, shape) for name, shape in read_table("torch_RESNET50_3D_GCN_X5.tsv")
    }
    symbol, conf = get_symbol("RESNET50_GLORE")
    inputs = {"data": (1, *conf.data_shape)}
    save(str(folder / "g50"), 0, symbol, *from_torch(state, symbol, inputs))
    return state, folder / "g50"


def test_a_pth_file_is_the_original_state_dict(released, tmp_path, golden):
    # The PyTorch network loads it strictly if names and shapes are those of its own state dict, and
    # computes the golden figures if the values are those that they were made with.
    state, prefix = released
    path = str(tmp_path / "g50.pth")
    export.main([str(prefix), path])
    found = read_torch_file(path)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in state.items()}
    assert all(np.array_equal(found[name], value) for name, value in state.items())
    # Our network, of that file, computes them as well.
    model = open_model(path)
    assert (model.facts.task, model.facts.network) == ("video", "RESNET50_GLORE")
    data = np.random.RandomState(100).standard_normal((1, 3, 8, 224, 224)).astype("float32")
    logits = model.block([mx.cpu()])(mx.nd.array(data)).asnumpy()
    expected = golden("torch_open.npz")["RESNET50_3D_GCN_X5"]
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture
def tiny(tmp_path):
    """Return the path of a small checkpoint as .safetensors with all its facts."""
    symbol, conf = get_symbol("TINY_GLORE", 8, block="gc@4:1")
    params = initial_params(symbol, {"data": (1, *conf.data_shape)}, seed=3)
    save(str(tmp_path / "tiny"), 0, symbol, *params)
    model = open_model(str(tmp_path / "tiny-0000.params"), network="TINY_GLORE",
                       overrides={"block": "gc@4:1"})  # fmt: skip
    facts = ModelFacts(
        **{**vars(model.facts), "class_names": NAMES, "mean": (0.1, 0.2, 0.3), "frame_interval": 2}
    )
    object.__setattr__(model, "facts", facts)
    path = str(tmp_path / "tiny.safetensors")
    export.write_safetensors(path, export.torch_arrays(model), model.metadata())
    return path, model


def test_safetensors_say_what_the_manifest_says(tiny, tmp_path):
    path, model = tiny
    arrays, metadata = read_safetensors(path)
    assert json.loads(metadata[FACTS]) == model.facts.as_dict()
    assert metadata["source"] == "tiny-0000.params"
    again = open_model(path)
    assert again.facts.as_dict() == model.facts.as_dict()
    assert "the metadata of tiny.safetensors" in again.origin
    other = str(tmp_path / "again.safetensors")
    export.main([path, other])
    assert read_safetensors(other)[1] == {**metadata, "format": "pt", "source": "tiny.safetensors"}
    # --pretrained reads either form.
    inputs = {"data": (1, *model.facts.data_shape)}
    export.main([path, str(tmp_path / "tiny.pth")])
    for name in ("tiny.safetensors", "tiny.pth"):
        args, auxs = load_pretrained(model.symbol, str(tmp_path / name), inputs)
        for params, own in ((args, model.arg_params), (auxs, model.aux_params)):
            assert all(np.array_equal(params[n], np.asarray(v)) for n, v in own.items())


def test_an_onnx_file_says_what_the_manifest_says(tiny, tmp_path):
    pytest.importorskip("onnxruntime")
    path, model = tiny
    target = str(tmp_path / "tiny.onnx")
    export.main([path, target])
    net = OnnxNet(target)
    assert json.loads(net.metadata[FACTS]) == model.facts.as_dict()
    assert net.metadata["source"] == "tiny.safetensors"
    assert net.data_shape == model.facts.data_shape
    export.main([path, target, "--crop-size", "96", "--clip-length", "4"])
    assert OnnxNet(target).data_shape == (3, 4, 96, 96)
    with pytest.raises(OnnxError, match="differ from MXNet's by"):
        export.main([path, target, "--tolerance", "1e-12"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "name a checkpoint and the file"),
        (["a"], "name a checkpoint and the file"),
        (["a", "b.bin"], r"b\.bin must end in \.onnx, \.pth or \.safetensors"),
    ],
)
def test_mistakes(words, text):
    with pytest.raises(UsageError, match=text):
        export.main(words)


def test_a_converted_video_network_is_no_image_network(released):
    # Its graph lies beside it, and says nothing of the number of frames.
    model = open_model(str(released[1]))
    assert (model.facts.task, model.facts.network) == ("video", "RESNET50_GLORE")
    assert model.facts.data_shape == (3, 8, 224, 224)
