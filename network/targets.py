"""Which anchors and proposals learn what: assignment to objects and random choice, in NumPy.

After GCNet's framework (mmdetection 1): a box belongs to the object that it overlaps most, if it
does so enough; of boxes that belong to an object and of those that belong to none a fixed number is
drawn. An image without objects has negatives only, and one without any usable anchor teaches
nothing: counts of 0 and no division by them.
"""

from typing import Any, NamedTuple, Optional

import numpy as np

from .boxes import encode, overlaps

NEGATIVE, UNUSED = -1, -2


class SampleRule(NamedTuple):
    """How boxes are drawn.

    Attributes
    ----------
    number
        Of an image.
    positives
        Most of them that belong to an object, as a share.
    high, low
        A box belongs to an object from this overlap on, and to none below that one.
    least
        The best boxes of an object belong to it from this overlap on, even below ``high``; None:
        they have no such privilege.
    """

    number: int
    positives: float
    high: float
    low: float
    least: Optional[float] = None


ANCHOR_RULE = SampleRule(256, 0.5, 0.7, 0.3, 0.3)
ROI_RULE = SampleRule(512, 0.25, 0.5, 0.5)


class Chosen(NamedTuple):
    """Boxes that were drawn: places (s,), the first ``positives`` of which belong to ``objects``.

    ``objects`` (positives,) are numbers of objects.
    """

    places: np.ndarray
    objects: np.ndarray

    @property
    def positives(self) -> int:
        """How many belong to an object."""
        return len(self.objects)


def assign(boxes: np.ndarray, objects: np.ndarray, rule: SampleRule) -> np.ndarray:
    """Return the object of each box: (n, 4), (k, 4) -> (n,), ``NEGATIVE`` or ``UNUSED``."""
    if not len(objects):
        return np.full(len(boxes), NEGATIVE)
    shared = overlaps(boxes, objects)
    best, most = shared.argmax(axis=1), shared.max(axis=1, initial=0)
    found = np.full(len(boxes), UNUSED)
    found[most < rule.low] = NEGATIVE
    found[most >= rule.high] = best[most >= rule.high]
    if rule.least is not None and len(boxes):
        for number, top in enumerate(shared.max(axis=0)):
            if top >= rule.least:
                found[shared[:, number] == top] = number
    return found


def draw(assigned: np.ndarray, rule: SampleRule, rng: np.random.Generator) -> Chosen:
    """Draw boxes of both kinds, of which :func:`assign` made ``assigned``."""

    def some(places: np.ndarray, count: int) -> np.ndarray:
        if len(places) <= count:
            return places
        return np.sort(rng.choice(places, count, replace=False))

    positive = some(np.flatnonzero(assigned >= 0), int(rule.number * rule.positives))
    negative = some(np.flatnonzero(assigned == NEGATIVE), rule.number - len(positive))
    return Chosen(np.concatenate([positive, negative]), assigned[positive])


def choose_anchors(
    anchors: np.ndarray,
    objects: np.ndarray,
    size: tuple[float, float],
    rule: SampleRule,
    rng: np.random.Generator,
) -> tuple[Chosen, np.ndarray]:
    """Draw anchors of an image; return them and what the positive ones must be shifted by.

    Anchors that reach beyond the image are not used, whatever they overlap.

    Parameters
    ----------
    anchors
        (T, 4).
    objects
        (k, 4).
    size
        (height, width) of the image.
    rule, rng
    """
    height, width = size
    inside = np.flatnonzero(
        (anchors[:, :2] >= 0).all(axis=1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
    )
    chosen = draw(assign(anchors[inside], objects, rule), rule, rng)
    places = inside[chosen.places]
    deltas = encode(anchors[places[: chosen.positives]], objects[chosen.objects])
    return Chosen(places, chosen.objects), deltas


def choose_rois(
    proposals: np.ndarray, objects: np.ndarray, rule: SampleRule, rng: np.random.Generator
) -> tuple[np.ndarray, Chosen]:
    """Draw ROIs among an image's proposals and its objects; return all candidates, and which."""
    candidates = np.concatenate([objects, proposals]).astype(np.float32)
    return candidates, draw(assign(candidates, objects, rule), rule, rng)


def mask_targets(rois: np.ndarray, objects: np.ndarray, masks: np.ndarray, side: int) -> np.ndarray:
    """Cut each ROI out of its object's mask.

    Parameters
    ----------
    rois, objects
        (M, 4): boxes, and the boxes of the objects that they belong to.
    masks
        (M, s, s) bool: the objects' masks within their boxes.
    side
        Of the result.

    Returns
    -------
    numpy.ndarray
        (M, side, side) float32: 1 where the object is, interpolated and then cut at 1/2; nothing
        is beyond an object's box.
    """
    cells = masks.shape[-1]
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    axes = []
    for low, high in ((1, 3), (0, 2)):  # rows, columns
        start, length = rois[:, low, None], (rois[:, high] - rois[:, low])[:, None]
        whole = np.maximum(objects[:, high] - objects[:, low], 1e-6)[:, None]
        # (M, side): places on the mask's grid; the centre of its first cell is 0
        axes.append((start + centres * length - objects[:, low, None]) / whole * cells - 0.5)
    padded = np.pad(masks.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    rows, columns = (np.clip(axis, -1, cells) for axis in axes)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[:, :, None], (columns - left)[:, None, :]
    number = np.arange(len(rois))[:, None, None]

    def at(row: Any, column: Any) -> np.ndarray:
        # One row and column of nothing lie before the mask, and one behind.
        row, column = (np.minimum(place + 1, cells + 1) for place in (row, column))
        return padded[number, row[:, :, None], column[:, None, :]]

    value = (1 - down) * ((1 - right) * at(top, left) + right * at(top, left + 1))
    value += down * ((1 - right) * at(top + 1, left) + right * at(top + 1, left + 1))
    return (value >= 0.5).astype(np.float32)
