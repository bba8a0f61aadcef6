"""Test a detector: average precision of boxes and masks, curves, pictures, COCO's results."""

import dataclasses
import json
import logging
import os
import time
from typing import Any, Optional

import numpy as np

from data.detection.coco import CocoSource, check_images, ground_truth, read_coco
from data.detection.loaders import read_image
from data.detection.objects import mask_in_image
from data.segmentation.masks import write_mask
from glore_common import UsageError, check_writable, progress, write_text
from train.coco_scores import FIGURES, OVERLAPS, Scores, coco_scores
from train.plots import plot_precision

from .detect import (
    Finder,
    draw,
    masks_of,
    open_part,
    picture_of,
    rows_of,
    same_classes,
    write_results_json,
)
from .model import Model
from .options import DetectionSourceOptions, EvaluateOptions, PartOptions

LOGGER = logging.getLogger("glore")
KINDS = ("box", "mask")
# More curves in one diagram cannot be told apart.
MOST_CURVES = 12


def test_source(options: PartOptions, model: Model, data_root: Optional[str]) -> CocoSource:
    """Return the images that are asked for, else a part of the training's data set."""
    trained = model.options.get("source", {})
    if options.images or options.annotations:
        if not (options.images and options.annotations):
            raise UsageError("give both --images DIR and --annotations FILE")
        found = read_coco(options.annotations, options.images)
    else:
        if not trained:
            raise UsageError(
                f"{model.path} does not say which images: give --images DIR and --annotations FILE"
            )
        known = {field.name for field in dataclasses.fields(DetectionSourceOptions)}
        source = DetectionSourceOptions(**{k: v for k, v in trained.items() if k in known})
        source.data_root = data_root or source.data_root
        part = open_part(source, options.part)
        if part is None:
            raise UsageError(
                f"the data set has no part {options.part}: give --images and --annotations"
            )
        found = part
    if model.facts.class_names:
        same_classes(found, model.facts.class_names, model.path)
    elif found.num_classes != model.facts.num_classes:
        raise UsageError(
            f"{model.path} has {model.facts.num_classes} classes, {found.origin} has "
            f"{found.num_classes}: give the data that it was trained for"
        )
    return found


def evaluate_detection(options: EvaluateOptions, model: Model, contexts: list) -> dict[str, Any]:
    """Test a network on images with objects; log and write the results; return the JSON's content.

    Images whose file has no annotations, as COCO's test part, are not scored.
    """
    asked, facts = options.parts, model.facts
    source = test_source(asked, model, options.data.data_root)
    scored = asked.part != "test" or bool(asked.annotations)
    if not scored and not asked.submit:
        raise UsageError("the part test has no objects to compare with: give --submit FILE")
    if asked.submit:
        check_writable(asked.submit, "--submit")
    stem = os.path.splitext(os.path.basename(os.path.normpath(model.path)))[0]
    prefix = options.output.output or os.path.join(".", "exps", "results", f"{stem}_{asked.part}")
    limit = min(len(source.pictures), options.data.max_samples or len(source.pictures))
    source = dataclasses.replace(source, pictures=source.pictures[:limit])
    check_images(source)
    truth = ground_truth(source) if scored else None
    if scored:
        # Whether the program is there is known before the images are looked at.
        coco_scores({"images": [], "annotations": [], "categories": []}, [], "box")
    finder = Finder(model, contexts, options.detection)
    LOGGER.info(
        "Testing    %d images of %s: shorter side %d, longer one %d pixels at most; scores above "
        "%g, %d objects of an image at most",
        limit,
        source.origin,
        *facts.data_shape[1:],
        finder.rule.score,
        finder.rule.most,
    )
    rows, started = [], time.perf_counter()
    for index in progress(range(limit), "Detecting", limit, unit="image"):
        picture = source.pictures[index]
        image = read_image(source.image(index))
        found = finder.find(image)
        masks = masks_of(found, *image.shape[:2])
        rows += rows_of(found, masks, picture.id, source.ids)
        if index < asked.pictures:
            name = os.path.splitext(os.path.basename(picture.file))[0]
            write_mask(f"{prefix}_{name}_found.png", picture_of(image, found, masks, facts))
            if scored:
                write_mask(f"{prefix}_{name}_true.png", true_picture(image, source, index))
    seconds = time.perf_counter() - started
    content: dict[str, Any] = {
        "network": facts.network,
        "weights": model.path,
        "kind": "detection",
        "data": source.origin,
        "images": limit,
        "seconds": round(seconds, 3),
        "detections": len(rows),
        "class_names": list(source.names),
    }
    if asked.submit:
        write_results_json(asked.submit, rows)
        LOGGER.info("Submission %d detections in %s", len(rows), asked.submit)
    if truth is not None:
        most = finder.rule.most
        scores = {kind: coco_scores(truth, rows, kind, most) for kind in KINDS}
        content.update({kind: result.figures for kind, result in scores.items()})
        write_detection_results(prefix, content, scores, options.output.per_class)
    return content


def true_picture(image: np.ndarray, source: CocoSource, index: int) -> np.ndarray:
    """Return a picture of an image with the objects that are on it."""
    things = source.pictures[index].things
    return draw(
        image,
        np.array([thing.box for thing in things]).reshape(-1, 4),
        np.array([thing.label for thing in things], np.int64),
        [source.names[thing.label] for thing in things],
        [mask_in_image(thing, *image.shape[:2]) for thing in things],
        source.num_classes,
    )


def shown(value: Optional[float]) -> str:
    """Return a figure in per cent; - where there was nothing to find."""
    return "-" if value is None else f"{100 * value:.1f}"


def write_detection_results(
    prefix: str, content: dict[str, Any], scores: dict[str, Scores], per_class: str
) -> None:
    """Write ``PREFIX.json``, the table of classes and the precision–recall curves; log figures."""
    names = content["class_names"]
    table = [["class", "name", "objects"]]
    table[0] += [f"{kind}_{figure}" for kind in scores for figure in FIGURES]
    for place, name in enumerate(names):
        figures = [scores[kind].per_class[place][figure] for kind in scores for figure in FIGURES]
        cells = ["" if value is None else f"{value:.6f}" for value in figures]
        quoted = '"' + name.replace('"', '""') + '"'
        table.append([str(place), quoted, str(scores["box"].objects[place]), *cells])
    per_class = per_class or f"{prefix}_per-class.csv"
    write_text(f"{prefix}.json", json.dumps(content, indent=1) + "\n")
    write_text(per_class, "".join(",".join(row) + "\n" for row in table))
    written = [f"{prefix}.json", per_class]
    for kind, result in scores.items():
        if not result.objects.any():
            continue
        written.append(f"{prefix}_{kind}-precision.png")
        title = f"{content['network']}: {kind} AP {shown(result.figures['ap'])} %"
        plot_precision(curves_of(result, names), written[-1], title)
    if len(names) <= MOST_CURVES:
        for place, name in enumerate(names):
            both = [scores[kind].per_class[place] for kind in KINDS]
            LOGGER.info(
                "Class      %-20s box AP %s, AP50 %s, AP75 %s; mask AP %s, AP50 %s, AP75 %s",
                name,
                *(shown(each[figure]) for each in both for figure in FIGURES[:3]),
            )
    for kind, result in scores.items():
        LOGGER.info(
            "Test %-4s  AP %s %%  AP50 %s %%  AP75 %s %%  small %s %%  medium %s %%  large %s %%",
            kind,
            *(shown(result.figures[figure]) for figure in FIGURES),
        )
    LOGGER.info(
        "Speed      %d images, %.2f images/s",
        content["images"],
        content["images"] / max(content["seconds"], 1e-9),
    )
    LOGGER.info("Results    %s", ", ".join(written))


def curves_of(result: Scores, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return what the diagrams show: all classes at several overlaps, each class at one."""
    seen = ~np.isnan(result.precision).any(axis=(0, 1))
    every = result.precision[:, :, seen]
    curves = {
        "all classes, by overlap": {
            overlap: every[place].mean(axis=1) for overlap, place in OVERLAPS.items()
        }
    }
    if len(names) <= MOST_CURVES:
        curves["overlap 0.5, by class"] = {
            name: result.precision[0, :, place] for place, name in enumerate(names) if seen[place]
        }
    return curves
