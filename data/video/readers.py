"""Frames of a video file, by decord. The only module of this project that imports decord.

decord 0.6.0 must be loaded after MXNet: the other order ends the process with a segmentation fault
at ``import mxnet``. Hence decord is imported at the first use, by :func:`_decord`, which loads
MXNet first; a worker process, which has no use for MXNet, calls :func:`forbid_mxnet` instead, after
which ``import mxnet`` raises ImportError. Either way the deadly order cannot happen.
"""

import functools
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from typing import Callable

import numpy as np

from glore_common import GloReError

from ..common.samples import UnreadableFile


class VideoError(UnreadableFile):
    """A video that cannot be read."""

    kind = "video"


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


def _check_file(path):
    """Raise VideoError for what the operating system can tell; return the size in bytes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from None
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


def read_frames(
    path: str, pick: Callable[[int], Sequence[int]], retries: int = 1
) -> tuple[np.ndarray, int]:
    """Read chosen frames of a video.

    Parameters
    ----------
    path
        The file. A relative path is made absolute (FFmpeg would take ``a:b.mp4`` for a protocol).
    pick
        ``pick(total)`` returns the indices (0-based, any order, repeats allowed) of the frames
        wanted from a video of ``total`` frames. Called once.
    retries
        How often to open the file anew after a failure.

    Returns
    -------
    frames
        (len(indices), height, width, 3) uint8, RGB.
    total
        Number of frames that the container announces.

    Raises
    ------
    VideoError
        The file is missing, empty, damaged, or has no video or no frames.
    """
    path = os.path.abspath(path)
    _check_file(path)
    decord = _decord()
    indices = None
    attempt = 0
    while True:
        try:
            reader = decord.VideoReader(path, num_threads=1)
            if indices is None:
                total = len(reader)
                if total < 1:
                    raise VideoError(path, "it has no frames")
                indices = np.asarray(pick(total), np.int64)
            wanted, places = np.unique(indices, return_inverse=True)
            if wanted[-1] >= len(reader) or wanted[0] < 0:
                raise VideoError(path, f"frame {wanted[-1]} was asked for, it has {len(reader)}")
            # A plain list: a scalar crashes decord.
            return reader.get_batch(wanted.tolist()).asnumpy()[places], total
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            if attempt == retries:
                raise VideoError(path, _first_line(error)) from None
        attempt += 1
        # A file on a network may come back; a damaged one costs this pause once.
        time.sleep(0.05)


def count_decodable_frames(path: str, batch: int = 32) -> tuple[int, int, str]:
    """Decode a whole video and return how many frames it really has.

    Parameters
    ----------
    path
    batch
        Frames held in memory at a time.

    Returns
    -------
    decoded
        Frames before the ``batch`` in which decoding failed. Where that is, is not sharp in a
        damaged H.264 file: decord decodes ahead and notices damage earlier or later, from one
        reading to the next.
    announced
        Frames that the container announces.
    reason
        Why decoding stopped early, or an empty string.

    Raises
    ------
    VideoError
        The file cannot be opened or not even its first frame decoded.
    """
    path = os.path.abspath(path)
    _check_file(path)
    decord = _decord()
    try:
        reader = decord.VideoReader(path, num_threads=1)
        announced = len(reader)
        reader[0]
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise VideoError(path, _first_line(error)) from None
    decoded = 0
    try:
        while decoded < announced:
            reader.get_batch(list(range(decoded, min(decoded + batch, announced))))
            decoded = min(decoded + batch, announced)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        return decoded, announced, _first_line(error)
    return decoded, announced, ""
