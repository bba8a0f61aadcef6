"""From an image's objects to numbers that travel with it, and back.

A batch holds images that are resized and put into the upper left corner of a canvas; the objects of
each are one row of float32 numbers: seed, height, width and number of objects, then for each place
box, class and mask. A mask is seen within its box, on a grid of ``CELLS`` cells a side, whatever
the box's size: resizing and mirroring leave it what it is, and it takes the same room on any image.
"""

from typing import Any, NamedTuple, Optional

import cv2
import numpy as np

from ..segmentation.transforms import as_array
from .coco import Picture, Thing
from .rle import decode, fill_polygons

# Cells of a mask's grid; the network's own masks have 28.
CELLS = 112
# Cells in a number: float32 holds 24 bits exactly.
BITS = 16
WORDS = CELLS * CELLS // BITS
HEADER = 4
PLACE = 5 + WORDS
# Sides of canvases are multiples of this, the stride of p5.
MULTIPLE = 32


class Truth(NamedTuple):
    """What is true of an image, in the pixels of its canvas.

    ``size`` (height, width) of the image within it, ``boxes`` (k, 4), ``classes`` (k,), ``masks``
    (k, CELLS, CELLS) bool within the boxes, and the ``seed`` of what is drawn in training.
    """

    size: tuple[float, float]
    boxes: np.ndarray
    classes: np.ndarray
    masks: np.ndarray
    seed: int


def label_length(places: int) -> int:
    """Return how many numbers the objects of an image take, if there are at most so many."""
    return HEADER + places * PLACE


def pack(truth: Truth, places: int) -> np.ndarray:
    """Return what is true of an image as a row of ``label_length(places)`` numbers."""
    count = len(truth.boxes)
    row = np.zeros(label_length(places), np.float32)
    row[:HEADER] = truth.seed, *truth.size, count
    table = row[HEADER:].reshape(places, PLACE)[:count]
    table[:, :4], table[:, 4] = truth.boxes, truth.classes
    # (k, CELLS * CELLS) bool -> (k, WORDS, 2) bytes -> (k, WORDS)
    packed = np.packbits(truth.masks.reshape(count, CELLS**2), axis=1).reshape(count, WORDS, 2)
    table[:, 5:] = packed[..., 0] * 256.0 + packed[..., 1]
    return row


def unpack(row: np.ndarray) -> Truth:
    """Return what :func:`pack` packed."""
    seed, height, width, count = row[:HEADER]
    table = row[HEADER:].reshape(-1, PLACE)[: int(count)]
    words = table[:, 5:].astype(np.uint16)
    packed = np.stack([words >> 8, words & 255], axis=-1).astype(np.uint8)
    masks = np.unpackbits(packed.reshape(len(table), 2 * WORDS), axis=1).astype(bool)
    return Truth(
        (float(height), float(width)),
        table[:, :4],
        table[:, 4].astype(np.int64),
        masks.reshape(-1, CELLS, CELLS),
        int(seed),
    )


def mask_within(thing: Thing) -> np.ndarray:
    """Return the mask of an object on the grid of its box, (CELLS, CELLS) bool."""
    left, top, right, bottom = thing.box
    if isinstance(thing.segmentation, dict):
        whole = decode(thing.segmentation)
        centres = (np.arange(CELLS) + 0.5) / CELLS
        rows = np.clip((top + centres * (bottom - top)).astype(int), 0, whole.shape[0] - 1)
        columns = np.clip((left + centres * (right - left)).astype(int), 0, whole.shape[1] - 1)
        return whole[np.ix_(rows, columns)]
    scale = np.array([CELLS / (right - left), CELLS / (bottom - top)])
    polygons = [
        (np.reshape(polygon, (-1, 2)) - (left, top)) * scale for polygon in thing.segmentation
    ]
    return fill_polygons(polygons, CELLS, CELLS)


def factor_of(height: int, width: int, short: int, long: int) -> float:
    """Return what an image is resized by: to a shorter side of ``short``, a longer one of
    ``long`` at most."""
    return min(short / min(height, width), long / max(height, width))


def size_of(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the resized (height, width)."""
    factor = factor_of(height, width, short, long)
    return max(1, round(height * factor)), max(1, round(width * factor))


def canvas_of(height: int, width: int) -> tuple[int, int]:
    """Return the sides of the smallest canvas that holds an image of this size."""
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def on_canvas(
    image: np.ndarray, size: tuple[int, int], canvas: tuple[int, int], mean: Any, std: Any
) -> np.ndarray:
    """Return an image (h, w, 3) uint8, resized and normalised, on its canvas (3, H, W) float32."""
    if image.shape[:2] != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    result = np.zeros((3, *canvas), np.float32)
    result[:, : size[0], : size[1]] = as_array(image, mean, std)
    return result


class Prepared:
    """Resizes an image with its objects, mirrors half of them, and puts it on a canvas.

    Parameters
    ----------
    short, long
        See :func:`factor_of`.
    mean, std
        RGB, on the 0..1 scale; what is beyond the image becomes 0.
    flip
        Mirror half of the images.
    """

    def __init__(self, short: int, long: int, mean: Any, std: Any, flip: bool = False) -> None:
        self.short, self.long = short, long
        self.mean, self.std = tuple(mean), tuple(std)
        self.flip = flip

    def __call__(
        self,
        image: np.ndarray,
        picture: Picture,
        canvas: tuple[int, int],
        rng: Optional[np.random.Generator] = None,
    ) -> tuple[np.ndarray, Truth]:
        """Return (3, H, W) float32, and what is true of it.

        Parameters
        ----------
        image
            (h, w, 3) uint8 RGB.
        picture
        canvas
            (H, W).
        rng
            Source of all randomness.
        """
        height, width = image.shape[:2]
        size = size_of(height, width, self.short, self.long)
        boxes: np.ndarray = np.array([thing.box for thing in picture.things], np.float32)
        boxes = boxes.reshape(-1, 4)
        masks = np.array([mask_within(thing) for thing in picture.things], bool)
        masks = masks.reshape(-1, CELLS, CELLS)
        boxes = boxes * np.tile([size[1] / width, size[0] / height], 2).astype(np.float32)
        if self.flip and rng is not None and rng.uniform() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
            boxes, masks = flipped(boxes, size[1]), masks[:, :, ::-1]
        classes = np.array([thing.label for thing in picture.things], np.int64)
        data = on_canvas(image, size, canvas, self.mean, self.std)
        return data, Truth((float(size[0]), float(size[1])), boxes, classes, masks, 0)


def flipped(boxes: np.ndarray, width: float) -> np.ndarray:
    """Return the boxes (k, 4) of a mirrored image."""
    return np.stack(
        [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1
    ).astype(boxes.dtype)


def mask_in_image(thing: Thing, height: int, width: int) -> np.ndarray:
    """Return the mask of an object in its image, (height, width) bool."""
    if isinstance(thing.segmentation, dict):
        return decode(thing.segmentation)
    return fill_polygons(thing.segmentation, height, width)
