"""Frames of a video file, by decord where it gives the right ones, else by PyAV.

The only module of this project that imports decord; :mod:`.container` has PyAV, and decides.

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
from typing import Any, Callable, Optional

import numpy as np

from glore_common import GloReError, UsageError

from . import container
from .container import DECODERS, DECORD, MOV, QUICKER_BY_PYAV, VideoError, VideoFacts

# Mean difference of pixels that is no difference of frames.
MOST_APART = 3.0


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


def by_decord(facts: VideoFacts) -> bool:
    """Return whether decord reads a file: where its frames are right, and it is not slower."""
    return facts.route == DECORD and facts.codec not in QUICKER_BY_PYAV


class _DecordError(VideoError):
    """decord cannot open a file."""


def _open_decord(path: str) -> Any:
    decord = _decord()
    try:
        return decord.VideoReader(path, num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise _DecordError(path, _first_line(error)) from None
    except UnicodeEncodeError:
        raise _DecordError(path, "decord opens names in UTF-8 only") from None


def _get_batch(reader: Any, path: str, indices: Sequence[int]) -> np.ndarray:
    """Return frames (rising indices) of decord's reader."""
    decord = _decord()
    try:
        # A plain list: a scalar crashes decord.
        return reader.get_batch(list(indices)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise VideoError(path, _first_line(error)) from None


def _turned_by_decord(facts: VideoFacts) -> int:
    """Return the quarter turns that decord has made: those of the angle, in MP4 and MOV."""
    turn = facts.turn
    if facts.container != MOV:
        return 0
    # A picture that is mirrored left to right counts as upside down, and the other way round.
    return 2 - turn.quarters if turn.mirrored and turn.quarters % 2 == 0 else turn.quarters


def _read_by_decord(path: str, facts: VideoFacts, wanted: np.ndarray, reader: Any) -> np.ndarray:
    if wanted[-1] >= len(reader):
        raise VideoError(path, f"frame {wanted[-1]} was asked for, it has {len(reader)}")
    return facts.turn.apply(_get_batch(reader, path, wanted.tolist()), _turned_by_decord(facts))


def known_facts(path: str, facts: Optional[VideoFacts] = None) -> VideoFacts:
    """Return what is known of a file: ``facts`` if they are of the file as it is.

    Raises
    ------
    VideoError
        It cannot be read.
    """
    path = os.path.abspath(path)
    size = _check_file(path)
    if facts is not None and facts.size == size:
        return facts
    return _looked(path, size, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _looked(path: str, size: int, modified: int) -> VideoFacts:
    """Look at a file once while it stays as it is: several clips of it may be wanted."""
    del modified
    return container.look(path, size)


def read_frames(
    path: str,
    pick: Callable[[int], Sequence[int]],
    retries: int = 1,
    facts: Optional[VideoFacts] = None,
    decoder: str = "auto",
) -> tuple[np.ndarray, VideoFacts]:
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
    facts
        What is known of the file; not used if its size has changed.
    decoder
        One of :data:`data.video.container.DECODERS`.

    Returns
    -------
    frames
        (len(indices), height, width, 3) uint8, RGB, contiguous.
    facts
        What is known of the file now.

    Raises
    ------
    VideoError
        The file is missing, empty, damaged, or has no video or no frames.
    """
    if decoder not in DECODERS:
        raise UsageError(f"decoder must be one of {', '.join(DECODERS)}; got {decoder!r}.")
    path = os.path.abspath(path)
    size = _check_file(path)
    if facts is not None and facts.size != size:
        facts = None
    indices: Optional[np.ndarray] = None
    while True:
        try:
            facts = facts or known_facts(path)
            reader = None
            if decoder == "decord" or (decoder == "auto" and by_decord(facts)):
                try:
                    reader = _open_decord(path)
                except _DecordError as error:
                    if decoder == "decord" or retries:
                        raise
                    facts = _without_decord(path, size, error)
                else:
                    if decoder == "auto" and len(reader) != facts.announced:
                        facts, reader = container.look(path, size, by_decord=False), None
            if indices is None:
                total = facts.frames if reader is None else min(facts.frames, len(reader))
                indices = np.asarray(pick(total), np.int64)
            wanted, places = np.unique(indices, return_inverse=True)
            if wanted[0] < 0 or wanted[-1] >= facts.frames:
                raise VideoError(path, f"frame {wanted[-1]} was asked for, it has {facts.frames}")
            if reader is None:
                try:
                    frames = container.read(path, facts, wanted.tolist())
                except VideoError:
                    # What was thought to be plain is damaged: read it as FFmpeg does.
                    if facts.route != DECORD or retries:
                        raise
                    facts = container.look(path, size, by_decord=False)
                    frames = container.read(path, facts, wanted.tolist())
            else:
                frames = _read_by_decord(path, facts, wanted, reader)
            if len(wanted) != len(indices) or (wanted != indices).any():
                frames = frames[places]
            return np.ascontiguousarray(frames), facts
        except VideoError:
            if not retries:
                raise
        retries -= 1
        # A file on a network may come back; a damaged one costs this pause once.
        time.sleep(0.05)


def _without_decord(path: str, size: int, error: VideoError) -> VideoFacts:
    """Return how PyAV reads what decord does not open; a damaged file is left at decord's word."""
    facts = container.look(path, size, by_decord=False)
    if facts.problem:
        raise error
    return facts


def count_decodable_frames(path: str) -> tuple[VideoFacts, str]:
    """Decode a whole video and return how many frames it really has.

    Returns
    -------
    facts
        ``frames`` are those before any damage, unless FFmpeg reads on behind it.
    reason
        What is damaged, or an empty string.

    Raises
    ------
    VideoError
        The file cannot be opened or not even its first frame decoded.
    """
    path = os.path.abspath(path)
    facts = container.look(path, _check_file(path))
    if facts.route == DECORD:
        # What decord does not open as it should, PyAV reads.
        _, facts = read_frames(path, lambda total: [0], facts=facts)
    whole, reason = container.count_undamaged(path)
    if not reason and whole == facts.frames:
        return facts, ""
    reason = f"only {whole} of {facts.announced} frames can be decoded: {reason or facts.problem}"
    return (facts._replace(frames=whole) if facts.route == DECORD else facts), reason


def difference(path: str, facts: VideoFacts, indices: Sequence[int], decoder: str = "auto") -> str:
    """Compare frames as they are read with those of the whole file, decoded from its start.

    Returns
    -------
    str
        What differs, or an empty string.
    """
    path, indices = os.path.abspath(path), sorted(set(indices))
    read, _ = read_frames(path, lambda total: indices, facts=facts, decoder=decoder)
    exact = container.read(path, facts._replace(route=container.FROM_START), indices)
    for index, one, other in zip(indices, read, exact):
        if one.shape != other.shape:
            return f"frame {index} has {one.shape[1]} x {one.shape[0]} pixels"
        # The readers' conversions to RGB may round differently.
        apart = float(np.abs(one.astype(np.int16) - other).mean())
        if apart > MOST_APART:
            return f"frame {index} is {apart:.1f} of 255 away from what FFmpeg gives"
    return ""
