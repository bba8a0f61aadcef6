"""The studies' programs on small networks: attention by position, open questions."""

import sys

import cv2
import numpy as np
import pytest

from benchmark import attention_study, open_questions
from benchmark.short_runs import new_block, run_missing, spread
from checkpoint import graph
from glore_common import GloReError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (73, 73, 3))
        cv2.imwrite(str(folder / f"{number}.png"), pixels.astype("uint8"))
    return str(folder)


def test_attention_of_two_epochs(tmp_path, images, capsys):
    block = "nl@4:1,gc@3:1/after:ratio=1/4,glore@5:1"
    prefix = str(tmp_path / "net")
    for epoch in (1, 2):
        net = new_block("local39", 2, {"block": block}, seed=epoch)
        graph.save(prefix, epoch, net.symbol, *net.arg_aux_params())
    table = tmp_path / "table.csv"
    attention_study.main(
        [prefix, "--crop-size", "64", "--inputs", images, "--all-epochs", "--output", str(table)]
    )
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "conv" in line]
    (nl,) = [row for row in rows if row[:2] == ["1", "conv4_B01_nl"]]
    # Its last layer starts at zero.
    assert nl[4] == "untrained"
    assert 0 <= float(nl[5]) < 0.5
    (gc,) = [row for row in rows if row[:2] == ["1", "conv3_B01_gc"]]
    assert gc[5:] == ["0.0000", "0.0000"]
    drifts = [row[6] for row in rows if row[1] == "conv5_B01_extra"][-2:]
    assert float(drifts[0]) > 0.1
    assert float(drifts[1]) == 0
    assert any("Without structure, 256 positions" in line for line in lines)
    assert len(table.read_text().splitlines()) == 1 + 2 * 3


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    open_questions.digits.cache_clear()
    with pytest.raises(GloReError, match="pip install scikit-learn"):
        open_questions.digits()


def test_a_run_of_made_up_digits(monkeypatch):
    """Classes that differ in brightness."""
    labels = np.arange(40) % 2
    pixels = np.ones((40, 16, 16, 3), "float32") * (2 * labels - 1)[:, None, None, None]
    parts = open_questions.Parts(pixels, labels, pixels, labels)
    monkeypatch.setitem(open_questions.SOURCES, "digits", lambda: parts)
    case = open_questions.Case("digits", "digits", "gc", "gc@4:1/after:ratio=1/2", 0, 12)
    result = open_questions.run(case)
    assert result["training loss"] < 0.6
    assert result["parameters"] == 16019


def test_runs_are_kept(tmp_path):
    case = open_questions.Case("digits", "digits", "none", "none", 0, 1)
    calls = []

    def once(given):
        calls.append(given)
        return {"accuracy": 0.5}

    for _ in range(2):
        (result,) = run_missing([case], str(tmp_path), once)
        assert result["accuracy"] == 0.5
        assert result["label"] == "none"
    assert calls == [case]


def test_spread():
    assert spread([1.0]) == "1.000"
    assert spread([1.0, 2.0], ".1f") == "1.5 (1.0–2.0)"
