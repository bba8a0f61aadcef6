"""Training curves and confusion matrices as PNG files (Matplotlib without a display)."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from glore_common import UsageError, atomic_path

MOST_NAMED_CLASSES = 40


def _figure(width, height):
    # The Figure API instead of pyplot: no global state, and no back end that wants a display.
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_history(rows, path, title=""):
    """Draw loss, accuracies and learning rate over the logged epochs.

    Parameters
    ----------
    rows : list of dict
        The rows of ``history.csv``; see ``train.callback.COLUMNS``. Missing values (None) leave a
        gap.
    path : str
        PNG file to write.
    title : str
        Written above.
    """
    if not rows:
        raise UsageError("there is no epoch to draw curves of")
    figure = _figure(12, 3.6)
    axes = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]

    def draw(axis, column, label, style):
        values = [np.nan if row.get(column) is None else row[column] for row in rows]
        axis.plot(epochs, values, style, label=label, marker=".")

    draw(axes[0], "train_loss", "training", "-")
    draw(axes[0], "val_loss", "validation", "--")
    axes[0].set_title("cross entropy")
    for name in ("top1", "top5"):
        draw(axes[1], f"train_{name}", f"training {name}", "-")
        draw(axes[1], f"val_{name}", f"validation {name}", "--")
    axes[1].set_title("accuracy")
    axes[1].set_ylim(0, 1.02)
    draw(axes[2], "lr", "learning rate", "-")
    axes[2].set_title("learning rate")
    # A schedule may end at 0, which a logarithmic axis cannot show.
    axes[2].set_yscale("log", nonpositive="mask")
    for axis in axes:
        axis.set_xlabel("logged epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def plot_confusion(matrix, path, class_names=None, title=""):
    """Draw a confusion matrix, each row normalised by its true class's count.

    Parameters
    ----------
    matrix : array_like
        (classes, classes) counts; a row is a true class.
    path : str
        PNG file to write.
    class_names : sequence of str, optional
        Written along the axes for up to 40 classes.
    title : str
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
        names = class_names or [str(index) for index in range(classes)]
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
