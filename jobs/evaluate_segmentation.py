"""Test a segmentation network: IoU, pixel accuracy, pictures, and what Cityscapes' server takes."""

import dataclasses
import json
import logging
import math
import os
import tempfile
import time
from typing import Any, Optional

import numpy as np

from data.segmentation.labels import IGNORED
from data.segmentation.loaders import read_pair
from data.segmentation.masks import write_mask
from data.segmentation.source import SegmentationSource, check, read_folders
from glore_common import UsageError, progress, write_text
from train.metric import ConfusionMatrix
from train.plots import plot_confusion

from .model import Model
from .options import EvaluateOptions, PartOptions, SegmentationSourceOptions
from .segment import (
    Segmenter,
    error_map,
    labels_of,
    open_part,
    overlay,
    palette_of,
)

LOGGER = logging.getLogger("glore")
MOST_PICTURED_CLASSES = 200


def official_scores(found: list[str], truth: list[str]) -> dict[str, Any]:
    """Return the scores of Cityscapes' own program: IoU and iIoU of classes and categories.

    Parameters
    ----------
    found, truth
        Files of ids; beside each true one lies its ``…_instanceIds.png``.

    Raises
    ------
    UsageError
        If the package cityscapesscripts is not installed.
    """
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as program
    except ImportError as error:
        raise UsageError(
            f"Cityscapes' own scores need the package cityscapesscripts (extra `cityscapes`): pip "
            f"install --no-deps cityscapesscripts pyquaternion ({error})"
        ) from error
    arguments = program.args
    arguments.quiet, arguments.JSONOutput = True, False
    result = program.evaluateImgLists(found, truth, arguments)
    return {
        "iou_class": result["averageScoreClasses"],
        "iiou_class": result["averageScoreInstClasses"],
        "iou_category": result["averageScoreCategories"],
        "iiou_category": result["averageScoreInstCategories"],
        "classes": result["classScores"],
        "instance_classes": result["classInstScores"],
        "categories": result["categoryScores"],
    }


def has_official_scores(source: SegmentationSource) -> bool:
    """Return whether Cityscapes' own program can score a source, and is installed."""
    if source.kind != "cityscapes" or source.mask(0) is None:
        return False
    try:
        import cityscapesscripts.helpers.csHelpers  # noqa: F401
    except ImportError:
        LOGGER.info(
            "iIoU and categories are left out: they need the package cityscapesscripts (extra "
            "`cityscapes`)"
        )
        return False
    instances = str(source.mask(0)).replace("labelIds", "instanceIds")
    if not os.path.isfile(instances):
        LOGGER.info("iIoU and categories are left out: there is no %s", instances)
        return False
    return True


def submission_name(image: str) -> str:
    """Return the file name of a result: ``aachen_000000_000019_pred_labelIds.png``."""
    stem = os.path.splitext(os.path.basename(image))[0]
    end = "_leftImg8bit"
    return f"{stem[: -len(end)]}_pred_labelIds.png" if stem.endswith(end) else f"{stem}.png"


def write_ids(folder: str, source: SegmentationSource, index: int, mask: np.ndarray) -> str:
    """Write a result as ids of the data set, single-channel PNG; return the path."""
    path = os.path.join(folder, submission_name(source.image(index)))
    write_mask(path, np.array(source.labels.ids, np.uint8)[mask])
    return path


def test_source(options: PartOptions, model: Model, data_root: Optional[str]) -> SegmentationSource:
    """Return the images that are asked for, else a part of the training's data set."""
    trained = model.options.get("source", {})
    known = {field.name for field in dataclasses.fields(SegmentationSourceOptions)}
    source = SegmentationSourceOptions(**{k: v for k, v in trained.items() if k in known})
    source.data_root = data_root or source.data_root
    if not source.classes and source.dataset == "folders":
        source.num_classes = model.facts.num_classes
    if options.images:
        found = read_folders(options.images, options.masks, labels_of(source, model.facts))
    else:
        if not trained:
            raise UsageError(
                f"{model.path} does not say which images: give --images DIR and --masks DIR"
            )
        found_part = open_part(source, options.part)
        if found_part is None:
            raise UsageError(f"the data set has no part {options.part}: give --images and --masks")
        found = found_part
    if found.labels.num_classes != model.facts.num_classes:
        raise UsageError(
            f"{model.path} has {model.facts.num_classes} classes, {found.origin} has "
            f"{found.labels.num_classes}: give the data that it was trained for"
        )
    return found


def evaluate_segmentation(options: EvaluateOptions, model: Model, contexts: list) -> dict[str, Any]:
    """Test a network on images with masks; log and write the results; return what the JSON says."""
    asked, views, facts = options.parts, options.segmentation, model.facts
    source = test_source(asked, model, options.data.data_root)
    stem = os.path.splitext(os.path.basename(os.path.normpath(model.path)))[0]
    prefix = options.output.output or os.path.join(".", "exps", "results", f"{stem}_{asked.part}")
    limit = min(len(source.pairs), options.data.max_samples or len(source.pairs))
    source = dataclasses.replace(source, pairs=source.pairs[:limit])
    check(source, contents=False)
    segmenter = Segmenter(model, contexts, views)
    LOGGER.info(
        "Testing    %d images of %s: scales %s%s, %s",
        limit,
        source.origin,
        ", ".join(f"{scale:g}" for scale in views.scales),
        ", mirrored too" if views.flip_test else "",
        "whole images" if views.window is None else "windows of {1} x {0}".format(*views.window),
    )
    confusion = ConfusionMatrix(facts.num_classes)
    palette = palette_of(facts)
    started, written, truth = time.perf_counter(), [], []
    official = has_official_scores(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.submit or temporary
        for index in progress(range(limit), "Segmenting", limit, unit="image"):
            image, mask = read_pair(source.image(index), source.mask(index), source.labels)
            found = segmenter.classes(image)
            labelled = mask != IGNORED
            confusion.update(mask[labelled], found[labelled])
            if asked.submit or official:
                written.append(write_ids(folder, source, index, found))
                truth.append(source.mask(index))
            if index < asked.pictures:
                name = os.path.splitext(os.path.basename(source.image(index)))[0]
                write_mask(f"{prefix}_{name}_overlay.png", overlay(image, found, palette))
                if source.mask(index) is not None:
                    write_mask(f"{prefix}_{name}_errors.png", error_map(found, mask))
        seconds = time.perf_counter() - started
        scores = official_scores(written, [str(path) for path in truth]) if official else None
    if asked.submit:
        LOGGER.info("Submission         %d masks of ids in %s", len(written), asked.submit)
    content: dict[str, Any] = {
        "network": facts.network,
        "weights": model.path,
        "kind": "segmentation",
        "data": source.origin,
        "images": limit,
        "seconds": round(seconds, 3),
        "window": views.window,
        "overlap": views.overlap,
        "flip": views.flip_test,
        "scales": list(views.scales),
        "class_names": list(source.labels.names),
        "miou": none_of_nan(confusion.mean_iou()),
        "pixel_accuracy": none_of_nan(confusion.accuracy()),
        "mean_class_accuracy": none_of_nan(confusion.mean_class_accuracy()),
        "iou": [none_of_nan(value) for value in confusion.iou()],
        "cityscapes": scores,
    }
    write_segmentation_results(prefix, content, confusion, options.output.per_class)
    return content


def none_of_nan(value: float) -> Optional[float]:
    """Return a figure as JSON can hold it: None where there was nothing to measure."""
    return None if math.isnan(value) else float(value)


def write_segmentation_results(
    prefix: str, content: dict[str, Any], confusion: ConfusionMatrix, per_class: str
) -> None:
    """Write ``PREFIX.json``, the table of classes, the confusion matrix; log the figures."""
    names, matrix = content["class_names"], confusion.matrix
    rows = ["class,name,iou,accuracy,pixels,predicted"]
    for index, (iou, accuracy) in enumerate(zip(confusion.iou(), confusion.per_class())):
        figures = ("" if math.isnan(value) else f"{value:.6f}" for value in (iou, accuracy))
        cells = (index, f'"{names[index]}"', *figures, matrix[index].sum(), matrix[:, index].sum())
        rows.append(",".join(map(str, cells)))
    per_class = per_class or f"{prefix}_per-class.csv"
    text = "".join(",".join(map(str, row)) + "\n" for row in matrix.tolist())
    write_text(f"{prefix}.json", json.dumps(content, indent=1) + "\n")
    write_text(per_class, "\n".join(rows) + "\n")
    write_text(f"{prefix}_confusion.csv", text)
    written = [f"{prefix}.json", per_class, f"{prefix}_confusion.csv"]
    if len(matrix) <= MOST_PICTURED_CLASSES and matrix.any():
        written.append(f"{prefix}_confusion.png")
        share = 100 * matrix / max(1, matrix.sum())
        title = f"{content['network']}: mIoU {content['miou']:.2%} (per cent of all pixels)"
        plot_confusion(np.round(share, 2), written[-1], names, title)
    if matrix.any():
        for name, iou in zip(names, confusion.iou()):
            LOGGER.info("IoU        %-20s %s", name, "-" if math.isnan(iou) else f"{iou:.2%}")
        LOGGER.info(
            "Test       miou %.2f %%  pixel accuracy %.2f %%  mean class accuracy %.2f %%  (%d "
            "images, %.2f images/s)",
            *(100 * content[n] for n in ("miou", "pixel_accuracy", "mean_class_accuracy")),
            content["images"],
            content["images"] / max(content["seconds"], 1e-9),
        )
    if content["cityscapes"]:
        names = ("iou_class", "iiou_class", "iou_category", "iiou_category")
        LOGGER.info(
            "Cityscapes IoU class %.2f %%  iIoU class %.2f %%  IoU category %.2f %%  iIoU category "
            "%.2f %%",
            *(100 * content["cityscapes"][name] for name in names),
        )
    LOGGER.info("Results    %s", ", ".join(written))
