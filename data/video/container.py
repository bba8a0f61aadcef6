"""What a video file holds, and which reader gives exactly its frames: a look at the container.

The truth is what FFmpeg gives when it decodes a file from its start. decord, which jumps to frames,
gives others where pictures are not stored in the order in which they are shown, where a key frame
does not stand for itself, and where an edit list hides frames (dmlc/decord issues 83, 124, 195,
252, 325, 365, 373, 375). PyAV demuxes a file in about the time that opening it takes, and tells.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import numpy as np

from ..common.samples import UnreadableFile

# How frames are found: by decord; by PyAV from the last key frame that stands for itself; by PyAV
# from the start of the file. 0: not known yet.
UNKNOWN, DECORD, SEEK, SEQUENTIAL = range(4)
HOW = {DECORD: "decord", SEEK: "pyav, from key frames", SEQUENTIAL: "pyav, from the start"}
# Formats in which a time stamp can be found again exactly.
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Where decord 0.6.0 was right on every file without delay that was tried.
DECORD_FORMATS, DECORD_CODECS = (*SEEKABLE, "avi"), ("mpeg4", "h264")
# Pictures of H.264 and HEVC that nothing before them is needed for (ITU-T H.264 table 7-1, H.265
# table 7-1): instantaneous decoder refresh.
IDR = {"h264": (5,), "hevc": (19, 20)}


class VideoError(UnreadableFile):
    """A video that cannot be read."""

    kind = "video"


class Container(NamedTuple):
    """What was found out about a file.

    Attributes
    ----------
    how
        One of ``DECORD``, ``SEEK``, ``SEQUENTIAL``.
    format, codec
        FFmpeg's names.
    rate
        Frames per second, as announced; 0 where nothing is.
    seconds
        Announced duration; 0 where there is none.
    width, height
        As stored, before it is turned.
    turned
        Whether frames are to be turned or mirrored.
    packets
        Pictures in the file, hidden ones not counted; 0 where they were not looked at.
    announced
        Frames as the container has them; 0 where it does not say.
    """

    how: int
    format: str
    codec: str
    rate: float
    seconds: float
    width: int
    height: int
    turned: bool
    packets: int
    announced: int


class Index(NamedTuple):
    """Time stamps of the frames in the order in which they are shown, those of the safe key frames,
    and whether pictures are hidden by an edit list."""

    shown: list[int]
    keys: list[int]
    hidden: bool


def _av() -> Any:
    import av

    av.logging.set_level(av.logging.PANIC)
    return av


@contextlib.contextmanager
def opened(path: str, strict: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield (container, video stream) of a file; the best stream, as FFmpeg chooses.

    With ``strict`` the decoder takes no damage for a picture that can be guessed.

    Raises
    ------
    VideoError
        If it cannot be opened, has no video, or there is no decoder for it.
    """
    av = _av()
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None:
                held = sorted({other.type for other in container.streams})
                raise VideoError(path, f"it has no video ({', '.join(held) or 'nothing'} only)")
            if stream.codec_context is None:
                raise VideoError(path, f"there is no decoder for its codec {_codec_of(stream)}")
            # Threads would hand frames out in the same order, but take memory of each worker.
            stream.codec_context.thread_count = 1
            if strict:
                stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, UnicodeError, ValueError) as error:
        raise VideoError(path, f"{getattr(error, 'strerror', None) or error}") from None


def _codec_of(stream: Any) -> str:
    match = re.search(r"/(\S+)", str(stream))
    return match[1] if match else "(unknown)"


def matrix_of(frame: Any) -> Optional[np.ndarray]:
    """Return a frame's display matrix, (3, 3) int32, or None if it is shown as it is stored."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return np.frombuffer(bytes(data), np.int32, 9).reshape(3, 3)
    return None


def turn(image: np.ndarray, matrix: Optional[np.ndarray]) -> np.ndarray:
    """Turn and mirror an image (h, w, 3) as ``ffmpeg`` does by itself (fftools, autorotate).

    Angles other than quarter turns are left alone.
    """
    if matrix is None:
        return image
    (a, b, _), (c, d, _), _ = matrix.astype(np.float64)
    if not (a or c) or not (b or d):
        return image
    angle = np.degrees(np.arctan2(b / np.hypot(b, d), a / np.hypot(a, c))) % 360
    quarter = int(round(angle / 90)) % 4
    if quarter == 1:
        # Clockwise, or mirrored at the diagonal.
        return image.transpose(1, 0, 2) if c > 0 else np.rot90(image, -1)
    if quarter == 2:
        image = image[:, ::-1] if a < 0 else image
        return image[::-1] if d < 0 else image
    if quarter == 3:
        return np.rot90(image, 2).transpose(1, 0, 2) if c < 0 else np.rot90(image, 1)
    return image[::-1] if d < 0 else image


def _units(packet: bytes, codec: str) -> Iterator[int]:
    """Yield the types of the first units of an H.264 or HEVC picture."""
    view = packet[:4096]
    starts = [match.end() for match in re.finditer(b"\0\0\1", view)]
    if not view.startswith((b"\0\0\1", b"\0\0\0\1")):
        # Lengths of four bytes before each unit, as in MP4 and Matroska.
        starts, at = [], 0
        while at + 5 <= len(packet) and len(starts) < 16:
            starts.append(at + 4)
            at += 4 + int.from_bytes(packet[at : at + 4], "big")
    for start in starts:
        if start < len(packet):
            yield packet[start] & 31 if codec == "h264" else packet[start] >> 1 & 63


def index_of(container: Any, stream: Any) -> Optional[Index]:
    """Return where the frames of a file are; None if its time stamps do not tell.

    A key frame is safe if no picture that is stored behind it is shown before it, and, where the
    codec knows the difference, if it makes the decoder forget what was before.
    """
    codec = stream.codec_context.name
    shown, stored, safe = [], [], []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_corrupt:
            return None
        stored.append(packet.pts)
        if not packet.is_discard:
            shown.append(packet.pts)
        if packet.is_keyframe:
            wanted = IDR.get(codec)
            if wanted is None or any(unit in wanted for unit in _units(bytes(packet), codec)):
                safe.append(len(stored) - 1)
    if not shown or len(set(stored)) != len(stored):
        return None
    # Smallest time stamp from each picture on.
    rest = np.minimum.accumulate(np.array(stored)[::-1])[::-1]
    keys = [stored[place] for place in safe if rest[place] >= stored[place]]
    return Index(sorted(shown), keys, len(shown) != len(stored))


def examine(path: str) -> Container:
    """Look at a file and say how its frames are found.

    Raises
    ------
    VideoError
        See :func:`opened`; also if not one frame can be decoded.
    """
    with opened(path) as (container, stream):
        context = stream.codec_context
        kind, codec = container.format.name, context.name
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise VideoError(path, "not one frame of it can be decoded")
        turned = matrix_of(first) is not None
        facts = {
            "format": kind,
            "codec": codec,
            "rate": float(stream.average_rate or 0),
            "seconds": _seconds(container, stream),
            "width": int(first.width),
            "height": int(first.height),
            "turned": turned,
            "announced": int(stream.frames),
        }
        delay = bool(context.has_b_frames)
    with opened(path) as (container, stream):
        index = index_of(container, stream) if kind in DECORD_FORMATS else None
        alone = len(container.streams.video) == 1
    if index is None:
        return Container(SEQUENTIAL, packets=0, **facts)
    in_order = index.keys and index.keys[0] == index.shown[0]
    plain = in_order and alone and not (delay or turned or index.hidden)
    how = SEEK if kind in SEEKABLE and in_order else SEQUENTIAL
    if plain and codec in DECORD_CODECS and index.shown[0] == 0:
        how = DECORD
    return Container(how, packets=len(index.shown), **facts)


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else 0.0
