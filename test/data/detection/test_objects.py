"""Objects on their way to the network: masks, resizing, mirroring, batches."""

import numpy as np
import pytest
from coco_files import coloured_boxes, content, write_coco

from data.common.loader import Loader, LoaderConfig
from data.detection import rle
from data.detection.coco import Picture, Thing, read_coco
from data.detection.loaders import (
    DetectionDataset,
    get_detection_train_loader,
    get_detection_val_loader,
)
from data.detection.objects import (
    CELLS,
    Prepared,
    Truth,
    flipped,
    label_length,
    mask_in_image,
    mask_within,
    pack,
    size_of,
    unpack,
)
from data.detection.options import DetectionReadingOptions
from glore_common import UsageError

MEAN, STD = (0.0,) * 3, (1.0,) * 3
L_SHAPE = [10, 10, 20, 10, 20, 30, 40, 30, 40, 38, 10, 38]


def masks(generator, count=5, height=23, width=17):
    return [generator.random((height, width)) < share for share in np.linspace(0, 1, count)]


def test_runs_are_those_of_pycocotools():
    """cocoapi 70: text, bytes and lists are all accepted; text is written."""
    program = pytest.importorskip("pycocotools.mask")
    for mask in masks(np.random.default_rng(0)):
        expected = program.encode(np.asfortranarray(mask.astype(np.uint8)))
        ours = rle.encode(mask)
        assert ours == {"size": [23, 17], "counts": expected["counts"].decode()}
        np.testing.assert_array_equal(rle.decode(ours), mask)
        np.testing.assert_array_equal(rle.decode(expected), mask)
        plain = {"size": [23, 17], "counts": rle.counts_of(ours["counts"])}
        np.testing.assert_array_equal(rle.decode(plain), mask)
        assert rle.text_of(plain["counts"]) == ours["counts"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"counts": [1]}, "a size and counts"),
        ({"size": [2, 2], "counts": [1, 2]}, "3 pixels, their size 2 x 2"),
        ({"size": [2, 2], "counts": [5, -1]}, "4 pixels"),
        ({"size": [2, 2], "counts": "\n"}, "no character of runs"),
        ({"size": [2, 2], "counts": "P"}, "ends within a number"),
    ],
)
def test_runs_that_are_none(runs, message):
    with pytest.raises(ValueError, match=message):
        rle.decode(runs)


def test_polygons_fill_the_pixels_whose_centres_they_hold():
    """tensorpack 587, gluon-cv PR 997: a box of 10 x 10 has 100 pixels, not 121."""
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    assert rle.fill_polygons([square], 40, 40).sum() == 100
    assert rle.fill_polygons([square, [30, 30, 35, 30, 35, 35, 30, 35]], 40, 40).sum() == 125
    assert rle.fill_polygons([[-50, -50, 5, -50, 5, 5, -50, 5]], 40, 40).sum() == 25
    program = pytest.importorskip("pycocotools.mask")
    theirs = program.decode(program.frPyObjects([L_SHAPE], 50, 50))[..., 0]
    ours = rle.fill_polygons([L_SHAPE], 50, 50)
    assert (ours != theirs).mean() < 0.02


def test_masks_within_boxes():
    thing = Thing(0, (10.0, 10.0, 40.0, 38.0), [L_SHAPE])
    grid = mask_within(thing)
    assert grid.shape == (CELLS, CELLS)
    assert grid.mean() == pytest.approx((10 * 28 + 20 * 8) / (30 * 28), abs=0.01)
    whole = mask_in_image(thing, 50, 50)
    runs = thing._replace(segmentation=rle.encode(whole))
    assert (mask_within(runs) == grid).mean() > 0.97


def test_packed_objects_are_the_same_again():
    generator = np.random.default_rng(0)
    truth = Truth(
        (100.0, 80.0),
        generator.uniform(0, 80, (3, 4)).astype(np.float32),
        np.array([2, 0, 79]),
        generator.random((3, CELLS, CELLS)) < 0.5,
        12345,
    )
    row = pack(truth, 5)
    assert row.shape == (label_length(5),)
    again = unpack(row)
    assert again.size == truth.size
    assert again.seed == truth.seed
    for name in ("boxes", "classes", "masks"):
        np.testing.assert_array_equal(getattr(again, name), getattr(truth, name))
    none = Truth((9.0, 9.0), np.zeros((0, 4)), np.zeros(0), np.zeros((0, CELLS, CELLS), bool), 0)
    assert len(unpack(pack(none, 0)).boxes) == len(unpack(pack(none, 4)).boxes) == 0


def test_mirrored_boxes_fit_their_image():
    """mmdetection 8281, albumentations 1720: continuous coordinates, and twice is the identity."""
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    assert flipped(boxes, 60).tolist() == [[50, 0, 60, 10]]
    np.testing.assert_array_equal(flipped(flipped(boxes, 60), 60), boxes)


class Always:
    """A generator that mirrors every image."""

    def uniform(self):
        return 0.0


@pytest.mark.parametrize("mirror", [False, True])
def test_image_box_and_mask_stay_together(mirror):
    image = np.zeros((50, 60, 3), np.uint8)
    thing = Thing(1, (10.0, 10.0, 40.0, 38.0), [L_SHAPE])
    image[mask_in_image(thing, 50, 60)] = 255
    prepared = Prepared(100, 200, MEAN, STD, flip=mirror)
    data, truth = prepared(image, Picture(1, "a", 50, 60, (thing,)), (128, 128), Always())
    assert truth.size == (100, 120)
    left, top, right, bottom = truth.boxes[0]
    assert (right - left, bottom - top) == (60, 56)
    # The mask within its box, as pixels, is where the image is bright.
    rows = ((np.arange(top, bottom) + 0.5 - top) / (bottom - top) * CELLS).astype(int)
    columns = ((np.arange(left, right) + 0.5 - left) / (right - left) * CELLS).astype(int)
    inside = truth.masks[0][np.ix_(rows, columns)]
    bright = data[0, int(top) : int(bottom), int(left) : int(right)] > 0.5
    assert (inside == bright).mean() > 0.98
    assert data[:, :, 120:].max() == data[:, 100:].max() == 0
    # Nothing bright lies outside of the box.
    data[:, int(top) : int(bottom), int(left) : int(right)] = 0
    assert data[:, :100, :120].max() < 0.6


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((200, 2000), (133, 1333))],
)
def test_sizes_are_those_of_800_and_1333(size, expected):
    assert size_of(*size, 800, 1333) == expected


def reading(**options):
    settings = {"batch_size": 2, "num_workers": 0, "short_side": 64, "long_side": 96}
    return DetectionReadingOptions(**{**settings, **options})


def test_batches_have_images_of_one_canvas(tmp_path):
    path, images = coloured_boxes(tmp_path, {"train": 7})["train"]
    source = read_coco(path, images, training=True)
    loader = get_detection_train_loader(source, reading(), mean=MEAN, std=STD, seed=3)
    seen = []
    for data, label in loader:
        assert data.shape in {(2, 3, 64, 96), (2, 3, 96, 64)}
        for each in map(unpack, label.asnumpy()):
            assert (each.size[0] > each.size[1]) == (data.shape[2] > data.shape[3])
            assert len(each.boxes) in (1, 2)
            assert each.masks.all()  # boxes are their own masks
            seen.append(each.size)
    # Three and four images, filled up to whole batches.
    assert len(seen) == 8 == loader.num_samples
    val = get_detection_val_loader(source, reading(val_batch=3), mean=MEAN, std=STD)
    shapes = [data.shape for data, _ in val]
    assert sum(shape[0] for shape in shapes) == 7
    assert val.num_samples == 7


def test_epochs_differ_and_repeat_with_their_seed(tmp_path):
    path, images = coloured_boxes(tmp_path, {"train": 7})["train"]
    source = read_coco(path, images, training=True)

    def epoch(index, seed=3, rank=0, ranks=1):
        loader = get_detection_train_loader(
            source, reading(), mean=MEAN, std=STD, seed=seed, rank=rank, num_ranks=ranks
        )
        loader.set_position(index, 0)
        return [data.asnumpy() for data, _ in loader]

    def same(one, other):
        return len(one) == len(other) and all(
            a.shape == b.shape and (a == b).all() for a, b in zip(one, other)
        )

    assert same(epoch(0), epoch(0))
    assert not same(epoch(0), epoch(1))
    assert not same(epoch(0), epoch(0, seed=4))
    # Workers step together on batches of one shape, and share the images.
    first, second = epoch(0, rank=0, ranks=2), epoch(0, rank=1, ranks=2)
    assert [batch.shape for batch in first] == [batch.shape for batch in second]
    assert not same(first, second)


def test_workers_read_what_one_process_reads(tmp_path):
    path, images = coloured_boxes(tmp_path, {"train": 5})["train"]
    source = read_coco(path, images, training=True)
    batches = []
    for workers in (0, 2):
        options = reading(num_workers=workers)
        loader = get_detection_train_loader(source, options, mean=MEAN, std=STD, seed=1)
        batches.append([(d.asnumpy(), b.asnumpy()) for d, b in loader])
        loader.close()
    for one, other in zip(*batches):
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)


def test_an_image_without_objects_is_a_row_without_objects(tmp_path):
    path, images = write_coco(tmp_path, content([], ((1, 40, 60),)))
    source = read_coco(path, images, training=True, keep_empty=True)
    loader = get_detection_train_loader(source, reading(batch_size=1), mean=MEAN, std=STD)
    ((data, label),) = list(loader)
    assert len(unpack(label.asnumpy()[0]).boxes) == 0
    assert data.shape == (1, 3, 64, 96)


def test_an_unreadable_image_is_replaced_by_one_of_its_canvas(tmp_path):
    path, images = coloured_boxes(tmp_path, {"train": 6})["train"]
    with open(f"{images}/2.png", "w") as stream:
        stream.write("no image")
    source = read_coco(path, images, training=True)
    loader = get_detection_train_loader(source, reading(), mean=MEAN, std=STD)
    shapes = [data.shape for data, _ in loader]
    assert sum(shape[0] for shape in shapes) == 8
    assert [bad.path for bad in loader.bad_files()] == [f"{images}/2.png"]


def test_shapes_that_differ_cannot_be_balanced(tmp_path):
    path, images = coloured_boxes(tmp_path, {"train": 4})["train"]
    dataset = DetectionDataset(read_coco(path, images), Prepared(64, 96, MEAN, STD))
    with pytest.raises(UsageError, match="samples of different shapes"):
        Loader(dataset, LoaderConfig(batch_size=2, num_workers=0, last_batch="discard"))
