"""Schedules: golden values, agreement with MXNet's, and independence of earlier calls."""

import json

import numpy as np
import pytest
from train_runs import train_options

from glore_common import UsageError
from mxnet_compat import mx
from train.schedule import (
    ConstantScheduler,
    CosineScheduler,
    MultiFactorScheduler,
    PolyScheduler,
    make_schedule,
    schedule_for,
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


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
def test_a_base_rate_must_be_above_zero(rate):
    with pytest.raises(UsageError, match="base learning rate must be above 0"):
        ConstantScheduler(rate)
    assert ConstantScheduler(1e-300)(1) == 1e-300


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_factor_must_be_above_zero(factor):
    with pytest.raises(UsageError, match="factor must be above 0"):
        MultiFactorScheduler(0.1, [5], factor)
    assert MultiFactorScheduler(0.1, [5], 1e-3)(6) == pytest.approx(1e-4)


def test_defaults_of_a_schedule():
    schedule = make_schedule("step", 1.0, [10])
    assert [schedule(step) for step in (1, 10, 11)] == pytest.approx([1.0, 1.0, 0.1])
    # Power 0.9 down to 0, without a warm-up.
    poly = make_schedule("poly", 1.0, total_steps=10)
    assert poly(5) == pytest.approx(0.5**0.9)
    assert PolyScheduler(1.0, 10)(5) == pytest.approx(0.5**0.9)
    # The warm-up starts from a tenth, and its last step has the whole rate.
    assert ConstantScheduler(1.0, 10)(0) == pytest.approx(0.1)
    assert [ConstantScheduler(1.0, 10)(step) for step in (9, 10)] == pytest.approx([0.91, 1.0])


@pytest.mark.parametrize("steps", [[0, 5], [-1], [5, 5], [5, 3]])
def test_steps_are_positive_and_rise(steps):
    with pytest.raises(UsageError, match="must be positive and increase"):
        MultiFactorScheduler(0.1, steps)
    assert MultiFactorScheduler(0.1, [1, 2])(3) == pytest.approx(1e-3)


def test_bounds_of_the_warm_up_and_the_final_rate():
    for wrong in (0.0, -0.1, 1.1):
        with pytest.raises(UsageError, match="warm-up factor"):
            ConstantScheduler(0.1, 5, wrong)
    assert ConstantScheduler(0.1, 5, 1.0)(1) == pytest.approx(0.1)
    with pytest.raises(UsageError, match="0 or more steps"):
        ConstantScheduler(0.1, -1)
    with pytest.raises(UsageError, match="must outnumber"):
        CosineScheduler(0.1, 5, warmup_steps=5)
    assert CosineScheduler(0.1, 6, warmup_steps=5)(6) == pytest.approx(0.0, abs=1e-12)
    for wrong in (-0.01, 0.2):
        with pytest.raises(UsageError, match="final rate"):
            CosineScheduler(0.1, 6, final_lr=wrong)
    assert CosineScheduler(0.1, 6, final_lr=0.1)(3) == pytest.approx(0.1)


def options_of(**given):
    return train_options(
        **{"lr_base": 0.1, "lr_schedule": "step", "end_epoch": 8, "epoch_div_factor": 2, **given}
    )


def test_options_make_a_schedule():
    # 80 samples of 4 a batch, 2 batches a step, on 2 workers: 5 steps.
    options = options_of(lr_steps=(80,), accumulate=2, warmup_steps=None)
    schedule = schedule_for(options, 12, 4, 2)
    assert [schedule(step) for step in (1, 5, 6)] == pytest.approx([0.1, 0.1, 0.01])
    # The rate grows with the workers only if that is asked for.
    options = options_of(lr_steps=(), lr_scaling="linear", warmup_steps=0)
    assert schedule_for(options, 12, 4, 3)(1) == pytest.approx(0.3)
    assert schedule_for(options, 12, 4)(1) == pytest.approx(0.1)


def test_options_count_passes_in_steps():
    # A pass of 13 batches is 7 and 6 of them, with 2 a step: 4 and 3 steps.
    options = options_of(lr_step_epochs=(2.0,), accumulate=2, warmup_steps=None, warmup_epochs=1.0)
    schedule = schedule_for(options, 13, 4)
    assert schedule(7) == pytest.approx(0.1)
    assert schedule(3) < 0.1
    assert [schedule(step) for step in (14, 15)] == pytest.approx([0.1, 0.01])
    cosine = schedule_for(options_of(lr_schedule="cosine", warmup_steps=0), 13, 4)
    # 8 logged epochs are 4 passes of 13 steps.
    assert cosine(52) == pytest.approx(0.0, abs=1e-12)
    assert cosine(26) == pytest.approx(0.05)
