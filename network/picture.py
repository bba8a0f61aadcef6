"""A picture of a graph drawn by Matplotlib, where Graphviz is not installed.

Nodes stand in rows by their distance from the input, in several columns beside one another so that
a deep network fits on a page; those of inserted blocks are tinted.
"""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from glore_common import atomic_path

from .shapes import Node

# Rows of a column, and the size of a node with its surroundings in inches.
ROWS = 45
WIDTH, HEIGHT = 2.9, 0.46
PLAIN, INSERTED, INPUT = "#eef2f7", "#fde3c0", "#d5ecd4"
FORMS = (".png", ".svg", ".pdf")


def places_of(nodes: Sequence[Node], inputs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return where each input and node is drawn: (x, y) in widths and heights of a node.

    A node is lower than all that it reads, or in a later column.
    """
    rows = dict.fromkeys(inputs, 0)
    for node in nodes:
        rows[node.name] = 1 + max((rows[name] for name in node.inputs if name in rows), default=0)
    members: defaultdict[int, list[str]] = defaultdict(list)
    for name, row in rows.items():
        members[row].append(name)
    places, left = {}, 0.0
    for start in range(0, max(rows.values()) + 1, ROWS):
        column = {row: members[row] for row in range(start, start + ROWS) if row in members}
        for row, names in column.items():
            for slot, name in enumerate(names):
                places[name] = (left + slot, float(row - start))
        left += max(len(names) for names in column.values()) + 0.4
    return places


def draw_graph(
    nodes: Sequence[Node], inputs: Sequence[str], tinted: Sequence[str], path: str
) -> None:
    """Draw a graph.

    Parameters
    ----------
    nodes
        Operations in graph order.
    inputs
        Names of what the graph reads.
    tinted
        Names of nodes that stand out.
    path
        ``.png``, ``.svg`` or ``.pdf`` file to write.
    """
    places, special = places_of(nodes, inputs), set(tinted)
    right = max(x for x, _ in places.values()) + 1.0
    bottom = max(y for _, y in places.values()) + 1.0
    figure = Figure(figsize=(WIDTH * right, HEIGHT * bottom), dpi=100)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(-0.5, right - 0.5)
    axis.set_ylim(bottom - 0.5, -0.5)
    axis.set_axis_off()
    for node in nodes:
        for source in node.inputs:
            if source in places:
                _connect(axis, places[source], places[node.name])
    texts = {name: name for name in inputs}
    texts.update(
        {node.name: f"{node.name}\n{node.op} {' x '.join(map(str, node.shape))}" for node in nodes}
    )
    for name, text in texts.items():
        x, y = places[name]
        colour = INPUT if name in inputs else INSERTED if name in special else PLAIN
        box = FancyBboxPatch(
            (x - 0.46, y - 0.33), 0.92, 0.66, boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=colour, edgecolor="#55606e", linewidth=0.7, zorder=2,
        )  # fmt: skip
        axis.add_patch(box)
        axis.text(x, y, text, ha="center", va="center", fontsize=6.5, zorder=3, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _connect(axis, source, target):
    """Draw the line from one node to another, around what stands between them in a column."""
    (x, y), (to_x, to_y) = source, target
    if x == to_x and to_y > y + 1:
        # A shortcut past other nodes: in the gap at their right.
        xs, ys = (x + 0.46, x + 0.5, x + 0.5, to_x + 0.46), (y, y + 0.3, to_y - 0.3, to_y)
    elif to_y > y:
        # Down in its own slot, then across just above the other.
        xs, ys = (x, x, to_x), (y + 0.33, to_y - 0.6, to_y - 0.33)
    else:
        # Into the next column, between the two.
        middle = to_x - 0.6
        xs, ys = (x + 0.46, middle, middle, to_x - 0.46), (y, y, to_y, to_y)
    axis.plot(xs, ys, color="#8a94a3", linewidth=0.9, zorder=1, solid_joinstyle="round")
