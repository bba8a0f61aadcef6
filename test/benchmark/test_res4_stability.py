"""The study of docs/res4-stability.md: what its runs record, and what its tables say of them."""

import csv
import math
import os

import numpy as np
import pytest

from benchmark import res4_stability as study
from dataset import prepare_demo_images
from glore_common import GloReError
from mxnet_compat import mx

TINY = ("--steps", "20", "--crop-size", "32", "--seeds", "3", "--rates", "0.01")
ROW = {
    "network": "n",
    "start": "fresh",
    "contrast": "even",
    "crop_size": 8,
    "place": "",
    "variant": "none",
}
ROW.update(rate=0.1, seed=0, steps=3, loss_1=3.0, loss_2=2.5, worst_val_loss=9.0)


def row(loss, top1, **changes):
    return {**ROW, "loss_3": loss, "val_top1": top1, **changes}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that runs the command, with images, results and pictures in tmp_path."""
    monkeypatch.setattr(study, "HERE", str(tmp_path / "docs"))
    few = {"images_per_class": 12, "val_images_per_class": 4, "test_images_per_class": 1}
    images = prepare_demo_images(tmp_path, **few, jobs=1)
    monkeypatch.setattr(study, "prepare_demo_images", lambda: images)
    os.makedirs(tmp_path / "docs" / "img")

    def run(*words):
        study.main([*words, "--results", str(tmp_path / "runs")])

    return run


def test_runs_are_kept_and_reported(command, tmp_path, capsys, caplog):
    where = ("--places", "res4", "--variants", "none,report,all")
    command("run", *TINY, *where)
    files = sorted(os.listdir(tmp_path / "runs"))
    assert files == [
        f"resnet18_v1_slim_32px_fresh_varied_{unit}_lr0.01_seed3_20.json"
        for unit in ("nowhere_none", "res4_all", "res4_report")
    ]
    times = [os.stat(tmp_path / "runs" / name).st_mtime_ns for name in files]
    caplog.clear()
    command("run", *TINY, *where)
    assert "3 runs, 0 of them to do" in caplog.text
    assert times == [os.stat(tmp_path / "runs" / name).st_mtime_ns for name in files]

    results = study.read_results(str(tmp_path / "runs"))
    assert [result["variant"] for result in results] == ["none", "report", "all"]
    assert all(len(result["losses"]) == 20 and result["finite"] for result in results)
    assert [step for step, _, _ in results[0]["validations"]] == [10, 20]

    command("report", *TINY)
    with open(tmp_path / "docs" / "res4_stability.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [line["place"] for line in rows] == ["", "res4", "res4"]
    for line, result in zip(rows, results):
        assert float(line["loss_3"]) == pytest.approx(np.mean(result["losses"][-6:]), abs=1e-4)
        assert float(line["worst_val_loss"]) == pytest.approx(result["validations"][1][1], abs=1e-4)
    assert "| res4 | reproduction's unit |" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "docs" / "img")) == [
        f"res4-resnet18_v1_slim-32px-fresh-varied-{what}.png" for what in ("training", "validation")
    ]


def test_an_empty_folder_is_one_message(command):
    with pytest.raises(GloReError, match="there are no runs in .*runs: python -m benchmark"):
        command("report")


def test_a_run_is_compared_with_its_own_seed_and_rate():
    guess = math.log(8)
    rows = [
        row(1.0, 0.5),
        row(2.0, 0.3, seed=1),
        row(1.5, 0.4, place="res4", variant="report"),
        row(guess, 0.1, place="res4", variant="report", seed=1),
        # Nothing to compare with.
        row(9.0, 0.0, place="res4", variant="report", seed=2),
    ]
    *_, plain, ours = study.paired(rows)
    assert plain == "| n, 8px, fresh, even | - | no unit | +0.00 | 0 of 2 | +0.0 | 0 of 2 |"
    mean = (0.5 + guess - 2) / 2
    assert ours.endswith(f"| reproduction's unit | {mean:+.2f} | 2 of 2 | -15.0 | 1 of 2 |")


def test_the_table_of_runs_has_a_column_per_rate():
    rows = [row(1.0, 0.5), row(3.0, 0.3, seed=1, worst_val_loss=20.0), row(2.0, 0.1, rate=0.2)]
    head, _, line = study.markdown(rows)
    assert "lr 0.1: " in head
    assert "lr 0.2: " in head
    assert line.endswith("| 3.00, 2.50, 2.00 / 20 / 40 % | 3.00, 2.50, 2.00 / 9 / 10 % |")


def test_even_contrast_keeps_the_image_and_changes_its_distance_from_grey():
    grey = (study.GREY / 255 - np.array(study.MEAN)) / np.array(study.STD)
    away = np.random.RandomState(0).randn(2, 3, 4, 4).astype("float32")
    faint = grey.reshape(1, 3, 1, 1) + away * np.array([0.1, 2.0]).reshape(2, 1, 1, 1)
    data, label = study.even((mx.nd.array(faint), mx.nd.array([1, 2])))
    got = data.asnumpy() - grey.reshape(1, 3, 1, 1)
    want = away / np.sqrt((away**2).mean((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert label.asnumpy().tolist() == [1, 2]


def test_the_unit_spreads_images_that_differ_in_contrast(command, capsys):
    command("spread", "--crop-size", "32", "--seeds", "3", "--places", "res4")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[0] for line in lines] == ["| varied", "| even"]
    for line in lines:
        before, behind = (float(cell.rstrip(" %|")) for cell in line.split(" | ")[2:])
        # Of 32 images the largest has at least a 32nd.
        assert 100 / 32 <= before < behind <= 100
