"""Folders with every kind of bad file: training, resuming, testing, and what is said of them."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from image_runs import NETWORK, add_tiny_network
from images import picture, write_image

from checkpoint.manifest import read_manifest
from glore_common import GloReError, run_main
from jobs import evaluate, train_imagenet

INPUTS = os.path.join(os.path.dirname(__file__), "..", "inputs", "images")
LATIN = os.fsdecode(b"Stra\xdfe")
# What no decoder reads, and what a transform cannot do.
BAD = ("corrupt_header.webp", "oversized_60000x60000.png", "page.jpg", "empty.png", "thread.png")
GOOD = ("exif6.webp", "really_gif.jpg", "xmp6.jpg", "banner_640x4.png", "deep/er/x.tif")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    add_tiny_network(monkeypatch)
    monkeypatch.setattr("train.report.plot_history", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def make(root, names, images=6):
    for label, name in enumerate(names):
        for number in range(images):
            path = os.path.join(str(root), name, f"{number}.jpg")
            write_image(path, picture(10 * label + number))


def spoil(folder):
    """Put all given files, and one more of each kind, into a class folder."""
    for name in os.listdir(INPUTS):
        shutil.copy(os.path.join(INPUTS, name), folder)
    write_image(os.path.join(folder, "deep", "er", "x.tif"), picture(1))
    write_image(os.path.join(folder, "thread.png"), np.zeros((1, 30000, 3), np.uint8))
    with open(os.path.join(folder, "page.jpg"), "w") as stream:
        stream.write("<html>404</html>")
    open(os.path.join(folder, "empty.png"), "w").close()
    os.makedirs(os.path.join(folder, "folder.jpg"))
    shutil.copy(os.path.join(folder, "0.jpg"), os.path.join(folder, "new\nline.jpg"))


def train(*options):
    fixed = ("--network", NETWORK, "--folder", "data", "--gpus", "", "--batch-size", "4")
    more = ("--num-workers", "1", "--max-pixels", "2000000", "--model-prefix", "models/job")
    return run_main(train_imagenet.main, [*fixed, *more, *options])


def test_all_kinds_of_bad_files_at_once(tmp_path, capfd):
    for part in ("train", "val"):
        make(tmp_path / "data" / part, ("a", LATIN))
        spoil(str(tmp_path / "data" / part / "a"))
    assert train("--num-epochs", "2") == 0
    output = capfd.readouterr().err
    assert "Traceback" not in output
    for part, consequence in (("train", "another one is used"), ("val", "it is left out")):
        said = re.findall(rf"image {tmp_path}/data/{part}/(\S+?): .*; {consequence}", output)
        assert len(said) == len(set(said))
        assert part == "train" or set(said) == {f"a/{name}" for name in BAD}
        assert set(said) <= {f"a/{name}" for name in BAD}
    (path,) = [str(p) for p in tmp_path.rglob("*_bad-files.tsv")]
    with open(path) as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    assert all(len(row) == 3 for row in rows)
    assert read_manifest("models/job_ep-0002").model["class_names"] == sorted([LATIN, "a"])

    for crops in ("centre", "ten", "full"):
        tested = ["models/job_ep", "--folder", "data/val", "--gpus", "", "--num-workers", "0"]
        tested += ["--crops", crops, "--output", f"out/{crops}", "--max-pixels", "2000000"]
        assert run_main(evaluate.main, tested) == 0
        output = capfd.readouterr().err
        assert "Traceback" not in output
        with open(f"out/{crops}.json") as stream:
            result = json.load(stream)
        found = {os.path.relpath(row["image"], "data/val") for row in result["predictions"]}
        good = {f"a/{name}" for name in (*GOOD, "new\nline.jpg")}
        good |= {f"{name}/{n}.jpg" for name in ("a", LATIN) for n in range(6)}
        assert found == good
        assert all(os.path.exists(row["image"]) for row in result["predictions"])
        with open(f"out/{crops}_bad-files.tsv") as stream:
            bad = {os.path.basename(line.split("\t")[0]) for line in stream}
        assert bad == set(BAD)
        with open(f"out/{crops}_per-class.csv", encoding="utf-8") as stream:
            assert "Stra\\udcdfe" in stream.read()


def test_a_last_batch_without_a_readable_image(tmp_path, capfd):
    make(tmp_path / "data" / "train", ("a", "b"), 4)
    make(tmp_path / "data" / "val", ("a", "b"), 4)
    (tmp_path / "data" / "val" / "b" / "zz.jpg").write_text("<html>404</html>")
    assert train("--num-epochs", "1") == 0
    assert train("--num-epochs", "2", "--resume", "auto") == 0
    assert "Traceback" not in capfd.readouterr().err
    history = read_manifest("models/job_ep-0002").position.history
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(row["val_top1"] is not None for row in history)


def test_classes_are_those_of_the_checkpoint(tmp_path, capfd):
    for part in ("train", "val"):
        make(tmp_path / "data" / part, ("a", "b", "c"), 2)
    assert train("--num-epochs", "1") == 0
    make(tmp_path / "part", ("a", "c"), 2)
    tested = ["models/job_ep", "--folder", "part", "--gpus", "", "--num-workers", "0"]
    assert run_main(evaluate.main, [*tested, "--output", "out"]) == 0
    with open("out.json") as stream:
        result = json.load(stream)
    assert [row["label"] for row in result["predictions"]] == [0, 0, 2, 2]
    assert result["class_names"] == ["a", "b", "c"]
    assert "has no folder for 1 classes: b" in capfd.readouterr().err
    make(tmp_path / "part", ("d", "e"), 1)
    assert run_main(evaluate.main, [*tested, "--output", "out"]) == 1
    assert "2 such in all: d, e. Rename or remove them." in capfd.readouterr().err


def test_a_flat_validation_folder_with_its_labels(tmp_path, capfd):
    make(tmp_path / "data" / "train", ("n01", "n02"), 4)
    names = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        write_image(str(tmp_path / "data" / "val" / name), picture(number))
    assert train("--num-epochs", "1") == 1
    assert "has 3 images but no class folders" in capfd.readouterr().err
    (tmp_path / "data" / "val.txt").write_text(
        "".join(f"{n} {i % 2}\n" for i, n in enumerate(names))
    )
    assert train("--num-epochs", "1") == 0
    tested = ["models/job_ep", "--folder", "data/val", "--gpus", "", "--num-workers", "0"]
    assert run_main(evaluate.main, [*tested, "--output", "out"]) == 0
    with open("out.json") as stream:
        assert [row["label"] for row in json.load(stream)["predictions"]] == [0, 1, 0]
    (tmp_path / "mine.txt").write_text("".join(f"{n} n02\n" for n in names))
    assert run_main(evaluate.main, [*tested, "--output", "out", "--labels", "mine.txt"]) == 0
    with open("out.json") as stream:
        assert [row["label"] for row in json.load(stream)["predictions"]] == [1, 1, 1]


def test_all_that_is_bad_is_an_error(tmp_path):
    for part in ("train", "val"):
        make(tmp_path / "data" / part, ("a", "b"), 4)
    assert train("--num-epochs", "1") == 0
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "x.jpg").write_text("no image")
    with pytest.raises(GloReError, match="2 distinct images in a row could not be read"):
        evaluate.main(["models/job_ep", "--folder", "val", "--gpus", "", "--output", "out"])
