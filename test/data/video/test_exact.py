"""Frames of every kind of file are those that FFmpeg gives when it decodes it from the start."""

import os
import subprocess

import numpy as np
import pytest

from data.video.container import DECORD, HOW, SEEK, SEQUENTIAL, VideoError, examine
from data.video.readers import count_frames, how_to_read, read_frames

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
INPUTS = os.path.join(os.path.dirname(__file__), "..", "..", "inputs", "videos")
FILES = sorted(name for name in os.listdir(INPUTS) if name not in ("README.md", "audio_only.mp4"))
# The static FFmpeg would load the character sets of the system's C library, and crash.
ENVIRONMENT = {**os.environ, "GCONV_PATH": "/nonexistent"}
WIDTH, HEIGHT, BITS = 176, 96, 10


def ffmpeg(*arguments, data=None):
    done = subprocess.run(
        [FFMPEG, "-v", "error", "-y", *map(str, arguments)],
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def truth_of(path, height=HEIGHT, width=WIDTH):
    """Return all frames of a file in their order: (n, height, width, 3)."""
    raw = ffmpeg(
        *("-i", path, "-an", "-fps_mode", "passthrough", "-f", "rawvideo"),
        *("-pix_fmt", "rgb24", "-"),
    )
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def picture(number):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    base = (128 + 50 * np.sin((x + 3 * number) / 9) + 30 * np.cos((y - 2 * number) / 7)).clip(
        0, 255
    )
    image = np.stack([base, base * 0.9, 255 - base], -1).astype(np.uint8)
    for bit in range(BITS):
        image[:16, 16 * bit : 16 * bit + 16] = 255 if number >> bit & 1 else 0
    image[-16:, :16] = (255, 0, 0)
    return image


def make(path, *options, frames=60):
    data = b"".join(picture(number).tobytes() for number in range(frames))
    ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", 25, "-i", "-"),
        *(*options, path),
        data=data,
    )
    return str(path)


def check(path, rounds=20, how=None, **size):
    """Compare random sets of frames; return how they were read."""
    truth = truth_of(path, **size)
    how = how_to_read(path) if how is None else how
    generator = np.random.RandomState(len(truth))
    for _ in range(rounds):
        wanted = generator.randint(0, len(truth), 8).tolist()
        frames, total = read_frames(path, lambda _, wanted=wanted: wanted, how=how)
        assert total == len(truth)
        assert frames.shape == (8, *truth.shape[1:])
        # Colours are converted by different versions of one library.
        assert np.abs(frames.astype(int) - truth[wanted]).max() <= 4, (HOW[how], wanted)
    return how


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_decoding_from_the_start(name):
    path = os.path.join(INPUTS, name)
    assert check(path) in (SEEK, SEQUENTIAL)
    assert count_frames(path)[0] == len(truth_of(path))
    check(path, rounds=3, how=SEQUENTIAL)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("plain.avi", ("-c:v", "mpeg4", "-g", 12), DECORD),
        ("plain.mp4", ("-c:v", "mpeg4", "-g", 12), DECORD),
        ("plain.mkv", ("-c:v", "libx264", "-bf", 0, "-g", 15), DECORD),
        ("closed.mp4", ("-c:v", "libx264", "-bf", 3, "-g", 15), SEEK),
        ("closed.mov", ("-c:v", "libx264", "-bf", 2, "-g", 200), SEEK),
        ("refresh.mp4", ("-c:v", "libx264", "-x264-params", "intra-refresh=1:bframes=0"), DECORD),
        ("hevc.mp4", ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=15"), SEEK),
        ("vp9.webm", ("-c:v", "libvpx-vp9", "-g", 15, "-deadline", "realtime"), SEEK),
        ("bf4.mkv", ("-c:v", "mpeg4", "-bf", 4, "-g", 20), SEEK),
        ("mpeg2.m2ts", ("-c:v", "mpeg2video", "-bf", 2, "-f", "mpegts"), SEQUENTIAL),
        ("motion.avi", ("-c:v", "mjpeg", "-q:v", 3), SEQUENTIAL),
        ("raw.264", ("-c:v", "libx264", "-bf", 2, "-f", "h264"), SEQUENTIAL),
        ("flash.flv", ("-c:v", "flv1"), SEQUENTIAL),
        ("short.gif", ("-vf", "fps=10"), SEQUENTIAL),
    ],
)
def test_relatives(tmp_path, name, options, expected):
    path = make(tmp_path / name, *options)
    assert check(path, rounds=6) == expected


def test_a_trim_without_decoding_keeps_its_frames(tmp_path):
    source = make(tmp_path / "a.mp4", "-c:v", "libx264", "-g", 25, frames=90)
    for start in (0.3, 1.5, 2.02):
        path = str(tmp_path / f"b{start}.mp4")
        ffmpeg("-ss", start, "-i", source, "-t", 1, "-c", "copy", path)
        assert check(path, rounds=4) == SEQUENTIAL


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("mirror", [(), ("-display_hflip",), ("-display_vflip",)])
def test_frames_are_turned_and_mirrored_as_ffmpeg_does(tmp_path, degrees, mirror):
    source = make(tmp_path / "a.mp4", "-c:v", "mpeg4", frames=6)
    path = str(tmp_path / "b.mp4")
    flags = [word for option in mirror for word in (option,)]
    ffmpeg("-display_rotation", degrees, *flags, "-i", source, "-c", "copy", path)
    sides = (HEIGHT, WIDTH) if degrees == 180 else (WIDTH, HEIGHT)
    assert check(path, rounds=2, height=sides[0], width=sides[1]) != DECORD
    assert examine(path).turned


@pytest.mark.parametrize(
    "name", ["packed.avi", "packed_1gop.avi", "h264_opengop.mp4", "trimcopy.mp4"]
)
def test_reading_is_the_same_every_time(name):
    path = os.path.join(INPUTS, name)
    last = count_frames(path)[0] - 1
    first, _ = read_frames(path, lambda _: [last, 0, last // 2, last])
    for _ in range(5):
        again, _ = read_frames(path, lambda _: [last, 0, last // 2, last])
        np.testing.assert_array_equal(first, again)


def test_what_is_no_video_says_so():
    with pytest.raises(VideoError, match=r"it has no video \(audio only\)"):
        how_to_read(os.path.join(INPUTS, "audio_only.mp4"))


@pytest.mark.parametrize(("decoder", "expected"), [("decord", DECORD), ("pyav", SEEK)])
def test_a_decoder_can_be_chosen(tmp_path, decoder, expected):
    path = make(tmp_path / "a.mp4", "-c:v", "mpeg4", frames=10)
    assert how_to_read(path, decoder) == expected
    check(path, rounds=3, how=expected)
