"""What a run says while it trains: log file, console, progress bar, history, curves, events.

On a terminal a progress bar moves and the step lines go to the log file alone; elsewhere they go
to both. A step line has the fields of the original project (facebookresearch/GloRe): learning
rate, epoch, batch, speed, loss-ce, top1, top5.
"""

import contextlib
import csv
import io
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

from tqdm import tqdm

from checkpoint.manifest import Position
from checkpoint.params import CheckpointError, SaveError
from glore_common import (
    GloReError,
    UsageError,
    missing_folders,
    take_back,
    temporaries,
    write_text,
)

from .plots import plot_history

LOGGER = logging.getLogger("glore.train")
LOG_DIR = os.path.join(".", "exps", "logs")
TIME_COLUMNS = ("train_seconds", "val_seconds", "samples_per_second", "input_wait")


def columns(figures: Sequence[str] = ("top1", "top5")) -> tuple[str, ...]:
    """Return the columns of a history, the keys of its rows.

    ``figures`` are those of the task (:class:`train.task.Task`), by default classification's.
    """
    means = [f"{part}_{name}" for part in ("train", "val") for name in ("loss", *figures)]
    return ("epoch", "step", "lr", *means, *TIME_COLUMNS)


def figures_of(row: dict) -> tuple[str, ...]:
    """Return the figures, besides the loss, that a row of the history has: ``top1``, ``top5``."""
    others = ("val_loss", "val_seconds")
    return tuple(name[4:] for name in row if name.startswith("val_") and name not in others)


class _ConsoleHandler(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def __init__(self, hide_step_lines: bool) -> None:
        super().__init__()
        self.hide_step_lines = hide_step_lines

    def emit(self, record: logging.LogRecord) -> None:
        if self.hide_step_lines and getattr(record, "step_line", False):
            return
        if getattr(record, "file_only", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    """A log file that costs no run: when it cannot be written it is given up, and that is said."""

    def __init__(self, path: str) -> None:
        self.folders = missing_folders(os.path.dirname(os.path.abspath(path)))
        self.new, self.has_steps = not os.path.exists(path), False
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        self.has_steps = self.has_steps or getattr(record, "step_line", False)
        super().emit(record)

    def take_back(self) -> None:
        """Leave nothing of a run that was refused before it did anything."""
        if self.new and not self.has_steps:
            self.close()
            take_back(self.baseFilename, self.folders)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        LOGGER.warning(
            "%s cannot be written any more (%s): there is no log file from here on",
            self.baseFilename,
            error.strerror or error,
        )


@contextlib.contextmanager
def log_to(path: Optional[str] = None, level: int = logging.INFO) -> Iterator[None]:
    """Send all Python logging to the console and, if given, to the end of a file.

    What ends the ``with`` block as an error is written to the file too: the message of a
    GloReError, or the trace of a bug. A run that is refused leaves no new file.

    Parameters
    ----------
    path
        Log file; its folder is made.
    level
        Lowest level that is written.

    Raises
    ------
    UsageError
        If the file cannot be opened.
    """
    # The level is this project's own: other libraries say hundreds of lines below INFO.
    root, own = logging.getLogger(), logging.getLogger("glore")
    handlers: list[Any] = [_ConsoleHandler(hide_step_lines=sys.stderr.isatty())]
    if path:
        try:
            handlers.append(_FileHandler(path))
        except OSError as error:
            raise UsageError(f"the log file cannot be written: {error}") from error
    formatter = logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    before = root.level, own.level
    root.setLevel(max(level, logging.INFO))
    own.setLevel(level)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    try:
        yield
    except GloReError as error:
        LOGGER.error("%s", error, extra={"file_only": True})
        if isinstance(error, (CheckpointError, UsageError)) and not isinstance(error, SaveError):
            for handler in handlers[1:]:
                handler.take_back()
        raise
    except Exception:
        LOGGER.exception("stopped by an unexpected error", extra={"file_only": True})
        raise
    finally:
        root.setLevel(before[0])
        own.setLevel(before[1])
        for handler in handlers:
            root.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()


def default_log_file(task: str) -> str:
    """Return where a task's log goes unless the user says otherwise."""
    return os.path.join(LOG_DIR, f"{task}.log")


def _figure(value: Optional[float], digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def epoch_table(rows: list[dict]) -> list[str]:
    """Return rows of the history as an aligned text table.

    Parameters
    ----------
    rows
        At least one; see :func:`columns`.

    Returns
    -------
    list of str
        The lines: a header, a rule, one line per row.
    """
    names = columns(figures_of(rows[0]))
    measured = names[3 : -len(TIME_COLUMNS)]
    header = (
        ["epoch", "step", "lr"]
        + [name.replace("train_", "").replace("val_", "val ") for name in measured]
        + ["train s", "val s", "samples/s", "input wait"]
    )
    body = [
        [str(row["epoch"]), str(row["step"]), f"{row['lr']:.3g}"]
        + [_figure(row[name]) for name in measured]
        + [_figure(row[name], 1) for name in TIME_COLUMNS[:3]]
        + [f"{row['input_wait']:.1%}"]
        for row in rows
    ]
    widths = [max(len(line[index]) for line in [header, *body]) for index in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in body]
    title = "  ".join(cell.rjust(width) for cell, width in zip(header, widths))
    return [title, "-" * len(title), *lines]


def write_history(rows: list[dict], path: str) -> None:
    """Write the history as CSV, atomically: a resumed run neither loses nor doubles a row."""
    text = io.StringIO()
    names = columns(figures_of(rows[0]))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if row[name] is None else row[name] for name in names})
    write_text(path, text.getvalue())


def best_row(rows: list[dict]) -> Optional[dict]:
    """Return the row with the highest first figure in validation (top-1), else the lowest loss.

    The earliest of equal rows wins; None without rows.
    """

    def merit(row: dict) -> tuple[float, float]:
        figures = figures_of(row)
        first = row[f"val_{figures[0]}"] if figures else None
        loss = row["val_loss"] if row.get("val_loss") is not None else row.get("train_loss")
        # Not a number: a figure of nothing, as of validation data without a labelled pixel.
        known = first is not None and not math.isnan(first)
        return first if known else -1.0, -loss if loss is not None else -math.inf

    return max(rows, key=merit, default=None)


class Reporter:
    """Writes step lines, epoch tables, ``history.csv``, curves and TensorBoard events.

    Parameters
    ----------
    task
        Name of the run.
    log_dir
        Folder of ``{task}_history.csv``, ``{task}_curves.png`` and ``{task}_tensorboard``.
    tensorboard
        Write TensorBoard events (extra ``tensorboard``).
    files
        False for workers other than the first, which only log.
    """

    def __init__(
        self, task: str, log_dir: str = LOG_DIR, tensorboard: bool = False, files: bool = True
    ) -> None:
        self.task = task
        self.files = files
        tensorboard = tensorboard and files
        self.history_path = os.path.join(log_dir, f"{task}_history.csv")
        self.curves_path = os.path.join(log_dir, f"{task}_curves.png")
        self.events_path = os.path.join(log_dir, f"{task}_tensorboard") if tensorboard else None
        self._events: Any = None
        self._bar: Optional[tqdm] = None

    def open(self, step: int) -> None:
        """Start reporting at ``step``; events of later steps of an earlier run are dropped."""
        if self.files:
            folder, name = os.path.split(self.history_path)
            stems = (name[: -len(".csv")], os.path.basename(self.curves_path)[: -len(".png")])
            for path in temporaries(folder or ".", stems):
                os.remove(path)
        if self.events_path is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UsageError(
                "--tensorboard needs the package tensorboardx: pip install tensorboardx"
            ) from None
        self._events = SummaryWriter(self.events_path, purge_step=step + 1)

    def close(self) -> None:
        """Close the bar and the event file."""
        self.end_bar()
        if self._events is not None:
            self._events.close()
            self._events = None

    def start_bar(self, label: str, total: int, done: int = 0) -> None:
        """Show a progress bar over ``total`` batches where stderr is a terminal."""
        self.end_bar()
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=label, unit="batch", dynamic_ncols=True, leave=False
            )

    def advance(self, batches: int = 1) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(batches)

    def end_bar(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step_line(
        self, position: Position, batches: int, lr: float, speed: float, means: dict[str, Any]
    ) -> None:
        """Report the batches since the last step line.

        Parameters
        ----------
        position
            Where the run stands.
        batches
            Batches of this logged epoch.
        lr
            Learning rate of the last step.
        speed
            Samples per second.
        means
            ``loss`` and the task's figures over these batches.
        """
        # With parts the loss is their sum, and no cross entropy.
        total = "loss" if any(name.startswith("loss-") for name in means) else "loss-ce"
        figures = " ".join(
            f"{total if name == 'loss' else name} {value:.4f}"
            for name, value in means.items()
            if value is not None
        )
        LOGGER.info(
            "Epoch [%d] Batch [%d/%d] Step %d lr %.4e Speed %.2f samples/s %s",
            position.epoch + 1,
            position.batch,
            batches,
            position.step,
            lr,
            speed,
            figures,
            extra={"step_line": True},
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"lr {lr:.2e}, {speed:.1f} samples/s, {figures}")
        if self._events is not None:
            for name, value in {**means, "lr": lr, "samples_per_second": speed}.items():
                if value is None:
                    continue
                self._events.add_scalar(f"step/{name}", value, position.step)

    def _write(self, write: Callable[..., None], rows: list[dict], path: str, *more: str) -> None:
        """Write a file of figures; a disk that is full costs the file, not the run."""
        if not self.files:
            return
        try:
            write(rows, path, *more)
        except OSError as error:
            LOGGER.warning("%s cannot be written: %s", path, error.strerror or error)

    def epoch_end(self, rows: list[dict]) -> None:
        """Report the last of the history's rows and write the history."""
        self.end_bar()
        row = rows[-1]
        for line in epoch_table(rows[-1:]):
            LOGGER.info("%s", line)
        self._write(write_history, rows, self.history_path)
        if self._events is not None:
            for name in columns(figures_of(row))[2:]:
                if row[name] is not None:
                    self._events.add_scalar(f"epoch/{name}", row[name], row["step"])

    def finish(self, rows: list[dict], checkpoint: Optional[str], started: float) -> None:
        """Draw the curves and sum the run up.

        Parameters
        ----------
        rows
            The history.
        checkpoint
            Stem of the last checkpoint.
        started
            ``time.perf_counter()`` when this process began to train.
        """
        self.end_bar()
        if rows and self.files:
            self._write(plot_history, rows, self.curves_path, self.task)
            self._write(write_history, rows, self.history_path)
            best = best_row(rows) or rows[-1]
            for line in epoch_table(rows):
                LOGGER.info("%s", line)
            LOGGER.info(
                "Best epoch %d: validation %s",
                best["epoch"],
                ", ".join(
                    f"{name} {_figure(best[f'val_{name}'])}" for name in (*figures_of(best), "loss")
                ),
            )
            LOGGER.info("History    %s", self.history_path)
            LOGGER.info("Curves     %s", self.curves_path)
        if checkpoint and self.files:
            LOGGER.info("Checkpoint %s.params", checkpoint)
        if self.events_path:
            LOGGER.info("Events     tensorboard --logdir %s", self.events_path)
        LOGGER.info("Done in %.1f s", time.perf_counter() - started)
