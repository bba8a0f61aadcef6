"""Windows of long videos: clips that begin at given frames, made in any process without MXNet."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from ..common.samples import Dataset, Sample
from .dataset import VideoDataset
from .readers import known_facts

# Frames per second of a file that does not say.
USUAL_RATE = 25.0


class Length(NamedTuple):
    """Frames of a video, and how many of them make a second."""

    frames: int
    rate: float


class WindowSampling:
    """Clips of ``num`` frames, ``interval`` apart, that begin at given frames, one after another.

    A video too short for one gives what :class:`data.video.sampler.EvenlySampling` gives of it:
    its frames in turn, again and again.
    """

    def __init__(self, num: int, interval: int) -> None:
        self.num = num
        self.interval = interval

    def at_interval(self, interval: int) -> "WindowSampling":
        """Return the same with another interval."""
        return WindowSampling(self.num, interval)

    def pick(self, range_max: int, rng: Any, copy_id: Any) -> list[int]:
        """Return the indices of the frames of the clips that begin at the frames ``copy_id``."""
        del rng
        if (self.num - 1) * self.interval + 1 > range_max:
            return [place % range_max for place in range(self.num)] * len(copy_id)
        wanted = range(0, self.num * self.interval, self.interval)
        return [min(start + frame, range_max - 1) for start in copy_id for frame in wanted]


def length_of(path: str) -> Length:
    """Return how long a video is.

    Raises
    ------
    VideoError
        If it cannot be read.
    """
    facts = known_facts(path)
    return Length(facts.frames, facts.rate or USUAL_RATE)


def window_starts(
    length: Length, stride: float, span: int, most: Optional[int] = None
) -> list[int]:
    """Return the frames at which windows begin.

    Parameters
    ----------
    length
        Of the video.
    stride
        Seconds from one window to the next.
    span
        Frames from the first to the last of a window, both counted. The last window is the last one
        that is whole; a video shorter than that has one.
    most
        As many at most, evenly spread.
    """
    step = stride * length.rate
    last = max(0, length.frames - span)
    count = 1 + int(last / step + 1e-9)
    starts = [min(last, round(number * step)) for number in range(count)]
    if most is not None and count > most:
        starts = [round(last * number / max(1, most - 1)) for number in range(most)]
    return sorted(set(starts))


class LengthDataset(Dataset):
    """The lengths of videos as samples: (1, 2) float32, frames and frames per second."""

    kind = "video"
    advice = "Remove the bad files from what is read."

    def __init__(self, clips: VideoDataset) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips.video_list.rows)

    @property
    def origin(self) -> str:
        """Where the videos come from."""
        return self.clips.origin

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (1, 2)."""
        return (1, 2)

    def name(self, index: int) -> str:
        """Return the file."""
        return self.clips.video_list.full_path(index)

    def request(self, index: int) -> str:
        """Return the file."""
        return self.name(index)

    def prepare(self) -> None:
        """Renounce MXNet."""
        self.clips.prepare()

    def load(self, request: str, rng: np.random.Generator) -> Sample:
        """Look at one file."""
        return Sample(np.array([length_of(request)], np.float32), 0)


def grouped(row: int, starts: Sequence[int], size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return the windows of a video in groups of ``size`` that are read together.

    The last group is filled up with its last window.
    """
    groups = [tuple(starts[at : at + size]) for at in range(0, len(starts), size)]
    return [(row, group + group[-1:] * (size - len(group))) for group in groups]


class WindowDataset(Dataset):
    """Groups of windows of videos as samples: opening a long file for each would take longest.

    Parameters
    ----------
    clips
        How clips are made, and of which videos.
    sampler
        Which frames make a window.
    groups
        Row of a video, and the frames that windows of it begin at, equally many in each; see
        :func:`grouped`.
    """

    kind = "video"
    advice = LengthDataset.advice

    def __init__(
        self,
        clips: VideoDataset,
        sampler: WindowSampling,
        groups: Sequence[tuple[int, tuple[int, ...]]],
    ) -> None:
        # Its own copy, of the same files, whose clips are all windows of a group.
        files = [clips.video_list.full_path(row) for row in range(len(clips.video_list.rows))]
        self.size = len(groups[0][1])
        self.crops, self.clip_shape = clips.views, clips.clip_shape
        self.views = self.size * self.crops
        channels, num, *sides = clips.clip_shape
        self.clips = clips.with_files(files)
        self.clips.num_clips = 1
        self.clips.sampler = sampler
        self.clips.clip_shape = (channels, self.size * num, *sides)
        self.groups = groups

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "groups": ()}

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def origin(self) -> str:
        """Where the videos come from."""
        return self.clips.origin

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (windows * crops, 3, T, h, w)."""
        return (self.views, *self.clip_shape)

    def name(self, index: int) -> str:
        """Return the file."""
        return self.clips.name(self.groups[index][0])

    def request(self, index: int) -> Any:
        """Return what :meth:`load` is to make the windows of."""
        row, starts = self.groups[index]
        # What "clip" means is the sampler's, here several at once.
        return self.clips.request(row)._replace(clip=starts)  # type: ignore[arg-type]

    def prepare(self) -> None:
        """Renounce MXNet."""
        self.clips.prepare()

    def load(self, request: Any, rng: np.random.Generator) -> Sample:
        """Read the windows of a group, one behind the other, each in all its crops."""
        sample = self.clips.load(request, rng)
        channels, num, *sides = self.clip_shape
        # (crops, 3, windows * T, h, w) -> (windows, crops, 3, T, h, w)
        parts = sample.array.reshape(self.crops, channels, self.size, num, *sides)
        return sample._replace(array=np.moveaxis(parts, 2, 0).reshape(-1, *self.clip_shape))
