"""extract_features.py: what the classifier reads, other nodes, resuming, neighbours."""

import json
import os

import numpy as np
import pytest
from served import write_checkpoint
from videos import write_picture_video

from glore_common import GloReError, UsageError
from jobs import extract_features, predict
from jobs.model import open_model

FIXED = ("--gpus", "", "--num-workers", "0")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of a small video network."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def clips(tmp_path):
    """Return the names of four videos in the working folder."""
    names = [f"v{number}.mp4" for number in range(4)]
    for number, name in enumerate(names):
        write_picture_video(str(tmp_path / name), 24, seed=number)
    return names


def run(*words, code=0):
    assert extract_features.main([*map(str, words), *FIXED]) == code


def test_the_classifier_of_the_features_gives_what_predict_says(checkpoint, clips):
    run(checkpoint, *clips, "--to", "all.npz")
    params = open_model(checkpoint).arg_params
    weight, bias = (np.asarray(params[f"classifier_{name}"]) for name in ("weight", "bias"))
    with np.load("all.npz") as content:
        assert content["files"].tolist() == clips
        logits = content["features"] @ weight.T + bias
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    assert predict.main([checkpoint, *clips, *FIXED, "--output", "p.jsonl", "--top-k", "8"]) == 0
    with open("p.jsonl") as stream:
        for line, row in zip(stream, scores):
            for found in json.loads(line)["top"]:
                assert found["score"] == pytest.approx(row[found["class"]], abs=2e-5)


def test_any_node_by_its_name(checkpoint, clips):
    run(checkpoint, *clips, "--to", "maps", "--output", "conv4_B01_sum")
    with np.load("maps/v0.npz") as content:
        assert content["features"].shape == (128, 4, 4, 4)
        assert str(content["node"]) == "conv4_B01_sum"
        assert str(content["source"]) == "v0.mp4"
    with pytest.raises(UsageError, match=r"no node conv4_B1_sum; near it: conv4_B01_sum"):
        run(checkpoint, *clips, "--to", "maps", "--output", "conv4_B1_sum")


@pytest.mark.parametrize("target", ["folder", "all.npz"])
def test_what_is_there_is_not_computed_again(target, checkpoint, clips, caplog, tmp_path):
    caplog.set_level("INFO")
    run(checkpoint, *clips[:2], "--to", target)
    run(checkpoint, *clips, "--to", target)
    assert "4 files, 2 of them are there" in caplog.text
    # Another node, another number of clips, other content: anew.
    write_picture_video(str(tmp_path / "v0.mp4"), 30, seed=9)
    caplog.clear()
    run(checkpoint, *clips, "--to", target)
    assert "4 files, 3 of them are there" in caplog.text
    caplog.clear()
    run(checkpoint, *clips, "--to", target, "--num-clips", 2)
    assert "4 files, 0 of them are there" in caplog.text
    if target == "folder":
        # What an interruption left is made again.
        (tmp_path / target / "v1.npz").write_bytes(b"PK half")
        caplog.clear()
        run(checkpoint, *clips, "--to", target, "--num-clips", 2)
        assert "4 files, 3 of them are there" in caplog.text
    assert not os.path.exists("all.npz.parts")


def test_several_workers_give_the_same(checkpoint, clips):
    run(checkpoint, *clips, "--to", "one.npz")
    words = [checkpoint, *clips, "--to", "two.npz", "--gpus", "", "--num-workers", "2"]
    assert extract_features.main(words) == 0
    with np.load("one.npz") as one, np.load("two.npz") as two:
        np.testing.assert_array_equal(one["features"], two["features"])


def test_neighbours(checkpoint, clips, capsys):
    for target in ("folder", "all.npz"):
        run(checkpoint, *clips, "--to", target)
        capsys.readouterr()
        run(checkpoint, "--to", target, "--query", "v2.mp4", "--nearest", 3)
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["rank"] for row in rows] == [1, 2, 3]
        assert (rows[0]["query"], rows[0]["file"]) == ("v2.mp4", "v2.mp4")
        assert rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
        similar = [row["similarity"] for row in rows]
        assert similar == sorted(similar, reverse=True)
        assert not os.path.exists(f"{target}.query")
    with pytest.raises(UsageError, match="name the --output that they are of"):
        run(checkpoint, "--to", "folder", "--query", "v2.mp4", "--output", "conv4_B01_sum")


def test_bad_files_and_names_that_are_equal(checkpoint, clips, tmp_path, caplog):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    os.mkdir("other")
    write_picture_video(str(tmp_path / "other" / "v0.mp4"), 24, seed=7)
    words = ("v0.mp4", "bad.mp4", "other/v0.mp4", "absent.mp4")
    run(checkpoint, *words, "--to", "folder", code=1)
    assert sorted(os.listdir("folder")) == ["v0-2.npz", "v0.npz"]
    assert "bad.mp4" in caplog.text
    assert "absent.mp4" in caplog.text
    run(checkpoint, *words, "--to", "all.npz", code=1)
    with np.load("all.npz") as content:
        assert content["files"].tolist() == ["v0.mp4", "other/v0.mp4"]


def test_mistakes(checkpoint, clips, tmp_path):
    with pytest.raises(UsageError, match="--to DIR"):
        run(checkpoint, *clips)
    with pytest.raises(UsageError, match="name the files"):
        run(checkpoint, "--to", "folder")
    os.mkdir("empty")
    with pytest.raises(GloReError, match="empty holds no features"):
        run(checkpoint, "--to", "empty", "--query", "v0.mp4")
