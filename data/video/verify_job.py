"""The check of one video file, as a worker process runs it.

Apart from :mod:`data.verify`, which is a script: workers cannot import what lives in ``__main__``.
"""

import os
from typing import Any

from .readers import count_decodable_frames, forbid_mxnet, read_frames
from .sampler import EvenlySampling


class VerifyJob:
    """What a worker does: check one file; ``quick``: decode eight frames only."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    def prepare(self, memory: Any) -> None:
        """Renounce MXNet, which decord would want loaded first; there is no memory."""
        forbid_mxnet()

    def run(self, path: str) -> tuple[int, int, int, str]:
        """Return (frames that can be decoded, frames announced, size in bytes, reason)."""
        if not self.quick:
            decoded, announced, reason = count_decodable_frames(path)
            return decoded, announced, os.stat(path).st_size, reason

        def pick(total):
            clips = EvenlySampling(1, 1, num_times=8)
            return [0, total - 1] + [clips.sample(total, copy)[0] for copy in range(8)]

        _, total = read_frames(path, pick, retries=0)
        return total, total, os.stat(path).st_size, ""
