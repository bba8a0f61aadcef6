"""Clips of the videos of a list, made in any process: nothing here needs MXNet."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np

from glore_common import UsageError, module_command

from ..common.samples import Dataset, Sample
from .container import VideoError, VideoFacts
from .list import FrameCounts, VideoList, list_of_files
from .readers import forbid_mxnet, known_facts, read_frames


class Sampler(Protocol):
    """Which frames make a clip; see :mod:`data.video.sampler`."""

    num: int

    def pick(self, range_max: int, rng: Any, copy_id: int) -> list[int]:
        """Return the indices of the frames of clip ``copy_id`` of a video."""

    def at_interval(self, interval: int) -> "Sampler":
        """Return the same with another distance of the frames."""


class Transform(Protocol):
    """What is done to a clip; see :mod:`data.common.transforms`."""

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """(T, H, W, 3) uint8 -> (3, T, h, w) float32, or (views, 3, T, h, w)."""


class ClipRequest(NamedTuple):
    """What is needed to make one clip: its place among the video's clips, and the video."""

    path: str
    label: int
    clip: int
    facts: Optional[VideoFacts]


class VideoDataset(Dataset):
    """Clips of the videos of a list.

    Item ``i`` is clip ``i % num_clips`` of video ``i // num_clips``.

    Parameters
    ----------
    video_list
    sampler
    transform
    clip_shape
        (3, T, h, w) that ``transform`` gives.
    views
        Number of crops that ``transform`` gives of each clip.
    num_clips
        Clips (copies) of each video.
    frame_counts
        Counts to go by, and where new ones are noted.
    decoder
        One of :data:`data.video.container.DECODERS`.
    clip_seconds
        What a clip spans: the sampler's interval then follows the frame rate, which is the
        list's or each video's own.
    """

    kind = "video"

    def __init__(
        self,
        video_list: VideoList,
        sampler: Sampler,
        transform: Transform,
        clip_shape: tuple[int, int, int, int],
        views: int = 1,
        num_clips: int = 1,
        frame_counts: Optional[FrameCounts] = None,
        decoder: str = "auto",
        clip_seconds: Optional[float] = None,
    ) -> None:
        self.video_list = video_list
        self.sampler = sampler
        self.transform = transform
        self.clip_shape = tuple(clip_shape)
        self.views = views
        self.num_clips = num_clips
        self.frame_counts = frame_counts
        self.decoder = decoder
        self.clip_seconds = clip_seconds
        self.rate = video_list.rate

    def __getstate__(self) -> dict[str, Any]:
        # Requests tell a worker which video to read: the list of all stays here.
        return {**self.__dict__, "video_list": None, "frame_counts": None}

    def with_list(self, video_list: VideoList) -> "VideoDataset":
        """Return the same clips of the videos of another list, counts of which are cached."""
        other = copy.copy(self)
        other.video_list, other.frame_counts = video_list, FrameCounts(video_list)
        other.rate = video_list.rate
        return other

    def with_files(self, paths: Sequence[str]) -> "VideoDataset":
        """Return the same clips of other videos, which have no labels (all are 0)."""
        other = copy.copy(self)
        other.video_list, other.frame_counts = list_of_files(paths), None
        return other

    def __len__(self) -> int:
        return len(self.video_list.rows) * self.num_clips

    @property
    def origin(self) -> str:
        """The list's path."""
        return self.video_list.path

    @property
    def advice(self) -> str:
        """How to find the bad videos."""
        check = module_command("data.verify")
        command = f"{check} {self.video_list.path} --root {self.video_list.root}"
        return f"See what is wrong with: {command}"

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (views, 3, T, h, w)."""
        return (self.views, *self.clip_shape)

    def row_of(self, index: int) -> int:
        """Return the row (0-based) of the video that item ``index`` belongs to."""
        return index // self.num_clips

    def name(self, index: int) -> str:
        """Return the path of the file that item ``index`` is read from."""
        return self.video_list.full_path(self.row_of(index))

    def labels(self) -> np.ndarray:
        """Return the class of every clip."""
        return np.repeat([row.label for row in self.video_list.rows], self.num_clips)

    def request(self, index: int) -> ClipRequest:
        """Return what :meth:`load` is to make item ``index`` of."""
        row, clip = divmod(index, self.num_clips)
        facts = None if self.frame_counts is None else self.frame_counts.noted(row)
        return ClipRequest(self.name(index), self.video_list.rows[row].label, clip, facts)

    def prepare(self) -> None:
        """Renounce MXNet, which a worker has no use for and decord would want loaded first."""
        forbid_mxnet()

    def load(self, request: ClipRequest, rng: np.random.Generator) -> Sample:
        """Decode and transform a clip.

        Returns
        -------
        Sample
            ``facts`` is (:class:`~data.video.container.VideoFacts`,), for :meth:`note`.

        Raises
        ------
        VideoError
            The file cannot be read.
        """
        path = request.path

        facts, sampler = request.facts, self.sampler
        if self.clip_seconds is not None:
            facts = known_facts(path, facts)
            rate = self.rate or facts.rate
            if not rate:
                raise VideoError(path, "its frame rate is not known, which --clip-seconds needs")
            sampler = sampler.at_interval(max(1, round(self.clip_seconds * rate / sampler.num)))

        def pick(total):
            return sampler.pick(total, rng, request.clip)

        frames, facts = read_frames(path, pick, facts=facts, decoder=self.decoder)
        array = self.transform(frames, rng)
        array = array.reshape((-1, *array.shape[-4:]))
        expected = (self.views, *self.clip_shape)
        if array.shape != expected or array.dtype != np.float32:
            raise UsageError(
                f"the transform gives {array.dtype} {array.shape}, expected float32 {expected} "
                f"for {path}."
            )
        return Sample(array, request.label, (facts,))

    def note(self, index: int, facts: tuple) -> None:
        """Take up what loading item ``index`` found out (called in the loader's process)."""
        if self.frame_counts is not None:
            self.frame_counts.note(self.row_of(index), *facts)

    def finish(self) -> None:
        """Write what was noted (called at the end of a pass and when the loader closes)."""
        if self.frame_counts is not None:
            self.frame_counts.save()
