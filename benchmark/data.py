"""How fast clips are read, beside the original's reader: ``python -m benchmark.data [VIDEO ...]``.

One process makes clips of 8 frames at interval 8, for training (random, augmented) and for
validation (middle, centre crop), in turn by this project and in the way of the PyTorch original
(facebookresearch/GloRe): OpenCV, a seek for each frame, transforms frame by frame. Without VIDEO,
some kinds of files of 340 x 256 pixels and 300 frames are made, and the table has a row of each.
``decord`` is what this project read all files with before it looked at them: its frames are
compared with those that FFmpeg gives from the start. On transport streams it may wait for ever for
a frame, so that it is left out there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Callable, Optional

import cv2
import numpy as np

from data.common.transforms import CenterCrop, RandomCrop, Resize, resize_clip
from data.video.loaders import ASPECT_RATIO, HLS, JITTER, SHORT_SIDE, train_transform, val_transform
from data.video.readers import VideoError, by_decord, difference, known_facts, read_frames
from data.video.sampler import EvenlySampling, RandomSampling
from data.video.transforms import RandomScale
from dataset.prepare_videos import NOWHERE, find_ffmpeg
from glore_common import run_main
from network.specs import MEAN, STD

SIZE, FRAMES, SIDE = (340, 256), 300, 224
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-b:v", "512k", "-threads", "1")
MPEG4 = ("-c:v", "mpeg4", "-b:v", "512k")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
# What is made, and with which options of FFmpeg.
KINDS = {
    "MPEG-4.avi": MPEG4,
    "H.264.mp4": X264,
    "MPEG-4 B-frames.avi": (*MPEG4, "-bf", "2"),
    "MPEG-4 B-frames.mp4": (*MPEG4, "-bf", "2"),
    "XviD.avi": ("-c:v", "libxvid", "-b:v", "512k", "-bf", "2"),
    "H.264.avi": X264,
    "H.264 open GOP.mp4": (*X264, "-g", "60", "-x264-params", "open-gop=1"),
    "H.264.ts": X264,
    "HEVC.mp4": ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "log-level=error"),
    "VP8.webm": ("-c:v", "libvpx", "-b:v", "512k", "-deadline", "realtime", "-cpu-used", "8"),
    "MPEG-1.mpg": ("-c:v", "mpeg1video", "-b:v", "800k", "-bf", "2"),
    "WMV.wmv": ("-c:v", "wmv2", "-b:v", "512k"),
    "Theora.ogv": ("-c:v", "libtheora", "-b:v", "600k"),
}


def scene() -> bytes:
    """Return the raw frames of a detailed scene that moves to the left."""
    rng, (width, height) = np.random.default_rng(0), SIZE
    wide = width + 2 * FRAMES
    picture = np.zeros((height, wide, 3), np.float32)
    for scale in (2, 4, 8, 16, 32):
        noise = rng.normal(0, 1, (height // scale + 2, wide // scale + 2, 3)).astype(np.float32)
        picture += cv2.resize(noise, (wide, height), interpolation=cv2.INTER_CUBIC) * scale**0.7
    picture = (128 + 40 * picture / picture.std()).clip(0, 255).astype(np.uint8)
    return b"".join(picture[:, 2 * n : 2 * n + width].tobytes() for n in range(FRAMES))


def make_videos(folder: str) -> list[str]:
    """Write the files of :data:`KINDS`; return their paths."""
    raw = scene()
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*SIZE), "-r", "25")
    paths = [os.path.join(folder, name) for name in KINDS]
    for path, options in zip(paths, KINDS.values()):
        command = [find_ffmpeg(), "-v", "error", "-y", *source, "-i", "-", *options, path]
        environment = {**os.environ, "GCONV_PATH": NOWHERE}
        subprocess.run(command, input=raw, check=True, env=environment)
    return paths


class Original:
    """The original's way: a seek for each frame, and its transforms."""

    def __init__(self, train: bool) -> None:
        self.train = train
        self.scale, self.crop = RandomScale(ASPECT_RATIO, SHORT_SIDE), RandomCrop(SIDE)
        self.resize, self.centre = Resize(256), CenterCrop(SIDE)

    def frames(self, path: str, pick: Callable[[int], Sequence[int]]) -> np.ndarray:
        """Return frames (T, H, W, 3)."""
        capture = cv2.VideoCapture(path)
        frames = []
        for index in pick(int(capture.get(cv2.CAP_PROP_FRAME_COUNT))):
            capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            readable, frame = capture.read()
            if not readable:
                raise VideoError(path, f"OpenCV does not read frame {index}")
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        capture.release()
        return np.stack(frames)

    def transform(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the network's input."""
        if self.train:
            clip = resize_clip(clip, *self.scale.draw_size(clip.shape[2], clip.shape[1], rng))
            clip = self.crop(clip, rng)
            clip = clip[:, :, ::-1] if rng.uniform() < 0.5 else clip
            shifts = [int(rng.uniform(-offset, offset)) for offset in HLS]
            clip = np.stack([self.shifted(frame, shifts) for frame in clip])
            low, high = rng.uniform(JITTER[0], 0), rng.uniform(0, JITTER[1])
            clip = clip + rng.uniform(low, high, clip.shape).astype(np.float32)
        else:
            clip = self.centre(self.resize(clip))
        array = np.ascontiguousarray(clip.transpose(3, 0, 1, 2)).astype(np.float32) / 255
        for channel, mean, std in zip(array, MEAN, STD):
            channel -= mean
            channel /= std
        return array

    @staticmethod
    def shifted(frame: np.ndarray, shifts: Sequence[int]) -> np.ndarray:
        """Return a frame with hue, lightness and saturation shifted."""
        values = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HLS).astype(np.int32)
        values = np.clip(values + shifts, 0, (180, 255, 255)).astype(np.uint8)
        return cv2.cvtColor(values, cv2.COLOR_HLS2RGB)


def measure(path: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the figures of one file: milliseconds per clip, and how exact decord is."""
    started = clock()
    facts = known_facts(path)
    look = 1e3 * (clock() - started)
    # As the loader finds it out when decord refuses a file that it should read.
    _, facts = read_frames(path, lambda total: [0], facts=facts)
    ours = {
        "train": train_transform(SIDE, MEAN, STD),
        "val": val_transform(SIDE, MEAN, STD),
    }
    samplers: dict[str, Any] = {"train": RandomSampling(8, 8), "val": EvenlySampling(8, 8)}
    ways = ["original", "ours"] if facts.container == "mpegts" else ["original", "decord", "ours"]
    seconds: dict[tuple[str, str], list[float]] = {}
    failed: dict[str, str] = {}

    def clip(way: str, part: str, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def pick(total: int) -> Sequence[int]:
            return samplers[part].pick(total, rng, 0)

        if way == "original":
            original = Original(part == "train")
            original.transform(original.frames(path, pick), rng)
        else:
            decoder = "decord" if way == "decord" else "auto"
            frames, _ = read_frames(path, pick, retries=0, facts=facts, decoder=decoder)
            ours[part](frames, rng)

    for seed in range(rounds + 1):
        for part in ours:
            for way in ways:
                started = clock()
                try:
                    clip(way, part, seed)
                except VideoError as error:
                    failed[way] = error.reason
                    continue
                if seed:  # the first round warms up
                    seconds.setdefault((way, part), []).append(clock() - started)
    figures: dict[str, Any] = {
        f"{way} {part}": 1e3 * float(np.median(times)) for (way, part), times in seconds.items()
    }
    figures.update(reader="decord" if by_decord(facts) else f"PyAV ({facts.route})", look=look)
    figures["exact before"] = exact_by_decord(path, facts) if "decord" in ways else "hangs"
    return figures


def exact_by_decord(path: str, facts: Any) -> str:
    """Say whether decord gives FFmpeg's frames of a file."""
    rng = np.random.default_rng(0)
    sets = [sorted(rng.integers(0, facts.frames, 4).tolist()) for _ in range(5)]
    try:
        wrong = any(difference(path, facts, indices, "decord") for indices in sets)
    except VideoError:
        return "refused"
    return "wrong" if wrong else "yes"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| file | reader | look | ms original | ms decord | ms now | ratio | decord exact |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def pair(row: dict[str, Any], way: str) -> str:
        cells = (row.get(f"{way} {part}") for part in ("train", "val"))
        return " / ".join("–" if cell is None else f"{cell:.1f}" for cell in cells)

    for name, row in rows.items():
        ratios = " / ".join(
            f"{row[f'original {part}'] / row[f'ours {part}']:.2f}"
            if f"original {part}" in row
            else "–"
            for part in ("train", "val")
        )
        ways = " | ".join(pair(row, way) for way in ("original", "decord", "ours"))
        before = row["exact before"]
        look = f"{row['look']:.1f}"
        lines.append(f"| {name} | {row['reader']} | {look} | {ways} | {ratios} | {before} |")
    return "\n".join(lines)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", nargs="*", metavar="VIDEO")
    parser.add_argument("--rounds", type=int, default=20, help="clips of each (%(default)s)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor: what a clip takes of all cores, which counts where as many workers as "
        "cores read, and where other jobs run (default: wall)",
    )
    arguments = parser.parse_args(argv)
    clock = CLOCKS[arguments.clock]
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.videos or make_videos(folder)
        rows = {os.path.basename(path): measure(path, arguments.rounds, clock) for path in paths}
    print(
        f"ms by the {arguments.clock} clock of a training / validation clip, medians of "
        f"{arguments.rounds}; look: once for each file"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
