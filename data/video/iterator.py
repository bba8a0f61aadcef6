"""Batches of clips: the loader of :mod:`data.common.loader`."""

from ..common.loader import BadFile, Loader, UnreadableData, WorkerError, write_bad_files
from .dataset import VideoDataset

__all__ = [
    "BadFile",
    "BadVideos",
    "VideoDataset",
    "VideoLoader",
    "WorkerError",
    "write_bad_files",
]

BadVideos = UnreadableData
VideoLoader = Loader
