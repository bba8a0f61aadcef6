"""Loaders: the same batches whatever the workers do, and no worker can spoil or outlive a job."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from numbered import X264, make
from videos import (
    DeadOnArrivalDataset,
    FailingDataset,
    HangingDataset,
    KillingDataset,
    UnstartableDataset,
    alive,
    level,
    make_dataset,
    make_folder,
    wait_for,
    write_list,
    write_picture_video,
    write_video,
)

from data.common.loader import (
    Loader,
    LoaderConfig,
    UnreadableData,
    WorkerError,
    write_bad_files,
)
from data.video.list import FrameCounts, read_video_list
from data.video.loaders import get_test_loader, get_train_loader, get_val_loader
from data.video.options import ClipOptions, ClipTestOptions
from data.video.sampler import EvenlySampling
from glore_common import UsageError

PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A list of 11 videos of a moving texture, made once."""
    path = tmp_path_factory.mktemp("videos")
    for number in range(11):
        write_picture_video(path / f"v{number}.mp4", 14, (64, 48), seed=number)
    return write_list(path, [f"v{number}.mp4" for number in range(11)], list(range(11)))


def collect(iterator):
    """Return the batches as (data, label, …) tuples of NumPy arrays."""
    return [
        tuple(part if isinstance(part, np.ndarray) else part.asnumpy() for part in batch)
        for batch in iterator
    ]


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        for part, counterpart in zip(one, other):
            np.testing.assert_array_equal(part, counterpart)


def loader_of(dataset, batch_size, **config):
    return Loader(dataset, LoaderConfig(batch_size, **config))


def changed(loader, **config):
    """Return the loader with another configuration."""
    return Loader(loader.dataset, dataclasses.replace(loader.config, **config))


def options_of(kind=ClipOptions, **more):
    basic = {"batch_size": 3, "clip_length": 4, "crop_size": 32, "num_workers": 0}
    return kind(**{**basic, **more})


def train_loader(path, batch_size=3, num_workers=0, seed=5, **config):
    options = options_of(
        batch_size=batch_size,
        num_workers=num_workers,
        train_frame_interval=2,
        augmentation="full",
    )
    loader = get_train_loader(path, os.path.dirname(path), options, seed=seed, **PIXELS)
    return changed(loader, **config) if config else loader


def val_loader(path, **more):
    options = options_of(val_frame_interval=2, **more)
    return get_val_loader(path, os.path.dirname(path), options, **PIXELS)


def clip_test_loader(path, **more):
    options = options_of(ClipTestOptions, frame_interval=2, **more)
    return get_test_loader(path, os.path.dirname(path), options, **PIXELS)


def test_same_batches_for_any_number_of_workers(folder):
    results = []
    for num_workers, prefetch in ((0, 1), (1, 1), (3, 2)):
        with train_loader(folder, num_workers=num_workers, prefetch=prefetch) as loader:
            assert len(loader) == 3
            results.append(collect(loader) + collect(loader))
    data, label = results[0][0]
    assert data.shape == (3, 3, 4, 32, 32)
    assert data.dtype == np.float32
    assert label.shape == (3,)
    assert label.dtype == np.float32
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])
    # The second epoch has another order, and other clips of the same video.
    assert not np.array_equal(results[0][0][1], results[0][3][1])


def test_seed_and_epoch_decide(folder):
    def first(**more):
        with train_loader(folder, **more) as loader:
            return collect(loader)

    assert_equal(first(), first())
    assert not np.array_equal(first()[0][0], first(seed=6)[0][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_a_batch(folder, num_workers):
    with train_loader(folder, num_workers=num_workers) as loader:
        whole = [collect(loader) for _ in range(3)]
    with train_loader(folder, num_workers=num_workers) as loader:
        loader.set_position(1, 2)
        assert_equal(collect(loader), whole[1][2:])
        assert_equal(collect(loader), whole[2])
        loader.set_position(0, 1)
        assert_equal(collect(loader), whole[0][1:])
        loader.set_position(0, 3)
        assert collect(loader) == []
        with pytest.raises(UsageError, match="no batch 4"):
            loader.set_position(0, 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_leaving_an_iterator_and_continuing(folder, num_workers):
    with train_loader(folder, num_workers=num_workers, batch_size=2) as loader:
        whole = [collect(loader) for _ in range(2)]
        for epoch in range(2):
            for start in range(0, 5, 2):
                loader.set_position(epoch, start)
                part = []
                for batch in loader:
                    part.append(batch)
                    if len(part) == 2:
                        break
                assert_equal(collect(part), whole[epoch][start : start + 2])
        # Far from what was read ahead: that is dropped, its memory used again.
        for epoch in (7, 0, 7, 1):
            loader.set_position(epoch, 0)
            first = collect([next(iter(loader))])[0]
        np.testing.assert_array_equal(first[0], whole[1][0][0])


def test_an_older_iterator_says_so(folder):
    with train_loader(folder) as loader:
        old = iter(loader)
        next(iter(loader))
        with pytest.raises(RuntimeError, match="replaced by a newer one"):
            next(old)


def test_ranks_share_an_epoch_without_overlap(folder):
    labels = []
    for rank in range(3):
        with train_loader(folder, batch_size=2, rank=rank, num_ranks=3) as loader:
            assert len(loader) == 1
            labels.append(np.concatenate([label for _, label in collect(loader)]))
    assert len(set(np.concatenate(labels))) == 6
    with train_loader(folder, batch_size=2, rank=2, num_ranks=3, last_batch="keep") as loader:
        assert (len(loader), loader.num_samples) == (2, 3)
        assert [len(label) for _, label in collect(loader)] == [2, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_video_once(folder, num_workers):
    seen = []
    for rank in range(3):
        options = options_of(batch_size=2, num_workers=num_workers, val_frame_interval=2)
        root, share = os.path.dirname(folder), {"rank": rank, "num_ranks": 3}
        with changed(
            get_val_loader(folder, root, options, **share, **PIXELS), with_index=True
        ) as loader:
            batches = collect(loader)
            assert len(batches) == len(loader) == 2
            for _, label, index in batches:
                np.testing.assert_array_equal(label, index)
                assert index.dtype == np.int64
            seen += np.concatenate([index for *_, index in batches]).tolist()
            again = collect(loader)
            assert_equal(batches, again)
    assert sorted(seen) == list(range(11))


def test_frames_of_the_validation_clip(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    write_video(tmp_path / "short.mp4", 3)
    path = write_list(tmp_path, ["a.mp4", "short.mp4"])
    dataset = make_dataset(path, train=False)
    with loader_of(dataset, 2) as loader:
        ((data, _),) = collect(loader)
    # 4 frames at interval 2 span 7 of 20: they start at ceil(13 / 2) = 7.
    levels = data.mean((1, 3, 4)) * 255
    np.testing.assert_allclose(levels[0], [level(n) for n in (7, 9, 11, 13)], atol=4)
    np.testing.assert_allclose(levels[1], [level(n) for n in (0, 1, 2, 0)], atol=4)


def test_clips_and_crops_for_testing(folder):
    with (
        clip_test_loader(folder, num_clips=2, num_crops=3, batch_size=7) as spatial,
        clip_test_loader(folder, num_clips=2, batch_size=4) as centre,
    ):
        batches, plain = collect(spatial), collect(centre)
    # 11 videos x 2 clips, 2 clips of 3 crops in a batch
    assert len(batches) == 11
    data, label, index = batches[1]
    assert data.shape == (6, 3, 4, 32, 32)
    np.testing.assert_array_equal(label, [1] * 6)
    np.testing.assert_array_equal(index, [1] * 6)
    middle = np.concatenate([batch[0] for batch in batches])[1::3]
    np.testing.assert_array_equal(middle, np.concatenate([batch[0] for batch in plain]))
    results = []
    for num_workers in (0, 2):
        with clip_test_loader(folder, num_crops=5, batch_size=10, num_workers=num_workers) as mixed:
            results.append(collect(mixed))
    assert_equal(*results)
    assert len(np.unique(results[0][0][0][:5].sum((1, 2, 3, 4)))) > 2
    with pytest.raises(UsageError, match="2 crops of kind 'spatial'"):
        clip_test_loader(folder, num_crops=2, crops="spatial")


def bad_folder(path, bad=(1, 4), count=6):
    """Make a list with garbage at the places ``bad``; return its path."""
    list_path = make_folder(path, count)
    for number in bad:
        (path / f"v{number}.mp4").write_bytes(b"garbage" * 100)
    return list_path


def test_bad_videos_are_replaced_alike_named_once_and_counted(tmp_path, caplog):
    path = bad_folder(tmp_path)
    results, bad = [], []
    for num_workers in (0, 3):
        caplog.clear()
        with loader_of(
            make_dataset(path), 2, shuffle=True, seed=3, num_workers=num_workers
        ) as loader:
            results.append(collect(loader) + collect(loader))
            bad.append(sorted((os.path.basename(f.path), f.times) for f in loader.bad_files()))
            with loader_of(make_dataset(path), 2, shuffle=True, seed=3) as resumed:
                resumed.set_position(1, 1)
                assert_equal(collect(resumed), results[-1][4:])
        mentions = [r.getMessage() for r in caplog.records if "cannot read" in r.getMessage()]
        own = mentions[: len(bad[-1])]
        assert len(own) == 2
        assert sum("v1.mp4" in text for text in own) == 1
        assert sum("v4.mp4" in text for text in own) == 1
    assert_equal(*results)
    assert len(results[0]) == 6
    assert all(len(data) == 2 for data, _ in results[0])
    assert bad[0] == bad[1]
    assert [name for name, _ in bad[0]] == ["v1.mp4", "v4.mp4"]
    assert sum(times for _, times in bad[0]) >= 4, "two bad places in each of two epochs"
    labels = np.concatenate([label for _, label in results[0]])
    assert set(labels.tolist()) <= {0.0, 2.0, 3.0, 1.0}


def test_bad_videos_are_left_out_of_an_evaluation(tmp_path):
    path = bad_folder(tmp_path, bad=(1, 2, 3))
    for num_workers in (0, 2):
        with loader_of(
            make_dataset(path, train=False),
            2,
            num_workers=num_workers,
            with_index=True,
            on_bad="skip",
        ) as loader:
            batches = collect(loader)
            assert [index.tolist() for *_, index in batches] == [[0], [4, 5]]
            data = batches[0][0]
            np.testing.assert_allclose(data[0, :, 0].mean() * 255, level(7), atol=4)
            assert len(loader.bad_files()) == 3


def test_strict_data(tmp_path):
    path = bad_folder(tmp_path)
    for num_workers in (0, 2):
        with (
            loader_of(make_dataset(path), 6, num_workers=num_workers, strict=True) as loader,
            pytest.raises(UnreadableData, match=r"cannot read the video .*v[14]\.mp4: .*strict"),
        ):
            collect(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_bad", ["replace", "skip"])
def test_many_failures_in_a_row_stop(tmp_path, num_workers, on_bad):
    path = bad_folder(tmp_path, bad=range(6))
    with (
        loader_of(
            make_dataset(path), 2, num_workers=num_workers, max_failures=3, on_bad=on_bad
        ) as loader,
        pytest.raises(UnreadableData, match=r"^3 distinct videos in a row .*data\.verify"),
    ):
        collect(loader)
    # Fewer files than the limit, all of them bad: that is no reason to go on for ever.
    with (
        loader_of(
            make_dataset(path), 2, num_workers=num_workers, max_failures=10, on_bad=on_bad
        ) as loader,
        pytest.raises(UnreadableData, match="^6 distinct videos"),
    ):
        collect(loader)


def test_missing_files_do_not_count_when_they_are_few(tmp_path):
    path = make_folder(tmp_path, 4)
    os.remove(tmp_path / "v3.mp4")
    with loader_of(make_dataset(path), 4, max_failures=2) as loader:
        collect(loader)
        (bad,) = loader.bad_files()
    assert bad.reason == "No such file or directory"


def test_summary_of_bad_files(tmp_path):
    path = bad_folder(tmp_path)
    summary = str(tmp_path / "bad.tsv")
    with loader_of(make_dataset(path), 2) as one, loader_of(make_dataset(path), 2) as two:
        collect(one)
        collect(two)
        assert write_bad_files([one, two], summary) == 2
        times = [bad.times for bad in one.bad_files()]
    with open(summary) as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    assert [row[0] for row in rows] == [str(tmp_path / "v1.mp4"), str(tmp_path / "v4.mp4")]
    assert [int(row[1]) for row in rows] == [2 * number for number in times]
    assert all("Invalid data found" in row[2] for row in rows)
    assert write_bad_files([], summary) == 0
    assert not os.path.exists(summary)


def test_error_in_a_worker_brings_its_traceback(tmp_path):
    path = make_folder(tmp_path, 4)
    with loader_of(make_dataset(path, FailingDataset), 2, num_workers=2) as loader:
        iterator = iter(loader)
        next(iterator)
        with pytest.raises(WorkerError, match="v2.mp4") as caught:
            next(iterator)
        assert "ZeroDivisionError: the bug of the test" in str(caught.value)
        assert "in load" in str(caught.value)
    with (
        loader_of(make_dataset(path, FailingDataset), 4) as loader,
        pytest.raises(ZeroDivisionError),
    ):
        collect(loader)


def test_user_mistake_in_a_worker_stays_one(tmp_path):
    path = make_folder(tmp_path, 4)
    dataset = make_dataset(path)
    dataset.clip_shape = (3, 4, 16, 16)
    with (
        loader_of(dataset, 2, num_workers=1) as loader,
        pytest.raises(UsageError, match="the transform gives float32"),
    ):
        collect(loader)


def test_worker_that_cannot_start_is_an_error(tmp_path):
    path = make_folder(tmp_path, 4)
    with (
        loader_of(make_dataset(path, UnstartableDataset), 2, num_workers=1) as loader,
        pytest.raises(WorkerError, match="could not start:(.|\n)*not in this process"),
    ):
        collect(loader)


def test_workers_that_die_on_arrival_are_not_restarted_for_ever(tmp_path):
    path = make_folder(tmp_path, 4)
    with (
        loader_of(make_dataset(path, DeadOnArrivalDataset), 2, num_workers=1) as loader,
        pytest.raises(WorkerError, match="SIGKILL before it was ready, the last of 3 in a row"),
    ):
        collect(loader)


def test_file_that_kills_its_worker_is_named_and_replaced(tmp_path, caplog):
    path = make_folder(tmp_path, 5)
    begin = time.monotonic()
    with loader_of(make_dataset(path, KillingDataset), 5, num_workers=2) as loader:
        ((data, _),) = collect(loader)
        (bad,) = loader.bad_files()
    assert time.monotonic() - begin < 20
    assert len(data) == 5
    assert bad.path == str(tmp_path / "v2.mp4")
    assert "killed by SIGKILL, twice" in bad.reason
    said = [record.getMessage() for record in caplog.records if "SIGKILL" in record.getMessage()]
    assert "v2.mp4" in said[0]
    assert "pid" in said[0]


def test_worker_killed_from_outside_changes_no_batch(tmp_path, caplog):
    path = make_folder(tmp_path, 5)
    with loader_of(make_dataset(path), 5) as loader:
        expected = collect(loader)
    (tmp_path / "once.wanted").write_text("")
    with loader_of(make_dataset(path, KillingDataset), 5, num_workers=2) as loader:
        loader.start()
        assert wait_for(lambda: len(loader.worker_pids()) == 2)
        first = set(loader.worker_pids())
        assert_equal(collect(loader), expected)
        assert loader.bad_files() == []
        # Others of the lost one's age may be dead as well: a new one tries again.
        lost, last = map(int, (tmp_path / "once.pids").read_text().split())
        assert lost in first
        assert last not in first
        assert "tried once more" in caplog.text
        # One that has nothing to do is noticed too, while nobody waits.
        victim = loader.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        assert wait_for(lambda: f"(pid {victim}) was killed by SIGKILL while" in caplog.text)
        loader.set_position(0)
        assert_equal(collect(loader), expected)


def test_file_that_hangs_is_named_and_replaced(tmp_path, caplog):
    path = make_folder(tmp_path, 5)
    with loader_of(make_dataset(path, HangingDataset), 5, num_workers=2, timeout=2.0) as loader:
        loader.start()
        assert wait_for(lambda: len(loader.worker_pids()) == 2)
        begin = time.monotonic()
        ((data, _),) = collect(loader)
        assert time.monotonic() - begin < 15
        (bad,) = loader.bad_files()
    assert len(data) == 5
    assert bad.path == str(tmp_path / "v2.mp4")
    assert "no answer within 2 s" in bad.reason
    assert "v2.mp4" in caplog.text


def test_close_and_collection_end_the_workers(folder):
    before = len(os.listdir("/proc/self/fd"))
    loader = train_loader(folder, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    pids = loader.worker_pids()
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    loader.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(UsageError, match="closed"):
        next(iterator)
    loader.close()
    loader = train_loader(folder, num_workers=1)
    loader.start()
    (pid,) = loader.worker_pids()
    del loader, iterator
    assert wait_for(lambda: not alive(pid))
    assert len(os.listdir("/proc/self/fd")) <= before


SCRIPT = """
import sys, time, videos
from data.common.loader import Loader, LoaderConfig
kind = getattr(videos, sys.argv[2])
loader = Loader(videos.make_dataset(sys.argv[1], kind), LoaderConfig(4, num_workers=2))
loader.start()
print(*loader.worker_pids(), flush=True)
for data, label in loader:
    print('batch', data.shape, flush=True)
print('waiting', flush=True)
time.sleep(100)
"""


def start_script(root, tmp_path, kind):
    path = make_folder(tmp_path, 4)
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join([root, os.path.join(root, "test", "helpers")])
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=tmp_path,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    return process, pids


@pytest.mark.parametrize("kind", ["VideoDataset", "HangingDataset"])
def test_no_worker_outlives_a_killed_parent(root, tmp_path, kind):
    process, pids = start_script(root, tmp_path, kind)
    if kind == "HangingDataset":
        time.sleep(1.5)  # until a worker is in the file it never comes back from
    else:
        assert process.stdout.readline() == "batch (4, 3, 4, 32, 32)\n"
    process.kill()
    process.communicate()
    assert wait_for(lambda: not any(alive(pid) for pid in pids), 5)


def test_ctrl_c_ends_workers_without_their_noise(root, tmp_path):
    process, pids = start_script(root, tmp_path, "VideoDataset")
    assert process.stdout.readline().startswith("batch")
    assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("KeyboardInterrupt") == 1
    assert errors.count("Traceback") == 1
    assert wait_for(lambda: not any(alive(pid) for pid in pids), 5)


def test_workers_do_not_load_mxnet(folder):
    with train_loader(folder, num_workers=1) as loader:
        collect(loader)
        (pid,) = loader.worker_pids()
        with open(f"/proc/{pid}/maps") as stream:
            mapped = stream.read()
    assert "libmxnet" not in mapped
    assert "libavcodec" in mapped


def test_frame_counts_are_kept_and_honoured(tmp_path, folder):
    path = make_folder(tmp_path, 3, frames=20)
    video_list = read_video_list(path, tmp_path)
    with val_loader(path, num_workers=1) as loader:
        collect(loader)
    counts = FrameCounts(video_list)
    size = os.path.getsize(tmp_path / "v0.mp4")
    assert (counts.known(), counts.get(0, size)) == (3, 20)
    # A video of which only 8 frames can be decoded is sampled within these.
    counts.note(0, counts.noted(0)._replace(frames=8), replace=True)
    dataset = make_dataset(path, train=False, frame_counts=counts)
    sample = dataset.load(dataset.request(0), None)
    levels = sample.array[0].mean((0, 2, 3)) * 255
    np.testing.assert_allclose(levels, [level(n) for n in (1, 3, 5, 7)], atol=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 12}, "11 samples, fewer than one batch of 12"),
        ({"rank": 3, "num_ranks": 3}, r"rank must be in 0\.\.2"),
        ({"last_batch": "wrap"}, "last_batch must be one of keep, discard"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
    ],
)
def test_senseless_arguments(folder, options, says):
    with pytest.raises(UsageError, match=says):
        train_loader(folder, **options)


def test_bad_files_are_quiet_on_stderr(tmp_path, capfd, caplog):
    path = bad_folder(tmp_path)
    caplog.set_level(logging.WARNING, "glore.data")
    with loader_of(make_dataset(path), 2, num_workers=2) as loader:
        collect(loader)
    # decord says one line for each time it fails to open a file, here twice for each of two.
    assert len(capfd.readouterr().err.splitlines()) <= 4
    assert "v1.mp4" in caplog.text


def test_balanced_sampling_draws_all_classes_alike(tmp_path):
    names = [write_video(tmp_path / f"{n}.mp4", 8).name for n in range(10)]
    path = write_list(tmp_path, names, [0] * 9 + [1])
    options = options_of(batch_size=1, train_frame_interval=1, augmentation="crop")
    options.class_balance = "sampling"
    with get_train_loader(path, tmp_path, options, seed=2, **PIXELS) as loader:
        drawn = np.concatenate([loader._order(epoch) for epoch in range(40)])
        np.testing.assert_array_equal(loader._order(3), loader._order(3))
        assert not np.array_equal(loader._order(3), loader._order(4))
    assert 160 < np.sum(drawn == 9) < 240, "half of 400 draws are of the class with one video"


def test_clips_that_span_seconds_whatever_the_rate(tmp_path):
    for name, rate in (("slow.mp4", 10), ("fast.mp4", 30)):
        make(tmp_path / name, 90, *X264, rate=rate)
    path = write_list(tmp_path, ["slow.mp4", "fast.mp4"])
    dataset = make_dataset(path, train=False, clip_seconds=2.0)
    picked = []

    class Sampler(EvenlySampling):
        def at_interval(self, interval):
            picked.append(interval)
            return super().at_interval(interval)

    dataset.sampler = Sampler(4, 2)
    for item in range(2):
        dataset.load(dataset.request(item), None)
    # 4 frames over 2 s: every 0.5 s
    assert picked == [5, 15]
