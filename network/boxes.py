"""Boxes in NumPy: anchors, overlap, encoding, suppression, levels of a pyramid.

A box is (left, top, right, bottom) in continuous coordinates, in which pixel 0 reaches from 0 to 1:
a box around it is (0, 0, 1, 1), its width 1. What GCNet's framework (mmdetection 1) writes as
(left, top, right - 1, bottom - 1) and widths + 1 is the same. Everything here is computed on the
host, whatever the network runs on: the same outputs of a network give the same boxes on a CPU and
on a GPU.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
# No box grows by more than this factor: log(1000 / 16).
MOST_GROWTH = math.log(1000 / 16)
# A box of this side is on level 4 of the pyramid.
CANONICAL_SIDE, CANONICAL_LEVEL = 224.0, 4
# Boxes of which all pairs are compared at once.
MOST_PAIRED = 512


def base_anchors(stride: int, scale: float = 8.0, rounded: bool = False) -> np.ndarray:
    """Return the anchors of the first position, (3, 4) float32, one for each of ``RATIOS``.

    Parameters
    ----------
    stride
        Pixels between positions; the square anchor has a side of ``scale`` strides.
    scale
    rounded
        As gluoncv has them: sides are multiples of the scale, and one pixel is missing, since its
        corners are those of pixels. Else as GCNet's framework has them.
    """
    centre = 0.5 * (stride - 1)
    anchors = []
    for ratio in RATIOS:
        if rounded:
            width = np.round(np.sqrt(stride**2 / ratio))
            height = np.round(width * ratio) * scale
            width *= scale
            half = np.array([width - 1, height - 1]) / 2
            anchors.append([*(centre - half), *(centre + half)])
        else:
            height = stride * scale * np.sqrt(ratio)
            width = stride * scale / np.sqrt(ratio)
            half = (np.array([width, height]) - 1) / 2
            anchors.append([*np.round(centre - half), *(np.round(centre + half) + 1)])
    return np.array(anchors, np.float32)


@functools.lru_cache(maxsize=64)
def anchors_of(
    sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    scale: float = 8.0,
    rounded: bool = False,
) -> tuple[np.ndarray, ...]:
    """Return the anchors of each level, (h * w * 3, 4), row by row of its map (h, w)."""
    levels = []
    for (height, width), stride in zip(sizes, strides):
        rows, columns = np.mgrid[:height, :width].astype(np.float32) * stride
        shift = np.stack([columns, rows, columns, rows], axis=-1)
        # (h, w, 1, 4) + (3, 4) -> (h * w * 3, 4)
        levels.append(
            (shift[:, :, None] + base_anchors(stride, scale, rounded))
            .reshape(-1, 4)
            .astype(np.float32)
        )
    return tuple(levels)


def area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (n,) of boxes (n, 4)."""
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return intersection over union of each pair, (n, m) of (n, 4) and (m, 4); 0 of nothing."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    sides = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - low
    sides = np.maximum(sides, 0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(boxes)[:, None] + area(others)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _centres(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + sides / 2, sides


def encode(
    boxes: np.ndarray, targets: np.ndarray, stds: Sequence[float] = (1.0,) * 4
) -> np.ndarray:
    """Return what must be added to ``boxes`` (n, 4) to get ``targets``, (n, 4) float32.

    Shifts of the centre in widths and heights, and logarithms of how sides grow, over ``stds``.
    """
    centres, sides = _centres(boxes)
    wanted, wanted_sides = _centres(targets)
    shift, growth = (wanted - centres) / sides, np.log(wanted_sides / sides)
    return (np.concatenate([shift, growth], axis=-1) / np.asarray(stds)).astype(np.float32)


def decode(
    boxes: np.ndarray,
    deltas: np.ndarray,
    stds: Sequence[float] = (1.0,) * 4,
    most_growth: float = MOST_GROWTH,
) -> np.ndarray:
    """Return the boxes (…, 4) that :func:`encode` gives ``deltas`` (…, 4) for."""
    centres, sides = _centres(boxes)
    deltas = deltas * np.asarray(stds, np.float32)
    centres = centres + deltas[..., :2] * sides
    half = sides * np.exp(np.minimum(deltas[..., 2:], most_growth)) / 2
    return np.concatenate([centres - half, centres + half], axis=-1)


def clip(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """Return boxes (…, 4) cut to an image."""
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


def suppress(
    boxes: np.ndarray, scores: np.ndarray, threshold: float, most: Optional[int] = None
) -> np.ndarray:
    """Return which boxes stay, the best first: none overlaps a better one by more than threshold.

    Parameters
    ----------
    boxes, scores
        (n, 4) and (n,). Of equal scores the earlier one is the better.
    threshold
    most
        Stop after so many.
    """
    order = np.argsort(-scores, kind="stable")
    sorted_boxes = boxes[order]
    corners, areas = sorted_boxes.T, area(sorted_boxes)

    def apart(place: Any) -> np.ndarray:
        """Return which boxes may stay beside those of ``place``: (n,), or (m, n) of several."""
        left, top, right, bottom = (each[place][..., None] for each in corners)
        width = np.minimum(right, corners[2]) - np.maximum(left, corners[0])
        height = np.minimum(bottom, corners[3]) - np.maximum(top, corners[1])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        return shared <= threshold * (areas[place][..., None] + areas - shared)

    # All pairs at once where they are few: far fewer calls.
    table = apart(np.arange(len(order))) if len(order) <= MOST_PAIRED else None
    alive = np.ones(len(order), bool)
    kept = []
    for place in range(len(order)):
        if not alive[place]:
            continue
        kept.append(order[place])
        if most is not None and len(kept) == most:
            break
        alive &= apart(place) if table is None else table[place]
    return np.array(kept, np.int64)


def suppress_by_class(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, threshold: float, most: int
) -> np.ndarray:
    """Do what :func:`suppress` does among boxes of one class; return the best of all classes."""
    kept = [
        members[suppress(boxes[members], scores[members], threshold)]
        for members in (np.flatnonzero(classes == label) for label in np.unique(classes))
    ]
    found = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    return found[np.argsort(-scores[found], kind="stable")][:most]


def level_of(boxes: np.ndarray, lowest: int = 2, highest: int = 5) -> np.ndarray:
    """Return the level of the pyramid that each box (n, 4) is looked at on: by its size."""
    side = np.sqrt(np.maximum(area(boxes), 1e-12))
    level = np.floor(CANONICAL_LEVEL + np.log2(side / CANONICAL_SIDE + 1e-6))
    return np.clip(level, lowest, highest).astype(np.int64)
