"""The check of one video file, as a worker process runs it.

Apart from :mod:`data.verify`, which is a script: workers cannot import what lives in ``__main__``.
"""

from typing import Any

from .container import VideoFacts
from .readers import count_decodable_frames, difference, forbid_mxnet, read_frames
from .sampler import EvenlySampling


class VerifyJob:
    """What a worker does: check one file.

    Parameters
    ----------
    quick
        Decode eight frames only.
    exact
        Compare frames with what FFmpeg gives when it decodes the file from its start.
    """

    def __init__(self, quick: bool, exact: bool = False) -> None:
        self.quick = quick
        self.exact = exact

    def prepare(self, memory: Any) -> None:
        """Renounce MXNet, which decord would want loaded first; there is no memory."""
        forbid_mxnet()

    def run(self, path: str) -> tuple[VideoFacts, str]:
        """Return (what is known of the file, what is wrong with it)."""
        if self.quick:
            _, facts = read_frames(path, _sample, retries=0)
            reason = facts.problem
        else:
            facts, reason = count_decodable_frames(path)
        if self.exact and not reason:
            reason = difference(path, facts, _sample(facts.frames))
        return facts, reason


def _sample(total: int) -> list[int]:
    """Return the first and last frame, and eight spread over the video."""
    clips = EvenlySampling(1, 1, num_times=8)
    return [0, total - 1] + [clips.sample(total, copy)[0] for copy in range(8)]
