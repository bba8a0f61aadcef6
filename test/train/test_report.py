"""Reports: log file, console, history, tables, curves and TensorBoard events."""

import csv
import logging
import os

import cv2
import numpy as np
import pytest

from checkpoint.manifest import Position
from glore_common import GloReError, UsageError
from train import plots
from train.plots import plot_confusion, plot_history
from train.report import (
    Reporter,
    best_row,
    columns,
    default_log_file,
    epoch_table,
    log_to,
    write_history,
)

LOGGER = logging.getLogger("glore.train")


def row(epoch, **more):
    figures = {
        "epoch": epoch,
        "step": 10 * epoch,
        "lr": 0.05,
        "train_loss": 2.0 / epoch,
        "train_top1": 0.1 * epoch,
        "train_top5": 0.5,
        "val_loss": 3.0 / epoch,
        "val_top1": 0.25,
        "val_top5": 0.75,
        "train_seconds": 12.345,
        "val_seconds": 1.5,
        "samples_per_second": 64.0,
        "input_wait": 0.125,
    }
    return {**figures, **more}


def test_log_goes_to_file_and_console(tmp_path, capfd):
    path = tmp_path / "logs" / "run.log"
    with log_to(str(path)):
        LOGGER.info("hello %d", 7)
        LOGGER.info("a step", extra={"step_line": True})
    with log_to(str(path)):
        LOGGER.info("appended")
    LOGGER.info("not any more")
    text = path.read_text()
    assert "INFO: hello 7" in text
    assert "appended" in text
    assert "not any more" not in text
    # No terminal here: the step line is on the console too.
    assert "a step" in capfd.readouterr().err


def test_terminal_shows_no_step_lines(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with log_to(str(tmp_path / "run.log")):
        LOGGER.info("a step", extra={"step_line": True})
        LOGGER.info("an epoch")
    error = capfd.readouterr().err
    assert "an epoch" in error
    assert "a step" not in error
    assert "a step" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    ("error", "trace"), [(GloReError("no disk"), False), (KeyError("x"), True)]
)
def test_what_ended_the_run_is_in_the_log_file_only(tmp_path, capfd, error, trace):
    with pytest.raises(type(error)), log_to(str(tmp_path / "run.log")):
        raise error
    text = (tmp_path / "run.log").read_text()
    assert "ERROR" in text
    assert ("Traceback" in text) == trace
    assert capfd.readouterr().err == ""


def test_log_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="log file"), log_to(str(tmp_path / "file" / "run.log")):
        pass


def test_default_log_file():
    assert default_log_file("demo") == os.path.join(".", "exps", "logs", "demo.log")


def test_table_is_aligned_and_takes_missing_values():
    lines = epoch_table([row(1, val_top1=None), row(12)])
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["epoch", "step", "lr"]
    assert lines[2].split()[7] == "-"
    assert lines[3].split()[:4] == ["12", "120", "0.05", "0.1667"]
    assert "12.5%" in lines[2]


def test_history_is_replaced_not_appended(tmp_path):
    path = str(tmp_path / "history.csv")
    write_history([row(1), row(2), row(3)], path)
    write_history([row(1), row(2, val_loss=None)], path)
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == columns()
    assert [line["epoch"] for line in rows] == ["1", "2"]
    assert float(rows[0]["train_loss"]) == 2.0
    assert rows[1]["val_loss"] == ""


def test_best_row():
    assert best_row([]) is None
    rows = [row(1, val_top1=0.5), row(2, val_top1=0.7, val_loss=2.0), row(3, val_top1=0.7)]
    assert best_row(rows)["epoch"] == 3
    without = [row(n, val_top1=None, val_loss=None, train_loss=n) for n in (2, 1, 3)]
    assert best_row(without)["epoch"] == 1


def test_reporter_writes_everything(tmp_path, caplog):
    reporter = Reporter("demo", str(tmp_path), tensorboard=True)
    with caplog.at_level(logging.INFO):
        reporter.open(0)
        means = {"loss": 1.5, "top1": 0.25, "top5": 0.5}
        reporter.start_bar("Epoch 3", 100)
        reporter.advance()
        reporter.step_line(Position(250, 2, 50), 100, 0.05, 64.123, means)
        reporter.epoch_end([row(1), row(2)])
        reporter.finish([row(1), row(2)], "models/demo_ep-0002", 0.0)
        reporter.close()
    line = "Epoch [3] Batch [50/100] Step 250 lr 5.0000e-02 Speed 64.12 samples/s "
    assert line + "loss-ce 1.5000 top1 0.2500 top5 0.5000" in caplog.text
    assert "Best epoch 2" in caplog.text
    assert "models/demo_ep-0002.params" in caplog.text
    assert (tmp_path / "demo_history.csv").read_text().count("\n") == 3
    assert cv2.imread(str(tmp_path / "demo_curves.png")).shape[2] == 3
    events = os.listdir(tmp_path / "demo_tensorboard")
    assert len(events) == 1
    content = (tmp_path / "demo_tensorboard" / events[0]).read_bytes()
    assert b"step/top1" in content
    assert b"epoch/val_loss" in content


def test_the_point_of_the_resumed_step_is_kept(tmp_path):
    """TensorBoard drops the points of earlier runs from the step at which a later one starts."""
    from tensorboard_events import starts

    reporter = Reporter("demo", str(tmp_path), tensorboard=True)
    reporter.open(20)
    reporter.close()
    assert starts(tmp_path / "demo_tensorboard") == [21]


def test_curves_of_one_epoch_without_validation(tmp_path):
    path = str(tmp_path / "curves.png")
    plot_history([row(1, val_loss=None, val_top1=None, val_top5=None)], path, "demo")
    assert cv2.imread(path).std() > 0
    with pytest.raises(UsageError):
        plot_history([], path)


@pytest.mark.parametrize(
    ("val_losses", "logarithmic"),
    [
        ([2.0, 1.5], False),
        ([8255.4, 11.6], True),
        ([float("inf"), 2.0], False),
        ([None] * 2, False),
    ],
)
def test_one_huge_loss_does_not_hide_the_others(monkeypatch, val_losses, logarithmic):
    drawn = []
    monkeypatch.setattr(plots, "plot_panels", lambda panels, *_, **__: drawn.append(panels[0]))
    rows = [row(epoch, val_loss=loss) for epoch, loss in enumerate(val_losses, 1)]
    plots.plot_history(rows, "curves.png")
    plots.plot_metric(rows, "loss", "loss.png", "cross entropy")
    assert [panel.log for panel in drawn] == [logarithmic] * 2
    assert [line.y for line in drawn[0].lines][1] == val_losses


@pytest.mark.parametrize(("losses", "shown"), [([0.9, 0.003], 1e-2), ([0.9, 0.6], 0.7)])
def test_logarithmic_axes_have_numbers_not_formulas(monkeypatch, tmp_path, losses, shown):
    figures, make = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    panel = plots.Panel("loss", "epoch", [plots.Line([1, 2], losses, "training")], log=True)
    plots.plot_panels([panel], str(tmp_path / "panel.png"))
    (axis,) = figures[0].axes
    labels = [label.get_text() for label in axis.yaxis.get_ticklabels(which="both")]
    numbers = [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels if label]
    assert shown in numbers


def test_one_legend_names_every_line_once(monkeypatch, tmp_path):
    figures, make = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    lines = [plots.Line([1, 2], [1, 2], label) for label in ("a", "b", "a")]
    panels = [plots.Panel("left", "step", lines[:1]), plots.Panel("right", "step", lines[1:])]
    for one in (True, False):
        plots.plot_panels(panels, str(tmp_path / "panels.png"), one_legend=one)
    names = [
        [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        for figure in figures
    ]
    assert names == [["a", "b"], []]
    assert [axis.get_legend() is None for figure in figures for axis in figure.axes] == [
        True,
        True,
        False,
        False,
    ]


def test_confusion_picture_is_dark_where_the_counts_are(tmp_path):
    path = str(tmp_path / "confusion.png")
    plot_confusion(np.eye(3) * 5, path, ["left", "right", "up"], "demo")
    good = cv2.imread(path)
    plot_confusion(np.fliplr(np.eye(3)) * 5, path, ["left", "right", "up"], "demo")
    bad = cv2.imread(path)
    assert good.shape == bad.shape
    assert not np.array_equal(good, bad)
    plot_confusion(np.eye(120), path)
    assert cv2.imread(path) is not None


@pytest.mark.parametrize(
    ("matrix", "names"), [(np.ones((2, 3)), None), (np.ones((2, 2)), ["only one"])]
)
def test_confusion_refuses(tmp_path, matrix, names):
    with pytest.raises(UsageError):
        plot_confusion(matrix, str(tmp_path / "confusion.png"), names)


def test_names_are_drawn_as_they_are(tmp_path):
    # Matplotlib would take what stands between two dollar signs for a formula, and fail.
    names = ["a$^^$", "<b> & c_d%\\frac{", "汉字", "日本$"]
    plots.plot_confusion(np.eye(4), str(tmp_path / "x.png"), names, "$^^$ of $")
    plots.plot_metric([row(1), row(2)], "loss", str(tmp_path / "y.png"), "$^^$")
    assert cv2.imread(str(tmp_path / "x.png")) is not None
    assert cv2.imread(str(tmp_path / "y.png")) is not None
