"""Average precision: pycocotools' own on files written by hand, and what it stumbles over."""

import contextlib
import io
import json

import numpy as np
import pytest
from coco_files import annotation, content

from data.detection.rle import encode, fill_polygons
from glore_common import GloReError, UsageError
from train.coco_scores import FIGURES, coco_scores

pytest.importorskip("pycocotools")
IMAGES = ((1, 200, 300), (2, 200, 300), (3, 200, 300))
CATEGORIES = ((3, "cat"), (7, "dog"), (9, "ship"))


def polygon(points, height=200, width=300):
    return encode(fill_polygons([points], height, width))


def example():
    """Boxes of all sizes in two of three classes, one crowd, one image without any."""
    ellipse = np.stack(
        [100 + 60 * np.cos(np.linspace(0, 6, 20)), 90 + 50 * np.sin(np.linspace(0, 6, 20))], 1
    )
    return content(
        [
            annotation(1, 1, 3, (10, 10, 20, 20)),
            annotation(2, 1, 3, (100, 50, 60, 80)),
            annotation(3, 1, 7, (30, 40, 150, 140)),
            annotation(
                4,
                2,
                7,
                (40, 40, 120, 100),
                segmentation=[ellipse.reshape(-1).tolist()],
                area=9000.0,
            ),
            annotation(
                5,
                2,
                3,
                (200, 10, 60, 60),
                iscrowd=1,
                segmentation=polygon([200, 10, 260, 10, 260, 70, 200, 70]),
            ),
        ],
        IMAGES,
        CATEGORIES,
    )


def perfect(truth):
    rows = []
    for row in truth["annotations"]:
        if row["iscrowd"]:
            continue
        rows.append(
            {
                "image_id": row["image_id"],
                "category_id": row["category_id"],
                "bbox": row["bbox"],
                "score": 0.9,
                "segmentation": polygon(row["segmentation"][0]),
            }
        )
    return rows


def perturbed(truth, seed=0):
    """Shifted boxes with scores of their own, wrong ones, and one within the crowd."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in perfect(truth) * 2:
        left, top, width, height = row["bbox"] + generator.normal(0, 4, 4)
        right, bottom = left + width, top + height
        rows.append(
            {
                **row,
                "bbox": [round(float(v), 3) for v in (left, top, width, height)],
                "score": round(float(generator.random()), 6),
                "segmentation": polygon([left, top, right, top, right, bottom, left, bottom]),
            }
        )
    for image, category, box in ((2, 3, (205, 15, 30, 30)), (3, 9, (5, 5, 40, 40))):
        left, top, width, height = box
        right, bottom = left + width, top + height
        rows.append(
            {
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "score": 0.7,
                "segmentation": polygon([left, top, right, top, right, bottom, left, bottom]),
            }
        )
    return rows


def by_their_program(folder, truth, rows, kind):
    """Return COCO's twelve figures as its own program prints them, from files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    without_boxes = [{k: v for k, v in r.items() if k != "bbox"} for r in rows]
    with open(f"{folder}/truth.json", "w") as stream:
        json.dump(truth, stream)
    with open(f"{folder}/rows.json", "w") as stream:
        json.dump(without_boxes if kind == "segm" else rows, stream)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(f"{folder}/truth.json")
        program = COCOeval(expected, expected.loadRes(f"{folder}/rows.json"), kind)
        program.evaluate()
        program.accumulate()
        program.summarize()
    return dict(zip(FIGURES, program.stats[:6]))


@pytest.mark.parametrize("made", [perfect, perturbed])
@pytest.mark.parametrize(("kind", "theirs"), [("box", "bbox"), ("mask", "segm")])
def test_figures_are_those_of_pycocotools(tmp_path, made, kind, theirs):
    truth = example()
    rows = made(truth)
    expected = by_their_program(tmp_path, truth, rows, theirs)
    scores = coco_scores(truth, rows, kind)
    for name, value in expected.items():
        assert scores.figures[name] == (None if value == -1 else pytest.approx(value, abs=1e-9))
    if made is perfect:
        assert scores.figures["ap"] == pytest.approx(1)
    else:
        assert 0.1 < scores.figures["ap"] < 0.95
    assert scores.objects.tolist() == [2, 2, 0]


def test_a_class_without_objects_is_absent_and_in_no_mean():
    """mmdetection 2052: -1 is no average precision."""
    truth = example()
    scores = coco_scores(truth, perfect(truth), "box")
    assert [each["ap"] for each in scores.per_class] == [pytest.approx(1), pytest.approx(1), None]
    assert scores.figures["ap"] == pytest.approx(1)
    assert np.isnan(scores.precision[:, :, 2]).all()
    assert scores.per_class[0]["ap_large"] is None
    assert scores.per_class[1]["ap_large"] == pytest.approx(1)


def test_no_detections_are_a_precision_of_0():
    """cocoapi 450: an empty list is an IndexError there."""
    scores = coco_scores(example(), [], "box")
    assert scores.figures["ap"] == 0
    assert coco_scores(example(), [], "mask").figures["ap50"] == 0
    nothing = coco_scores(content([], IMAGES, CATEGORIES), [], "box")
    assert nothing.figures["ap"] is None


def test_annotations_may_be_numbered_from_0():
    """cocoapi 507: pycocotools takes the id 0 for no match."""
    rows = [annotation(0, 1, 3), annotation(1, 1, 3, (50, 50, 20, 20))]
    truth = content(rows, IMAGES, CATEGORIES)
    assert coco_scores(truth, perfect(truth), "box").figures["ap"] == pytest.approx(1)


def test_areas_may_be_missing():
    truth = example()
    full = coco_scores(truth, perturbed(truth), "mask").figures
    for row in truth["annotations"]:
        del row["area"]
    found = coco_scores(truth, perturbed(truth), "mask").figures
    assert found["ap"] == pytest.approx(full["ap"])


def test_masks_are_sorted_by_their_own_area():
    """mmdetection PR 4898: a triangle of 800 pixels in a box of 1600 is a small object."""
    triangle = [0, 0, 40, 0, 0, 40]
    row = annotation(1, 1, 3, (0, 0, 40, 40), segmentation=[triangle], area=800.0)
    truth = content([row, annotation(2, 1, 3, (100, 100, 20, 20))], IMAGES, CATEGORIES)
    rows = perfect(truth)
    rows[0]["segmentation"] = polygon([0, 0, 40, 0, 0, 38])
    # A mask that is wrong, but whose own area is small: it counts among the small ones.
    wrong = {**rows[0], "segmentation": polygon([200, 0, 240, 0, 200, 40]), "score": 0.95}
    figures = coco_scores(truth, [*rows, wrong], "mask").figures
    assert figures["ap_medium"] is None
    assert figures["ap_small"] < 0.9


def test_an_object_without_a_mask_is_neither_right_nor_wrong():
    truth = example()
    rows = perfect(truth)
    truth["annotations"][0].pop("segmentation")
    assert coco_scores(truth, rows, "mask").figures["ap"] == pytest.approx(1)
    assert coco_scores(truth, rows, "box").figures["ap"] == pytest.approx(1)
    assert coco_scores(truth, rows[1:], "mask").figures["ap"] == pytest.approx(1)
    assert coco_scores(truth, rows[1:], "box").figures["ap"] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, "detection 0: there is no image 77"),
        ({"image_id": "1"}, "there is no image '1' .ids of images are of type int"),
        ({"category_id": 1}, "detection 0: there is no category 1"),
    ],
)
def test_detections_of_what_is_not_there(change, message):
    """cocoapi 600, detectron2 1531: unknown images and categories, ids of another type."""
    row = {**perfect(example())[0], **change}
    with pytest.raises(GloReError, match=message):
        coco_scores(example(), [row], "box")


def test_fewer_detections_can_count():
    truth = example()
    rows = perfect(truth)
    one = coco_scores(truth, rows, "box", most=1).figures["ap"]
    assert one < coco_scores(truth, rows, "box", most=2).figures["ap"] == pytest.approx(1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match="extra `detection`"):
        coco_scores(example(), [], "box")
