"""quantize.py: what it finds, what uses it, layers left in float32, mistakes."""

import json
import os

import cv2
import numpy as np
import pytest
from served import CLASSES, write_checkpoint
from videos import write_picture_video

from checkpoint.params import CheckpointError
from glore_common import GloReError, UsageError
from jobs import evaluate, predict, quantize
from jobs.model import int8_path, open_model, read_int8
from jobs.options import InferenceOptions
from mxnet_compat import mx
from network.quantization import Int8, joined, layers_of

FIXED = ("--num-workers", "0")
CPU = ("--gpus", "", *FIXED)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def videos(tmp_path):
    """Return a folder of eight videos."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(8):
        write_picture_video(str(folder / f"{number}.mp4"), 24, seed=number)
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tiny.safetensors")


def predicted(*words):
    assert predict.main([*map(str, words), *CPU, "--output", "out.jsonl"]) == 0
    with open("out.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def scores(row):
    return np.array([top["score"] for top in sorted(row["top"], key=lambda top: top["class"])])


def test_predict_uses_what_quantize_finds(checkpoint, videos):
    quantize.main([checkpoint, videos, "--samples", "3", "--agreement", "0", *FIXED])
    with open(int8_path(checkpoint), encoding="utf-8") as stream:
        content = json.load(stream)
    assert [content[name] for name in ("samples", "floats", "sensitivity")] == [3, [], None]
    assert content["test"]["samples"] == 5
    assert content["test"]["speed"] > 0
    plain = predicted(checkpoint, videos, "--top-k", 8)
    rounded = predicted(checkpoint, videos, "--top-k", 8, "--int8")
    for one, other in zip(plain, rounded):
        difference = np.abs(scores(one) - scores(other)).max()
        assert 0 < difference < 0.1
    # What is said of the test is what the five files get that the ranges were not found on: of
    # eight the first, fourth (third from 0, rounded down) and last.
    tested = [place for place in range(8) if place not in (0, 3, 7)]
    same = [plain[p]["top"][0]["class"] == rounded[p]["top"][0]["class"] for p in tested]
    assert content["test"]["agreement"] == np.mean(same)


def test_images(tmp_path):
    path = write_checkpoint(tmp_path / "image.safetensors", "resnet18_w-glore_1-1", CLASSES[:5],
                            size=64)  # fmt: skip
    generator = np.random.RandomState(0)
    for number in range(4):
        noise = generator.randint(0, 255, (9, 12, 3)).astype("uint8")
        cv2.imwrite(f"{number}.png", cv2.resize(noise, (96, 72)))
    quantize.main([path, "*.png", "--samples", "2", "--agreement", "0", *FIXED])
    names = [f"{number}.png" for number in range(4)]
    plain, rounded = (predicted(path, *names, *more) for more in ((), ("--int8",)))
    for one, other in zip(plain, rounded):
        assert 0 < np.abs(scores(one) - scores(other)).max() < 0.2
    # evaluate.py as well: the scores are those of predict.py.
    for label, name in enumerate(CLASSES[:5]):
        os.makedirs(f"classes/{name}")
        os.link(names[label % 4], f"classes/{name}/{label}.png")
    evaluate.main([path, "--folder", "classes", "--int8", "--output", "result", *CPU])
    with open("result.json", encoding="utf-8") as stream:
        found = json.load(stream)["predictions"]
    for row, other in zip(found, [*rounded, rounded[0]]):
        assert row["score"] == pytest.approx(other["top"][0]["score"], abs=1e-6)


def test_layers_that_do_harm_stay_in_float32(checkpoint, videos, monkeypatch):
    """A layer is made to do harm: what it reads is cut to a hundredth of its range."""
    right = quantize.calibrated

    def wrong(*arguments):
        ranges = dict(right(*arguments).ranges)
        ranges["data"] = (-1e-2, 1e-2)
        return Int8(ranges)

    monkeypatch.setattr(quantize, "calibrated", wrong)
    quantize.main([checkpoint, videos, "--samples", "4", "--agreement", "1", *FIXED])
    int8 = read_int8(checkpoint)
    assert int8.floats == ("conv1_conv",)
    with open(int8_path(checkpoint), encoding="utf-8") as stream:
        table = json.load(stream)["sensitivity"]
    model = open_model(checkpoint)
    names = list(layers_of(joined(model.fused([mx.cpu()]).optimized)))
    assert sorted(name for name, _ in table) == sorted(names)
    assert table[0][0] == "conv1_conv"
    assert table[0][1] > 0.5
    differences = [difference for _, difference in table]
    assert differences == sorted(differences, reverse=True)
    assert differences[1] < 0.1


def test_mistakes(checkpoint, videos, tmp_path):
    words = [checkpoint, videos, *CPU, "--output", "out.jsonl"]
    with pytest.raises(CheckpointError, match="no INT8 form.*quantize.py .* FILES"):
        predict.main([*words, "--int8"])
    with pytest.raises(UsageError, match="--int8 or --fused false, not both"):
        predict.main([*words, "--int8", "--fused", "false"])
    with pytest.raises(UsageError, match="--int8 or --backend onnx, not both"):
        predict.main([*words, "--int8", "--backend", "onnx"])
    with pytest.raises(UsageError, match="two files at least"):
        quantize.main([checkpoint, os.path.join(videos, "0.mp4"), *FIXED])
    with pytest.raises(UsageError, match="name a checkpoint"):
        quantize.main([])
    with pytest.raises(GloReError, match="none of the 1 videos can be read"):
        quantize.main([checkpoint, "absent.mp4", os.path.join(videos, "0.mp4"), *FIXED])
    with pytest.raises(GloReError, match="none of the files to compare on can be read"):
        quantize.main([checkpoint, os.path.join(videos, "0.mp4"), "absent.mp4", *FIXED])
    assert not os.path.exists(int8_path(checkpoint))
    quantize.main([checkpoint, videos, "--samples", "2", "--agreement", "0", *FIXED])
    path = int8_path(checkpoint)
    with open(path, encoding="utf-8") as stream:
        good = json.load(stream)
    ranges = dict(good["ranges"])
    name = sorted(ranges)[0]
    for change, message in (
        ({"weights": {"sha256": "0", "bytes": 1}}, "other weights"),
        ({"ranges": {**ranges, name: [0, float("inf")]}}, "not finite"),
        ({"ranges": {**ranges, name: [0]}}, "cannot be read"),
        ({"ranges": []}, "cannot be read"),
        ({"ranges": {}}, "no ranges for"),
        ({"floats": ["conv9"]}, "no layers conv9"),
        ({"floats": 3}, "cannot be read"),
    ):
        with open(path, "w", encoding="utf-8") as stream:
            json.dump({**good, **change}, stream)
        with pytest.raises(CheckpointError, match=message):
            predict.main([*words, "--int8"])
    for text in ("{", "[]", "3", ""):
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        with pytest.raises(CheckpointError, match="cannot be read.*make it anew"):
            predict.main([*words, "--int8"])
    assert not os.path.exists("out.jsonl") or not os.path.getsize("out.jsonl")


def test_networks_that_do_not_classify_are_refused():
    for options in (InferenceOptions(int8=True), InferenceOptions(backend="onnx")):
        for task in ("segmentation", "detection"):
            with pytest.raises(UsageError, match=f"for networks that classify.*{task}"):
                options.engine(task)
    assert InferenceOptions().engine("detection") == "plain"
