"""Kills, full disks and hang-ups in a run's first saves: nothing whole is lost."""

import errno
import glob
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from checkpoint.params import CheckpointError, read_params
from glore_common import UsageError, atomic_path
from train.report import log_to

STEPS = 24


def command(root, folder, task, *more, **options):
    """Return what trains for 24 steps with a checkpoint after each."""
    settings = {
        **{"task_name": task, "model_dir": str(folder), "kv_store": "device", "batches": 6},
        **{"end_epoch": 4, "save_every_steps": 1, **options},
    }
    program = os.path.join(root, "test", "helpers", "dist_job.py")
    return [sys.executable, program, json.dumps(settings), *more]


def start(root, folder, *words, **options):
    helpers = os.path.join(root, "test", "helpers")
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((root, helpers))},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def newest(folder, task):
    (path,) = glob.glob(os.path.join(str(folder), f"{task}_ep-0004.params"))
    return read_params(path)


def assert_same(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(root, folder, *command(root, folder, "t"))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return newest(folder, "t")


@pytest.mark.slow
def test_a_run_killed_in_each_of_its_first_saves_ends_as_an_undisturbed_one(
    root, tmp_path, undisturbed
):
    rng = random.Random(3)
    words = command(root, tmp_path, "t", "--resume", "auto", pause=0.02)
    killed = 0
    for save in range(20):
        process = start(root, tmp_path, *words)
        deadline = time.monotonic() + 120
        # The first files of the next save, then at a random moment of it or of the one after.
        seen = set(os.listdir(tmp_path))
        while process.poll() is None and set(os.listdir(tmp_path)) <= seen | {".t.lock"}:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.04)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if save == 0:
            # As when the first save of all was cut short.
            for path in glob.glob(str(tmp_path / "t_*.json")):
                os.remove(path)
    assert killed > 10
    process = start(root, tmp_path, *words)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same(newest(tmp_path, "t"), undisturbed)
    assert glob.glob(str(tmp_path / ".*.tmp*")) == []


def test_a_hang_up_saves(root, tmp_path, undisturbed):
    # Also where the tests themselves run below nohup.
    process = start(
        *(root, tmp_path, *command(root, tmp_path, "t", save_every_steps=0, pause=0.1)),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while "Epoch [1]" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP, errors
    assert "--task-name t --resume auto" in errors
    process = start(root, tmp_path, *command(root, tmp_path, "t", "--resume", "auto"))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same(newest(tmp_path, "t"), undisturbed)


def test_nohup_is_an_answer_to_a_hang_up(root, tmp_path):
    words = command(root, tmp_path, "t", pause=0.05)
    process = start(
        root, tmp_path, *words, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    while "Epoch [1]" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_a_signal_after_a_save_that_failed_says_what_is_lost(root, tmp_path):
    words = command(root, tmp_path, "t", on_save_error="continue", pause=0.05)
    process = start(root, tmp_path, *words, preexec_fn=limit_files(300))
    while "The run goes on" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped; the last steps are lost. There is no checkpoint yet." in errors


def limit_files(size):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("answer", ["stop", "continue"])
def test_checkpoints_that_cannot_be_written(root, tmp_path, answer):
    # Room for nothing of a checkpoint: the run says so, once for each, and goes on if told to.
    words = command(root, tmp_path, "t", on_save_error=answer)
    process = start(root, tmp_path, *words, preexec_fn=limit_files(300))
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert "cannot be written: File too large. Raise the limit of file sizes (ulimit -f)." in errors
    assert errors.count("The run goes on") == (STEPS if answer == "continue" else 0)
    assert ("its result could not be saved" in errors) == (answer == "continue")
    assert glob.glob(str(tmp_path / "t_*.params")) + glob.glob(str(tmp_path / "*.tmp*")) == []


def test_a_log_that_cannot_be_written_costs_the_log(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with log_to("/dev/full"):
        for number in range(3):
            logging.getLogger("glore").info("line %d", number)
    said = capsys.readouterr().err
    assert "line 2" in said
    assert said.count("there is no log file from here on") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("error", [UsageError("no"), CheckpointError("no")])
def test_a_refused_run_leaves_no_log(tmp_path, error):
    path = tmp_path / "exps" / "logs" / "t.log"
    with pytest.raises(type(error)), log_to(str(path)):
        raise error
    assert os.listdir(tmp_path) == []
    # Neither an older log nor that of a run that has done something is taken back.
    for step_line in (True, False):
        with pytest.raises(type(error)), log_to(str(path)):
            logging.getLogger("glore").info("here", extra={"step_line": step_line})
            raise error
        assert "here" in path.read_text()


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as info, atomic_path(tmp_path / "x.png"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert info.value.filename == str(tmp_path / "x.png")
    assert os.listdir(tmp_path) == []
