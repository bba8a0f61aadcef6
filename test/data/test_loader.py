"""The loader and its workers, whatever is read: stretches of a pass, small messages, no waiting."""

import ast
import os
import pathlib
import pickle
import signal
import sys
import threading
import time

import pytest
from counting import Numbers
from videos import wait_for

from data.common.loader import Loader, LoaderConfig, WorkerError
from data.common.options import ReadingOptions
from data.common.samples import LoadJob, UnreadableFile
from data.common.transforms import CenterCrop, Compose, Normalize, Resize, ToArray
from data.image.dataset import ImageDataset
from data.image.source import ImageSample, ImageSource
from data.video.dataset import VideoDataset
from data.video.list import FrameCounts, VideoList, VideoRow
from data.video.sampler import RandomSampling
from glore_common import UsageError


def labels(iterator):
    return [batch[1].asnumpy().astype(int).tolist() for batch in iterator]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_the_runs_asked_for_are_read(tmp_path, num_workers):
    dataset = Numbers(tmp_path, 40)
    with Loader(dataset, LoaderConfig(2, num_workers=num_workers, prefetch=3)) as loader:
        loader.set_runs(0, [(1, 3), (7, 8), (18, 20)])
        expected = [[2, 3], [4, 5], [14, 15], [36, 37], [38, 39]]
        assert labels(loader) == expected
        assert dataset.read() == sorted(sum(expected, []))
        # A run that ends in the middle of a pass.
        loader.set_position(0, 9, 11)
        assert labels(loader) == [[18, 19], [20, 21]]
        time.sleep(0.2)
        assert len(dataset.read()) == 14
        # Then comes the next pass, whole.
        assert len(labels(loader)) == 20
        loader.set_runs(3, [])
        assert labels(loader) == []


def test_reading_ahead_goes_on_with_the_next_run(tmp_path):
    dataset = Numbers(tmp_path, 40)
    with Loader(dataset, LoaderConfig(2, num_workers=1, prefetch=2)) as loader:
        loader.set_runs(0, [(0, 1), (10, 11), (19, 20)])
        iterator = iter(loader)
        next(iterator)
        assert wait_for(lambda: dataset.read() == [0, 1, 20, 21, 38, 39])
        assert labels(iterator) == [[20, 21], [38, 39]]
    assert len(dataset.read()) == 6


@pytest.mark.parametrize("runs", [[(0, 21)], [(3, 2)], [(4, 6), (5, 7)], [(-1, 2)]])
def test_runs_that_make_no_sense(tmp_path, runs):
    with (
        Loader(Numbers(tmp_path, 40), LoaderConfig(2)) as loader,
        pytest.raises(UsageError, match="a pass has 20 batches"),
    ):
        loader.set_runs(0, runs)


def many_clips(count):
    rows = tuple(VideoRow(str(n), n % 400, f"class {n % 400}/video {n}.avi") for n in range(count))
    videos = VideoList(__file__, "/videos", rows, tuple(range(1, count + 1)))
    transform = Compose([Resize(40), CenterCrop(32), ToArray(), Normalize((0, 0, 0), (1, 1, 1))])
    shape = (3, 4, 32, 32)
    return VideoDataset(
        videos, RandomSampling(4, 2), transform, shape, frame_counts=FrameCounts(videos)
    )


def many_images(count):
    samples = tuple(ImageSample(f"class {n % 1000}/image {n}.jpg", n % 1000) for n in range(count))
    transform = Compose([Resize(40), CenterCrop(32), ToArray(), Normalize((0, 0, 0), (1, 1, 1))])
    return ImageDataset(ImageSource("/images", samples, 1000), transform, (32, 32))


@pytest.mark.parametrize("make", [many_clips, many_images])
def test_workers_are_not_sent_the_whole_list(make):
    sizes = [len(pickle.dumps(LoadJob(make(count), 0, 2, 100))) for count in (1, 240_000)]
    assert sizes[0] == pytest.approx(sizes[1], abs=50)
    assert sizes[1] < 2000
    dataset = make(240_000)
    request = dataset.request(239_999)
    assert len(pickle.dumps(request)) < 1000
    # What a worker makes of its copy and a request is what the loader's process would make.
    copy = pickle.loads(pickle.dumps(dataset))
    for loading in (dataset, copy):
        with pytest.raises(UnreadableFile, match=r"239999\.(avi|jpg): No such file"):
            loading.load(request, None)


@pytest.fixture
def deaf_workers(tmp_path, monkeypatch):
    """Worker processes that start, but never read what they are sent."""
    script = tmp_path / "deaf"
    script.write_text("#!/bin/sh\nexec sleep 100\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def in_time(function, seconds=10.0):
    """Call ``function`` and return its result; a failure if it does not come back in time."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"{function} did not come back within {seconds:g} s"
    return results[0]


@pytest.mark.usefixtures("deaf_workers")
def test_workers_that_do_not_read_hold_nobody_up(tmp_path):
    folder = tmp_path / "read"
    folder.mkdir()
    loader = Loader(Numbers(folder, 40, payload=bytes(5_000_000)), LoaderConfig(2, num_workers=2))
    in_time(lambda: loader.start() or True)
    iterator = in_time(lambda: iter(loader))
    assert in_time(lambda: len(loader.worker_pids())) == 2
    # One that dies is replaced, in the thread that holds the lock.
    before = loader.worker_pids()
    os.kill(before[0], signal.SIGKILL)
    assert wait_for(lambda: in_time(loader.worker_pids) != before)
    assert in_time(lambda: loader.bad_files() == [])
    in_time(lambda: loader.close() or True)
    with pytest.raises(UsageError, match="closed"):
        next(iterator)


def test_a_request_that_may_not_fit_into_a_pipe_is_refused(tmp_path):
    with (
        Loader(Numbers(tmp_path, 40, weight=100_000), LoaderConfig(2, num_workers=1)) as loader,
        pytest.raises(WorkerError, match="the request for number 0 has 100"),
    ):
        next(iter(loader))


def test_options_that_nobody_settled(tmp_path):
    with pytest.raises(UsageError, match="batch_size was not given"):
        LoaderConfig.of(ReadingOptions())
    config = LoaderConfig.of(ReadingOptions(batch_size=3, max_failures=4, strict_data=True))
    assert (config.batch_size, config.max_failures, config.strict) == (3, 4, True)
    assert 1 <= config.num_workers <= 8


def test_images_and_what_is_common_import_nothing_of_videos(root):
    for room, others in (("common", {"image", "video"}), ("image", {"video"})):
        for path in pathlib.Path(root, "data", room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.ImportFrom, ast.Import)):
                    module = (getattr(node, "module", "") or "").split(".")
                    names = [part for alias in node.names for part in alias.name.split(".")]
                    assert not others & {*module, *names}, f"{path}:{node.lineno}"
