"""The check of one video file, as a worker process runs it.

Apart from :mod:`data.verify`, which is a script: workers cannot import what lives in ``__main__``.
"""

import os
from typing import Any, NamedTuple

import numpy as np

from .container import SEQUENTIAL, Container, examine
from .readers import check_file, count_frames, forbid_mxnet, read_frames
from .sampler import EvenlySampling

# Frames that are compared between the readers, and how far apart their pixels may be: both convert
# colours with FFmpeg's swscale, in different versions.
SAMPLED, CLOSE = 8, 4


class Checked(NamedTuple):
    """What was found out about a file: ``reason`` says what is wrong, if anything is."""

    frames: int
    announced: int
    size: int
    reason: str
    container: Container


class VerifyJob:
    """What a worker does: check one file.

    Parameters
    ----------
    quick
        Decode eight frames only.
    exact
        Compare what both readers give with the frames of a decoding from the start.
    """

    def __init__(self, quick: bool, exact: bool = False) -> None:
        self.quick = quick
        self.exact = exact

    def prepare(self, memory: Any) -> None:
        """Renounce MXNet, which decord would want loaded first; there is no memory."""
        forbid_mxnet()

    def run(self, path: str) -> Checked:
        """Check a file."""
        size = check_file(path)
        facts = examine(os.path.abspath(path))
        if self.quick:
            _, total = read_frames(path, _sample, retries=0, how=facts.how)
            return Checked(total, total, size, "", facts)
        decoded, reason = count_frames(os.path.abspath(path), strict=True)
        announced = facts.announced or facts.packets or decoded
        if self.exact and not reason:
            reason = self._compare(path, facts)
        return Checked(decoded, announced, size, reason, facts)

    def _compare(self, path: str, facts: Container) -> str:
        """Return how the reader that is used differs from a decoding from the start, if it does."""
        truth, total = read_frames(path, _sample, retries=0, how=SEQUENTIAL)
        found, count = read_frames(path, _sample, retries=0, how=facts.how)
        if count != total:
            return f"{count} frames by one reader, {total} by the other"
        wrong = np.abs(found.astype(int) - truth).reshape(len(found), -1).max(1) > CLOSE
        return (
            f"{wrong.sum()} of {len(found)} frames differ between the readers"
            if wrong.any()
            else ""
        )


def _sample(total: int) -> list[int]:
    clips = EvenlySampling(1, 1, num_times=SAMPLED)
    return [0, total - 1] + [clips.sample(total, copy)[0] for copy in range(SAMPLED)]
