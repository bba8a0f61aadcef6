"""Training curves and confusion matrices as PNG files (Matplotlib without a display)."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from glore_common import UsageError, atomic_path, printable

MOST_NAMED_CLASSES = 40
# Losses get a logarithmic axis when the largest is so many times the median: a validation of a run
# that is about to fail hides everything else otherwise.
WIDE_RANGE = 20


def _plain_text(draw: Callable) -> Callable:
    """Have names of classes and tasks drawn as they are, also with two dollar signs in them."""

    @functools.wraps(draw)
    def drawn(*args: Any, **options: Any) -> Any:
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():
            # A font that lacks a letter of another script shows a box for it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            return draw(*args, **options)

    return drawn


def _figure(width: float, height: float) -> Any:
    # The Figure API instead of pyplot: no global state, and no back end that wants a display.
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


class Line(NamedTuple):
    """One curve of a :class:`Panel`; None among ``y`` leaves a gap.

    ``style``, ``colour`` and ``width`` are Matplotlib's (colour None: the next of its cycle).
    """

    x: Sequence
    y: Sequence
    label: Optional[str] = None
    style: str = "-"
    colour: Optional[str] = None
    width: float = 1.5


class Panel(NamedTuple):
    """One diagram of a figure.

    Attributes
    ----------
    title, xlabel
        Above it, and below.
    lines
        The curves.
    log
        Logarithmic vertical axis, on which 0 is left out.
    limits
        Of the vertical axis.
    marker
        Of the points, Matplotlib's; None for lines alone.
    """

    title: str
    xlabel: str
    lines: Sequence[Line]
    log: bool = False
    limits: Optional[tuple] = None
    marker: Optional[str] = "."


@_plain_text
def plot_panels(
    panels: Sequence[Panel],
    path: str,
    title: str = "",
    columns: Optional[int] = None,
    size: tuple[float, float] = (4.0, 3.6),
    one_legend: bool = False,
) -> None:
    """Draw diagrams beside and below one another.

    Parameters
    ----------
    panels : sequence of Panel
    path
        PNG file to write.
    title
        Written above.
    columns
        Diagrams beside one another; by default all.
    size
        Of one diagram, in inches of 100 pixels.
    one_legend
        One legend below for the whole figure, with every label once, instead of one per diagram.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = _figure(size[0] * columns, size[1] * rows)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis, panel in zip(axes, panels):
        for line in panel.lines:
            values = [np.nan if value is None else value for value in line.y]
            axis.plot(
                line.x,
                values,
                line.style,
                label=line.label,
                color=line.colour,
                linewidth=line.width,
                marker=panel.marker,
            )
        axis.set_title(panel.title)
        axis.set_xlabel(panel.xlabel)
        if panel.limits:
            axis.set_ylim(*panel.limits)
        whole = all(float(x).is_integer() for line in panel.lines for x in line.x)
        axis.xaxis.set_major_locator(MaxNLocator(integer=whole))
        if panel.log:
            axis.set_yscale("log", nonpositive="mask")
            # Matplotlib's own labels are formulas, which no text is here.
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        axis.grid(alpha=0.3)
        if not one_legend and any(line.label for line in panel.lines):
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if one_legend:
        named: dict[str, Any] = {}
        for axis in axes:
            named.update((label, line) for line, label in zip(*axis.get_legend_handles_labels()))
        figure.legend(
            named.values(), named, loc="outside lower center", ncols=columns, fontsize="small"
        )
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _metric_lines(rows: list[dict], metric: str, suffix: str = "") -> list[Line]:
    """Return the curves of a metric in training and validation over the logged epochs."""
    epochs = [row["epoch"] for row in rows]
    return [
        Line(epochs, [row.get(f"{prefix}_{metric}") for row in rows], name + suffix, style)
        for prefix, name, style in (("train", "training", "-"), ("val", "validation", "--"))
    ]


def _loss_panel(rows: list[dict], title: str) -> Panel:
    """Return the diagram of the losses over the logged epochs."""
    lines = _metric_lines(rows, "loss")
    values = np.array([v for line in lines for v in line.y if v is not None], float)
    values = values[np.isfinite(values) & (values > 0)]
    wide = values.size > 0 and values.max() > WIDE_RANGE * np.median(values)
    return Panel(title, "logged epoch", lines, log=bool(wide))


def plot_metric(rows: list[dict], metric: str, path: str, title: str) -> None:
    """Draw one metric, ``loss`` or ``top1``, in training and validation over the logged epochs.

    ``rows`` and ``path`` are those of :func:`plot_history`.
    """
    if not rows:
        raise UsageError("there is no epoch to draw curves of")
    if metric == "loss":
        panel = _loss_panel(rows, title)
    else:
        panel = Panel(title, "logged epoch", _metric_lines(rows, metric), limits=(0, 1.02))
    plot_panels([panel], path, size=(6.0, 4.0))


def plot_history(rows: list[dict], path: str, title: str = "") -> None:
    """Draw loss, the task's figures and learning rate over the logged epochs.

    Parameters
    ----------
    rows
        The rows of ``history.csv``; see :func:`train.report.columns`. Missing values (None) leave
        a gap.
    path
        PNG file to write.
    title
        Written above.
    """
    if not rows:
        raise UsageError("there is no epoch to draw curves of")
    epochs, rates = [row["epoch"] for row in rows], [row.get("lr") for row in rows]
    figures = [
        name[len("train_") :]
        for name in rows[0]
        if name.startswith("train_") and name not in ("train_loss", "train_seconds")
    ]
    parts = [name for name in figures if name.startswith("loss-")]
    figures = [name for name in figures if name not in parts]
    lines = [line for name in figures for line in _metric_lines(rows, name, f" {name}")]
    loss = _loss_panel(rows, "loss" if parts else "cross entropy")
    of_parts = [line for name in parts for line in _metric_lines(rows, name, f" {name}")]
    panels = [
        loss._replace(lines=[*loss.lines, *of_parts]),
        Panel(", ".join(figures), "logged epoch", lines, limits=(0, 1.02)),
        # A schedule may end at 0, which a logarithmic axis cannot show.
        Panel(
            "learning rate",
            "logged epoch",
            [Line(epochs, rates, "learning rate")],
            log=all((rate or 0) > 0 for rate in rates),
        ),
    ]
    plot_panels(panels, path, title)


def plot_precision(curves: dict[str, dict[str, np.ndarray]], path: str, title: str = "") -> None:
    """Draw precision over recall, a diagram for each entry of ``curves``.

    Parameters
    ----------
    curves
        Title of a diagram to its curves by name: precision (101,) at each recall from 0 to 1, NaN
        where there is none.
    path
        PNG file to write.
    title
        Written above.
    """
    recalls = np.linspace(0, 1, 101)
    panels = [
        Panel(
            name,
            "recall",
            [Line(list(recalls), list(values), label) for label, values in lines.items()],
            limits=(0, 1.02),
            marker=None,
        )
        for name, lines in curves.items()
    ]
    plot_panels(panels, path, title)


@_plain_text
def plot_confusion(
    matrix: Any, path: str, class_names: Optional[Sequence[str]] = None, title: str = ""
) -> None:
    """Draw a confusion matrix, each row normalised by its true class's count.

    Parameters
    ----------
    matrix
        (classes, classes) counts; a row is a true class.
    path
        PNG file to write.
    class_names
        Written along the axes for up to 40 classes.
    title
        Written above.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UsageError(f"a confusion matrix is square, not of shape {matrix.shape}")
    classes = matrix.shape[0]
    if class_names is not None and len(class_names) != classes:
        raise UsageError(f"{len(class_names)} class names for {classes} classes")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    few = classes <= MOST_NAMED_CLASSES
    size = 3.5 + 0.35 * classes if few else 12
    figure = _figure(size + 1, size)
    axis = figure.subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if few:
        names = [printable(str(name)) for name in class_names or range(classes)]
        axis.set_xticks(range(classes), names, rotation=90)
        axis.set_yticks(range(classes), names)
        for row in range(classes):
            for column in range(classes):
                if matrix[row, column]:
                    shade = "white" if share[row, column] > 0.5 else "black"
                    text = f"{matrix[row, column]:g}"
                    axis.text(column, row, text, ha="center", va="center", color=shade, fontsize=8)
    axis.set_title(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


# Classes that a timeline names; the others are too unlikely to matter in it.
TIMELINE_CLASSES = 8


def plot_timeline(
    times: Sequence[float],
    scores: Any,
    path: str,
    class_names: Optional[Sequence[str]] = None,
    title: str = "",
) -> None:
    """Draw how likely the classes are over the time of a video.

    Parameters
    ----------
    times
        Seconds, the middle of each window.
    scores
        (windows, classes). The classes that are likeliest somewhere are drawn.
    path
        PNG file to write.
    class_names
    title
        Written above.
    """
    table = np.asarray(scores, dtype=np.float64)
    shown = np.argsort(-table.max(axis=0), kind="stable")[:TIMELINE_CLASSES]
    figure = _figure(9, 4)
    axis = figure.subplots()
    for index in shown:
        name = class_names[index] if class_names else f"class {index}"
        axis.plot(times, table[:, index], marker="o" if len(times) <= 60 else None, label=name)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("seconds")
    axis.set_ylabel("score")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
