"""Known frames encoded into real video files, and datasets that misbehave, for the tests of data/.

Imports nothing of MXNet: worker processes unpickle the datasets from here.
"""

import os
import signal
import subprocess
import time

import cv2
import numpy as np

from data.common.transforms import CenterCrop, Compose, Normalize, RandomCrop, Resize, ToArray
from data.video.container import DECORD, VideoFacts
from data.video.dataset import VideoDataset
from data.video.list import read_video_list
from data.video.sampler import EvenlySampling, RandomSampling
from data.video.verify_job import VerifyJob


def level(number):
    """Return the grey level that frame ``number`` is painted with."""
    return 20 + 10 * (number % 22)


def write_video(path, frames=20, size=(64, 48), codec="mp4v", shade=0):
    """Encode ``frames`` plain frames of :func:`level` (+ ``shade``); size is (width, height)."""
    writer = cv2.VideoWriter(os.fspath(path), cv2.VideoWriter_fourcc(*codec), 25, size)
    assert writer.isOpened(), f"OpenCV cannot write {codec}"
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), level(number) + shade, np.uint8))
    writer.release()
    return path


def write_picture_video(path, frames=12, size=(160, 120), seed=0, codec="mp4v"):
    """Encode a smooth random texture that moves to the right by two pixels a frame."""
    width, height = size
    noise = np.random.RandomState(seed).randint(0, 256, (height, width + 2 * frames, 3))
    texture = cv2.GaussianBlur(noise.astype(np.uint8), (0, 0), 4)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    writer = cv2.VideoWriter(os.fspath(path), cv2.VideoWriter_fourcc(*codec), 25, size)
    assert writer.isOpened(), f"OpenCV cannot write {codec}"
    for number in range(frames):
        writer.write(texture[:, 2 * number : 2 * number + width])
    writer.release()
    return path


def write_list(folder, names, labels=None, name="list.txt"):
    """Write a video list of ``names`` (relative to ``folder``) and return its path."""
    rows = [
        f"{number} {labels[number] if labels else number % 4} {sub_path}\n"
        for number, sub_path in enumerate(names)
    ]
    path = os.path.join(os.fspath(folder), name)
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(rows)
    return path


def make_folder(folder, count=6, frames=20):
    """Write ``count`` videos that differ in shade, and their list; return the list's path."""
    names = [f"v{number}.mp4" for number in range(count)]
    for number, name in enumerate(names):
        write_video(os.path.join(os.fspath(folder), name), frames, shade=number % 8)
    return write_list(folder, names)


def make_dataset(list_path, kind=VideoDataset, train=True, **more):
    """Return a small dataset of 4-frame clips of 32 x 32."""
    video_list = read_video_list(list_path, os.path.dirname(list_path))
    crop = RandomCrop(32) if train else CenterCrop(32)
    sampler = RandomSampling(4, 2) if train else EvenlySampling(4, 2, more.get("num_clips", 1))
    transform = Compose([Resize(40), crop, ToArray(), Normalize((0, 0, 0), (1, 1, 1))])
    return kind(video_list, sampler, transform, (3, 4, 32, 32), **more)


class KillingDataset(VideoDataset):
    """Kills its process at ``v2.mp4``; only once if the file ``once`` in the root can be made."""

    def load(self, request, rng):
        if request.path.endswith("v2.mp4"):
            flag = os.path.join(os.path.dirname(request.path), "once")
            with open(flag + ".pids", "a") as stream:
                stream.write(f"{os.getpid()}\n")
            if not os.path.exists(flag):
                if os.path.exists(flag + ".wanted"):
                    open(flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().load(request, rng)


class HangingDataset(VideoDataset):
    """Never comes back from ``v2.mp4``."""

    def load(self, request, rng):
        if request.path.endswith("v2.mp4"):
            time.sleep(1000)
        return super().load(request, rng)


class FailingDataset(VideoDataset):
    """Has a bug that shows at ``v2.mp4``."""

    def load(self, request, rng):
        if request.path.endswith("v2.mp4"):
            raise ZeroDivisionError("the bug of the test")
        return super().load(request, rng)


class UnstartableDataset(VideoDataset):
    """Cannot be unpickled in a worker."""

    def __setstate__(self, state):
        raise ValueError("not in this process")


class DeadOnArrivalDataset(VideoDataset):
    """Kills the worker that unpickles it."""

    def __setstate__(self, state):
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyJob(VerifyJob):
    """Checks files like ``VerifyJob``, but dies at ``cut.mp4`` and hangs at ``empty.mp4``."""

    def run(self, path):
        if path.endswith("cut.mp4"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.endswith("empty.mp4"):
            time.sleep(1000)
        return VideoFacts(5, 1, DECORD, rate=25.0, announced=5), ""


def alive(pid):
    """Return whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=10.0):
    """Wait until ``condition()``; return whether it came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def run(command, **more):
    """Run a command and return the finished process with its output as text."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)
