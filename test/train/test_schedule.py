"""Schedules: golden values, agreement with MXNet's, and independence of earlier calls."""

import json

import numpy as np
import pytest

from glore_common import UsageError
from mxnet_compat import mx
from train.schedule import (
    ConstantScheduler,
    CosineScheduler,
    MultiFactorScheduler,
    PolyScheduler,
    make_schedule,
    steps_from_samples,
)


def test_golden_values_in_any_order(golden):
    with open(golden("data_and_schedule.json")) as stream:
        case = json.load(stream)["lr"]
    schedule = make_schedule(
        "step", case["base_lr"], case["steps"], case["factor"], warmup_steps=1500
    )
    for step, expected in [*case["values"], *reversed(case["values"])]:
        assert schedule(step) == expected, step


def test_rate_falls_after_the_step_not_at_it():
    schedule = MultiFactorScheduler(1.0, (10, 20), 0.5)
    assert [schedule(step) for step in (1, 10, 11, 20, 21)] == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("step", [5, 6, 50, 99, 100])
def test_poly_and_cosine_equal_mxnets(step):
    poly = mx.lr_scheduler.PolyScheduler(100, 0.4, 0.9, 0.01, warmup_steps=5, warmup_begin_lr=0.04)
    cosine = mx.lr_scheduler.CosineScheduler(100, 0.4, 0.01, warmup_steps=5, warmup_begin_lr=0.04)
    ours = {"final_lr": 0.01, "warmup_steps": 5}
    np.testing.assert_allclose(PolyScheduler(0.4, 100, 0.9, **ours)(step), poly(step), rtol=1e-12)
    np.testing.assert_allclose(CosineScheduler(0.4, 100, **ours)(step), cosine(step), rtol=1e-12)


def test_decay_ends_at_the_final_rate_and_stays():
    schedule = CosineScheduler(0.4, 10, final_lr=0.1)
    assert schedule(10) == schedule(1000) == pytest.approx(0.1)
    assert schedule(5) == pytest.approx(0.25)
    np.testing.assert_allclose(PolyScheduler(0.4, 10, power=2)(5), 0.1)


def test_warm_up_reaches_the_rate_of_every_schedule():
    for name in ("step", "constant", "poly", "cosine"):
        schedule = make_schedule(name, 2.0, total_steps=100, warmup_steps=10)
        assert schedule(5) == pytest.approx(2.0 * 0.55), name
        assert schedule(10) == pytest.approx(2.0), name


def test_works_inside_an_optimizer():
    optimizer = mx.optimizer.SGD(lr_scheduler=ConstantScheduler(0.25), learning_rate=0.25)
    assert optimizer.learning_rate == 0.25


def test_steps_from_samples():
    assert steps_from_samples((240_000, 360_000.0), 64) == (3750, 5625)
    assert steps_from_samples((100,), 64) == (1,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "step", "base_lr": 0.1, "steps": (20, 10)},
        {"name": "step", "base_lr": -1.0},
        {"name": "cosin", "base_lr": 0.1},
        {"name": "cosine", "base_lr": 0.1},
        {"name": "poly", "base_lr": 0.1, "total_steps": 5, "warmup_steps": 5},
        {"name": "constant", "base_lr": 0.1, "warmup_factor": 0.0},
    ],
)
def test_bad_usage(arguments):
    with pytest.raises(UsageError):
        make_schedule(**arguments)


def test_unknown_name_lists_the_nearest_first():
    with pytest.raises(UsageError, match="known are cosine"):
        make_schedule("cosin", 0.1)
