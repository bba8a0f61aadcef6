"""Known frames come back from real files; files that cannot be read say why."""

import subprocess
import sys

import numpy as np
import pytest
from numbered import X264, make, number_of
from videos import level, run, write_picture_video, write_video

from data.video.container import BY_TIME, DECORD
from data.video.readers import VideoError, count_decodable_frames, read_frames


def levels(frames):
    return frames.mean((1, 2, 3)).round().astype(int).tolist()


@pytest.mark.parametrize(("codec", "name"), [("mp4v", "a.mp4"), ("XVID", "a.avi")])
def test_frames_asked_for_in_their_order(tmp_path, codec, name):
    path = write_video(tmp_path / name, 20, codec=codec)
    wanted = [19, 0, 7, 7, 3, 12, 0]
    frames, facts = read_frames(path, lambda total: wanted)
    assert (facts.frames, facts.route) == (20, DECORD)
    assert frames.shape == (7, 48, 64, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(levels(frames), [level(number) for number in wanted], atol=4)


def test_rgb_order(tmp_path):
    import cv2

    path = str(tmp_path / "blue.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
    for _ in range(3):
        writer.write(np.full((48, 64, 3), (230, 30, 30), np.uint8))  # OpenCV writes BGR
    writer.release()
    frames, _ = read_frames(path, lambda total: [1])
    red, green, blue = frames.mean((0, 1, 2))
    assert blue > 200
    assert red < 60
    assert green < 60


@pytest.mark.parametrize(
    "name",
    ["with space.mp4", "br[ack](et){s}.mp4", "Übung ß 漢字.mp4", "a:b%20'c'#?.mp4", "-x.mp4"],
)
def test_names(tmp_path, monkeypatch, name):
    write_video(tmp_path / "plain.mp4", 5)
    (tmp_path / "plain.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    frames, _ = read_frames(name, lambda total: [4])
    np.testing.assert_allclose(levels(frames), [level(4)], atol=4)


@pytest.mark.parametrize("size", [(33, 47), (65, 49), (101, 31), (20, 18)])
def test_odd_sizes(tmp_path, size):
    # OpenCV's writer makes sizes even; FFmpeg does not.
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    path = tmp_path / "odd.avi"
    picture = b"".join(bytes([level(number)]) * (3 * size[0] * size[1]) for number in range(6))
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-i", "-"]
    command = [ffmpeg, "-v", "error", *raw, "-c:v", "mpeg4", str(path)]
    subprocess.run(command, input=picture, check=True, timeout=60)
    frames, _ = read_frames(path, lambda total: [0, 5])
    assert frames.shape == (2, size[1], size[0], 3)
    np.testing.assert_allclose(levels(frames), [level(0), level(5)], atol=4)


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "one.mp4", 1)
    frames, facts = read_frames(path, lambda total: [0] * 8)
    assert facts.frames == 1
    np.testing.assert_allclose(levels(frames), [level(0)] * 8, atol=4)
    assert count_decodable_frames(path) == (facts, "")


def bad_file(folder, kind):
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(np.random.RandomState(0).bytes(5000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        content = write_video(folder / "whole.mp4", 30).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "audio":
        ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
        command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "sine=duration=1", str(path)]
        subprocess.run(command, check=True, timeout=60)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "No such file"),
        ("empty", "the file is empty"),
        ("garbage", "Invalid data found"),
        ("folder", "it is a folder"),
        ("truncated", "Invalid data found"),
        ("audio", "it has no video, only audio"),
    ],
)
def test_unreadable_files_say_why(tmp_path, capfd, kind, says):
    path = bad_file(tmp_path, kind)
    with pytest.raises(VideoError, match=says) as caught:
        read_frames(path, lambda total: [0])
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert "\n" not in caught.value.reason
    with pytest.raises(VideoError, match=says):
        count_decodable_frames(path)
    assert len(capfd.readouterr().err.splitlines()) < 5, "FFmpeg must be quiet"


def test_index_past_the_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    with pytest.raises(VideoError, match="frame 5 was asked for, it has 5"):
        read_frames(path, lambda total: [0, 5])


def test_retries_are_bounded_and_ask_for_the_same_frames(tmp_path, monkeypatch):
    import data.video.readers

    path = make(tmp_path / "a.mp4", 9, *X264)
    decord = data.video.readers._decord()
    opened, picked, working = [], [], decord.VideoReader

    def flaky(*arguments, **more):
        opened.append(arguments[0])
        if len(opened) <= failures:
            raise RuntimeError("Error reading")
        return working(*arguments, **more)

    monkeypatch.setattr(decord, "VideoReader", flaky)
    failures = 2
    frames, _ = read_frames(path, lambda total: picked.append(total) or [8], retries=2)
    assert number_of(frames[0]) == 8
    assert (len(opened), picked) == (3, [9])
    opened.clear()
    with pytest.raises(VideoError, match="Error reading"):
        read_frames(path, lambda total: [8], retries=1, decoder="decord")
    assert len(opened) == 2
    opened.clear()
    frames, facts = read_frames(path, lambda total: [8], retries=1)
    assert number_of(frames[0]) == 8
    assert (len(opened), facts.route) == (2, BY_TIME), "what decord does not open, PyAV does"


def test_count_of_a_damaged_h264_file(tmp_path, capfd):
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    source, path = write_picture_video(tmp_path / "s.mp4", 120, (160, 120)), tmp_path / "d.mp4"
    subprocess.run(
        [ffmpeg, "-v", "error", "-i", str(source), "-c:v", "libx264", "-g", "10", str(path)],
        check=True,
        timeout=60,
    )
    facts, reason = count_decodable_frames(path)
    assert (facts.frames, facts.announced, reason) == (120, 120, "")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    facts, reason = count_decodable_frames(path)
    assert 0 < facts.frames < 120
    assert reason == f"only {facts.frames} of 120 frames can be decoded: " + reason.split(": ")[1]
    assert "Invalid data" in reason
    # Always at the same frame.
    assert {count_decodable_frames(path) for _ in range(5)} == {(facts, reason)}
    with pytest.raises(VideoError):
        read_frames(path, lambda total: list(range(total)))
    assert len(capfd.readouterr().err.splitlines()) < 5, "FFmpeg must be quiet"


def test_decord_comes_after_mxnet(root):
    code = (
        "import sys; from data.video.readers import _decord; assert 'mxnet' not in sys.modules; "
        "_decord(); names = list(sys.modules); print(names.index('mxnet') < names.index('decord'))"
    )
    assert run([sys.executable, "-c", code], cwd=root).stdout == "True\n"


def test_the_deadly_order_is_refused(root):
    code = "import decord; from data.video.readers import _decord; _decord()"
    result = run([sys.executable, "-c", code], cwd=root)
    assert result.returncode == 1
    assert "decord was imported before mxnet" in result.stderr


def test_a_process_that_renounced_mxnet_cannot_import_it(root):
    code = (
        "from data.video.readers import _decord, forbid_mxnet; forbid_mxnet(); _decord()\n"
        "try:\n    import mxnet\nexcept ImportError:\n    print('refused')"
    )
    assert run([sys.executable, "-c", code], cwd=root).stdout == "refused\n"


def test_decord_is_imported_in_one_file_only(root):
    import pathlib

    rooms = ("checkpoint", "cluster", "data", "dataset", "jobs", "network", "train")
    files = [*pathlib.Path(root).glob("*.py")]
    files += [path for room in rooms for path in pathlib.Path(root, room).rglob("*.py")]
    importers = [
        path.relative_to(root).as_posix()
        for path in files
        if any(
            line.strip().startswith(("import decord", "from decord"))
            for line in path.read_text(encoding="utf-8").splitlines()
        )
    ]
    assert importers == ["data/video/readers.py"]
