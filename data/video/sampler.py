"""Which frames of a video make a clip.

The positions are those of facebookresearch/GloRe (``test/golden/data_and_schedule.json``); unlike
there, randomness comes from a generator passed in.
"""

from typing import Any

import numpy as np

from glore_common import UsageError


def _check(num: int, interval: int) -> None:
    if num < 1 or interval < 1:
        raise UsageError(
            f"a clip needs at least 1 frame and an interval of at least 1, got {num} x {interval}."
        )


def _frames_in_turn(num, range_max):
    """Return what a video too short for the clip gives: its frames in turn, again and again."""
    return [position % range_max for position in range(num)]


class RandomSampling:
    """A clip of ``num`` frames, ``interval`` apart, that starts anywhere in the video.

    Parameters
    ----------
    num
        Frames in a clip.
    interval
        Distance of neighbouring frames.
    speed
        The interval is multiplied by a factor drawn uniformly from this range; a video too short
        for the drawn factor lowers the upper end.
    """

    def __init__(
        self, num: int, interval: int = 1, speed: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        _check(num, interval)
        if not 0 < speed[0] <= speed[1]:
            raise UsageError(f"speed must be a rising pair of positive factors, got {speed}.")
        self.num = num
        self.interval = interval
        self.speed = (speed[0], speed[1])

    def sample(self, range_max: int, rng: Any) -> list[int]:
        """Return the frame indices of one clip.

        Parameters
        ----------
        range_max
            Number of frames of the video, at least 1.
        rng
            A ``numpy.random.Generator`` or ``RandomState``. Two numbers are drawn from it, none
            when the video is shorter than the clip.
        """
        if self.num == 1:
            return [int(rng.choice(range_max))]
        slowest = self.speed[0]
        fastest = min(self.speed[1], (range_max - 1) / ((self.num - 1) * self.interval))
        if fastest < slowest:
            return _frames_in_turn(self.num, range_max)
        # The factor is drawn also when the range is a single value: the golden positions depend
        # on how many numbers are taken from the generator.
        step = rng.uniform(slowest, fastest) * self.interval
        spare = (range_max - 1) - (self.num - 1) * step
        start = rng.uniform(0, spare)
        return [int(start + position * step) for position in range(self.num)]

    def at_interval(self, interval: int) -> "RandomSampling":
        """Return the same with another interval."""
        return RandomSampling(self.num, interval, self.speed)

    def pick(self, range_max: int, rng: Any, copy_id: int) -> list[int]:
        """Return :meth:`sample`; the number of the copy plays no part."""
        del copy_id
        return self.sample(range_max, rng)


class EvenlySampling:
    """``num_times`` clips of ``num`` frames spread evenly over the video.

    Clips that fit side by side leave equal gaps before, between and after them; otherwise the
    first starts at the first frame, the last ends at the last frame and they overlap equally.

    Parameters
    ----------
    num, interval
        As for :class:`RandomSampling`.
    num_times
        Number of clips (copies) of a video.
    """

    def __init__(self, num: int, interval: int = 1, num_times: int = 1) -> None:
        _check(num, interval)
        if num_times < 1:
            raise UsageError(f"at least one clip of a video is needed, got {num_times}.")
        self.num = num
        self.interval = interval
        self.num_times = num_times

    def sample(self, range_max: int, copy_id: int = 0) -> list[int]:
        """Return the frame indices of copy ``copy_id`` (0 .. num_times - 1, then again from 0).

        Parameters
        ----------
        range_max
            Number of frames of the video, at least 1.
        copy_id
        """
        length = (self.num - 1) * self.interval + 1
        if length > range_max:
            return _frames_in_turn(self.num, range_max)
        copy_id %= self.num_times
        gaps = range_max - length * self.num_times
        if gaps >= 0:
            # Rounded up, in whole numbers: -(-a // b) is the ceiling of a / b.
            start = copy_id * length - (-(copy_id + 1) * gaps // (self.num_times + 1))
        else:
            start = copy_id * (range_max - length) // (self.num_times - 1)
        return np.arange(start, start + length, self.interval).tolist()

    def at_interval(self, interval: int) -> "EvenlySampling":
        """Return the same with another interval."""
        return EvenlySampling(self.num, interval, self.num_times)

    def pick(self, range_max: int, rng: Any, copy_id: int) -> list[int]:
        """Return :meth:`sample`; the generator is not used."""
        del rng
        return self.sample(range_max, copy_id)
