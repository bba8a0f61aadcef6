"""Objects on images of any size: finding them, their masks in the image, results, pictures."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any, Optional

import cv2
import numpy as np

from data.detection.coco import CocoSource, read_coco
from data.detection.objects import canvas_of, on_canvas, size_of
from data.detection.rle import encode
from data.segmentation.labels import numbered
from dataset import prepare_demo_harbours
from glore_common import UsageError, write_text
from mxnet_compat import mx
from network.detector import PROPOSALS, DetectionRule, Found

from .model import Model, ModelFacts
from .options import DetectionSourceOptions, FindOptions

LOGGER = logging.getLogger("glore")
DEFAULT_ROOT = "dataset/COCO"
# Below this a pixel of a mask belongs to no object.
MASK_THRESHOLD = 0.5
# Of objects in pictures.
PICTURED_SCORE = 0.3
MIN_SCORES = {"gcnet": 0.05, "gluoncv": 0.001}


def style_of(overrides: dict[str, Any]) -> str:
    """Return whose form a network's heads have."""
    return overrides.get("style") or "gcnet"


# --- data -----------------------------------------------------------------------------------------


def coco_part(root: str, part: str, training: bool, keep_empty: bool) -> CocoSource:
    """Return a part of COCO's official tree."""
    folder, file = f"{part}2017", f"instances_{part}2017.json"
    if part == "test":
        file = "image_info_test-dev2017.json"
    path = os.path.join(root, "annotations", file)
    if not os.path.isfile(path):
        raise UsageError(
            f"{path} is missing: --data-root is the folder that holds train2017/, val2017/ and "
            "annotations/ of COCO 2017 (https://cocodataset.org/#download)"
        )
    return read_coco(path, os.path.join(root, folder), training, keep_empty, part != "test")


def open_part(
    options: DetectionSourceOptions, part: str, training: bool = False, keep_empty: bool = False
) -> Optional[CocoSource]:
    """Return the images and objects of a part of the data set that the options name.

    Parameters
    ----------
    options
    part
        ``train``, ``val`` or ``test``.
    training, keep_empty
        Of :func:`data.detection.coco.read_coco`.

    Returns
    -------
    None if there is no such part.
    """
    if options.dataset == "coco":
        return coco_part(options.data_root or DEFAULT_ROOT, part, training, keep_empty)
    if options.dataset == "demo":
        if part == "test":
            return None
        root = prepare_demo_harbours(options.data_root).root
        path = f"{root}/annotations/instances_{part}.json"
        return read_coco(path, f"{root}/{part}", training, keep_empty)
    images, path = {
        "train": (options.images, options.annotations),
        "val": (options.val_images or options.images, options.val_annotations),
    }.get(part, (None, None))
    if part == "train" and not (images and path):
        raise UsageError("--dataset json needs --images DIR and --annotations FILE")
    if not images or not path:
        return None
    return read_coco(path, images, training, keep_empty)


def same_classes(source: CocoSource, names: Sequence[str], where: str) -> None:
    """Raise UsageError unless a source has these classes, in this order."""
    if list(source.names) == list(names):
        return
    differing = next(
        (place for place, (a, b) in enumerate(zip(source.names, names)) if a != b),
        min(len(names), len(source.names)),
    )
    found = [
        f"{each[differing]!r}" if differing < len(each) else "none"
        for each in (source.names, names)
    ]
    raise UsageError(
        f"{source.origin} has {len(source.names)} classes, {where} has {len(names)}; class "
        f"{differing} is {found[0]} here and {found[1]} there"
    )


# --- finding --------------------------------------------------------------------------------------


class Finder:
    """A detector, and which of its boxes count.

    Parameters
    ----------
    model
    contexts
        The first one is used.
    options
    """

    def __init__(self, model: Model, contexts: list, options: FindOptions) -> None:
        self.facts = model.facts
        self.context = contexts[0]
        self.block = model.detector([self.context])
        style = style_of(model.facts.overrides)
        score = MIN_SCORES[style] if options.min_score is None else options.min_score
        self.rule = DetectionRule(score, options.max_overlap, options.max_objects)
        self.proposals = PROPOSALS[style][1]._replace(most=options.proposals)
        if not self.proposals.together:
            self.proposals = self.proposals._replace(
                before=options.proposals, after=options.proposals
            )

    def find(self, image: np.ndarray) -> Found:
        """Return the objects of an image (h, w, 3) uint8 RGB, in its own pixels."""
        height, width = image.shape[:2]
        size = size_of(height, width, *self.facts.data_shape[1:])
        array = on_canvas(image, size, canvas_of(*size), self.facts.mean, self.facts.std)
        data = mx.nd.array(array[None], ctx=self.context)
        found = self.block.detect(data, [size], self.proposals, self.rule)[0]
        scale = np.tile([width / size[1], height / size[0]], 2).astype(np.float32)
        return found._replace(boxes=found.boxes * scale)


def paste(mask: np.ndarray, box: Sequence[float], height: int, width: int) -> np.ndarray:
    """Return the pixels of an image (h, w) bool that a mask within a box covers.

    A pixel counts if its centre lies in the box and the mask, interpolated between the centres of
    its cells, is ``MASK_THRESHOLD`` or more there.

    Parameters
    ----------
    mask
        (s, s), 0..1.
    box
        Left, top, right, bottom, in pixels.
    height, width
    """
    result = np.zeros((height, width), bool)
    left, top, right, bottom = (float(value) for value in box)
    if right <= left or bottom <= top:
        return result
    cells = len(mask)
    shares, places = [], []
    for low, high, side in ((top, bottom, height), (left, right, width)):
        centres = np.arange(max(0, int(np.ceil(low - 0.5))), min(side, int(np.ceil(high - 0.5))))
        place = np.clip((centres + 0.5 - low) / (high - low) * cells - 0.5, 0, cells - 1)
        first = np.minimum(place.astype(int), cells - 2)
        # Each pixel's weights of the cells: (pixels, s)
        weights = np.zeros((len(centres), cells), np.float32)
        rows = np.arange(len(centres))
        weights[rows, first] = 1 - (place - first)
        weights[rows, first + 1] += place - first
        shares.append(weights)
        places.append(centres)
    # (h', s) x (s, s) x (s, w') -> (h', w')
    value = shares[0] @ mask.astype(np.float32) @ shares[1].T
    result[np.ix_(*places)] = value >= MASK_THRESHOLD
    return result


def rows_of(
    found: Found, masks: Sequence[np.ndarray], image: Any, ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return an image's objects as COCO's results have them: plain numbers, the best first.

    Parameters
    ----------
    found, masks
        Objects, and their masks in the image (h, w).
    image
        Its id.
    ids
        Of the classes.
    """
    return [
        {
            "image_id": image,
            "category_id": int(ids[label]),
            "bbox": [
                round(float(v), 3) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])
            ],
            "score": round(float(score), 6),
            "segmentation": encode(mask),
        }
        for box, score, label, mask in zip(found.boxes, found.scores, found.classes, masks)
    ]


def described(
    found: Found, masks: Sequence[np.ndarray], names: Optional[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return an image's objects for a reader of JSON: class, name, score, box, mask."""
    rows = rows_of(found, masks, None, range(1 + int(found.classes.max(initial=0))))
    return [
        {
            "class": row["category_id"],
            "name": names[row["category_id"]] if names else None,
            "score": row["score"],
            "box": row["bbox"],
            "mask": row["segmentation"],
        }
        for row in rows
    ]


def masks_of(found: Found, height: int, width: int) -> list[np.ndarray]:
    """Return the masks of objects in their image, each (h, w) bool."""
    masks: Any = () if found.masks is None else found.masks
    return [paste(mask, box, height, width) for mask, box in zip(masks, found.boxes)]


# --- pictures -------------------------------------------------------------------------------------


def names_of(facts: ModelFacts) -> list[str]:
    """Return the names of a network's classes."""
    return list(facts.class_names or numbered(facts.num_classes).names)


def colours_of(count: int) -> np.ndarray:
    """Return a colour for each class, (count, 3) uint8 RGB: hues as far apart as may be."""
    hues = (np.arange(count) * 180.0 / max(count, 1)).astype(np.uint8)
    table = np.stack([hues, np.full(count, 220, np.uint8), np.full(count, 255, np.uint8)], axis=1)
    return cv2.cvtColor(table[None], cv2.COLOR_HSV2RGB)[0]


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str],
    masks: Sequence[np.ndarray],
    num_classes: int,
) -> np.ndarray:
    """Return a picture of an image with its objects, at least 400 pixels wide so that text fits.

    Parameters
    ----------
    image
        (h, w, 3) uint8 RGB.
    boxes, labels, texts, masks
        Of the objects: (k, 4), (k,), what is written, each (h, w) bool.
    num_classes
    """
    colours = colours_of(num_classes)
    factor = max(1, -(-400 // image.shape[1]))
    picture = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    for mask, label in zip(masks, labels):
        larger = np.kron(mask, np.ones((factor, factor), bool))
        picture[larger] = (0.5 * picture[larger] + 0.5 * colours[label]).astype(np.uint8)
    for box, label, text in zip(boxes, labels, texts):
        colour = tuple(int(v) for v in colours[label])
        left, top, right, bottom = (round(float(v) * factor) for v in box)
        cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), colour, 1)
        (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
        left = max(0, min(left, picture.shape[1] - wide - 2))
        base = top - 2 if top > high + 4 else min(bottom + high + 3, picture.shape[0] - 2)
        cv2.rectangle(picture, (left, base - high - 2), (left + wide + 2, base + 2), colour, -1)
        cv2.putText(
            picture,
            text,
            (left + 1, base),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.4,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
    return picture


def picture_of(
    image: np.ndarray, found: Found, masks: Sequence[np.ndarray], facts: ModelFacts
) -> np.ndarray:
    """Return a picture of what was found with a score of ``PICTURED_SCORE`` or more."""
    shown = np.flatnonzero(found.scores >= PICTURED_SCORE)
    names = names_of(facts)
    texts = [f"{names[found.classes[k]]} {found.scores[k]:.2f}" for k in shown]
    return draw(
        image,
        found.boxes[shown],
        found.classes[shown],
        texts,
        [masks[k] for k in shown],
        facts.num_classes,
    )


def write_results_json(path: str, rows: list[dict[str, Any]]) -> None:
    """Write detections as COCO's server takes them."""
    write_text(path, json.dumps(rows) + "\n")
