"""Batches of clips: the loader of :mod:`data.loader`, under the names that video jobs know."""

from .loader import BadFile, Loader, UnreadableData, WorkerError, write_bad_files
from .video_dataset import VideoDataset

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
