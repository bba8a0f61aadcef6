"""Both samplers give the golden frame indices."""

import json

import numpy as np
import pytest

from data.video.sampler import EvenlySampling, RandomSampling
from glore_common import UsageError


@pytest.fixture(scope="module")
def table(golden):
    with open(golden("data_and_schedule.json")) as stream:
        return json.load(stream)


def test_evenly_equals_golden(table):
    assert len(table["evenly"]) == 230
    for row in table["evenly"]:
        sampler = EvenlySampling(row["num"], row["interval"], row["num_times"])
        assert sampler.sample(row["range_max"], row["copy_id"]) == row["idxs"], row


def test_random_equals_golden(table):
    generators = {}
    assert len(table["random"]) == 42
    for row in table["random"]:
        key = (row["num"], row["interval"], row["seed"])
        rng = generators.setdefault(key, np.random.RandomState(row["seed"]))
        sampler = RandomSampling(row["num"], row["interval"])
        assert sampler.sample(row["range_max"], rng) == row["idxs"], row


def test_random_reaches_the_whole_video_with_either_generator():
    for rng in (np.random.default_rng(0), np.random.RandomState(0)):
        starts = {RandomSampling(4, 3).sample(20, rng)[0] for _ in range(300)}
        assert starts == set(range(10))
        frames = {RandomSampling(1).sample(5, rng)[0] for _ in range(100)}
        assert frames == set(range(5))


def test_speed_widens_the_interval():
    rng = np.random.default_rng(1)
    spans = {np.ptp(RandomSampling(4, 4, speed=(1.0, 2.0)).sample(100, rng)) for _ in range(200)}
    assert min(spans) >= 12
    assert 22 <= max(spans) <= 24


def test_copies_come_again_after_the_last():
    sampler = EvenlySampling(8, 8, 10)
    assert sampler.sample(300, 13) == sampler.sample(300, 3)
    assert sampler.pick(300, None, 3) == sampler.sample(300, 3)


@pytest.mark.parametrize("wrong", [(0, 1), (4, 0)])
def test_senseless_arguments(wrong):
    for kind in (RandomSampling, EvenlySampling):
        with pytest.raises(UsageError, match="at least 1"):
            kind(*wrong)
    with pytest.raises(UsageError, match="at least one clip"):
        EvenlySampling(4, 1, 0)
    with pytest.raises(UsageError, match="rising pair"):
        RandomSampling(4, 1, speed=(2.0, 1.0))


def test_the_slowest_speed_decides_what_is_too_short():
    # 4 frames, 2 apart, at half the speed span 4 frames of a video, and at the whole one 7.
    sampler = RandomSampling(4, 2, speed=(0.5, 1.0))
    rng = np.random.default_rng(0)
    assert sampler.sample(4, rng) == [0, 1, 2, 3]
    assert sampler.sample(3, rng) == [0, 1, 2, 0]
    assert {np.ptp(sampler.sample(5, rng)) for _ in range(50)} <= {3, 4}


def test_defaults_are_neighbouring_frames_and_one_clip():
    rng = np.random.default_rng(0)
    assert np.ptp(RandomSampling(4).sample(50, rng)) == 3
    assert EvenlySampling(4).sample(50, 0) == EvenlySampling(4, 1, 1).sample(50, 0)
    assert np.ptp(EvenlySampling(4).sample(50, 0)) == 3
    assert EvenlySampling(4).num_times == 1
