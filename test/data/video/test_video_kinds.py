"""The frames of every kind of video file are those that FFmpeg gives, and the same every time."""

import os
import shutil
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from numbered import INPUTS, X264, ffmpeg, frame, make, number_of, packed, truth
from videos import run, write_list

import data.video.container
from data.verify import verify_list
from data.video.container import BY_TIME, BY_TYPE, DECORD, FROM_START, Turn, VideoError, look
from data.video.list import FrameCounts, read_video_list
from data.video.readers import count_decodable_frames, difference, read_frames

# What is no video, or has its own test.
OTHERS = ("README.md", "audio_only.mp4", "mapping_table_bom.txt")
FILES = sorted(name for name in os.listdir(INPUTS) if name not in OTHERS)
MPEG4, X265 = ("-c:v", "mpeg4", "-q:v", 4), ("-c:v", "libx265", "-pix_fmt", "yuv420p")
FAST = "log-level=error:pools=1:keyint=20"


def check(path, decoder="auto", sets=20):
    """Read random sets of frames and compare them with FFmpeg's; return the facts."""
    expected = truth(path)
    rng = np.random.RandomState(0)
    facts = None
    for turn in range(sets):
        picked = []

        def pick(total, turn=turn, picked=picked):
            assert total == len(expected)
            picked += rng.randint(0, total, 8).tolist()
            if turn % 4 == 0:
                picked[-2:] = [total - 1, 0]
            return picked

        frames, facts = read_frames(path, pick, facts=facts, decoder=decoder)
        assert frames.flags.c_contiguous
        for number, picture in zip(picked, frames):
            assert picture.shape == expected[number].shape
            apart = np.abs(picture.astype(int) - expected[number]).mean()
            assert apart < 2, f"{os.path.basename(path)}, frame {number}"
    assert difference(path, facts, list(range(0, facts.frames, 7))) == ""
    return facts


@pytest.mark.parametrize("name", FILES)
def test_frames_of_the_inputs_are_those_of_ffmpeg(name):
    check(os.path.join(INPUTS, name))


# name of the file: (FFmpeg's options, how it is read)
MADE = {
    "plain.avi": ((*MPEG4, "-g", 12), DECORD),
    "b1.avi": ((*MPEG4, "-bf", 1, "-g", 20), BY_TYPE),
    "b4.avi": ((*MPEG4, "-bf", 4, "-g", 30), BY_TYPE),
    "b3.mov": ((*MPEG4, "-bf", 3, "-g", 24), BY_TIME),
    "b2.mkv": ((*MPEG4, "-bf", 2, "-g", 15), BY_TIME),
    "xvid.avi": (("-c:v", "libxvid", "-bf", 2, "-g", 25, "-q:v", 4), BY_TYPE),
    "closed.mov": ((*X264, "-g", 20, "-bf", 3), DECORD),
    "closed.mkv": ((*X264, "-g", 20, "-bf", 8), DECORD),
    "open.mkv": ((*X264, "-g", 20, "-bf", 3, "-x264-params", "open-gop=1"), BY_TIME),
    "refresh.mp4": ((*X264, "-g", 20, "-intra-refresh", 1), BY_TIME),
    "h264.avi": ((*X264, "-g", 20, "-bf", 0), FROM_START),
    "h264.flv": ((*X264, "-g", 20, "-bf", 2), FROM_START),
    "raw.h264": ((*X264, "-g", 20, "-bf", 2), FROM_START),
    "hevc.mp4": ((*X265, "-preset", "ultrafast", "-x265-params", FAST), BY_TIME),
    "hevc_closed.mp4": (
        (*X265, "-preset", "ultrafast", "-x265-params", f"{FAST}:open-gop=0"),
        DECORD,
    ),
    "mpeg2.ts": (("-c:v", "mpeg2video", "-bf", 2, "-b:v", "800k"), FROM_START),
    "mpeg2.vob": (("-c:v", "mpeg2video", "-bf", 2, "-b:v", "800k"), FROM_START),
    "wmv.wmv": (("-c:v", "wmv2", "-b:v", "800k"), FROM_START),
    "flash.flv": (("-c:v", "flv", "-b:v", "800k"), FROM_START),
    "altref.webm": (("-c:v", "libvpx", "-b:v", "600k", "-g", 30, "-lag-in-frames", 16), DECORD),
    "picture.mjpeg.avi": (("-c:v", "mjpeg", "-q:v", 3), DECORD),
    "moving.gif": ((), FROM_START),
}


@pytest.mark.parametrize("name", MADE)
def test_frames_of_made_files_are_those_of_ffmpeg(tmp_path, name):
    options, route = MADE[name]
    path = make(tmp_path / name, 60, *options)
    assert look(str(path), os.stat(path).st_size).route == route
    facts = check(path, sets=8)
    assert (facts.frames, facts.route) == (len(truth(path)), route)
    check(path, decoder="pyav", sets=3)


def test_packed_b_frames(tmp_path):
    path = packed(tmp_path / "packed.avi", 50, 12)
    assert check(path).route == BY_TYPE


@pytest.mark.parametrize(("bf", "start"), [(0, 0.3), (0, 1.1), (3, 0.7), (3, 1.5), (16, 0.9)])
@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts"])
def test_trimmed_without_decoding(tmp_path, bf, start, extension):
    source = make(tmp_path / "a.mp4", 60, *X264, "-g", 25, "-bf", bf)
    path = tmp_path / f"b.{extension}"
    ffmpeg("-ss", start, "-i", source, "-t", 0.8, "-c", "copy", path)
    check(path, sets=5)


def test_variable_rate(tmp_path):
    source = make(tmp_path / "a.mp4", 60, *X264)
    path = tmp_path / "b.mkv"
    some = "select='lt(n,20)+not(mod(n,7))'"
    ffmpeg("-i", source, "-vf", some, "-fps_mode", "vfr", *X264, "-bf", 2, "-g", 8, path)
    check(path)
    live = tmp_path / "live.webm"
    webm = ("-c:v", "libvpx", "-b:v", "500k", "-f", "webm", "-live", 1)
    live.write_bytes(ffmpeg("-i", source, *webm, "-").stdout)
    check(live)


def with_matrix(tmp_path, name, *options):
    source = make(tmp_path / "plain.mp4", 20, *X264, "-bf", 2)
    ffmpeg(*options, "-i", source, "-c", "copy", tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    ("options", "turn"),
    [
        (("-display_rotation", 90), Turn(1)),
        (("-display_rotation", 180), Turn(2)),
        (("-display_rotation", 270), Turn(3)),
        (("-display_hflip",), Turn(0, True)),
        (("-display_vflip",), Turn(2, True)),
        (("-display_rotation", 90, "-display_hflip"), Turn(1, True)),
        (("-display_rotation", 270, "-display_hflip"), Turn(3, True)),
    ],
)
def test_turned_and_mirrored(tmp_path, name, options, turn):
    path = with_matrix(tmp_path, name, *options)
    assert check(path, sets=3).turn == turn
    check(path, decoder="pyav", sets=2)
    check(path, decoder="decord", sets=2)
    # The corners as well, not FFmpeg's word alone
    frames, _ = read_frames(path, lambda total: [7])
    upright = np.rot90(frames[0][:, ::-1] if turn.mirrored else frames[0], -turn.quarters)
    assert np.abs(upright.astype(int) - frame(7)).mean() < 12
    assert number_of(upright) == 7


def test_no_video_says_so(tmp_path):
    (cover := tmp_path / "cover.jpg").write_bytes(
        ffmpeg(
            "-f", "lavfi", "-i", "color=c=blue:s=64x64", "-frames:v", 1, "-f", "mjpeg", "-"
        ).stdout
    )
    sound = ("-f", "lavfi", "-i", "sine=duration=0.5")
    song = tmp_path / "song.m4a"
    ffmpeg(
        *sound,
        "-i",
        cover,
        "-map",
        0,
        "-map",
        1,
        "-c:v",
        "copy",
        "-c:a",
        "aac",
        "-disposition:v:0",
        "attached_pic",
        song,
    )
    with pytest.raises(VideoError, match="no video, only a cover picture"):
        read_frames(song, lambda total: [0])
    with pytest.raises(VideoError, match="it has no video, only audio"):
        read_frames(os.path.join(INPUTS, "audio_only.mp4"), lambda total: [0])
    unknown = tmp_path / "unknown.mp4"
    plain = make(tmp_path / "plain.mp4", 5, *X264).read_bytes()
    unknown.write_bytes(plain.replace(b"avc1", b"qqqq"))
    with pytest.raises(VideoError, match="no decoder for its video"):
        read_frames(unknown, lambda total: [0])


def test_the_cover_and_the_preview_are_not_the_video():
    for name in ("cover_first.mp4", "two_streams.mp4"):
        frames, facts = read_frames(os.path.join(INPUTS, name), lambda total: [33, 90])
        assert frames.shape[1:3] == (96, 176)
        assert facts.route == BY_TIME
        assert [number_of(picture) for picture in frames] == [33, 90]


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    path = make(tmp_path / "a.avi", 30, *MPEG4)
    _, facts = read_frames(path, lambda total: [29])
    make(path, 20, *MPEG4, "-bf", 2)
    frames, again = read_frames(path, lambda total: [total - 1], facts=facts)
    assert (facts.frames, again.frames, again.route) == (30, 20, BY_TYPE)
    assert number_of(frames[0]) == 19


def test_a_file_that_is_not_as_noted_is_read_from_the_start(tmp_path):
    path = make(tmp_path / "a.ts", 40, *MPEG4)
    _, facts = read_frames(path, lambda total: [0])
    wrong = facts._replace(route=BY_TYPE)
    frames, _ = read_frames(path, lambda total: [39, 3], facts=wrong)
    assert [number_of(picture) for picture in frames] == [39, 3]


def test_what_ffmpeg_complains_of_is_said_and_read_from_the_start(tmp_path):
    path = make(tmp_path / "a.mp4", 60, *X264, "-g", 10, "-movflags", "+faststart")
    path.write_bytes(path.read_bytes()[:-9000])
    facts, reason = count_decodable_frames(path)
    assert facts.route == FROM_START
    assert 0 < facts.frames < 60
    assert reason.startswith("only ")
    read_frames(path, lambda total: list(range(total)))


def test_exact_verification_names_a_reader_that_is_wrong(tmp_path, monkeypatch):
    path = make(tmp_path / "a.mp4", 60, *X264, "-g", 20, "-intra-refresh", 1)
    videos = read_video_list(write_list(tmp_path, ["a.mp4"]), tmp_path)
    (row,) = verify_list(videos, exact=True)
    assert row["status"] == "ok"
    expected = {"reader": "pyav", "codec": "h264", "container": "mov", "rotation": "0"}
    assert {key: row[key] for key in expected} == expected
    assert (row["fps"], row["seconds"]) == (25.0, 2.4)
    assert FrameCounts(videos).noted(0).route == BY_TIME
    monkeypatch.setattr(data.video.container._Packets, "exact_by_decord", lambda self: True)
    facts, reason = count_decodable_frames(path)
    assert (facts.route, reason) == (DECORD, "")
    assert "away from what FFmpeg gives" in difference(path, facts, [11, 25, 40])


@pytest.mark.parametrize("first", ["mxnet", "decord", "cv2", "av"])
def test_av_loads_beside_the_others(root, first):
    others = [name for name in ("mxnet_compat", "decord", "cv2", "av") if first not in name]
    first = "mxnet_compat" if first == "mxnet" else first
    if first == "decord":  # MXNet must come before it
        first, others = "av", ["mxnet_compat", "decord", "cv2"]
    code = "\n".join(f"import {name}" for name in [first, *others]) + "\nprint('loaded')"
    assert run([sys.executable, "-c", code], cwd=root).stdout == "loaded\n"


def test_videos_are_read_by_av_in_one_file_only(root):
    import pathlib

    files = [
        path for room in ("data", "dataset") for path in pathlib.Path(root, room).rglob("*.py")
    ]
    importers = [
        path.relative_to(root).as_posix()
        for path in files
        if any(line.strip().startswith("import av") for line in path.read_text().splitlines())
    ]
    assert importers == ["data/video/container.py"]


def test_copies_of_a_file_read_alike_in_any_process(root, tmp_path):
    """The last frame of a stream with delay, which differed from one reading to the next."""
    path = shutil.copy(os.path.join(INPUTS, "packed_1gop.avi"), tmp_path / "a.avi")
    code = (
        "import sys, hashlib; from data.video.readers import forbid_mxnet, read_frames; "
        "forbid_mxnet(); frames, _ = read_frames(sys.argv[1], lambda total: [total - 1, 3]); "
        "print(hashlib.sha256(frames.tobytes()).hexdigest())"
    )
    results = {run([sys.executable, "-c", code, path], cwd=root).stdout for _ in range(3)}
    assert len(results) == 1
    assert len(results.pop()) == 65


@pytest.fixture
def decoded(monkeypatch):
    """Return the list of the frames that come out of decoders from now on."""
    seen = []
    given = data.video.container._Decoder._decoded

    def noted(self, packet):
        for number, picture in given(self, packet):
            seen.append(number)
            yield number, picture

    monkeypatch.setattr(data.video.container._Decoder, "_decoded", noted)
    return seen


@pytest.mark.parametrize(
    ("wanted", "most"),
    [
        # A clip: what lies between its frames must be decoded, where others refer to it.
        (list(range(60, 60 + 8 * 8, 8)), 64 + 12),
        # Far apart: each costs at most what lies between two key frames.
        ([0, 100, 150, 239], 4 * (12 + 4)),
        ([7] * 8, 8 + 4),
        # The last frame of a file costs no more than any other.
        ([239], 12 + 4),
    ],
)
def test_frames_decoded_for_those_asked_for(tmp_path, decoded, wanted, most):
    """Key frames are twelve apart; a decoder may hold four frames back."""
    path = make(str(tmp_path / "a.mov"), 240, *MPEG4, "-bf", 2, "-g", 12, "-sc_threshold", 10**9)
    _, facts = read_frames(path, lambda total: [0])
    assert (facts.frames, facts.route) == (240, BY_TIME)
    del decoded[:]
    frames, _ = read_frames(path, lambda total: wanted, facts=facts)
    assert [number_of(picture) for picture in frames] == wanted
    assert len(set(wanted)) <= len(decoded) <= most


def test_decoded_frames_of_a_file_without_places(tmp_path, decoded):
    """It is decoded from its start, and no further than to the last frame asked for."""
    path = make(str(tmp_path / "a.flv"), 120, *X264, "-g", 12, "-bf", 2)
    _, facts = read_frames(path, lambda total: [0])
    assert facts.route == FROM_START
    del decoded[:]
    frames, _ = read_frames(path, lambda total: [10, 30], facts=facts)
    assert [number_of(picture) for picture in frames] == [10, 30]
    assert 31 <= len(decoded) <= 31 + 20


def elementary(width, height, frames, shade):
    """Return MPEG-2 pictures without a container: the left half dark, each brighter."""
    coder = av.CodecContext.create("mpeg2video", "w")
    coder.width, coder.height, coder.pix_fmt = width, height, "yuv420p"
    coder.time_base, coder.bit_rate = Fraction(1, 25), 800_000
    content = b""
    for number in range(frames):
        picture = np.full((height, width, 3), shade + 10 * number, np.uint8)
        picture[:, : width // 2] //= 2
        shown = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        shown.pts = number
        content += b"".join(map(bytes, coder.encode(shown)))
    return content + b"".join(map(bytes, coder.encode(None)))


def test_a_video_that_changes_its_size_midway(tmp_path):
    path = tmp_path / "sizes.mpg"
    path.write_bytes(elementary(64, 48, 6, 60) + elementary(32, 32, 6, 90))
    # FFmpeg scales to the first size as well.
    facts = check(str(path))
    (last,), _ = read_frames(str(path), lambda total: [total - 1], facts=facts)
    assert last.shape == (48, 64, 3)
    assert abs(last[40, 60].mean() - 140) < 6
    assert abs(last[40, 5].mean() - 70) < 6
