"""The check of a GPU, tried with a CPU in its place."""

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmark import gpu_check
from benchmark.gpu_check import FAILED, NOT_RUN, OK, TINY, Row
from glore_common import GloReError
from mxnet_compat import mx
from train.step import Learner


def test_dry_run_passes_every_check_that_a_cpu_can_run(root):
    done = subprocess.run(
        [sys.executable, "-m", "benchmark.gpu_check", "--dry-run"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    verdicts = [row[-1].rstrip(" |") for row in rows if len(row) == 4]
    assert verdicts[0] == "verdict"
    assert sorted(set(verdicts[1:])) == [NOT_RUN, OK]
    assert verdicts.count(OK) == 14
    assert "training | inference" in done.stdout


def test_a_difference_fails_a_check():
    reference = [np.array([1.0, -4.0]), np.array([0.0])]
    assert gpu_check.compared("x", reference, reference, 1e-3).verdict == OK
    near = [np.array([1.002, -4.0]), np.array([0.0])]
    assert gpu_check.compared("x", reference, near, 1e-3) == Row("x", "5.0e-04", "1e-03", OK)
    assert gpu_check.compared("x", reference, near, 1e-4).verdict == FAILED
    broken = [np.array([np.nan, -4.0]), np.array([0.0])]
    assert gpu_check.compared("x", reference, broken, 1e-3).verdict == FAILED


def test_a_step_that_differs_is_found(monkeypatch):
    devices = [mx.cpu(0)], [mx.cpu(1)]
    assert gpu_check.check_step("x", TINY, *devices).verdict == OK
    original = Learner.step

    def wrong(self, batches, lr, seed):
        return original(self, batches, lr * (1.1 if self.contexts == devices[1] else 1), seed)

    monkeypatch.setattr(Learner, "step", wrong)
    assert gpu_check.check_step("x", TINY, *devices).verdict == FAILED


def test_a_check_that_cannot_run_does_not_stop_the_others(capsys):
    def breaks():
        raise mx.MXNetError("Traceback\nno kernel image is available\n")

    assert gpu_check.attempt("x", breaks) == Row("x", "no kernel image is available", "", FAILED)


@pytest.mark.skipif(mx.context.num_gpus() > 0, reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(GloReError, match="there is no GPU to check"):
        gpu_check.main([])
