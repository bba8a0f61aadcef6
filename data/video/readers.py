"""Frames of a video file, by decord where it is exact, else by PyAV.

Which it is says :mod:`data.video.container`. This is the only module that imports decord.

decord 0.6.0 must be loaded after MXNet: the other order ends the process with a segmentation fault
at ``import mxnet``. Hence decord is imported at the first use, by :func:`_decord`, which loads
MXNet first; a worker process, which has no use for MXNet, calls :func:`forbid_mxnet` instead, after
which ``import mxnet`` raises ImportError. Either way the deadly order cannot happen.
"""

import bisect
import functools
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

import numpy as np

from glore_common import GloReError

from .container import (
    DECORD,
    SEEK,
    UNKNOWN,
    VideoError,
    examine,
    index_of,
    matrix_of,
    opened,
    turn,
)


def forbid_mxnet() -> None:
    """Promise that this process never imports MXNet; ``import mxnet`` fails from now on."""
    sys.modules.setdefault("mxnet", None)  # type: ignore[arg-type]


@functools.cache
def _decord():
    """Import decord, MXNet before it unless this process has renounced MXNet."""
    if "mxnet" not in sys.modules:
        if "decord" in sys.modules:
            raise GloReError(
                "decord was imported before mxnet; importing mxnet now would crash the process "
                "(decord 0.6.0). Import mxnet first, or leave importing decord to data/."
            )
        import mxnet_compat  # noqa: F401
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord


def check_file(path: str) -> int:
    """Raise VideoError for what the operating system can tell; return the size in bytes."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # a zero byte in the name
        raise VideoError(path, getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        # A pipe would be waited for, /dev/zero read until memory is full.
        raise VideoError(path, "it is a folder, a pipe or a device, and no file")
    if status.st_size == 0:
        raise VideoError(path, "the file is empty")
    if not os.access(path, os.R_OK):
        raise VideoError(path, "no permission to read it")
    return status.st_size


def _first_line(error):
    """Return the telling part of a decord message, which carries a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((text for text in lines if not text.startswith("Stack trace")), "no message")
    # "[05:20:13] /github/workspace/src/video/video_reader.cc:151: Check failed: st_nb >= 0 ..."
    return re.sub(r"\[[\d:]+\] \S+\.(cc|h):\d+: ", "", line)


def how_to_read(path: str, decoder: str = "auto") -> int:
    """Return how the frames of a file are found: one of the ways of :mod:`data.video.container`.

    Parameters
    ----------
    path
        The file.
    decoder
        'auto': by decord where that is exact; 'decord' or 'pyav': by that one.

    Raises
    ------
    VideoError
        If the file cannot be read.
    """
    path = os.path.abspath(path)
    check_file(path)
    if decoder == "decord":
        return DECORD
    how = examine(path).how
    return SEEK if decoder == "pyav" and how == DECORD else how


def read_frames(
    path: str,
    pick: Callable[[int], Sequence[int]],
    retries: int = 1,
    how: int = UNKNOWN,
    counted: int = 0,
) -> tuple[np.ndarray, int]:
    """Read chosen frames of a video: those that FFmpeg gives when it decodes it from its start.

    Parameters
    ----------
    path
        The file. A relative path is made absolute (FFmpeg would take ``a:b.mp4`` for a protocol).
    pick
        ``pick(total)`` returns the indices (0-based, any order, repeats allowed) of the frames
        wanted from a video of ``total`` frames. Called once.
    retries
        How often to open the file anew after a failure.
    how
        From :func:`how_to_read`, which is asked where it is not given.
    counted
        Frames that were counted before: a file that is read from its start is otherwise decoded
        twice, once to count.

    Returns
    -------
    frames
        (len(indices), height, width, 3) uint8, RGB, turned and mirrored as the file says.
    total
        Number of frames.

    Raises
    ------
    VideoError
        The file is missing, empty, damaged, or has no video or no frames.
    """
    path = os.path.abspath(path)
    check_file(path)
    indices: Optional[np.ndarray] = None
    total = 0

    def choose(number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the wanted indices in order, each once, and where each of them goes."""
        nonlocal indices, total
        if indices is None:
            total = number
            if total < 1:
                raise VideoError(path, "it has no frames")
            indices = np.asarray(pick(total), np.int64)
        wanted, places = np.unique(indices, return_inverse=True)
        if wanted[-1] >= number or wanted[0] < 0:
            raise VideoError(path, f"frame {wanted[-1]} was asked for, it has {number}")
        return wanted, places.reshape(-1)

    attempt = 0
    while True:
        try:
            way = how or how_to_read(path)
            if way == DECORD:
                frames = _by_decord(path, choose)
            else:
                frames = _by_pyav(path, choose, way, counted)
            return frames, total
        except VideoError:
            if attempt == retries:
                raise
        attempt += 1
        # A file on a network may come back; a damaged one costs this pause once.
        time.sleep(0.05)


_Choose = Callable[[int], tuple[np.ndarray, np.ndarray]]


def _by_decord(path: str, choose: _Choose) -> np.ndarray:
    decord = _decord()
    try:
        reader = decord.VideoReader(path, num_threads=1)
        wanted, places = choose(len(reader))
        # A plain list: a scalar crashes decord.
        return reader.get_batch(wanted.tolist()).asnumpy()[places]
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise VideoError(path, _first_line(error)) from None


class _NotFound(Exception):
    """The time stamps of a file's pictures are not those of its frames."""


def _by_pyav(path: str, choose: _Choose, how: int, counted: int) -> np.ndarray:
    index = None
    if how == SEEK:
        with opened(path) as (container, stream):
            index = index_of(container, stream)
    if index is not None and index.keys and index.keys[0] == index.shown[0]:
        wanted, places = choose(len(index.shown))
        try:
            frames = _from_keys(path, [index.shown[place] for place in wanted], index.keys)
            return np.stack(frames)[places]
        except _NotFound:
            counted = 0
    wanted, places = choose(counted or count_frames(path)[0])
    frames = []
    for number, frame in enumerate(decoded(path)):
        if number == wanted[len(frames)]:
            frames.append(image_of(frame))
            if len(frames) == len(wanted):
                return np.stack(frames)[places]
    raise VideoError(path, f"frame {wanted[len(frames)]} was asked for, it has {number + 1}")


def _from_keys(path: str, stamps: list[int], keys: list[int]) -> list[np.ndarray]:
    """Return the frames with these rising time stamps, decoding from the key frames before them."""
    frames: list[np.ndarray] = []
    with opened(path) as (container, stream):
        position = None
        for stamp in stamps:
            key = keys[bisect.bisect_right(keys, stamp) - 1]
            if position is None or key > position:
                container.seek(key, stream=stream, backward=True)
                found = iter(container.decode(stream))
                position = key - 1
            while position < stamp:
                frame = next(found, None)
                if frame is None or frame.pts is None or frame.pts > stamp:
                    raise _NotFound
                # What precedes the key frame belongs to where the container really went.
                position = max(position, frame.pts) if frame.pts >= key else position
            if position != stamp:
                raise _NotFound
            frames.append(image_of(frame))
    return frames


def decoded(path: str, strict: bool = False) -> Iterator[Any]:
    """Yield the frames of a file from its start, up to where it is damaged."""
    with opened(path, strict) as (container, stream):
        yield from container.decode(stream)


def image_of(frame: Any) -> np.ndarray:
    """Return a frame of PyAV as it is to be shown: (height, width, 3) uint8, RGB."""
    return np.ascontiguousarray(turn(frame.to_ndarray(format="rgb24"), matrix_of(frame)))


def count_frames(path: str, strict: bool = False) -> tuple[int, str]:
    """Return how many frames can be decoded, and why no more, if the file is damaged.

    With ``strict`` damage that a decoder would cover up ends the count as well.

    Raises
    ------
    VideoError
        If not one can.
    """
    number, reason = 0, ""
    try:
        for number, _ in enumerate(decoded(path, strict), 1):  # noqa: B007  (what it is at the end counts)
            pass
    except VideoError as error:
        if not number:
            raise
        reason = error.reason
    return number, reason
