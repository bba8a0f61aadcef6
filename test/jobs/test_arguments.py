"""Options with real types: flags, lists, numbers, devices and resuming."""

import logging

import pytest

from checkpoint.store import CheckpointStore
from glore_common import UsageError
from jobs.arguments import (
    Parser,
    add_checkpoint_arguments,
    add_device_arguments,
    add_flag,
    add_logging_arguments,
    add_precise_bn_arguments,
    add_run_arguments,
    add_schedule_arguments,
    devices,
    resume_from,
)
from mxnet_compat import mx


def parser():
    result = Parser("Trains.", prog="train.py")
    add_device_arguments(result)
    add_run_arguments(result, end_epoch=100)
    add_schedule_arguments(result, lr_steps=(240_000, 360_000))
    add_precise_bn_arguments(result)
    add_checkpoint_arguments(result)
    add_logging_arguments(result)
    add_flag(result, "--fine-tune", "fine-tune", default=False)
    add_flag(result, "--pretrained", "start from weights", default=True)
    return result


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--fine-tune"], True),
        (["--fine-tune", "True"], True),
        (["--fine-tune", "False"], False),
        (["--fine-tune", "no"], False),
        (["--fine-tune=0"], False),
        (["--fine-tune", "--gpus", ""], True),
    ],
)
def test_flags(words, expected):
    assert parser().parse_args(words).fine_tune is expected


def test_pretrained_false_is_false():
    assert parser().parse_args(["--pretrained", "False"]).pretrained is False


def test_lists_are_numbers_not_letters():
    args = parser().parse_args(["--lr-steps", "1.08e7, 15600000", "--precise-bn-batches", "4,1"])
    assert args.lr_steps == (10_800_000, 15_600_000)
    assert args.precise_bn_batches == (4, 1)
    assert parser().parse_args([]).lr_steps == (240_000, 360_000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fine-tune", "perhaps"], "neither true nor false"),
        (["--lr-steps", "1,x"], "comma-separated list"),
        (["--lr-steps", "1.5"], "comma-separated list"),
        (["--precise-bn-batches", "4"], "1 values, not 2"),
        (["--end-epoch", "0"], "out of range"),
        (["--lr-base", "-1"], "above 0"),
        (["--lr-base", "nan"], "out of range"),
        (["--max-steps", "2.5"], "no whole number"),
        (["--random-seed", "-1"], "out of range"),
        (["--gpus", "0,0"], "different GPUs"),
        (["--resume-epohc", "3"], "closest: --resume-epoch"),
        (["--max", "3"], "unrecognized"),
        (["--lr-schedule", "linear"], "invalid choice"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("devices:", "checkpoints:", "logging:", "default: 240000,360000"):
        assert part in text
    assert "logged epochs to train (default: 100)" in text
    assert "default: None" not in text
    assert text.count("default: 400,100") == 1


@pytest.mark.parametrize(
    ("words", "seen", "expected"),
    [
        ([], 0, [mx.cpu()]),
        ([], 2, [mx.gpu(0), mx.gpu(1)]),
        (["--gpus", ""], 2, [mx.cpu()]),
        (["--gpus", "cpu"], 0, [mx.cpu()]),
        (["--gpus", "1"], 2, [mx.gpu(1)]),
        (["--gpus", "0, 1"], 2, [mx.gpu(0), mx.gpu(1)]),
    ],
)
def test_devices(words, seen, expected, caplog):
    with caplog.at_level(logging.INFO):
        assert devices(parser().parse_args(words).gpus, seen) == expected
    assert ("CPU" if expected == [mx.cpu()] else "GPU") in caplog.text


def test_missing_gpu_is_an_error():
    with pytest.raises(UsageError, match="GPU 3 was asked for, but MXNet sees 2"):
        devices((0, 3), 2)


def test_default_devices_ask_mxnet(caplog):
    with caplog.at_level(logging.INFO):
        found = devices()
    assert len(found) == max(1, mx.context.num_gpus())


def test_resume(tmp_path):
    store = CheckpointStore(str(tmp_path), "demo")
    assert resume_from(parser().parse_args([]), store) == "none"
    assert resume_from(parser().parse_args(["--resume", "auto"]), store) == "auto"
    args = parser().parse_args(["--resume-epoch", "3"])
    assert resume_from(args, store) == str(tmp_path / "demo_ep-0003")
    with pytest.raises(UsageError, match="not both"):
        resume_from(parser().parse_args(["--resume", "auto", "--resume-epoch", "3"]), store)
