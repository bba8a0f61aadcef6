"""Options with real types: flags, lists, numbers, files, devices and resuming."""

import dataclasses
import logging
import shlex

import pytest
import yaml

from glore_common import UsageError
from glore_options import as_dict, as_yaml, differences, group, parse
from jobs.options import ClassifierOptions, EvaluateOptions, ImagenetOptions, KineticsOptions
from mxnet_compat import mx
from train.devices import contexts_of
from train.options import DeviceOptions, RunOptions, ScheduleOptions, TrainOptions


@dataclasses.dataclass
class Trains(TrainOptions):
    """A job like the real ones."""

    schedule: ScheduleOptions = group(ScheduleOptions, lr_steps=(240_000, 360_000))
    run: RunOptions = group(RunOptions, end_epoch=100)


def parsed(*words, options=KineticsOptions):
    return parse(options(), [str(word) for word in words], "Trains.", prog="train.py")


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
    assert parsed(*words).network.fine_tune is expected


def test_lists_are_numbers_not_letters():
    options = parsed("--lr-steps", "1.08e7, 15600000", "--precise-bn-batches", "4,1")
    assert options.schedule.lr_steps == (10_800_000, 15_600_000)
    assert options.precise_bn.precise_bn_batches == (4, 1)
    assert parsed(options=Trains).schedule.lr_steps == (240_000, 360_000)
    options = parsed("--schedule", "6", "8", options=ClassifierOptions)
    assert options.schedule.lr_step_epochs == (6.0, 8.0)


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
        (["--weight-decay", "inf"], "it must be 0 or more and at most 1"),
        (["--lr-base", "1e308"], "it must be above 0 and at most 10000"),
        (["--warmup-epochs", "inf"], "out of range"),
        (["--num-node", "100000"], "1 to 16384 (one weight of a unit's graph of 100000 takes 37.3"),
        (["--crop-size", "20000"], "1 to 8192 (one image with a side of 20000 takes 4.47 GiB)"),
        (["--rgb-mean", "nan"], "out of range: it must be 0 or more and at most 255"),
        (["--rgb-mean", "a,b,c"], "'a' is no number"),
        (["--precise-bn-batches", "4,-1"], "out of range"),
        (["--max-steps", "2.5"], "no whole number"),
        (["--random-seed", "-1"], "out of range"),
        (["--gpus", "0,0"], "different GPUs"),
        (["--resume-epohc", "3"], "closest: --resume-epoch"),
        (["--max", "3"], "unrecognized"),
        (["--lr-schedule", "linear"], "invalid choice"),
        (["--lr-step-epochs", "30", "--lr-steps", "1e6"], "not allowed with"),
        (["--warmup-epochs", "5", "--warmup-steps", "10"], "not allowed with"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed(*words)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.startswith("train.py: error: ")
    assert said.endswith("See train.py --help\n")


def test_help_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help", options=Trains)
    text = " ".join(capsys.readouterr().out.split())
    for part in ("devices:", "checkpoints:", "logging:", "default: 240000,360000"):
        assert part in text
    assert "logged epochs to train (default: 100)" in text
    assert "default: None" not in text
    assert text.count("default: 400,100") == 1


@pytest.mark.parametrize(
    "options", [KineticsOptions, ImagenetOptions, ClassifierOptions, EvaluateOptions]
)
def test_settled_options_come_back_from_their_file(options, tmp_path):
    first = parsed("--gpus", "", "--dropout", "0.25", "--rgb-std", "57.1,58,59.3", options=options)
    (tmp_path / "o.yaml").write_text(as_yaml(first))
    second = parsed("--config", tmp_path / "o.yaml", options=options)
    assert as_dict(second) == as_dict(first)
    assert second.pixels.rgb_std == (57.1, 58.0, 59.3)


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "o.yaml"
    path.write_text("batch_size: 8\nrun: {end-epoch: 5}\nwarmup_steps: 7\nlr_steps: [10, 2.4e5]\n")
    options = parsed("--config", path, "--end-epoch", 3, "--warmup-epochs", 1)
    assert (options.data.batch_size, options.run.end_epoch) == (8, 3)
    assert options.schedule.lr_steps == (10, 240_000)
    # One of two that exclude each other, given on the command line, replaces the other.
    assert (options.schedule.warmup_steps, options.schedule.warmup_epochs) == (None, 1.0)
    assert {"batch_size", "end_epoch", "warmup_epochs"} < options.given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 8", r"unknown option 'batch_sise' \(closest: batch_size"),
        ("batch_size: no", "batch_size: False: "),
        ("batch_size: [1, 2]", "'1,2' is no whole number"),
        ("batch_size: {a: 1}", "batch_size: "),
        ("data: {batch_size: 8}\nbatch_size: 9", "sets batch_size twice"),
        ("lr_schedule: linear", "it must be one of: "),
        ("warmup_steps: 5\nwarmup_epochs: 1", "gives warmup_steps and warmup_epochs"),
        ("- 1", "must hold lines"),
        ("a: [", "is no YAML"),
        ("run: 3", "unknown option 'run'"),
    ],
)
def test_a_wrong_file_names_option_and_value(text, message, tmp_path):
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        parsed("--config", tmp_path / "o.yaml")


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match="none.yaml cannot be read"):
        parsed("--config", "none.yaml")


def test_the_file_holds_the_command_line(tmp_path):
    text = as_yaml(parsed("--task-name", "a b"))
    assert text.startswith("# ")
    assert "--task-name 'a b'" in text.splitlines()[0]
    assert yaml.safe_load(text)["checkpoints"]["task_name"] == "a b"


def test_changes_that_matter_are_listed():
    first = as_dict(parsed("--end-epoch", 5, "--num-workers", 3))
    second = parsed("--end-epoch", 9, "--num-workers", 1, "--rgb-mean", "1,2,3", "--precise-bn")
    assert differences(second, first) == [
        "--rgb-mean: None -> [1.0, 2.0, 3.0]",
        "--precise-bn: False -> True",
        "--end-epoch: 5 -> 9",
    ]
    # What an older version did not know is not compared.
    del first["run"]["end_epoch"]
    assert len(differences(second, first)) == 2


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
        assert contexts_of(parsed(*words).devices, seen) == expected
    assert ("CPU" if expected == [mx.cpu()] else "GPU") in caplog.text


def test_missing_gpu_is_an_error():
    with pytest.raises(UsageError, match="GPU 3 was asked for, but MXNet sees 2"):
        contexts_of(DeviceOptions(gpus=(0, 3)), 2)


def test_default_devices_ask_mxnet(caplog):
    with caplog.at_level(logging.INFO):
        found = contexts_of(DeviceOptions())
    assert len(found) == max(1, mx.context.num_gpus())


def test_the_groups_named_first_come_first():
    assert list(KineticsOptions().groups())[:4] == ["network", "data", "pixels", "schedule"]


@pytest.mark.parametrize("words", [("--lr-steps", "5,3,1"), ("--lr-step-epochs", "30,30")])
def test_steps_of_the_schedule_must_rise(words):
    options = parsed(*words)
    options.run.end_epoch = 1
    with pytest.raises(UsageError, match=f"{words[0]} .* must rise"):
        options.check()


def test_the_command_that_continues_a_run():
    options = parsed("--network", "TINY_GLORE", "--resume", "none", "--overwrite", "--keep", 2)
    options.checkpoints.task_name = "my task"
    words = shlex.split(options.continuation())
    expected = ["--network", "TINY_GLORE", "--keep", "2", "--task-name", "my task"]
    assert words[-8:] == [*expected, "--resume", "auto"]
    assert "--overwrite" not in words
    assert words.count("--resume") == 1
