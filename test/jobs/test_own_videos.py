"""A data set of one's own, from folders of clips to a confusion matrix, by the scripts."""

import csv
import hashlib
import json
import os
import shutil
import sys

import pytest
from numbered import INPUTS, X264, make
from videos import run

from dataset import get_config, read_mapping_table

CLASSES = {"dark dog": -90, "grey cat": 0, "pale cow": 90}


def call(root, folder, *arguments):
    """Run a script or module of the checkout in ``folder``; return what it says."""
    environment = {**os.environ, "PYTHONPATH": root}
    done = run([sys.executable, *map(str, arguments)], cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(root, folder, name, *options):
    return call(
        *(root, folder, os.path.join(root, "train_kinetics.py"), "--dataset", name),
        *("--data-root", "data", "--network", "TINY_GLORE", "--gpus", "", *options),
    )


@pytest.fixture(scope="module")
def walk(root, tmp_path_factory):
    """Return (folder, what each step said) of three classes from preparation to test."""
    folder = tmp_path_factory.mktemp("own")
    for name, shade in CLASSES.items():
        (folder / "in" / name).mkdir(parents=True)
        for number in range(4):
            make(folder / "in" / name / f"{number}.mp4", 12, *X264, shade=shade + 3 * number)
    said = {}
    prepare = ("-m", "dataset.prepare_videos", "--videos", "in", "--dataset", "mine")
    said["prepare"] = call(root, folder, *prepare, "--data-root", "data")
    raw = folder / "data" / "mine" / "raw"
    verify = ("-m", "data.verify", raw / "list_cvt" / "train.txt", "--num-workers", 1)
    said["verify"] = call(root, folder, *verify, "--root", raw / "data" / "train", "--exact")
    os.remove(sorted((raw / "data" / "train" / "dark_dog").iterdir())[0])
    said["train"] = train(root, folder, "mine", "--num-workers", 1, "--end-epoch", 1)
    checkpoint = os.path.join("exps", "models", "mine_TINY_GLORE_ep")
    evaluate = os.path.join(root, "evaluate.py")
    said["evaluate"] = call(root, folder, evaluate, checkpoint, "--num-clips", 2, "--gpus", "")
    return folder, said


def test_the_walk_of_three_classes(walk):
    folder, said = walk
    assert "3 classes, 12 videos" in said["prepare"]
    assert "9 of 9 videos are good, 0 bad." in said["verify"]
    assert "mine: 8 videos to train, 3 to validate, 3 classes" in said["train"]
    assert "1 of 9 videos of" in said["train"]
    assert "64 x 64 pixels" in said["train"]
    assert (
        "Testing    3 videos of mine, 6 clips (2 of each), 6 crops (1 of each clip)"
        in (said["evaluate"])
    )
    assert "mean class accuracy" in said["evaluate"]
    stem = folder / "exps" / "results" / "mine_TINY_GLORE_ep-0001"
    with open(f"{stem}_per-class.csv") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [
            "dark_dog",
            "grey_cat",
            "pale_cow",
        ]
    with open(f"{stem}_confusion.csv") as stream:
        matrix = [[int(cell) for cell in row] for row in csv.reader(stream)]
    assert [sum(row) for row in matrix] == [1, 1, 1]
    with open(f"{stem}.json") as stream:
        content = json.load(stream)
    assert content["class_names"] == ["dark_dog", "grey_cat", "pale_cow"]
    assert (content["dataset"], content["num_clips"]) == ("mine", 2)
    assert os.path.getsize(f"{stem}_confusion.png") > 1000


def test_classes_that_are_not_the_checkpoints_are_refused_at_once(walk, root):
    folder, _ = walk
    config = get_config("mine", folder / "data")
    assert read_mapping_table(config.mapping_table) == ["dark_dog", "grey_cat", "pale_cow"]
    other = folder / "data" / "other" / "raw"
    shutil.copytree(folder / "data" / "mine" / "raw", other)
    (other / "list_cvt" / "mapping_table.txt").write_text("0\tgrey_cat\n1\tdark_dog\n2\tpale_cow\n")
    checkpoint = os.path.join("exps", "models", "mine_TINY_GLORE_ep")
    command = [sys.executable, os.path.join(root, "evaluate.py"), checkpoint, "--gpus", ""]
    done = run([*command, "--dataset", "other", "--data-root", "data"], cwd=folder)
    assert done.returncode == 2
    assert "class 0 is 'dark_dog' in" in done.stderr
    assert "'grey_cat' in" in done.stderr
    # Classes of the same name keep their rows, wherever they are now.
    said = train(
        *(root, folder, "other", "--num-workers", 0, "--max-steps", 1, "--batch-size", 2),
        *("--end-epoch", 2),
        *("--pretrained", checkpoint, "--class-balance", "weights", "--warmup-steps", 99),
        *("--lr-schedule", "step"),
    )
    assert "3 of 3 classes keep their part of the classifier, by their names" in said
    assert "the warm-up takes 99 steps, the run" in said


def test_a_name_in_another_encoding_loses_no_results(walk, root):
    folder, _ = walk
    raw = folder / "data" / "foreign" / "raw"
    shutil.copytree(folder / "data" / "mine" / "raw", raw)
    path = raw / "list_cvt" / "val.txt"
    rows = path.read_bytes().splitlines()
    name = rows[0].split(None, 2)[2]
    new = name.replace(b".", b"\xdf.")
    videos = os.fsencode(raw / "data" / "val")
    os.rename(os.path.join(videos, name), os.path.join(videos, new))
    path.write_bytes(b"\n".join([rows[0].replace(name, new), *rows[1:], b""]))
    checkpoint = os.path.join("exps", "models", "mine_TINY_GLORE_ep")
    evaluate = (os.path.join(root, "evaluate.py"), checkpoint, "--gpus", "", "--output", "foreign")
    said = call(root, folder, *evaluate, "--dataset", "foreign", "--data-root", "data")
    assert "Testing    3 videos of foreign" in said
    with open(folder / "foreign.json") as stream:
        assert json.load(stream)["count"] == 3
    written = [file for file in os.listdir(folder) if file.startswith("foreign")]
    texts = [(folder / file).read_bytes() for file in written]
    assert any(b"\\udcdf." in text for text in texts)


@pytest.mark.slow
def test_equal_runs_on_packed_b_frames_give_one_file(root, tmp_path):
    for name in ("packed", "packed_1gop"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(4):
            shutil.copy(
                os.path.join(INPUTS, f"{name}.avi"), tmp_path / "in" / name / f"{number}.avi"
            )
    prepare = ("-m", "dataset.prepare_videos", "--videos", "in", "--dataset", "packed", "--link")
    call(root, tmp_path, *prepare, "--data-root", "data")
    digests = set()
    for number in range(3):
        options = ("--num-workers", 1 + number, "--end-epoch", 2, "--task-name", f"run{number}")
        train(root, tmp_path, "packed", *options)
        params = tmp_path / "exps" / "models" / f"run{number}_ep-0002.params"
        digests.add(hashlib.sha256(params.read_bytes()).hexdigest())
    assert len(digests) == 1
