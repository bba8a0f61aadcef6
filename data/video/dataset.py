"""Samples of a video list, made in any process: nothing here needs MXNet."""

import os

import numpy as np

from glore_common import UsageError

from ..common.samples import Dataset, Sample
from .readers import SMALLEST_DECODER_SIDE, read_frames
from .transforms import Compose, RandomScale, resize_clip


class VideoDataset(Dataset):
    """Clips of the videos of a list.

    Item ``i`` is clip ``i % num_clips`` of video ``i // num_clips``.

    Parameters
    ----------
    video_list : VideoList
    sampler : RandomSampling or EvenlySampling
    transform : callable
        ``transform(clip, rng)``: (T, H, W, 3) uint8 -> (3, T, h, w) float32, or
        (views, 3, T, h, w) for a multi-crop.
    clip_shape : (int, int, int, int)
        (3, T, h, w) that ``transform`` gives.
    views : int
        Number of crops that ``transform`` gives of each clip.
    num_clips : int
        Clips (copies) of each video.
    retries : int
        How often to reopen a file that fails.
    frame_counts : FrameCounts, optional
        Counts to go by, and where new ones are noted.
    decoder_resize : bool
        Let the decoder shrink the frames to the size that the first transform, a RandomScale,
        draws. The frames then differ a little from those that OpenCV shrinks (another filter),
        and on small videos it is slower; see :meth:`load`.
    """

    kind = "video"

    def __init__(
        self,
        video_list,
        sampler,
        transform,
        clip_shape,
        views=1,
        num_clips=1,
        retries=1,
        frame_counts=None,
        decoder_resize=False,
    ):
        if decoder_resize and not (
            isinstance(transform, Compose) and isinstance(transform.transforms[0], RandomScale)
        ):
            raise UsageError("decoder_resize needs a Compose that begins with RandomScale.")
        self.video_list = video_list
        self.sampler = sampler
        self.transform = transform
        self.clip_shape = tuple(clip_shape)
        self.views = views
        self.num_clips = num_clips
        self.retries = retries
        self.frame_counts = frame_counts
        self.decoder_resize = decoder_resize

    def __len__(self):
        return len(self.video_list.rows) * self.num_clips

    @property
    def origin(self):
        """The list's path."""
        return self.video_list.path

    @property
    def advice(self):
        """How to find the bad videos."""
        command = f"python -m data.verify {self.video_list.path} --root {self.video_list.root}"
        return f"See what is wrong with: {command}"

    def shape_of(self, index):
        """Return (views, 3, T, h, w)."""
        return (self.views, *self.clip_shape)

    def row_of(self, index):
        """Return the row (0-based) of the video that item ``index`` belongs to."""
        return index // self.num_clips

    def name(self, index):
        """Return the path of the file that item ``index`` is read from."""
        return self.video_list.full_path(self.row_of(index))

    def load(self, index, rng):
        """Decode and transform item ``index``.

        Measured with decord 0.6.0 on 8 frames at interval 8: letting the decoder resize takes
        340x256 mp4v from 16 to 21 ms, 1280x720 mp4v from 80 to 71 ms, and changes pixels by 2.5
        (up to 30) levels of 255 against OpenCV's bilinear filter. It is done for shrinking only.

        Parameters
        ----------
        index : int
        rng : numpy.random.Generator
            The only source of randomness.

        Returns
        -------
        Sample
            ``facts`` is (frames, file size in bytes), for :meth:`note`.

        Raises
        ------
        VideoError
            The file cannot be read.
        """
        row = self.row_of(index)
        path = self.video_list.full_path(row)
        size = os.stat(path).st_size if os.path.exists(path) else 0
        counted = self.frame_counts.get(row, size) if self.frame_counts is not None else None

        def pick(total):
            return self.sampler.pick(min(total, counted or total), rng, index % self.num_clips)

        if not self.decoder_resize:
            frames, total = read_frames(path, pick, retries=self.retries)
            array = self.transform(frames, rng)
        else:
            target = []

            def resize(width, height):
                target[:] = self.transform.transforms[0].draw_size(width, height, rng)
                shrinks = target[0] <= width and target[1] <= height
                return tuple(target) if shrinks and min(target) >= SMALLEST_DECODER_SIDE else None

            frames, total = read_frames(path, pick, resize, self.retries)
            array = Compose(self.transform.transforms[1:])(resize_clip(frames, *target), rng)
        array = array.reshape((-1, *array.shape[-4:]))
        if array.shape != self.shape_of(index) or array.dtype != np.float32:
            raise UsageError(
                f"the transform gives {array.dtype} {array.shape}, expected float32 "
                f"{self.shape_of(index)} for {path}."
            )
        return Sample(array, self.video_list.rows[row].label, (total, size))

    def note(self, index, facts):
        """Take up what loading item ``index`` found out (called in the loader's process)."""
        if self.frame_counts is not None:
            self.frame_counts.note(self.row_of(index), *facts)

    def finish(self):
        """Write what was noted (called at the end of a pass and when the loader closes)."""
        if self.frame_counts is not None:
            self.frame_counts.save()
