"""dataset/prepare_videos.py on real videos: what is encoded, listed, skipped, reported, stopped."""

import filecmp
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numbered
import numpy as np
import pytest
from numbered import INPUTS

from data.video.list import read_video_list
from dataset import get_config, prepare_videos, read_mapping_table, video_plans
from glore_common import GloReError, Locked, UsageError, file_lock, run_main


@pytest.fixture(scope="session")
def ffmpeg():
    return prepare_videos.find_ffmpeg()


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """Return {(width, height): path} of one-second videos, brighter from left to right."""
    folder = tmp_path_factory.mktemp("samples")
    paths = {}
    for width, height in ((640, 360), (360, 640), (101, 67), (854, 480)):
        path = str(folder / f"{width}x{height}.avi")
        # XVID pads odd sizes; MJPG keeps them, so that the odd case is an odd case.
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (width, height))
        ramp = np.tile(np.linspace(0, 200, width, dtype=np.uint8), (height, 1))
        for number in range(10):
            writer.write(cv2.merge([ramp + 5 * number] * 3))
        writer.release()
        paths[width, height] = path
    return paths


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        readable, frame = capture.read()
        if not readable:
            return np.array(frames)
        frames.append(frame)


def rows_of(path):
    with open(path, encoding="utf-8") as stream:
        rows = [line.rstrip("\n").split(" ", 2) for line in stream]
    return {(int(label), sub_path) for _, label, sub_path in rows}


def put(sample, *parts):
    path = os.path.join(*map(str, parts))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copyfile(sample, path)
    return path


def prepare(data_root, *arguments):
    """Run the command line in this process; return its exit code."""
    return prepare_videos.main(["--data-root", str(data_root), "--jobs", "2", *map(str, arguments)])


def partials(folder):
    return [name for _, _, names in os.walk(folder) for name in names if "partial" in name]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((640, 360), 288, (512, 288)),
        ((360, 640), 288, (288, 512)),
        ((854, 480), 288, (512, 288)),
        ((101, 67), 288, (100, 66)),  # not enlarged, made even
        ((640, 360), 97, (170, 96)),
    ],
)
def test_encoding(samples, ffmpeg, tmp_path, size, short_side, expected):
    target = str(tmp_path / "out.avi")
    command = prepare_videos.ffmpeg_command(ffmpeg, samples[size], target, short_side, "512k")
    subprocess.run(command, check=True)
    capture = cv2.VideoCapture(target)
    codec = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
    assert codec == b"FMP4"  # FFmpeg's MPEG-4
    frames = read_video(target)
    assert frames.shape == (10, expected[1], expected[0], 3)
    ramp = np.linspace(0, 200, expected[0])[None, :, None]
    for number in (0, 9):
        assert np.abs(frames[number] - (ramp + 5 * number)).mean() < 4


def test_class_folders_with_awkward_names(samples, tmp_path, capsys):
    small, train, val = samples[101, 67], tmp_path / "train", tmp_path / "val"
    put(small, train, "air drumming", "a [1] (x) 100%d.avi")
    put(small, train, "abseiling", "-dash 'quote' \"q\".avi")
    put(small, train, "abseiling", "part 2", "żółw;&$HOME.avi")
    put(small, train, "abseiling", "ü" * 125 + ".avi")  # 254 bytes, the longest name there can be
    put(small, val, "air drumming", "b.avi")
    put(small, val, "stray.avi")
    (val / "air drumming" / ".hidden.avi").touch()
    (val / "air drumming" / "notes.txt").touch()
    out = tmp_path / "my data"
    arguments = ["--dataset", "kinetics", "--train-videos", train, "--val-videos", val]

    assert prepare(out, *arguments, "--dry-run") == 0
    assert "5 videos: 0 done, 5 to transcode" in capsys.readouterr().out
    assert not out.exists()

    assert prepare(out, *arguments) == 0
    config = get_config("Kinetics", out)
    config.check()
    assert read_mapping_table(config.mapping_table) == ["abseiling", "air_drumming"]
    assert rows_of(config.train_list) == {
        (1, "air_drumming/a [1] (x) 100%d.avi"),
        (0, "abseiling/-dash 'quote' \"q\".avi"),
        (0, "abseiling/part 2/żółw;&$HOME.avi"),
        (0, "abseiling/" + "ü" * 125 + ".avi"),
    }
    assert rows_of(config.val_list) == {(1, "air_drumming/b.avi")}
    for _, path in rows_of(config.train_list):
        assert read_video(os.path.join(config.train_root, path)).shape == (10, 66, 100, 3)
    assert not partials(out)


def test_resumes_and_reports_failures(samples, tmp_path, capsys):
    videos = tmp_path / "videos"
    for name in ("a", "b", "c"):
        put(samples[101, 67], videos, "one", f"{name}.avi")
        put(samples[101, 67], videos, "two", f"{name}.avi")
    with open(videos / "one" / "b.avi", "wb") as stream:
        stream.write(random.Random(0).randbytes(20000))
    (videos / "two" / "empty.mp4").touch()
    out = tmp_path / "out"
    arguments = ["--dataset", "Kinetics", "--videos", videos, "--val-fraction", "0.3"]
    with pytest.raises(GloReError, match="2 videos failed; .*prepare_report.txt names them"):
        prepare(out, *arguments)
    config = get_config("Kinetics", out)
    report = os.path.join(config.root, "raw", "prepare_report.txt")
    with open(report) as stream:
        failed = [line.split("\t") for line in stream]
    assert [row[:2] for row in failed] == [
        ["failed", str(videos / "one" / "b.avi")],
        ["failed", str(videos / "two" / "empty.mp4")],
    ]
    assert all(row[2].startswith("FFmpeg: ") for row in failed)
    assert not partials(out)
    train, val = rows_of(config.train_list), rows_of(config.val_list)
    assert {path for _, path in train | val} == {
        *("one/a.avi", "one/c.avi", "two/a.avi", "two/b.avi", "two/c.avi")
    }
    done = {
        os.path.join(parent, name): os.stat(os.path.join(parent, name)).st_mtime_ns
        for parent, _, names in os.walk(os.path.join(config.root, "raw", "data"))
        for name in names
    }
    assert len(done) == 5

    # They are mended: the finished ones are skipped, and no video changes sides.
    put(samples[101, 67], videos, "one", "b.avi")
    put(samples[101, 67], videos, "two", "empty.mp4")
    capsys.readouterr()
    assert prepare(out, *arguments) == 0
    assert "7 videos: 5 done, 2 to transcode" in capsys.readouterr().out
    assert rows_of(config.train_list) > train
    assert rows_of(config.val_list) >= val
    for path, stamp in done.items():
        assert os.stat(path).st_mtime_ns == stamp
    with open(report) as stream:
        assert stream.read() == "All videos are there.\n"


def test_other_settings_are_not_mixed(samples, tmp_path):
    for part in ("train", "val"):
        put(samples[640, 360], tmp_path, part, "one", "a.avi")
    arguments = ["--dataset", "Kinetics"]
    arguments += ["--train-videos", tmp_path / "train", "--val-videos", tmp_path / "val"]
    out = tmp_path / "out"
    video = os.path.join(get_config("Kinetics", out).train_root, "one", "a.avi")
    assert prepare(out, *arguments) == 0
    with pytest.raises(UsageError, match="with short_side=288 bitrate=512k, this is short_side=64"):
        prepare(out, *arguments, "--short-side", "64")
    assert read_video(video).shape[1:] == (288, 512, 3)
    assert prepare(out, *arguments, "--short-side", "64", "--overwrite") == 0
    assert read_video(video).shape[1:] == (64, 114, 3)
    own = ["--dataset", "Kinetics", "--train-videos", get_config("Kinetics", out).train_root]
    own += ["--val-videos", tmp_path / "val", "--overwrite"]
    with pytest.raises(UsageError, match="where its transcoded version would go"):
        prepare(out, *own)


def test_an_interrupted_overwrite_leaves_one_encoding(samples, tmp_path, monkeypatch):
    for name in "abc":
        put(samples[640, 360], tmp_path, "videos", "one", f"{name}.avi")
    out = tmp_path / "out"
    arguments = ["--dataset", "Kinetics", "--videos", tmp_path / "videos", "--val-fraction", "0.5"]
    assert prepare(out, *arguments) == 0
    raw = os.path.join(get_config("Kinetics", out).root, "raw")

    def heights():
        found = [os.path.join(p, n) for p, _, names in os.walk(raw) for n in names]
        return sorted(read_video(path).shape[1] for path in found if path.endswith(".avi"))

    assert heights() == [288] * 3
    transcode, made = prepare_videos._Runner.transcode, []

    def interrupted(runner, job):
        if made:
            raise KeyboardInterrupt
        transcode(runner, job)
        made.append(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_videos._Runner, "transcode", interrupted)
        prepare(out, *arguments, "--short-side", "64", "--overwrite", "--jobs", "1")
    assert heights() == [64]
    with pytest.raises(UsageError, match="with short_side=64 "):
        prepare(out, *arguments)
    # Without --overwrite the same settings go on; with it, the same settings need no removal.
    assert prepare(out, *arguments, "--short-side", "64") == 0
    assert heights() == [64] * 3
    made.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_videos._Runner, "transcode", interrupted)
        prepare(out, *arguments, "--short-side", "64", "--overwrite", "--jobs", "1")
    assert heights() == [64] * 3


def test_a_video_that_another_would_replace_is_kept(samples, tmp_path):
    out = tmp_path / "out"
    config = get_config("Kinetics", out)
    for name in ("one/a.avi", "one/b.avi"):
        put(samples[101, 67], config.train_root, name)
    put(samples[640, 360], tmp_path, "val", "one", "a.avi")
    for link in ([], ["--link"]):
        arguments = ["--dataset", "Kinetics", *link, "--train-videos", tmp_path / "val"]
        with pytest.raises(UsageError, match="lies where .* another video"):
            prepare(out, *arguments, "--val-videos", config.train_root, "--overwrite")
    kept = os.path.join(config.train_root, "one", "a.avi")
    assert not os.path.islink(kept)
    assert filecmp.cmp(kept, samples[101, 67], shallow=False)


def test_validation_file_and_mapping_table(samples, tmp_path):
    videos = tmp_path / "videos"
    for name in ("swim/a.avi", "swim/b.avi", "run/c.avi", "run/d e.avi"):
        put(samples[101, 67], videos, name)
    (tmp_path / "val.txt").write_text("swim/b.avi\n\nrun/d e.avi\n")
    (tmp_path / "table.txt").write_text("0\tjump\n1\tswim\n2\trun\n")
    out = tmp_path / "out"
    arguments = ["--dataset", "Kinetics", "--videos", videos, "--link"]
    arguments += ["--val-file", tmp_path / "val.txt", "--mapping-table", tmp_path / "table.txt"]
    assert prepare(out, *arguments) == 0
    config = get_config("Kinetics", out)
    assert rows_of(config.train_list) == {(1, "swim/a.avi"), (2, "run/c.avi")}
    assert rows_of(config.val_list) == {(1, "swim/b.avi"), (2, "run/d e.avi")}
    link = os.path.join(config.val_root, "run", "d e.avi")
    assert os.path.realpath(link) == os.path.realpath(videos / "run" / "d e.avi")
    assert read_mapping_table(config.mapping_table) == ["jump", "swim", "run"]

    (tmp_path / "val.txt").write_text("swim/b.avi\nswim/x.avi\n")
    with pytest.raises(UsageError, match="val.txt, line 2: 'swim/x.avi' is no video in"):
        prepare(out, *arguments)
    (tmp_path / "val.txt").write_text("swim/b.avi\n")
    (tmp_path / "table.txt").write_text("0\tswim\n1\truns\n")
    with pytest.raises(UsageError, match="class 'run' is not in .*; nearest there: runs, swim"):
        prepare(out, *arguments)


def test_validation_fraction_is_drawn_per_class():
    drawn = video_plans.validation_fraction(0.25, seed=3)
    paths = [f"run/{number}.avi" for number in range(40)]
    chosen = drawn("run", paths)
    assert len(chosen) == 10
    assert chosen == drawn("run", paths[::-1])
    assert chosen != video_plans.validation_fraction(0.25, seed=4)("run", paths)
    assert chosen != set(paths[:10])
    # one more video: at most one that was drawn is drawn no longer
    assert len(chosen - drawn("run", [*paths, "run/new.avi"])) <= 1
    assert len(drawn("run", paths[:2])) == 1
    assert drawn("run", paths[:1]) == set()
    with pytest.raises(UsageError, match="between 0 and 1"):
        video_plans.validation_fraction(1.0, seed=3)


CSV_TEXT = """label,youtube_id,time_start,time_end,split,is_cc
air drumming,-abc_DEF123,3,5,train,0
"passing (in game)",xyz,10,20,train,0
air drumming,whole,0,1,validate,0
yoga,gone,7,17,val,0
,secret,1,11,test,0
"""


def test_kinetics_csv(samples, tmp_path, capsys):
    videos = tmp_path / "videos"
    small = samples[101, 67]
    (tmp_path / "k.csv").write_text(CSV_TEXT)
    put(small, videos, "train", "air drumming", "-abc_DEF123_000003_000005.mp4")
    put(small, videos, "elsewhere", "xyz.mp4")
    put(samples[640, 360], videos, "passing_(in_game)", "xyz.mp4")  # its class folder wins
    put(small, videos, "whole.webm")
    out = tmp_path / "out"
    arguments = ["--dataset", "Kinetics", "--csv", tmp_path / "k.csv", "--videos", videos]
    assert prepare(out, *arguments) == 0
    config = get_config("Kinetics", out)
    # the class of a video that has gone keeps its label
    assert read_mapping_table(config.mapping_table) == ["air_drumming", "passing_(in_game)", "yoga"]
    assert rows_of(config.train_list) == {
        (0, "air_drumming/-abc_DEF123_000003_000005.avi"),
        (1, "passing_(in_game)/xyz_000010_000020.avi"),
    }
    assert rows_of(config.val_list) == {(0, "air_drumming/whole_000000_000001.avi")}
    taken = os.path.join(config.train_root, "passing_(in_game)", "xyz_000010_000020.avi")
    assert read_video(taken).shape[1:] == (288, 512, 3)
    assert "1 videos of the annotation are missing" in capsys.readouterr().out
    with open(os.path.join(config.root, "raw", "prepare_report.txt")) as stream:
        assert stream.read() == "missing\tyoga/gone_000007_000017\n"


def test_whole_videos_are_cut(tmp_path):
    path = put(os.devnull, tmp_path, "videos", "whole.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for number in range(50):
        writer.write(np.full((64, 64, 3), 5 * number, np.uint8))
    writer.release()
    shutil.copyfile(path, tmp_path / "videos" / "clip_000002_000004.avi")
    lines = CSV_TEXT.splitlines()[:1] + ["a,whole,2,4,train,0", "a,whole,1,2,val,0"]
    lines.append("a,clip,2,4,train,0")
    (tmp_path / "k.csv").write_text("\n".join(lines))
    arguments = ["--dataset", "Kinetics", "--csv", tmp_path / "k.csv", "--trim"]
    assert prepare(tmp_path / "out", *arguments, "--videos", tmp_path / "videos") == 0
    root = get_config("Kinetics", tmp_path / "out").train_root
    frames = read_video(os.path.join(root, "a", "whole_000002_000004.avi"))
    assert len(frames) == 20
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(5 * np.arange(20, 40), abs=2)
    # named by its seconds: it has been cut by the downloader
    assert len(read_video(os.path.join(root, "a", "clip_000002_000004.avi"))) == 50


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("yoga,id,5,x,train,0", "line 2: time_start and time_end must be seconds"),
        ("yoga,id,5,5,train,0", "line 2: the clip from 5 s to 5 s is empty"),
        ("yoga,id,5,15,tran,0", "line 2: unknown split 'tran'"),
        (",id,5,15,train,0", "line 2: label or youtube_id is empty"),
        ("yoga", "line 2: unknown split None"),
        ("yoga,id,5,15,test,0", "no training or validation rows"),
        ("yoga,id,5,15,train,0", "none of the 1 videos .* expected names such as id_000005_000015"),
    ],
)
def test_bad_csv(samples, tmp_path, line, message):
    put(samples[101, 67], tmp_path, "videos", "other.avi")
    (tmp_path / "k.csv").write_text(CSV_TEXT.splitlines()[0] + "\n" + line + "\n")
    config = get_config("Kinetics", tmp_path)
    with pytest.raises(UsageError, match=message):
        video_plans.plan_from_csv(config, [str(tmp_path / "k.csv")], [str(tmp_path / "videos")])
    (tmp_path / "k.csv").write_text("label,time_start\n")
    with pytest.raises(UsageError, match="column youtube_id, time_end, split missing"):
        video_plans.plan_from_csv(config, [str(tmp_path / "k.csv")], [str(tmp_path / "videos")])


@pytest.mark.parametrize("label", ["..", "../../evil", "/evil", "a/b", "."])
def test_a_csv_label_does_not_lead_out_of_the_folder(samples, tmp_path, label):
    put(samples[101, 67], tmp_path, "videos", "id.avi")
    rows = [CSV_TEXT.splitlines()[0], f"{label},id,0,5,train,0"]
    (tmp_path / "k.csv").write_text("\n".join(rows))
    arguments = ["--csv", tmp_path / "k.csv", "--videos", tmp_path / "videos"]
    with pytest.raises(UsageError, match=f"'{re.escape(label)}' cannot be a class name"):
        prepare(tmp_path / "out", "--dataset", "Kinetics", *arguments)
    assert sorted(os.listdir(tmp_path)) == ["k.csv", "videos"]


def test_a_split_file_does_not_lead_out_of_the_folder(samples, tmp_path):
    splits, videos = tmp_path / "splits", tmp_path / "hmdb"
    splits.mkdir()
    (splits / "wave_test_split1.txt").write_text("../../evil.avi 1\nfine.avi 1\n")
    put(samples[101, 67], tmp_path, "evil.avi")
    put(samples[101, 67], videos, "wave", "fine.avi")
    out = tmp_path / "out"
    arguments = ["--dataset", "HMDB51", "--splits", splits, "--videos", videos]
    with pytest.raises(GloReError, match="1 videos failed"):
        prepare(out, *arguments)
    config = get_config("HMDB51", out)
    assert rows_of(config.train_list) == {(0, "wave/fine.avi")}
    with open(os.path.join(config.root, "raw", "prepare_report.txt")) as stream:
        assert "wave/../../evil.avi lies outside of the data's folder" in stream.read()
    assert not os.path.exists(os.path.join(config.root, "raw", "evil.avi"))


def test_ucf101_official_splits(samples, tmp_path):
    splits, videos = tmp_path / "splits", tmp_path / "UCF-101"
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 Zebra\r\n2 Archery\r\n")
    (splits / "trainlist01.txt").write_text("Zebra/v_1.avi 1\nArchery/v_2.avi 2\n")
    (splits / "testlist01.txt").write_text("Zebra/v_3.avi\n")
    (splits / "trainlist02.txt").write_text("Zebra/v_3.avi 1\n")
    (splits / "testlist02.txt").write_text("Archery/v_2.avi\nZebra/v_1.avi\n")
    for name in ("Zebra/v_1.avi", "Zebra/v_3.avi", "Archery/v_2.avi"):
        put(samples[101, 67], videos, name)
    arguments = ["--dataset", "UCF101", "--splits", splits, "--videos", videos, "--link"]
    assert prepare(tmp_path, *arguments) == 0
    first, second = (get_config("UCF101", tmp_path, split) for split in (1, 2))
    first.check()
    second.check()
    # the labels are classInd.txt's, not alphabetical
    assert read_mapping_table(first.mapping_table) == ["Zebra", "Archery"]
    assert rows_of(first.train_list) == {(0, "Zebra/v_1.avi"), (1, "Archery/v_2.avi")}
    assert rows_of(first.val_list) == {(0, "Zebra/v_3.avi")}
    assert rows_of(second.train_list) == {(0, "Zebra/v_3.avi")}
    assert rows_of(second.val_list) == {(1, "Archery/v_2.avi"), (0, "Zebra/v_1.avi")}
    assert not os.path.exists(get_config("UCF101", tmp_path, 3).train_list)

    # Videos that lie in raw/data already, one of them missing
    shutil.rmtree(first.train_root)
    shutil.copytree(videos, first.train_root)
    os.remove(os.path.join(first.train_root, "Zebra", "v_3.avi"))
    arguments[arguments.index(videos)] = first.train_root
    with pytest.raises(GloReError, match="1 are missing"):
        prepare(tmp_path, *arguments)
    assert rows_of(first.train_list) == {(0, "Zebra/v_1.avi"), (1, "Archery/v_2.avi")}
    assert os.path.isfile(os.path.join(first.train_root, "Zebra", "v_1.avi"))
    assert not os.path.islink(os.path.join(first.train_root, "Zebra", "v_1.avi"))

    (splits / "testlist01.txt").write_text("Horse/v_3.avi\n")
    with pytest.raises(UsageError, match="testlist01.txt, line 1: 'Horse' is not in classInd.txt"):
        prepare(tmp_path, *arguments)


def test_hmdb51_official_splits(samples, tmp_path):
    splits, videos = tmp_path / "splits", tmp_path / "hmdb"
    splits.mkdir()
    names = {"wave": ["w [x]_1.avi", "w#(2).avi", "w 3.avi"], "chew": ["c1.avi"]}
    (splits / "wave_test_split1.txt").write_text("w [x]_1.avi 1 \nw#(2).avi 2 \nw 3.avi 0 \n")
    (splits / "chew_test_split1.txt").write_text("c1.avi 1\n")
    for label, files in names.items():
        for name in files:
            put(samples[101, 67], videos, label, name)
    assert prepare(tmp_path, "--dataset", "hmdb51", "--splits", splits, "--videos", videos) == 0
    config = get_config("HMDB51", tmp_path)
    assert rows_of(config.train_list) == {(1, "wave/w [x]_1.avi"), (0, "chew/c1.avi")}
    assert rows_of(config.val_list) == {(1, "wave/w#(2).avi")}
    assert read_video(os.path.join(config.val_root, "wave", "w#(2).avi")).shape == (10, 66, 100, 3)
    (splits / "chew_test_split1.txt").write_text("c1.avi 3\n")
    with pytest.raises(UsageError, match="chew_test_split1.txt, line 1: expected 'video.avi 0"):
        video_plans.plan_hmdb51(tmp_path, splits, videos)


def test_same_target_twice(samples, tmp_path):
    for name in ("train/one/a.avi", "train/one/a.mp4", "val/one/a.avi"):
        put(samples[101, 67], tmp_path, name)
    arguments = ["--train-videos", tmp_path / "train", "--val-videos", tmp_path / "val"]
    with pytest.raises(GloReError, match="1 videos failed"):
        prepare(tmp_path, "--dataset", "Kinetics", *arguments)
    config = get_config("Kinetics", tmp_path)
    assert rows_of(config.train_list) == {(0, "one/a.avi")}
    with open(os.path.join(config.root, "raw", "prepare_report.txt")) as stream:
        assert "a.mp4\twould become one/a.avi, as " in stream.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "v"], "none is given"),
        (["--videos", "v", "--csv", "c", "--val-fraction", "0.1"], "given: --csv, --val-fraction"),
        (["--train-videos", "v"], "go together"),
        (["--csv", "c"], "--csv needs --videos"),
        (["--videos", "v", "--videos", "w", "--val-fraction", "0.1"], "2 are given"),
        (["--videos", "v", "--val-fraction", "0.1", "--trim"], "--trim needs --csv"),
        (["--videos", "v", "--val-fraction", "0.1"], "v is not a folder"),
        (["--videos", "v", "--splits", "s"], "--splits is for UCF101 and HMDB51"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        prepare_videos.main(["--dataset", "Kinetics", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bitrate", "fast"], "'fast' is no number such as 512k"),
        (["--short-side", "0"], "0 is out of range: it must be 16 or more"),
        (["--jobs", "0"], "must be 1 or more"),
        (["--timeout", "0"], "must be above 0"),
    ],
)
def test_bad_values(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        prepare_videos.main(["--dataset", "Kinetics", "--videos", "v", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_and_too_many_classes(samples, tmp_path):
    with pytest.raises(UsageError, match=r"python -m dataset\.demo"):
        prepare(tmp_path, "--dataset", "Demo", "--videos", "v", "--val-fraction", "0.1")
    for number in range(52):
        put(samples[101, 67], tmp_path, "videos", str(number), "a.avi")
    arguments = ["--dataset", "HMDB51", "--videos", tmp_path / "videos", "--val-fraction", "0.1"]
    with pytest.raises(UsageError, match="52 classes found, HMDB51 has 51"):
        prepare(tmp_path, *arguments)


def test_ffmpeg_missing_or_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # as if it were not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GloReError, match="pip install imageio-ffmpeg"):
        prepare_videos.find_ffmpeg()
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert prepare_videos.find_ffmpeg() == str(program)


def test_a_hanging_ffmpeg_is_ended(tmp_path):
    def make_command(source, target, trim):
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    runner = prepare_videos._Runner(make_command, timeout=0.5)
    jobs = [video_plans.Job("a", str(tmp_path / "a.avi"))]
    started = time.monotonic()
    failures = prepare_videos.run_jobs(jobs, runner.transcode, 1, runner.stop)
    assert failures == [("a", "FFmpeg took longer than 0.5 s")]
    assert time.monotonic() - started < 20


def test_full_disk_stops_the_run(tmp_path):
    def make(job):
        raise prepare_videos.TranscodeError("FFmpeg: av_interleaved: No space left on device")

    jobs = [video_plans.Job(str(n), str(tmp_path / f"{n}.avi")) for n in range(50)]
    with pytest.raises(GloReError, match="the disk is full"):
        prepare_videos.run_jobs(jobs, make, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_ffmpegs(ffmpeg, root, tmp_path, number):
    source = tmp_path / "videos" / "one" / "a.mp4"
    source.parent.mkdir(parents=True)
    os.mkfifo(source)  # FFmpeg waits for data that never come
    os.mkfifo(source.parent / "b.mp4")
    program = [sys.executable, "-m", "dataset.prepare_videos", "--dataset", "Kinetics"]
    program += ["--data-root", str(tmp_path / "out"), "--videos", str(tmp_path / "videos")]
    process = subprocess.Popen(
        [*program, "--val-fraction", "0.5", "--jobs", "2"],
        cwd=root,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )

    def children():
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as stream:
            main = stream.read().split()
        for task in os.listdir(f"/proc/{process.pid}/task"):
            with open(f"/proc/{process.pid}/task/{task}/children") as stream:
                main += stream.read().split()
        return set(main)

    deadline = time.monotonic() + 60
    while len(children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    running = children()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "The same command goes on where it stopped" in errors
    assert not any(os.path.exists(f"/proc/{child}") for child in running)
    assert not partials(tmp_path)


def test_one_run_at_a_time(samples, tmp_path):
    put(samples[101, 67], tmp_path, "videos", "one", "a.avi")
    put(samples[101, 67], tmp_path, "videos", "one", "b.avi")
    arguments = ["--dataset", "Kinetics", "--videos", tmp_path / "videos", "--val-fraction", "0.5"]
    lock = os.path.join(get_config("Kinetics", tmp_path).root, ".lock")
    with file_lock(lock), pytest.raises(Locked, match=rf"process {os.getpid()} on .* holds "):
        prepare(tmp_path, *arguments)
    assert prepare(tmp_path, *arguments) == 0


def test_exit_codes(tmp_path, capsys):
    wrong = ["--dataset", "Kinetcs", "--videos", "v", "--val-fraction", "0.1"]
    assert run_main(prepare_videos.main, wrong) == 2
    errors = capsys.readouterr().err
    assert "unknown data set 'Kinetcs'; known (nearest first): Kinetics" in errors


# --- kinds of files -------------------------------------------------------------------------------


def test_every_kind_of_file_is_prepared_or_named(tmp_path, caplog):
    sources = tmp_path / "in"
    for name in ("cover_first.mp4", "two_streams.mp4", "h264.ts", "theora.ogv", "packed.avi"):
        put(os.path.join(INPUTS, name), sources, "one", name)
    put(os.path.join(INPUTS, "h264.ts"), sources, "two", "00001.MTS")
    put(numbered.make(tmp_path / "moving.gif", 20), sources, "two", "moving.gif")
    (sources / "two" / "notes.txt").write_text("no video")
    (sources / "three").mkdir()
    assert prepare(tmp_path, "--dataset", "mine", "--videos", sources) == 0
    assert "1 files are no videos by their names; left out (1 .txt)" in caplog.text
    assert "no videos of 1 classes: three" in caplog.text
    config = get_config("mine", tmp_path)
    assert (config.num_classes, config.class_names()) == (2, ["one", "two"])
    for part in (config.train_root, config.val_root):
        for folder, _, names in os.walk(part):
            for name in names:
                frames = read_video(os.path.join(folder, name))[..., ::-1]
                # The film, neither its cover nor its preview, from its first to its last frame
                assert frames.shape[1:] == (96, 176, 3)
                numbers = [numbered.number_of(frame) for frame in frames]
                assert numbers == list(range(20 if name == "moving.avi" else 120))


def test_a_recording_of_a_browser_has_its_real_rate(tmp_path):
    source = numbered.make(tmp_path / "a.mkv", 45, "-c:v", "ffv1", rate=30)
    recording = tmp_path / "in" / "one" / "b.webm"
    recording.parent.mkdir(parents=True)
    jitter = "settb=1/1000,setpts='N*33+mod(N*7,13)'"
    numbered.ffmpeg(
        *("-i", source, "-vf", jitter, "-fps_mode", "passthrough", "-enc_time_base", "1/1000"),
        *("-c:v", "libvpx", "-b:v", "500k", "-deadline", "realtime", recording),
    )
    assert prepare_videos.rate_for(str(recording)) == 30
    assert prepare_videos.rate_for(str(source)) is None
    shutil.copy(recording, recording.parent / "c.webm")
    assert prepare(tmp_path, "--dataset", "mine", "--videos", tmp_path / "in") == 0
    prepared = os.path.join(get_config("mine", tmp_path).train_root, "one", "*.avi")
    (path,) = glob.glob(prepared)
    assert 44 <= len(read_video(path)) <= 46


def test_one_rate_for_all_is_recorded_in_the_lists(tmp_path):
    for name, rate in (("a.mp4", 25), ("b.mp4", 50)):
        path = numbered.make(tmp_path / name, 50, *numbered.X264, rate=rate)
        put(path, tmp_path, "in", "one", name)
    arguments = ("--dataset", "mine", "--videos", tmp_path / "in", "--fps", "10")
    assert prepare(tmp_path, *arguments) == 0
    config = get_config("mine", tmp_path)
    counts = []
    for list_path, videos in (
        (config.train_list, config.train_root),
        (config.val_list, config.val_root),
    ):
        found = read_video_list(list_path, videos)
        assert found.rate == 10
        counts.append(len(read_video(found.full_path(0))))
    assert sorted(counts) == [10, 20]
    with pytest.raises(UsageError, match="same settings"):
        prepare(tmp_path, *arguments[:-1], "12")
    with pytest.raises(UsageError, match="cannot be used with --link"):
        prepare(tmp_path, *arguments, "--link")


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_a_broken_copy_does_not_win(samples, tmp_path, link):
    broken = put(samples[101, 67], tmp_path, "v", "train", "---QUuC4vJs_000084_000094.avi")
    with open(broken, "r+b") as stream:
        stream.truncate(700)
    good = ("v", "replacement", "replacement_for_corrupted_k400")
    put(samples[101, 67], tmp_path, *good, "---QUuC4vJs_000084_000094.avi")
    # Without a folder of replacements every copy is tried.
    put(broken, tmp_path, "v", "train", "0wR5jVB-WPk_000417_000427.avi")
    put(samples[101, 67], tmp_path, "v", "val", "0wR5jVB-WPk_000417_000427.avi")
    annotation = tmp_path / "a.csv"
    annotation.write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "testifying,---QUuC4vJs,84,94,train,0\n"
        "abseiling,0wR5jVB-WPk,417,427,train,0\n"
    )
    arguments = ("--dataset", "Kinetics", "--videos", tmp_path / "v", "--csv", annotation, *link)
    assert prepare(tmp_path, *arguments) == 0
    config = get_config("Kinetics", tmp_path)
    rows = read_video_list(config.train_list, config.train_root)
    assert len(rows.rows) == 2
    assert all(len(read_video(rows.full_path(place))) == 10 for place in range(2))


def test_a_data_set_of_ones_own_in_two_folders(samples, tmp_path):
    for part in ("train", "val"):
        for name in ("b c", "a"):
            put(samples[101, 67], tmp_path, "in", part, name, f"{part}.avi")
    assert prepare(tmp_path, "--dataset", "mine", "--videos", tmp_path / "in", "--link") == 0
    config = get_config("mine", tmp_path)
    assert rows_of(config.val_list) == {(0, "a/val.avi"), (1, "b_c/val.avi")}
    assert (config.num_classes, config.batch_size, config.epoch_div_factor) == (2, 2, 1)
    assert get_config("mine", tmp_path, num_classes=7).num_classes == 7
    with pytest.raises(UsageError, match=r"unknown data set 'Kinetcs'.*Kinetics"):
        prepare(tmp_path, "--dataset", "Kinetcs", "--videos", tmp_path / "in")
    for name in ("../x", ".hidden"):
        with pytest.raises(UsageError, match="cannot be the name of a data set"):
            get_config(name, tmp_path, new=True)
