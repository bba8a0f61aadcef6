"""get_model and list_models, with a loopback server in place of the published addresses."""

import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from served import CLASSES, write_checkpoint

from checkpoint import released
from checkpoint.graph import save
from checkpoint.released import DownloadError
from glore_common import UsageError
from jobs.zoo import get_model, list_models
from mxnet_compat import mx
from network.builder import get_symbol
from network.initializer import initial_params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of a small video network."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def test_names():
    assert list_models("tiny*") == ["TINY_GLORE", "TINY_3D"]
    assert "resnet50_w-glore_2-3" in list_models("*GloRe*", pretrained=True)
    assert "resnet18" not in list_models(pretrained=True)
    assert len(list_models()) > 40
    assert list_models("none") == []


def test_a_network_knows_its_input_and_classes(checkpoint, tmp_path):
    net = get_model("tiny_glore", checkpoint)
    assert net.class_names == list(CLASSES)
    assert (net.facts.task, net.facts.frame_interval) == ("video", 2)
    frames = np.random.RandomState(0).randint(0, 256, (40, 80, 100, 3)).astype("uint8")
    batch = net.transform(frames)
    assert batch.shape == (1, 3, 8, 64, 64)
    # The middle clip, as in validation: of 15 frames' length, from frame 13 on.
    clip = frames[13:28:2]
    np.testing.assert_array_equal(net.transform(clip).asnumpy(), batch.asnumpy())
    logits = net(batch)
    assert logits.shape == (1, 8)
    net.export(str(tmp_path / "net"), 4)
    with pytest.warns(UserWarning, match="Cannot decide type"):
        again = mx.gluon.SymbolBlock.imports(
            str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0004.params")
        )
    np.testing.assert_allclose(again(batch).asnumpy(), logits.asnumpy(), rtol=1e-5)
    for wrong in (frames[0], frames.astype("float32"), frames[..., :2]):
        with pytest.raises(UsageError, match=r"expected \(frames, height, width, 3\) uint8"):
            net.transform(wrong)


def test_a_frozen_backbone_and_features_of_a_stage(checkpoint):
    net = get_model("TINY_GLORE", checkpoint, classes=3, frozen=True)
    assert net.class_names is None
    trained = [p.name for p in net.collect_params().values() if p.grad_req != "null"]
    assert trained == ["classifier_weight", "classifier_bias"]
    data = mx.nd.random.normal(shape=(2, 3, 8, 64, 64))
    assert net(data).shape == (2, 3)
    with mx.autograd.record():
        loss = net(data).sum()
    loss.backward()
    stage = get_model("TINY_GLORE", checkpoint, output="conv4_B01_sum")
    assert stage(data).shape == (2, 128, 4, 4, 4)
    pooled = get_model("TINY_GLORE", checkpoint, output="flatten")
    full = get_model("TINY_GLORE", checkpoint)
    weight, bias = (full.collect_params()[f"classifier_{n}"].data() for n in ("weight", "bias"))
    made = mx.nd.dot(pooled(data), weight.T) + bias
    np.testing.assert_allclose(made.asnumpy(), full(data).asnumpy(), rtol=1e-4, atol=1e-5)


def test_an_image_network():
    net = get_model("resnet18", classes=4, crop_size=64)
    assert net.transform(np.zeros((70, 90, 3), "uint8")).shape == (1, 3, 64, 64)
    black = net.transform(np.zeros((70, 90, 3), "uint8"))[0, :, 0, 0].asnumpy()
    np.testing.assert_allclose(
        black, [-m / s for m, s in zip(net.facts.mean, net.facts.std)], rtol=1e-5
    )


def test_other_sizes_than_the_checkpoints(checkpoint):
    net = get_model("TINY_GLORE", checkpoint, crop_size=96, clip_length=4)
    assert net.facts.data_shape == (3, 4, 96, 96)
    assert net(net.transform(np.zeros((4, 120, 110, 3), "uint8"))).shape == (1, 8)


# --- published weights ----------------------------------------------------------------------------

NAME = "resnet50_w-glore_2-3"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Serve a tar of a released network's form at loopback; return the requests made."""
    symbol, conf = get_symbol(NAME, 5, fixed_pool=True)
    save(str(tmp_path / "made" / NAME), 0, symbol,
         *initial_params(symbol, {"data": (1, *conf.data_shape)}, seed=1))  # fmt: skip
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(str(tmp_path / "made"), NAME)
    content, asked = stream.getvalue(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(released, "URL_PREFIX", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("GLORE_HOME", str(tmp_path / "home"))
    yield asked
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_published_weights_come_once_and_are_checked(published, tmp_path):
    net = get_model(NAME, pretrained=True, classes=5)
    assert published == [f"/{NAME}.tar"]
    again = get_model(NAME, pretrained=True)
    assert len(published) == 1
    assert again.facts.num_classes == 1000
    own, other = (n.collect_params()["conv1_conv_weight"].data() for n in (net, again))
    np.testing.assert_array_equal(own.asnumpy(), other.asnumpy())
    tar = tmp_path / "home" / "released" / f"{NAME}.tar"
    tar.write_bytes(tar.read_bytes()[:-10] + b"0123456789")
    with pytest.raises(DownloadError, match="has changed since it was first used"):
        get_model(NAME, pretrained=True)


def test_without_a_network_the_message_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "URL_PREFIX", "http://127.0.0.1:9/")
    monkeypatch.setenv("GLORE_HOME", str(tmp_path))
    with pytest.raises(DownloadError, match=rf"download that file and copy it to {tmp_path}"):
        get_model(NAME, pretrained=True)
    with pytest.raises(UsageError, match="no weights of resnet18 are published"):
        get_model("resnet18", pretrained=True)
    with pytest.raises(UsageError, match="Did you mean resnet50"):
        get_model("resnet5O")
