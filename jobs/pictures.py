"""What ``explain`` draws: maps of units and blocks over images and frames.

Rules: non-negative weights get a sequential colour map that begins at 0, signed ones a diverging
one with the same range on both sides of 0; all maps of a block share one scale, which a colour bar
shows; a map lies on the grey image where its cells' centres are, and is not interpolated unless
asked.
"""

import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glore_common import atomic_path

SIGNED, POSITIVE = "RdBu_r", "viridis"
OPACITY = 0.65  # of a map on an image
CELL = 1.75  # inches: width of a map
DPI = 100
VIDEO_TILE = 192  # pixels: width of a map in a film
FRAMES_PER_SECOND = 2  # of a film


class Shown(NamedTuple):
    """An input as it is shown.

    Attributes
    ----------
    name
        For titles.
    frames
        (T, h, w, 3) uint8, RGB: what the network is fed; one frame for an image.
    seconds
        Time of each frame in the video; empty for an image.
    """

    name: str
    frames: np.ndarray
    seconds: tuple[float, ...]

    def grey(self, frame: int) -> np.ndarray:
        """Return a frame as (h, w, 3) grey, 0..1."""
        grey = cv2.cvtColor(self.frames[frame], cv2.COLOR_RGB2GRAY)
        return np.repeat(grey[..., None] / 255, 3, 2)


class Maps(NamedTuple):
    """Maps of one block for one input.

    Attributes
    ----------
    values
        (maps, [T'], h', w').
    titles
        One per map.
    signed
        Whether values below 0 mean something.
    label
        Of the colour bar.
    boxes
        Per map the cell ([t], y, x) that asks, in a map of ``box_shape``.
    box_shape
        ([T'], h', w').
    offset
        Cells that a map's first one is centred behind pixel 0; of pooled maps that is not 0.
    """

    values: np.ndarray
    titles: Sequence[str]
    signed: bool
    label: str
    boxes: Sequence[tuple[int, ...]] = ()
    box_shape: tuple[int, ...] = ()
    offset: float = 0.0

    def scale(self) -> Normalize:
        """Return the range of colours, the same for all maps."""
        top = float(abs(self.values).max()) or 1.0
        return Normalize(-top if self.signed else 0.0, top)

    def colours(self) -> Any:
        """Return the colour map."""
        return colormaps[SIGNED if self.signed else POSITIVE]


def strides(shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Return per axis the pixels from one cell's centre to the next.

    Strides are powers of two in all networks here, and a map is the input divided, rounded up.
    """
    return tuple(2 ** max(0, round(float(np.log2(s / n)))) for s, n in zip(size, shape))


def frame_of(slice_number: int, maps: int, frames: int) -> int:
    """Return the frame at the centre of a time slice of a map."""
    (step,) = strides((maps,), (frames,))
    return min(frames - 1, slice_number * step)


def extent(
    shape: Sequence[int], size: Sequence[int], offset: float = 0.0
) -> tuple[float, float, float, float]:
    """Return Matplotlib's extent (left, right, bottom, top) of a map (h', w') on an image (h, w).

    Kernels are odd and padded by half, so that cell i is centred on pixel stride * i, or in a map
    with an ``offset`` that many cells behind it.
    """
    down, right = strides(shape, size)
    left, top = (offset - 0.5) * right, (offset - 0.5) * down
    return (left, left + shape[1] * right, top + shape[0] * down, top)


def _figure(width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _bare(axis: Any, size: Sequence[int]) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlim(-0.5, size[1] - 0.5)
    axis.set_ylim(size[0] - 0.5, -0.5)


def draw_maps(shown: Shown, maps: Maps, path: str, title: str, smooth: bool = False) -> None:
    """Draw the maps of one block, one column each behind the frame, one row per time slice.

    Parameters
    ----------
    shown, maps
    path
        PNG file.
    title
    smooth
        Interpolate.
    """
    values = maps.values if maps.values.ndim == 4 else maps.values[:, None]
    count, slices = values.shape[:2]
    size = shown.frames.shape[1:3]
    figure = _figure(CELL * (count + 1) + 1.1, CELL * slices * size[0] / size[1] + 0.9)
    axes = figure.subplots(slices, count + 1, squeeze=False)
    for row in range(slices):
        frame = frame_of(row, slices, len(shown.frames))
        axes[row, 0].imshow(shown.frames[frame])
        if shown.seconds:
            axes[row, 0].set_ylabel(f"{shown.seconds[frame]:.2f} s")
        for column in range(count):
            axis = axes[row, column + 1]
            axis.imshow(shown.grey(frame), vmin=0, vmax=1)
            axis.imshow(
                values[column, row],
                cmap=maps.colours(),
                norm=maps.scale(),
                alpha=OPACITY,
                extent=extent(values.shape[2:], size, maps.offset),
                interpolation="bilinear" if smooth else "nearest",
            )
            box = maps.boxes[column] if maps.boxes else None
            if box is not None and (len(box) == 2 or box[0] == row):
                _box(axis, box[-2:], maps.box_shape[-2:], size)
            if row == 0:
                axis.set_title(maps.titles[column], fontsize=8)
        for axis in axes[row]:
            _bare(axis, size)
    axes[0, 0].set_title("input", fontsize=8)
    figure.colorbar(
        ScalarMappable(maps.scale(), maps.colours()), ax=axes, label=maps.label, aspect=30
    )
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _box(axis: Any, cell: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> None:
    """Draw the cell that asks, in its true size."""
    down, right = strides(shape, size)
    corner = ((cell[1] - 0.5) * right, (cell[0] - 0.5) * down)
    axis.add_patch(Rectangle(corner, right, down, fill=False, edgecolor="red", linewidth=1.5))


def draw_relation(relation: np.ndarray, order: Sequence[int], path: str, title: str) -> None:
    """Draw the learnt relation of a unit's nodes, as a matrix and as a graph.

    Parameters
    ----------
    relation
        (N, N): how much of the node of a column is added to the node of a row.
    order
        Nodes that the graph shows.
    path, title
    """
    top = float(abs(relation).max()) or 1.0
    norm, colours = Normalize(-top, top), colormaps[SIGNED]
    figure = _figure(9.2, 4.4)
    left, right = figure.subplots(1, 2)
    left.imshow(relation, cmap=colours, norm=norm, interpolation="nearest")
    left.set_xlabel("from node")
    left.set_ylabel("to node")
    left.set_title("weights of the node relation (without the shortcut)", fontsize=9)
    chosen = list(order)
    angle = 2 * np.pi * np.arange(len(chosen)) / max(1, len(chosen))
    x, y = np.sin(angle), np.cos(angle)
    edges = [
        (abs(relation[b, a]), i, j) for i, a in enumerate(chosen) for j, b in enumerate(chosen)
    ]
    strongest = sorted((edge for edge in edges if edge[1] != edge[2]), reverse=True)
    for weight, i, j in reversed(strongest[: 3 * len(chosen)]):
        value = relation[chosen[j], chosen[i]]
        right.annotate(
            "",
            (x[j], y[j]),
            (x[i], y[i]),
            arrowprops={
                "arrowstyle": "-|>",
                "color": colours(norm(value)),
                "linewidth": 0.5 + 3 * weight / top,
                "shrinkA": 12,
                "shrinkB": 12,
                "connectionstyle": "arc3,rad=0.12",
            },
        )
    right.scatter(x, y, s=420, c="white", edgecolors="black", zorder=3)
    for number, a, b in zip(chosen, x, y):
        right.text(a, b, str(number), ha="center", va="center", fontsize=8, zorder=4)
    right.set_xlim(-1.25, 1.25)
    right.set_ylim(-1.25, 1.25)
    right.set_aspect("equal")
    right.axis("off")
    edges_shown = min(3 * len(chosen), len(strongest))
    right.set_title(
        f"the {len(chosen)} nodes of most energy, {edges_shown} strongest edges", fontsize=9
    )
    figure.colorbar(ScalarMappable(norm, colours), ax=[left, right], label="weight", aspect=30)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_factors(factors: np.ndarray, path: str, title: str) -> None:
    """Draw the factors that SE gives the channels, in the order of the channels and sorted."""
    figure = _figure(9.0, 3.0)
    left, right = figure.subplots(1, 2, sharey=True)
    left.bar(np.arange(len(factors)), factors, width=1.0, color="tab:blue")
    left.set_xlabel("channel")
    left.set_ylabel("factor")
    left.set_ylim(0, 1)
    right.plot(np.sort(factors)[::-1], color="tab:blue")
    right.set_xlabel("channels, largest factor first")
    for axis in (left, right):
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{title} (dashed: 0.5, what an untrained block gives)", fontsize=10)
    _save(figure, path)


def write_film(shown: Shown, maps: Maps, path: str) -> None:
    """Write an MP4 (H.264): each frame of a clip with the maps of its time slice beside it.

    Parameters
    ----------
    shown, maps
    path
    """
    size = shown.frames.shape[1:3]
    width = VIDEO_TILE
    height = width * size[0] // size[1] // 2 * 2
    scale, colours = maps.scale(), maps.colours()
    across = -(-(len(maps.values) + 1) // 2) if len(maps.values) > 3 else len(maps.values) + 1
    tiles_of: list[list[np.ndarray]] = []
    for frame in range(len(shown.frames)):
        picture = cv2.resize(shown.frames[frame], (width, height))
        tiles = [_titled(picture, f"{shown.seconds[frame]:.2f} s")]
        for values, title in zip(maps.values, maps.titles):
            (step,) = strides(values.shape[:1], (len(shown.frames),))
            cells = values[min(len(values) - 1, (2 * frame + step) // (2 * step))]
            rows, columns = (
                np.arange(n) / stride - maps.offset
                for n, stride in zip(size, strides(cells.shape, size))
            )
            at = np.ix_(*(_nearest(p, n) for p, n in zip((rows, columns), cells.shape)))
            covered = np.outer(rows < len(cells) - 0.5, columns < cells.shape[1] - 0.5)
            opacity = OPACITY * covered[..., None]
            paint = colours(scale(cells[at]))[..., :3]
            mixed = opacity * paint + (1 - opacity) * shown.grey(frame)
            tile = cv2.resize((255 * mixed).astype("uint8"), (width, height))
            tiles.append(_titled(tile, title.split("\n")[0]))
        tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % across)
        tiles_of.append(tiles)
    pictures = [
        np.concatenate(
            [np.concatenate(tiles[i : i + across], 1) for i in range(0, len(tiles), across)]
        )
        for tiles in tiles_of
    ]
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        # The container is told by the name's end.
        temporary = os.path.join(work, "film.mp4")
        with av.open(temporary, "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, path)


def _nearest(places: np.ndarray, count: int) -> np.ndarray:
    """Return the cells that pixels at these places, in cells, belong to."""
    return np.clip(np.floor(places + 0.5), 0, count - 1).astype(int)


def _titled(tile: np.ndarray, text: str) -> np.ndarray:
    """Return a tile below a line of text."""
    bar = np.full((22, tile.shape[1], 3), 255, "uint8")
    cv2.putText(bar, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, tile])
