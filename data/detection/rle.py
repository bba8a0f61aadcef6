"""Masks as COCO writes them: polygons, and runs of pixels (RLE).

Runs go down the columns, one column after the other, and begin with pixels that are not set. They
are a list of numbers, or text: numbers of 5 bits per character, from the third one on as the
difference to the one before the last. Package pycocotools has the same; what only evaluation needs
is left to it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def counts_of(text: str) -> list[int]:
    """Return the lengths of runs of their text.

    Raises
    ------
    ValueError
        If it is no such text.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no character of runs")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the text of runs ends within a number")
    return counts


def text_of(counts: Sequence[int]) -> str:
    """Return the text of runs; the reverse of :func:`counts_of`."""
    text = []
    for place, count in enumerate(counts):
        value = int(count) - (int(counts[place - 2]) if place > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
            if not more:
                break
    return "".join(text)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask (h, w) as runs: ``{"size": [h, w], "counts": text}``."""
    flat = np.asarray(mask, bool).reshape(-1, order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(ends).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": [int(side) for side in mask.shape], "counts": text_of(counts)}


def lengths_of(runs: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the lengths of runs, and the size (h, w) of their mask.

    Parameters
    ----------
    runs
        ``size`` [h, w], and ``counts``: text, the same as bytes, or a list of numbers.

    Raises
    ------
    ValueError
        If they do not make up a mask of their size.
    """
    try:
        height, width = (int(side) for side in runs["size"])
        counts = runs["counts"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"runs have a size and counts ({error!r})") from None
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    if isinstance(counts, str):
        counts = counts_of(counts)
    try:
        lengths = np.asarray(counts, np.int64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"counts are text or whole numbers ({error})") from None
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"the runs have {lengths.sum()} pixels, their size {height} x {width}")
    return lengths, (height, width)


def decode(runs: dict[str, Any]) -> np.ndarray:
    """Return the mask (h, w) bool of runs: of what :func:`lengths_of` takes."""
    lengths, size = lengths_of(runs)
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return flat.reshape(size, order="F")


def fill_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Return the mask (h, w) bool of the pixels whose centres lie in one of the polygons.

    Parameters
    ----------
    polygons
        Each x, y, x, y, …, in continuous coordinates; they may reach beyond the mask.
    height, width
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        mask |= _filled(points, height, width)
    return mask


def _filled(points: np.ndarray, height: int, width: int) -> np.ndarray:
    start, end = points, np.roll(points, -1, axis=0)
    centres = np.arange(height) + 0.5
    # Edges x rows: whether the edge passes the row's centre, and where.
    passes = (start[:, 1, None] <= centres) != (end[:, 1, None] <= centres)
    edge, row = np.nonzero(passes)
    share = (centres[row] - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    place = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
    # The first pixel whose centre lies behind it: from there on inside and outside are exchanged.
    column = np.clip(np.ceil(place - 0.5), 0, width).astype(np.int64)
    exchanges = np.zeros((height, width + 1), np.int64)
    np.add.at(exchanges, (row, column), 1)
    return np.cumsum(exchanges, axis=1)[:, :width] % 2 == 1
