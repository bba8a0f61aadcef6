"""Reading files of COCO's format: what can be used, what is left out, what is refused.

Each kind of mistake is one that users of other projects reported; the number in a docstring is
that of their report.
"""

import numpy as np
import pytest
from coco_files import annotation, content, write_coco
from PIL import Image
from segmentation_files import picture, save

from data.detection.coco import (
    AnnotationError,
    check_images,
    ground_truth,
    log_left_out,
    read_coco,
)
from data.detection.loaders import read_image
from data.detection.objects import mask_in_image
from data.detection.rle import lengths_of, text_of

RECTANGLE = [5, 5, 25, 5, 25, 25]


def read(tmp_path, what, **how):
    path, images = write_coco(tmp_path, what)
    return read_coco(path, images, **how)


def things(tmp_path, *annotations, **how):
    return read(tmp_path, content(annotations), **how).pictures[0].things


def test_classes_are_numbered_in_the_order_of_their_ids(tmp_path):
    """detectron2 1731, detr 444: ids with gaps, in any order, or from 0."""
    rows = [annotation(1, category=7), annotation(2, category=3), annotation(3, category=0)]
    what = content(rows, categories=((7, "seven"), (0, "none"), (3, "three")))
    source = read(tmp_path, what)
    assert source.names == ("none", "three", "seven")
    assert source.ids == (0, 3, 7)
    assert [thing.label for thing in source.pictures[0].things] == [2, 1, 0]


def test_ids_of_several_annotations_that_are_the_same(tmp_path):
    """mmdetection 4897, TACO 46: boxes of one id would be taken for one another."""
    rows = [annotation(n) for n in (1, 1, 2, 2, 3)]
    with pytest.raises(AnnotationError, match="several annotations have the same id: 1, 2"):
        read(tmp_path, content(rows))
    with pytest.raises(AnnotationError, match="several images have the same id"):
        read(tmp_path, content([], images=((1, 40, 60), (1, 40, 60))))
    with pytest.raises(AnnotationError, match="several categories"):
        read(tmp_path, content([], categories=((1, "a"), (1, "b"))))
    row = annotation(1)
    del row["id"]
    with pytest.raises(AnnotationError, match="1 annotations have no id"):
        read(tmp_path, content([row]))


@pytest.mark.parametrize("polygons", [[], [[10, 10]], [[5, 5, 25, 25]], None, [[]]])
def test_objects_without_a_usable_mask_are_left_out_and_counted(tmp_path, polygons, caplog):
    """mmdetection 3338, cocoapi 369: no polygon, or one of less than three points."""
    rows = [annotation(1, segmentation=polygons), annotation(2)]
    source = read(tmp_path, content(rows))
    assert len(source.pictures[0].things) == 1
    assert source.left_out == {"objects without a usable mask": 1}
    with caplog.at_level("INFO", "glore"):
        log_left_out(source)
    assert "1 objects without a usable mask" in caplog.text


def test_polygons_that_cannot_be_meant(tmp_path):
    """coco-annotator 169: an odd number of coordinates; others: text, NaN."""
    for polygon, message in (
        ([1, 2, 3, 4, 5, 6, 7], "annotation 9: a polygon is a list of x, y"),
        ([1, 2, 3, 4, 5, "6"], "annotation 9: a polygon has a coordinate that is no number"),
        ([1, 2, 3, 4, 5, float("nan")], "no number"),
        (5, "annotation 9: a polygon is a list"),
    ):
        with pytest.raises(AnnotationError, match=message):
            things(tmp_path, annotation(9, segmentation=[polygon]))


def test_small_polygons_beside_large_ones_are_left_out(tmp_path):
    (thing,) = things(tmp_path, annotation(1, segmentation=[[1, 1, 2, 2], RECTANGLE]))
    assert thing.segmentation == [RECTANGLE]


def test_polygons_far_outside_are_no_crash(tmp_path):
    """cocoapi 380: huge coordinates."""
    huge = [[-1e7, -1e7, 1e7, -1e7, 1e7, 1e7, -1e7, 1e7]]
    (thing,) = things(tmp_path, annotation(1, box=(0, 0, 60, 40), segmentation=huge))
    assert mask_in_image(thing, 40, 60).all()


@pytest.mark.parametrize("crowd", [0, 1])
def test_runs_as_text_and_as_a_list(tmp_path, crowd):
    """pycococreator 40, detectron2 573: counts as a list, or compressed; crowd or not."""
    counts = [5 * 40 + 5, *[10, 30] * 9, 10]
    counts.append(40 * 60 - sum(counts))
    for runs in (counts, text_of(counts), text_of(counts).encode()):
        rows = [annotation(1, segmentation={"size": [40, 60], "counts": runs}, iscrowd=crowd)]
        if isinstance(runs, bytes):
            # No JSON has them; pycocotools makes them (cocoapi 70).
            assert lengths_of({"size": [40, 60], "counts": runs})[0].tolist() == counts
            continue
        source = read(tmp_path, content(rows))
        assert len(source.pictures[0].things) == 1 - crowd
        if crowd:
            assert source.left_out == {"crowds": 1}
        else:
            mask = mask_in_image(source.pictures[0].things[0], 40, 60)
            assert mask.sum() == 100
            assert mask[5:15, 5:15].all()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"size": [40, 60], "counts": [3]}, "annotation 4: the runs have 3 pixels"),
        ({"size": [40, 60], "counts": ["a"]}, "annotation 4: counts are text or whole numbers"),
        ({"size": [60, 40], "counts": [2400]}, "its mask has 40 x 60 pixels, its image 60 x 40"),
        ({"counts": [2400]}, "annotation 4: runs have a size and counts"),
    ],
)
def test_runs_that_cannot_be_meant(tmp_path, runs, message):
    with pytest.raises(AnnotationError, match=message):
        things(tmp_path, annotation(4, segmentation=runs))


def test_crowds_are_no_targets_and_stay_in_the_truth(tmp_path):
    """detectron2 5027, mmdetection 7100."""
    runs = {"size": [40, 60], "counts": [0, 2400]}
    rows = [annotation(1, segmentation=runs, iscrowd=1, box=(0, 0, 60, 40)), annotation(2)]
    source = read(tmp_path, content(rows), training=True)
    assert len(source.pictures[0].things) == 1
    assert [row["iscrowd"] for row in ground_truth(source)["annotations"]] == [1, 0]
    with pytest.raises(AnnotationError, match="no image that can be used: 1 crowds, 1 images"):
        read(tmp_path, content(rows[:1]), training=True)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((50, 30, 20, 20), (50, 30, 60, 40)),
        ((-5, -5, 20, 20), (0, 0, 15, 15)),
        ((70, 70, 20, 20), None),
        ((5, 5, 0, 10), None),
        ((5, 5, -10, 10), None),
        ((5, 5, 0.4, 10), None),
        ((59.5, 5, 20, 10), None),
    ],
)
def test_boxes_that_reach_beyond_their_image(tmp_path, box, expected):
    """torchvision 2240, Mask_RCNN 112: outside, without a width, of a negative one."""
    source = read(tmp_path, content([annotation(1, box=(1, 1, 9, 9)), annotation(2, box=box)]))
    found = [thing.box for thing in source.pictures[0].things]
    assert found == [(1, 1, 10, 10), *([expected] if expected else [])]
    assert sum(source.left_out.values()) == (expected is None)


def test_boxes_and_references_that_cannot_be_meant(tmp_path):
    """cocoapi 600: unknown images or categories; ids of another type."""
    for change, message in (
        ({"bbox": [1, 2, 3]}, r"annotation 4: bbox is \[x, y, width, height\]"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox is"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox is"),
        ({"image_id": 7}, "annotation 4: there is no image 7"),
        ({"image_id": "1"}, "there is no image 1"),
        ({"category_id": 99}, "annotation 4: there is no category 99"),
    ):
        with pytest.raises(AnnotationError, match=message):
            things(tmp_path, {**annotation(4), **change})


def test_images_without_objects_can_be_kept(tmp_path):
    """torchvision 2144."""
    images = ((1, 40, 60), (2, 40, 60), (3, 16, 60))
    what = content([annotation(1), annotation(2, image=3)], images)
    assert [p.id for p in read(tmp_path, what).pictures] == [1, 2, 3]
    kept = read(tmp_path, what, training=True)
    assert [p.id for p in kept.pictures] == [1]
    assert kept.left_out == {
        "images without objects": 1,
        "images with a side below 32 pixels": 1,
    }
    empty = read(tmp_path, what, training=True, keep_empty=True)
    assert [p.id for p in empty.pictures] == [1, 2]


def test_files_that_are_none(tmp_path):
    path, images = write_coco(tmp_path, content([annotation(1)]))
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_coco(f"{tmp_path}/nothing.json", images)
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "no list images"),
        ('{"images": [], "categories": []}', "no list annotations"),
        ('{"images": [], "annotations": [], "categories": []}', "no image that can be used"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "image 1 needs id, file"),
    ):
        with open(path, "w") as stream:
            stream.write(text)
        with pytest.raises(AnnotationError, match=message):
            read_coco(path, images)
    with open(path, "w") as stream:
        stream.write(
            '{"images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}],'
            '"categories": []}'
        )
    assert len(read_coco(path, images, annotated=False).pictures) == 1


def test_missing_images_and_images_of_another_size_are_found_before_training(tmp_path):
    images = ((1, 40, 60), (2, 40, 60), (3, 40, 60))
    path, root = write_coco(tmp_path, content([annotation(1)], images))
    source = read_coco(path, root)
    check_images(source)
    save(f"{root}/2.png", picture(60, 40))
    with pytest.raises(AnnotationError, match=r"2.png has 40 x 60 pixels, .* says 60 x 40"):
        check_images(source)
    check_images(source, contents=False)
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(AnnotationError, match="1 of 3 images of .* are missing, the first one"):
        check_images(source, contents=False)


def test_images_are_turned_as_their_exif_says(tmp_path):
    """detectron2 788: a JPEG of 40 x 20 pixels that is looked at as 20 x 40."""
    what = content([annotation(1)], ((1, 40, 20),))
    what["images"][0]["file_name"] = "1.jpg"
    path, root = write_coco(tmp_path, what, pictures=False)
    array = picture(20, 40)
    array[:, :10] = 255  # the left edge: on top once it is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    save(f"{root}/1.jpg", array, exif=exif, quality=95)
    check_images(read_coco(path, root))
    turned = read_image(f"{root}/1.jpg")
    assert turned.shape == (40, 20, 3)
    assert turned[:8].mean() > 240
    assert turned[30:].mean() < 200
    # The annotations of the image as it is stored are not those of the image that is seen.
    what["images"][0].update(height=20, width=40)
    path, _ = write_coco(tmp_path, what, pictures=False)
    with pytest.raises(AnnotationError, match="the annotations are those of the unturned image"):
        check_images(read_coco(path, root))


def test_truth_is_cut_to_its_images(tmp_path):
    rows = [
        annotation(0, box=(50, 30, 20, 20)),
        annotation(5, box=(70, 70, 5, 5)),
        annotation(6, segmentation=[]),
    ]
    truth = ground_truth(read(tmp_path, content(rows)))
    assert [row["bbox"] for row in truth["annotations"]] == [[50, 30, 10, 10], [2, 3, 10, 8]]
    assert "segmentation" not in truth["annotations"][1]
    assert np.shape(truth["images"]) == (1,)
