"""Which files a user's text stands for."""

import pytest

from checkpoint.params import CheckpointError
from checkpoint.paths import find
from glore_common import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(folder, *names):
    for name in names:
        (folder / name).touch()


def test_a_prefix_is_its_newest_epoch(folder):
    touch(folder, "net-0003.params", "net-0012.params", "net-symbol.json")
    for text in ("net", "net-symbol.json", "net-0012", "net-0012.params"):
        assert find(text).params == "net-0012.params"
    assert find("net", 3).params == "net-0003.params"
    with pytest.raises(UsageError, match="has no epoch 3"):
        find("net-0012.params", 3)


def test_a_task_without_a_whole_epoch_is_its_newest_step(folder):
    touch(folder, "job_step-0000002.params", "job_step-0000010.params", "job_ep-symbol.json")
    for text in ("job_ep", "job", "./job_ep"):
        assert find(text).params.endswith("job_step-0000010.params")
    assert find("job_ep").symbol == "./job_ep-symbol.json"
    touch(folder, "job_ep-0001.params")
    assert find("job_ep").params == "job_ep-0001.params"


def test_nothing_there_is_said(folder):
    touch(folder, "other_step-0000002.params")
    with pytest.raises(CheckpointError, match="neither a file job_ep nor a checkpoint"):
        find("job_ep")
