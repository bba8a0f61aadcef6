"""What a worker process of the server does with an uploaded file; nothing here needs MXNet.

A file from anywhere is read in such a process: one that crashes a decoder, hangs it or wants all
memory costs its own request, and no other.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import cv2
import numpy as np

from data.common.samples import SAMPLE, UnreadableFile, generator
from data.common.transforms import resize_clip
from data.video.container import announced
from data.video.readers import read_frames
from data.video.windows import (
    Length,
    WindowDataset,
    WindowSampling,
    grouped,
    length_of,
    window_starts,
)

# How files begin that are given to a decoder. Others are refused: FFmpeg would follow a playlist to
# other files and addresses.
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8", b"II*\0", b"MM\0*")
VIDEO_STARTS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"\0\0\1\xba",  # MPEG program stream
    b"\0\0\1\xb3",  # MPEG-1 and -2 video
    b"FLV\1",
    b"OggS",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # Windows Media
)
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
STRIP_FRAMES, STRIP_HEIGHT, QUALITY = 8, 96, 85


class Asked(NamedTuple):
    """What is wanted besides the classes: windows, a strip of frames, the frames of the clip."""

    windows: bool = False
    strip: bool = False
    clip: bool = False


class Found(NamedTuple):
    """What was found in a file.

    Attributes
    ----------
    length
        None of an image.
    views, rows
        Views of the file as a whole, and with those of the windows, which follow in the memory.
    windows
        First frame, and the frame behind the last, of each window.
    strip
        (seconds, JPEG) of frames spread over the file.
    clip
        JPEG of each frame that the network sees of the first view.
    """

    length: Optional[Length]
    views: int
    rows: int
    windows: tuple[tuple[int, int], ...] = ()
    strip: tuple[tuple[float, bytes], ...] = ()
    clip: tuple[bytes, ...] = ()


def kind_of(start: bytes) -> Optional[str]:
    """Return 'video' or 'image' by a file's first bytes (12 or more), or None."""
    if start.startswith(IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return "image"
    if start.startswith(VIDEO_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"AVI "):
        return "video"
    if start[4:8] in MP4_BOXES:
        return "image" if start[8:12] in (b"avif", b"avis") else "video"
    return None


def jpeg(frame: np.ndarray) -> bytes:
    """Return an RGB frame as JPEG."""
    _, content = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return content.tobytes()


def _thumbnail(frame: np.ndarray) -> bytes:
    width = max(1, round(frame.shape[1] * STRIP_HEIGHT / frame.shape[0]))
    return jpeg(resize_clip(frame[None], width, STRIP_HEIGHT, cv2.INTER_AREA)[0])


class UploadJob:
    """Reads an uploaded file into a slot of the shared memory.

    Parameters
    ----------
    dataset
        How files are shown to the network; of no file.
    interval
        Frames from one of a clip to the next; None for images.
    normalisation
        (mean, std) of the network's input.
    limits
        (slots, windows, seconds, pixels): slots of the memory, most windows of a video, its longest
        duration, most pixels of a frame.
    """

    def __init__(
        self,
        dataset: Any,
        interval: Optional[int],
        normalisation: tuple[Sequence[float], Sequence[float]],
        limits: tuple[int, int, float, int],
    ) -> None:
        self.dataset = dataset
        self.normalisation = normalisation
        self.slots, self.most_windows, self.most_seconds, self.most_pixels = limits
        self.video = interval is not None
        shape = dataset.clip_shape if self.video else (3, *dataset.size)
        self.interval = interval
        self.views = dataset.views * (dataset.num_clips if self.video else 1)
        # A window is shown in as many crops as the whole.
        self.rows = self.views + (self.most_windows * dataset.views if self.video else 0)
        self.shape = tuple(shape)
        self._memory: Optional[np.ndarray] = None

    @property
    def memory_size(self) -> int:
        """Bytes that :meth:`attach` needs."""
        return 4 * self.slots * self.rows * int(np.prod(self.shape))

    def attach(self, memory: Any) -> None:
        """Use ``memory``, a writable buffer."""
        numbers = self.memory_size // 4
        whole = np.frombuffer(memory, np.float32, numbers)
        self._memory = whole.reshape(self.slots, self.rows, *self.shape)

    def detach(self) -> None:
        """Let go of the memory."""
        self._memory = None

    def prepare(self, memory: Any) -> None:
        """Get a worker process ready."""
        self.attach(memory)
        self.dataset.prepare()

    def rows_of(self, slot: int, count: int) -> np.ndarray:
        """Return the first views in a slot: (count, 3, …)."""
        assert self._memory is not None, "no memory was attached"
        return self._memory[slot, :count]

    def run(self, slot: int, path: str, asked: Asked) -> Found:
        """Read a file.

        Raises
        ------
        UnreadableFile
            If it is no file of the network's kind, beyond the limits, or damaged.
        """
        with open(path, "rb") as stream:
            kind = kind_of(stream.read(16))
        wanted = "video" if self.video else "image"
        if kind != wanted:
            found = f"an {kind}" if kind == "image" else f"a {kind}"
            what = found if kind else "neither a video nor an image of a known kind"
            raise UnreadableFile(path, f"it is {what}; this network reads {wanted}s")
        return self._video(slot, path, asked) if self.video else self._image(slot, path, asked)

    def _image(self, slot: int, path: str, asked: Asked) -> Found:
        dataset = self.dataset.with_files([path])
        array = dataset.load(dataset.request(0), generator(0, SAMPLE, 0, 0, 0)).array
        self.rows_of(slot, self.views)[:] = array
        seen = (jpeg(self._pixels(array[0][:, None])[0]),)
        return Found(None, self.views, self.views, (), ((0.0, seen[0]),) if asked.strip else (),
                     seen if asked.clip else ())  # fmt: skip

    def _check(self, path: str, seconds: float) -> None:
        if seconds > self.most_seconds:
            raise UnreadableFile(
                path, f"it lasts {seconds:.0f} s, more than the {self.most_seconds:.0f} s allowed"
            )

    def _video(self, slot: int, path: str, asked: Asked) -> Found:
        said = announced(path)
        if said.width * said.height > self.most_pixels:
            raise UnreadableFile(
                path,
                f"its frames of {said.width} x {said.height} pixels are larger than the "
                f"{self.most_pixels:,} pixels allowed",
            )
        self._check(path, said.seconds)
        length = length_of(path)
        self._check(path, length.frames / length.rate)
        dataset = self.dataset.with_files([path])
        memory = self.rows_of(slot, self.rows)
        place = 0
        for clip in range(len(dataset)):
            # As the loader of testing draws: by (epoch, item, attempt).
            array = dataset.load(dataset.request(clip), generator(0, SAMPLE, 0, clip, 0)).array
            memory[place : place + len(array)] = array
            place += len(array)
        windows = self._windows(dataset, length, memory[place:]) if asked.windows else ()
        rows = place + len(windows) * dataset.views
        strip = self._strip(path, length) if asked.strip else ()
        pixels = self._pixels(memory[0]) if asked.clip else ()
        seen = tuple(jpeg(frame) for frame in pixels)
        return Found(length, self.views, rows, windows, strip, seen)

    def _windows(
        self, dataset: Any, length: Length, memory: np.ndarray
    ) -> tuple[tuple[int, int], ...]:
        num = self.shape[1]
        span = (num - 1) * self.interval + 1
        # Each begins in the middle of the one before.
        starts = window_starts(length, span / (2 * length.rate), span, self.most_windows)
        groups = grouped(0, starts, len(starts))
        windows = WindowDataset(dataset, WindowSampling(num, self.interval), groups)
        array = windows.load(windows.request(0), generator(0, SAMPLE, 0, 0, 0)).array
        memory[: len(array)] = array
        return tuple((start, min(start + span, length.frames)) for start in starts)

    def _strip(self, path: str, length: Length) -> tuple[tuple[float, bytes], ...]:
        count = min(STRIP_FRAMES, length.frames)
        wanted = [int((number + 0.5) * length.frames / count) for number in range(count)]
        frames, _ = read_frames(path, lambda total: [min(frame, total - 1) for frame in wanted])
        return tuple(
            (number / length.rate, _thumbnail(frame)) for number, frame in zip(wanted, frames)
        )

    def _pixels(self, array: np.ndarray) -> np.ndarray:
        """Undo the normalisation: (3, T, h, w) -> (T, h, w, 3) uint8."""
        mean, std = (np.asarray(value).reshape(3, 1, 1, 1) for value in self.normalisation)
        pixels = np.clip(255 * (array * std + mean) + 0.5, 0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))


def display_name(text: str) -> str:
    """Return the last part of a name that a client gave, without control characters."""
    name = os.path.basename(text.replace("\\", "/"))
    return "".join(character for character in name if character.isprintable())[:200]
