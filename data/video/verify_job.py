"""The check of one video file, as a worker process runs it.

Apart from :mod:`data.verify`, which is a script: workers cannot import what lives in ``__main__``.
"""

import os

from .readers import count_decodable_frames, read_frames
from .sampler import EvenlySampling


class VerifyJob:
    """What a worker does: check one file.

    Parameters
    ----------
    quick : bool
        Decode eight frames only.
    """

    def __init__(self, quick):
        self.quick = quick

    def run(self, path):
        """Return (frames that can be decoded, frames announced, size in bytes, reason)."""
        if not self.quick:
            decoded, announced, reason = count_decodable_frames(path)
            return decoded, announced, os.stat(path).st_size, reason

        def pick(total):
            clips = EvenlySampling(1, 1, num_times=8)
            return [0, total - 1] + [clips.sample(total, copy)[0] for copy in range(8)]

        _, total = read_frames(path, pick, retries=0)
        return total, total, os.stat(path).st_size, ""
