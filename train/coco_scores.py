"""Average precision of boxes and masks as COCO has it, by its own program (pycocotools).

What pycocotools stumbles over is dealt with here: annotations numbered from 0 or without an area,
no detection at all, areas of masks that are taken from boxes, classes without any object.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from glore_common import GloReError, UsageError

KINDS = {"box": "bbox", "mask": "segm"}
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
# Overlaps 0.5, 0.55, …, 0.95; of these, the first and the sixth are figures of their own.
OVERLAPS = {"0.5": 0, "0.75": 5, "0.9": 8}
AREAS = ("all", "small", "medium", "large")


class Scores(NamedTuple):
    """How well boxes or masks were found.

    ``figures`` by name, None where there is no object to be found; ``per_class`` the same for each
    class; ``objects`` (classes,) how many there are; ``precision`` (10, 101, classes) at each
    overlap and each recall from 0 to 1, NaN for a class without objects.
    """

    figures: dict[str, Optional[float]]
    per_class: list[dict[str, Optional[float]]]
    objects: np.ndarray
    precision: np.ndarray


def _mean(values: np.ndarray) -> Optional[float]:
    """Return the mean of what is not absent (-1), or None."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _figures(precision: np.ndarray) -> dict[str, Optional[float]]:
    """Return the figures of precisions (overlaps, recalls, classes, areas)."""
    every, half, strict = precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]
    sizes = [precision[..., place] for place in (1, 2, 3)]
    return dict(zip(FIGURES, map(_mean, (every, half, strict, *sizes))))


def check_results(rows: Sequence[dict], images: Sequence[Any], categories: Sequence[Any]) -> None:
    """Make sure that detections are of known images and categories.

    Raises
    ------
    GloReError
        Naming the first one that is not.
    """
    known_images, known = set(images), set(categories)
    for place, row in enumerate(rows):
        if row.get("image_id") not in known_images:
            raise GloReError(
                f"detection {place}: there is no image {row.get('image_id')!r} (ids of images are "
                f"of type {type(next(iter(known_images), 0)).__name__})"
            )
        if row.get("category_id") not in known:
            raise GloReError(f"detection {place}: there is no category {row.get('category_id')!r}")


def coco_scores(
    truth: dict[str, Any], rows: Sequence[dict[str, Any]], kind: str, most: int = 100
) -> Scores:
    """Score detections.

    Parameters
    ----------
    truth
        ``images``, ``annotations`` and ``categories`` of COCO's format; areas may be missing.
    rows
        Detections as COCO's results have them. A mask is a run-length code.
    kind : {'box', 'mask'}
    most
        Detections of an image and class that count.

    Raises
    ------
    UsageError
        If pycocotools is not installed.
    GloReError
        A detection of an unknown image or category.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UsageError(
            "average precision needs the package pycocotools (extra `detection`): pip install "
            f"--no-deps pycocotools ({error})"
        ) from error
    images = [row["id"] for row in truth["images"]]
    categories = sorted(row["id"] for row in truth["categories"])
    check_results(rows, images, categories)
    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = COCO(), COCO()
        expected.dataset = {**truth, "annotations": _objects(truth["annotations"], kind)}
        expected.createIndex()
        found.dataset = {**truth, "annotations": _detections(rows, kind)}
        found.createIndex()
        for annotation in expected.dataset["annotations"]:
            if "area" not in annotation:
                annotation["area"] = _area(expected, annotation)
        for annotation in found.dataset["annotations"]:
            annotation["area"] = _area(found, annotation)
        program = COCOeval(expected, found, KINDS[kind])
        program.params.maxDets = [most]
        program.evaluate()
        program.accumulate()
    # (overlaps, recalls, classes, areas, numbers of detections)
    precision = program.eval["precision"][..., -1]
    objects = np.array(
        [
            sum(
                a["category_id"] == category and not a.get("iscrowd")
                for a in expected.dataset["annotations"]
            )
            for category in categories
        ]
    )
    curves = precision[..., 0]
    return Scores(
        _figures(precision),
        [_figures(precision[:, :, place : place + 1]) for place in range(len(categories))],
        objects,
        np.where(curves > -1, curves, np.nan),
    )


def _objects(annotations: Sequence[dict], kind: str) -> list[dict]:
    """Return copies of annotations with ids from 1: pycocotools takes 0 for no match.

    Where masks are scored, an object without one counts as a crowd that fills its box: what is
    found there is neither right nor wrong.
    """
    copies = []
    for number, row in enumerate(annotations, 1):
        copy = {**row, "id": number, "iscrowd": int(bool(row.get("iscrowd")))}
        if kind == "mask" and not copy.get("segmentation"):
            left, top, width, height = row["bbox"]
            right, bottom = left + width, top + height
            copy["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
            copy["iscrowd"] = 1
        copies.append(copy)
    return copies


def _detections(rows: Sequence[dict], kind: str) -> list[dict]:
    """Return detections with ids, and with nothing but what their kind needs.

    A box beside a mask would be taken for the mask's area.
    """
    needed = "segmentation" if kind == "mask" else "bbox"
    return [
        {
            "id": number,
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "score": row["score"],
            "iscrowd": 0,
            needed: row[needed],
        }
        for number, row in enumerate(rows, 1)
    ]


def _area(content: Any, annotation: dict) -> float:
    """Return the area of a mask, or of a box where there is no mask."""
    from pycocotools import mask

    if annotation.get("segmentation"):
        return float(mask.area(content.annToRLE(annotation)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])
