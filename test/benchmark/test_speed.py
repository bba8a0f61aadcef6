"""The measurement of speed: its processes, its arithmetic, its tables."""

import importlib.util
import json

import numpy as np
import pytest

from benchmark import speed
from benchmark.speed import LIMITS, OURS, Case, Sample, call_of


@pytest.fixture
def program(tmp_path):
    """Return a function that writes a program of the shell, and gives its path."""

    def write(text):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_a_tiny_network_beside_a_reference(tmp_path, program, capsys, monkeypatch):
    monkeypatch.delitem(LIMITS, "product")
    answers = '{"wall": 1000, "processor": 1000, "peak": 1048576}'
    python = program(f"echo '{{\"ready\": true}}'; while read x; do echo '{answers}'; done")
    prefix = str(tmp_path / "out")
    argv = ["TINY_GLORE", "--crop-size", "32", "--rounds", "1", "--threads", "1"]
    argv += ["--reference", str(tmp_path), "--python", python, "--output", prefix]
    assert speed.main([*argv, "--task", "training", "--train-batch-sizes", "1"]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: dict(zip(rows[4], row)) for row in rows[4:] if row}
    assert list(table) == ["form", "---", *LIMITS, "train", "eager", "bf16"]
    assert table["eager"]["median, s"] == "1000.000"
    assert table["eager"]["peak, MiB"] == "1"
    assert float(table["train"]["speed / eager"]) > 1000
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["forms"]["train"]["peak"] > 2**26


def test_growth_along_an_axis(tmp_path, capsys, monkeypatch):
    asked = []

    def measured(case, forms, options):
        asked.append((case.batch, case.crop, *forms))
        seconds = {"convolution": 1.0, "plain": 2.0 * case.batch, "fused": 1.0 * case.batch}
        return {form: [Sample(s, s, 2**20)] * options.rounds for form, s in seconds.items()}

    monkeypatch.setattr(speed, "measure", measured)
    monkeypatch.setattr(speed, "OURS", {"inference": ("plain", "fused"), "training": ("train",)})
    argv = ["TINY_GLORE", "--task", "inference", "--grow", "batch=1,3", "--grow", "crop=32"]
    assert speed.main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert asked == [(n, crop, "plain", "fused") for n, crop in ((1, None), (3, None), (1, 32))]
    text = capsys.readouterr().out
    assert "| batch | plain, s (MiB) | fused, s (MiB) |" in text
    assert "\n| 1 | 2.000 (1) | 1.000 (1) |\n| 3 | 6.000 (1) | 3.000 (1) |\n" in text
    assert "\n| crop | plain" in text
    assert (tmp_path / "out.png").stat().st_size > 5000


@pytest.mark.parametrize("network", ["TINY_GLORE", "TINY_GLORE+se"])
def test_all_forms_compute_the_same(network):
    case = Case(network, "inference", batch=2, threads=1, crop=32)
    forms = set(OURS["inference"])
    if not importlib.util.find_spec("onnxruntime"):
        forms.remove("onnx")
    results = {form: np.asarray(call_of(form, case)()).reshape(2, -1) for form in forms}
    plain = results.pop("plain")
    assert np.ptp(plain) > 0.1
    rounded = results.pop("int8")
    assert 1e-3 < np.abs(rounded - plain).max() / np.abs(plain).max() < 0.2
    for other in results.values():
        np.testing.assert_allclose(other, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


def test_made_up_parameters_do_not_overflow():
    case = Case("RESNET50_GLORE", "inference", batch=1, threads=1)
    assert 0.1 < np.abs(call_of("fused", case)()).max() < 100


def test_figures_of_a_case():
    case = Case("TINY_GLORE", "inference", batch=3, threads=2)
    one = Case("TINY_GLORE", "inference", batch=1, threads=2).operations()
    assert case.operations() == 3 * one
    assert Case("TINY_GLORE", "training", batch=1, threads=2).operations() == 3 * one
    found = {
        "convolution": [Sample(1.0, 2.0, 1), Sample(2.0, 4.0, 1)],
        # Both rounds are equal but for what else the machine did in the second.
        "plain": [Sample(4.0, 10.0, 5), Sample(8.0, 20.0, 7)],
        "eager": [Sample(2.0, 4.0, 1), Sample(4.0, 8.0, 1)],
    }
    rows = speed.summarise(case, found, "wall")["forms"]
    assert rows["plain"]["median"] == 6.0
    assert rows["plain"]["ratios"] == {"plain": 1.0, "eager": 0.5}
    assert rows["plain"]["share"] == pytest.approx(3 * one / LIMITS["convolution"] / 4)
    assert rows["plain"]["peak"] == 7
    assert rows["convolution"]["share"] == 1
    assert speed.summarise(case, found, "processor")["forms"]["plain"]["median"] == 7.5


@pytest.mark.parametrize(
    ("text", "said"),
    [("exit 3", "without a word"), ("echo '{\"ready\": true}'; read x; echo Oh >&2", "Oh")],
)
def test_a_form_that_fails_is_left_out(program, capsys, monkeypatch, text, said):
    """At its start, or in the middle of the rounds."""
    monkeypatch.setattr(speed, "LIMITS", {})
    options = speed.parse_options(
        ["TINY_GLORE", "--reference", ".", "--python", program(text), "--rounds", "2"]
    )
    case = Case("TINY_GLORE", "inference", batch=1, threads=1)
    assert speed.measure(case, ["bf16"], options) == {}
    assert f"bf16 failed: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--reference", "x"], ["--grow", "depth=1"], ["--grow", "batch"]])
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit):
        speed.parse_options(["TINY_GLORE", *argv])
    assert ("go together" if argv[0] == "--reference" else "AXIS=LIST") in capsys.readouterr().err
