"""predict.py: the same scores as evaluate.py, windows, files of all kinds, mistakes."""

import csv
import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image
from served import CLASSES, write_checkpoint
from videos import write_list, write_picture_video

from dataset import get_config
from glore_common import UsageError
from jobs import evaluate, predict
from jobs.media import FileOptions, find_files
from jobs.predict import clock, subtitles

NAMES = [f"class {number}" for number in range(400)]
FIXED = ("--gpus", "", "--num-workers", "0")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of a small video network with 8 classes."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def of_images(tmp_path_factory):
    """Return a checkpoint of an image network with 5 classes for 64 x 64 pixels."""
    path = tmp_path_factory.mktemp("weights") / "image.safetensors"
    return write_checkpoint(path, "resnet18_w-glore_1-1", CLASSES[:5], size=64)


def run(*words, code=0):
    """Predict; return the lines as dictionaries."""
    assert predict.main([*map(str, words), *FIXED, "--output", "out.jsonl"]) == code
    with open("out.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def scores(row):
    return {found["class"]: found["score"] for found in row["top"]}


# --- the same as evaluate.py ----------------------------------------------------------------------


@pytest.mark.parametrize("views", [(), ("--num-clips", "3", "--num-crops", "3")])
def test_a_video_has_the_scores_of_evaluate(views, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "k400.safetensors", classes=NAMES)
    config = get_config("Kinetics", str(tmp_path))
    os.makedirs(config.val_root)
    os.makedirs(os.path.dirname(config.val_list))
    names = [f"v{number}.mp4" for number in range(5)]
    # One of them is shorter than a clip: its frames are repeated.
    for number, name in enumerate(names):
        write_picture_video(
            os.path.join(config.val_root, name), 3 if number == 2 else 40, seed=number
        )
    write_list(os.path.dirname(config.val_list), names, name=os.path.basename(config.val_list))
    for backend in ("mxnet", "onnx"):
        if backend == "onnx":
            pytest.importorskip("onnxruntime")
        with_it = (*FIXED, "--backend", backend, *views)
        evaluate.main([checkpoint, "--dataset", "Kinetics", "--data-root", str(tmp_path), *with_it,
                       "--output", "result"])  # fmt: skip
        with open("result.json") as stream:
            expected = json.load(stream)["predictions"]
        rows = run(checkpoint, config.val_root, "--top-k", 5, "--backend", backend, *views)
        assert [os.path.basename(row["file"]) for row in rows] == names
        for row, other in zip(rows, expected):
            assert row["views"] == other["views"] == (9 if views else 1)
            assert row["top"][0]["score"] == pytest.approx(other["score"], abs=2e-6)
            assert [found["class"] for found in row["top"]] == other["top5"]
            assert row["top"][0]["name"] == NAMES[other["prediction"]]


def test_batches_of_any_size_give_the_same(checkpoint, tmp_path):
    for number in range(5):
        write_picture_video(str(tmp_path / f"{number}.mp4"), 24, seed=number)
    one, four, eight = (
        run(checkpoint, tmp_path, "--batch-size", size, "--top-k", 8) for size in (1, 4, 8)
    )
    assert len(one) == len(four) == len(eight) == 5
    for rows in zip(one, four, eight):
        for row in rows[1:]:
            assert scores(row) == pytest.approx(scores(rows[0]), abs=2e-6)


# --- windows --------------------------------------------------------------------------------------


def test_windows_of_a_video(checkpoint, tmp_path):
    write_picture_video(str(tmp_path / "a.mp4"), 60, seed=1)
    words = ("--timeline", "pictures", "--subtitles", "titles", "--top-k", 8)
    rows = run(checkpoint, "a.mp4", "--stride", 0.4, *words)
    windows, whole = rows[:-1], rows[-1]
    # 15 frames of 25 a second each; the last one begins with frame 45 or before.
    assert [row["start"] for row in windows] == [0.0, 0.4, 0.8, 1.2, 1.6]
    assert [row["end"] for row in windows] == [0.6, 1.0, 1.4, 1.8, 2.2]
    assert whole["windows"] == 5
    mean = {c: np.mean([scores(row)[c] for row in windows]) for c in range(8)}
    assert scores(whole) == pytest.approx(mean, abs=2e-6)
    assert len({row["top"][0]["score"] for row in windows}) > 1
    picture = cv2.imread("pictures/a.png")
    assert picture.shape[0] > 200
    assert np.ptp(picture) > 100
    with open("titles/a.srt") as stream:
        text = stream.read()
    assert text.startswith("1\n00:00:00,000 --> 00:00:0")
    assert text.rstrip().splitlines()[-2].endswith("--> 00:00:02,200")
    # Without a stride the windows follow each other.
    rows = run(checkpoint, "a.mp4", "--subtitles", "titles")
    assert [row["start"] for row in rows[:-1]] == [0.0, 0.6, 1.2, 1.8]
    # The middle clip is one of the windows.
    middle = run(checkpoint, "a.mp4", "--top-k", 8)[0]
    rows = run(checkpoint, "a.mp4", "--stride", 0.04, "--top-k", 8)
    assert any(scores(row) == pytest.approx(scores(middle), abs=2e-6) for row in rows[:-1])


def test_a_video_shorter_than_a_window(checkpoint, tmp_path):
    write_picture_video(str(tmp_path / "short.mp4"), 3)
    window, whole = run(checkpoint, "short.mp4", "--stride", 1, "--top-k", 8)
    assert (window["start"], window["end"]) == (0.0, 0.12)
    assert scores(window) == scores(whole)
    assert scores(run(checkpoint, "short.mp4", "--top-k", 8)[0]) == pytest.approx(
        scores(whole), abs=2e-6
    )


def test_two_actions_are_two_titles():
    def window(start, end, number, score):
        name = ("walk", "run")[number]
        return {
            "start": start,
            "end": end,
            "top": [{"class": number, "name": name, "score": score}],
        }

    rows = [window(0, 2, 0, 0.8), window(1, 3, 0, 0.6), window(2, 4, 1, 0.9)]
    assert subtitles(rows) == (
        "1\n00:00:00,000 --> 00:00:02,000\nwalk  70%\n\n"
        "2\n00:00:02,000 --> 00:00:04,000\nrun  90%\n"
    )
    assert clock(3725.0625) == "01:02:05,062"


# --- images ---------------------------------------------------------------------------------------


def test_images_of_every_kind_are_read_or_refused_by_name(of_images, tmp_path):
    picture = np.zeros((80, 100, 3), np.uint8)
    picture[:40, :, 0], picture[40:, :, 2] = 200, 255
    colour = Image.fromarray(picture)
    colour.save("rgb.png")
    colour.convert("L").save("grey.png")
    colour.convert("RGBA").save("rgba.png")
    colour.quantize(16).save("palette.png")
    colour.convert("CMYK").save("cmyk.jpg")
    Image.fromarray((np.arange(8000).reshape(80, 100) * 8).astype("uint16")).save("deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:60])
    names = ["rgb.png", "grey.png", "rgba.png", "palette.png", "cmyk.jpg", "deep.png", "turned.png"]
    rows = run(of_images, *names, "cut.png", "--top-k", 5, code=1)
    *good, bad = rows
    assert [row["file"] for row in good] == names
    assert bad["file"] == "cut.png"
    assert bad["error"]
    for name in ("rgba.png", "palette.png", "turned.png"):
        row = next(row for row in good if row["file"] == name)
        assert scores(row) == pytest.approx(scores(good[0]), abs=1e-3), name


def test_colours_are_not_swapped(of_images, tmp_path):
    # The same red, written by a library that takes BGR and by one that takes RGB.
    cv2.imwrite("cv2.png", np.full((70, 70, 3), (0, 0, 255), np.uint8))
    Image.new("RGB", (70, 70), (255, 0, 0)).save("pil.png")
    cv2.imwrite("blue.png", np.full((70, 70, 3), (255, 0, 0), np.uint8))
    first, second, blue = run(of_images, "cv2.png", "pil.png", "blue.png", "--top-k", 5)
    assert scores(first) == scores(second)
    assert scores(blue) != pytest.approx(scores(first), abs=1e-3)


def test_ten_crops_and_whole_images(of_images, tmp_path):
    for number in range(3):
        noise = np.random.RandomState(number).randint(0, 256, (80 + 9 * number, 100, 3))
        cv2.imwrite(f"{number}.png", noise.astype("uint8"))
    ten = run(of_images, "*.png", "--crops", "ten")
    assert [row["views"] for row in ten] == [10] * 3
    full = run(of_images, "*.png", "--crops", "full")
    assert [row["file"] for row in full] == ["0.png", "1.png", "2.png"]


# --- files and mistakes ---------------------------------------------------------------------------


def test_which_files_are_found(tmp_path):
    for name in ("b.mp4", "a/c.AVI", "a/b/d.webm", "a/.hidden.mp4", "a/x.txt", "a/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("# remark\nb.mp4\n\nv1 3 a/c.AVI\nsome name.mp4\n")

    def found(*inputs, task="video", **more):
        return find_files(FileOptions(inputs=inputs, **more), task)

    assert found("a") == ["a/c.AVI", "a/b/d.webm"]
    assert found("a", task="image") == ["a/y.jpg"]
    assert found("**/*.mp4") == ["b.mp4"]
    assert found("absent.mp4", "b.mp4") == ["absent.mp4", "b.mp4"]
    assert found(list="list.txt") == ["b.mp4", "a/c.AVI", "some name.mp4"]
    assert found(list="list.txt", list_root="r")[0] == "r/b.mp4"
    with pytest.raises(UsageError, match="no videos"):
        found("a/*.txt")
    with pytest.raises(UsageError, match="name the videos"):
        found()
    (tmp_path / "[1].mp4").write_bytes(b"x")
    assert found("[1].mp4") == ["[1].mp4"]


def test_bad_files_are_named_and_the_others_predicted(checkpoint, tmp_path, caplog):
    write_picture_video(str(tmp_path / "good.mp4"), 24)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (70, 70)).save("image.png")
    words = ("bad.mp4", "good.mp4", "absent.mp4", "image.png", "empty.mp4")
    rows = run(checkpoint, *words, code=1)
    assert [row["file"] for row in rows if "top" in row] == ["good.mp4"]
    errors = {row["file"]: row["error"] for row in rows if "error" in row}
    assert sorted(errors) == ["absent.mp4", "bad.mp4", "empty.mp4", "image.png"]
    assert errors["image.png"] == "it is an image, and this network reads videos"
    assert "No such file" in errors["absent.mp4"]
    assert "bad.mp4" in caplog.text
    # Windows, and nothing but bad files.
    rows = run(checkpoint, *words, "--stride", 1, code=1)
    assert {row["file"] for row in rows if "error" in row} == set(errors)
    assert [row["file"] for row in run(checkpoint, "bad.mp4", code=1)] == ["bad.mp4"]
    assert [row["file"] for row in run(checkpoint, "bad.mp4", "--stride", 1, code=1)] == ["bad.mp4"]


def test_csv_and_options_between_the_words(checkpoint, tmp_path, capsys):
    for name in ("a.mp4", "b, c.mp4"):
        write_picture_video(str(tmp_path / name), 24)
    words = [checkpoint, "a.mp4", "--top-k", "2", "b, c.mp4", "--format", "csv", *FIXED]
    assert predict.main(words) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["file"], row["rank"]) for row in rows] == [
        (name, rank) for name in ("a.mp4", "b, c.mp4") for rank in "12"
    ]
    assert {row["name"] for row in rows} <= set(CLASSES)
    assert predict.main([*words[:-6], *FIXED, "--output", "o.csv"]) == 0
    with open("o.csv") as stream:
        assert stream.readline() == "file,start,end,rank,class,name,score\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("a.mp4", "--crops", "ten"), "--crops ten is not for videos"),
        (("--top-k", "3"), "name the videos"),
        (("a.mp4", "--class-names", "four.txt"), "four.txt names 4 classes, the network has 8"),
        (("a.mp4", "--class-names", "none.txt"), "none.txt cannot be read"),
        (("--list", "none.txt"), "none.txt cannot be read"),
    ],
)
def test_mistakes(words, text, checkpoint, tmp_path):
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(UsageError, match=text):
        predict.main([checkpoint, *words, *FIXED])


def test_mistakes_with_images(of_images):
    for words in (("--stride", "1"), ("--timeline", "d")):
        with pytest.raises(UsageError, match="are for videos"):
            predict.main([of_images, "a.png", *words])
    with pytest.raises(UsageError, match="name a checkpoint"):
        predict.main([])
