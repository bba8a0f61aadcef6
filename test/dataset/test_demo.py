"""dataset/demo.py: what the demo videos show, and that they are made once and completely."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

import dataset
from dataset import demo
from glore_common import GloReError, UsageError


def read_frames(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        readable, frame = capture.read()
        if not readable:
            return np.array(frames)
        frames.append(frame)


def read_list(path):
    with open(path) as stream:
        return [line.split() for line in stream]


def tree(folder):
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return dataset.prepare_demo(root, clips_per_class=3, val_clips_per_class=2, jobs=1)


def measured_motion(frames):
    """Fit p' = p + translation + [[grow, -turn], [turn, grow]] (p - centre) to the optical flow."""
    # The channel with most contrast: colours of equal brightness are a uniform grey.
    channel = frames[10].reshape(-1, 3).std(axis=0).argmax()
    previous, following = (np.ascontiguousarray(frames[i, :, :, channel]) for i in (10, 11))
    flow = cv2.calcOpticalFlowFarneback(previous, following, None, 0.5, 2, 21, 3, 7, 1.5, 0)
    y, x = np.mgrid[8 : demo.HEIGHT - 8 : 4, 8 : demo.WIDTH - 8 : 4]
    u, v = flow[y, x].reshape(-1, 2).T
    x, y = x.ravel() - demo.WIDTH / 2, y.ravel() - demo.HEIGHT / 2
    zero, one = np.zeros_like(x), np.ones_like(x)
    rows = np.concatenate([np.stack([one, zero, x, -y], 1), np.stack([zero, one, y, x], 1)])
    return np.linalg.lstsq(rows, np.concatenate([u, v]), rcond=None)[0]


@pytest.mark.parametrize("motion", demo.CLASSES)
def test_the_scene_moves_as_its_class_says(motion):
    for seed in range(4):
        right, down, grow, turn = measured_motion(demo.render_clip(motion, (7, seed)))
        pan = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
        kind, _, direction = motion.partition("_")
        if kind == "pan":
            along = right * pan[direction][0] + down * pan[direction][1]
            across = abs(right * pan[direction][1]) + abs(down * pan[direction][0])
            assert 0.9 * demo.PAN_PIXELS[0] < along < 1.1 * demo.PAN_PIXELS[1]
            assert across < 0.35 * along
            assert abs(grow) < 0.01
            assert abs(turn) < 0.01
        elif kind == "zoom":
            sign = 1 if direction == "in" else -1
            assert 0.018 < sign * grow < 0.042
            assert abs(turn) < 0.01
        else:
            # y points down: clockwise on the screen is a positive turn
            sign = 1 if direction == "clockwise" else -1
            assert np.radians(1.3) < sign * turn < np.radians(3.2)
            assert abs(grow) < 0.01


def test_a_clip_is_a_function_of_class_and_seed():
    first = demo.render_clip("zoom_in", (1, 0, 4, 2))
    assert first.shape == (24, 96, 128, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, demo.render_clip("zoom_in", (1, 0, 4, 2)))
    assert np.abs(first.astype(int) - demo.render_clip("zoom_in", (1, 1, 4, 2))).mean() > 10


def test_zooms_look_alike_at_every_moment():
    """Sharpness and contrast of first and last frames do not tell zooming in from zooming out."""
    sharpness = {}
    for motion in ("zoom_in", "zoom_out"):
        values = []
        for seed in range(40):
            frames = demo.render_clip(motion, (3, seed))[[0, -1]].astype(np.float32)
            grey = frames.mean(axis=3)
            values.append([np.log(np.diff(f, axis=1).std() / f.std()) for f in grey])
        sharpness[motion] = np.array(values)
    for moment in (0, 1):
        inwards, outwards = (sharpness[motion][:, moment] for motion in ("zoom_in", "zoom_out"))
        spread = np.sqrt((inwards.var() + outwards.var()) / 40)
        assert abs(inwards.mean() - outwards.mean()) < 4 * spread
    # and the 2.5-fold change of scale of a plain picture would show: log 1.6 to log 2.5
    for values in sharpness.values():
        assert abs((values[:, 0] - values[:, 1]).mean()) < 0.1


def test_layout_lists_and_videos(small):
    small.check()
    assert small.class_names() == list(demo.CLASSES)
    for part, number in (("train", 3), ("val", 2)):
        rows = read_list(getattr(small, f"{part}_list"))
        assert [int(row[0]) for row in rows] == list(range(8 * number))
        labels = [int(row[1]) for row in rows]
        assert np.bincount(labels).tolist() == [number] * 8
        assert labels != sorted(labels)
        for _, label, path in rows:
            assert path.split("/")[0] == demo.CLASSES[int(label)]
    rows = read_list(small.train_list)
    _, label, path = rows[0]
    frames = read_frames(os.path.join(small.train_root, path))
    assert frames.shape == (24, 96, 128, 3)
    index = int(path[-8:-4])
    drawn = demo.render_clip(demo.CLASSES[int(label)], (demo.SEED, 0, int(label), index))
    assert np.abs(frames.astype(int) - drawn).mean() < 8


def test_training_and_validation_differ(small):
    for motion in demo.CLASSES:
        path = f"{motion}/{motion}_0000.avi"
        train = read_frames(os.path.join(small.train_root, path)).astype(int)
        val = read_frames(os.path.join(small.val_root, path))
        assert np.abs(train - val).mean() > 10


def test_made_once_and_mended(small, tmp_path, monkeypatch):
    shutil.copytree(os.path.dirname(small.root), tmp_path, dirs_exist_ok=True)
    raw = tmp_path / "Demo" / "raw"
    stamp = tmp_path / "Demo" / "raw" / "stamp"

    def kept(**arguments):
        stamp.touch()
        dataset.prepare_demo(tmp_path, jobs=1, **arguments)
        return stamp.exists()

    ask = {"clips_per_class": 1, "val_clips_per_class": 1}
    assert kept()  # what is there stays when no number is asked for
    assert kept(clips_per_class=3, val_clips_per_class=2)
    assert not kept(**ask)
    assert kept(**ask)
    assert not kept(force=True, **ask)
    os.remove(raw / "data" / "val_avi-96p" / "zoom_in" / "zoom_in_0000.avi")
    assert not kept(**ask)
    with open(raw / "list_cvt" / "demo_train_avi.txt", "a") as stream:
        stream.write("x")
    assert not kept(**ask)
    (raw / "manifest.json").write_text("[]")
    assert not kept(**ask)
    monkeypatch.setattr(demo, "GENERATOR_VERSION", demo.GENERATOR_VERSION + 1)
    assert not kept(**ask)
    manifest = json.loads((raw / "manifest.json").read_text())
    assert manifest["generator"] == demo.GENERATOR_VERSION
    assert manifest["clips_per_class"] == {"train": 1, "val": 1}
    assert sorted(manifest["files"]) == [name for name in tree(raw) if name != "manifest.json"]
    assert sorted(os.listdir(tmp_path / "Demo")) == [".lock", "raw"]


def test_foreign_files_are_not_removed(tmp_path):
    mine = tmp_path / "Demo" / "raw" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(GloReError, match="was not made by this generator"):
        dataset.prepare_demo(tmp_path, clips_per_class=1, val_clips_per_class=1)
    assert mine.read_text() == "mine"


def test_bad_numbers_and_places(tmp_path):
    with pytest.raises(UsageError, match="number of clips per class must be 1 or more, not 0"):
        dataset.prepare_demo(tmp_path, clips_per_class=0)
    (tmp_path / "file").touch()
    with pytest.raises(GloReError, match="cannot write to"):
        dataset.prepare_demo(tmp_path / "file", clips_per_class=1)


def command(root, *arguments):
    return [sys.executable, "-m", "dataset.demo", "--root", str(root), *arguments]


def test_processes_at_once_and_any_number_of_them(small, root, tmp_path):
    """Two commands with two processes each: one makes the data, and they are those of one."""
    arguments = ["--clips-per-class", "3", "--val-clips-per-class", "2", "--jobs", "2"]
    running = [
        subprocess.Popen(
            command(tmp_path, *arguments),
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert sum("Making the demo data" in errors for _, errors in outputs) == 1
    assert all(f"Demo data: {tmp_path}/Demo/raw" in output for output, _ in outputs)
    expected = os.path.join(small.root, "raw")
    found = tmp_path / "Demo" / "raw"
    assert tree(found) == tree(expected)
    for name in tree(expected):
        with open(os.path.join(expected, name), "rb") as stream:
            assert (found / name).read_bytes() == stream.read(), name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(root, tmp_path, number):
    process = subprocess.Popen(
        command(tmp_path, "--clips-per-class", "2000", "--jobs", "2"),
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "Demo"
    deadline = time.monotonic() + 60
    while not any(name.endswith(".avi") for name in tree(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not (folder / "raw").exists()
    # The workers end with their parent.
    time.sleep(1)
    before = tree(folder)
    time.sleep(0.5)
    assert tree(folder) == before
    dataset.prepare_demo(tmp_path, clips_per_class=1, val_clips_per_class=1, jobs=1).check()
    assert sorted(os.listdir(folder)) == [".lock", "raw"]
