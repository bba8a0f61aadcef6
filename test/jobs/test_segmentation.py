"""Training, testing and using networks that segment."""

import dataclasses
import json
import os
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image
from segmentation_files import cityscapes_tree, picture, save

from checkpoint.params import read_params
from data.segmentation.labels import CITYSCAPES, IGNORED, numbered
from data.segmentation.masks import read_mask
from glore_common import UsageError
from jobs import evaluate, evaluate_segmentation, predict, segment, train_segmentation
from jobs.evaluate_segmentation import official_scores
from jobs.options import PixelViewOptions, SegmentationSourceOptions
from jobs.segment import Segmenter, error_map, masks_of, window_places
from mxnet_compat import mx
from train.metric import ConfusionMatrix

CLASSES = 3


def segmenter(predict, **views):
    """Return a Segmenter whose network is a function of (1, 3, h, w) arrays."""
    found = Segmenter.__new__(Segmenter)
    found.facts = SimpleNamespace(num_classes=CLASSES, mean=(0.0,) * 3, std=(1.0,) * 3)
    found.views = dataclasses.replace(PixelViewOptions(), **views)
    found.context, found.block, found._windows = mx.cpu(), predict, {}
    found.memory = lambda height, width: height * width / 1e3
    return found


def colour_logits(data):
    """Logits that are the colours: a function of each pixel alone."""
    return 10 * data


def constant(data):
    return mx.nd.ones_like(data) * mx.nd.array([1.0, 2.0, 90.0]).reshape((1, 3, 1, 1))


@pytest.mark.parametrize(
    ("size", "window", "overlap"),
    [(5, 8, 0.3), (7, 8, 0), (9, 8, 0.4), (8, 8, 0.5), (100, 50, 0), (101, 50, 0), (33, 8, 0.9)],
)
def test_windows_cover_everything_and_end_flush(size, window, overlap):
    places = window_places(size, window, overlap)
    covered = np.zeros(size, int)
    for place in places:
        assert place >= 0
        covered[place : place + window] += 1
    assert covered.min() >= 1
    assert places[-1] == max(0, size - window)
    steps = np.diff(places)
    assert len(set(places)) == len(places)
    assert (steps <= np.ceil(window * (1 - overlap))).all()
    if overlap == 0 and size == 100:
        assert places == [0, 50]  # every pixel once


@pytest.mark.parametrize("size", [(5, 7), (9, 8), (8, 8), (31, 20)])
def test_a_constant_network_gives_a_constant(size):
    found = segmenter(constant, window=(8, 8), overlap=0.4, flip_test=True, scales=(0.5, 1, 1.75))
    probabilities = found.probabilities(picture(*size))
    assert probabilities.shape == (CLASSES, *size)
    np.testing.assert_allclose(probabilities[2], 1, atol=1e-6)  # logits of 90 overflow nothing
    assert (found.classes(picture(*size)) == 2).all()


def test_one_window_over_all_is_the_whole_image():
    image = picture(24, 40)
    whole = segmenter(colour_logits).probabilities(image)
    for window in ((24, 40), (64, 64)):
        slid = segmenter(colour_logits, window=window).probabilities(image)
        np.testing.assert_array_equal(slid, whole)
    parts = segmenter(colour_logits, window=(16, 16), overlap=0.25).probabilities(image)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_mirrored_views_are_mirrored_back():
    image = picture(12, 20)
    plain = segmenter(colour_logits).probabilities(image)
    both = segmenter(colour_logits, flip_test=True).probabilities(image)
    np.testing.assert_allclose(both, plain, atol=1e-6)


def test_an_image_that_is_too_large_for_memory_is_tiled_and_that_is_said(caplog):
    found = segmenter(colour_logits, memory_limit=10.0)
    image = picture(100, 200)  # 20 by the memory rule above
    assert found.window(100, 200) == (100, 100)
    assert "would take about 20.0 GB: it is seen in windows of 100 x 100" in caplog.text
    np.testing.assert_allclose(
        found.probabilities(image),
        segmenter(colour_logits, memory_limit=100.0).probabilities(image),
        atol=1e-6,
    )
    with pytest.raises(UsageError, match="--memory-limit 1 GB is too little"):
        segmenter(colour_logits, memory_limit=1.0).window(100, 200)


def test_error_map():
    truth = np.array([[0, 1, IGNORED]], np.uint8)
    found = np.array([[0, 2, 2]], np.uint8)
    assert error_map(found, truth).tolist() == [[[160] * 3, [230, 30, 30], [0] * 3]]


def test_figures_equal_cityscapes_own_program(tmp_path):
    """IoU of classes; ground-truth void counts nowhere, a void prediction is a miss."""
    pytest.importorskip("cityscapesscripts")
    root = cityscapes_tree(tmp_path, {"val": 3}, ids=(7, 11, 23, 24, 26))
    generator = np.random.RandomState(0)
    found, truth, confusion = [], [], ConfusionMatrix(19)
    for index in range(3):
        stem = f"{root}/gtFine/val/town/town_{index:06d}_000019_gtFine"
        truth.append(f"{stem}_labelIds.png")
        mask = read_mask(truth[-1])
        result = mask.copy()
        wrong = generator.rand(*mask.shape) < 0.3
        result[wrong] = generator.choice([7, 11, 26, 33], int(wrong.sum()))
        result[mask < 7] = 7
        found.append(save(f"{tmp_path}/found/{index}.png", result))
        ids, given = (CITYSCAPES.train_ids(array, "m") for array in (mask, result))
        kept = ids != IGNORED
        confusion.update(ids[kept], given[kept])
    scores = official_scores(found, truth)
    assert scores["iou_class"] == pytest.approx(confusion.mean_iou(), abs=1e-6)
    for name, value in zip(CITYSCAPES.names, confusion.iou()):
        official = scores["classes"][name]
        assert (np.isnan(official) and np.isnan(value)) or official == pytest.approx(value)
    assert 0 < scores["iiou_class"] <= 1
    assert 0 < scores["iou_category"] <= 1


def arguments(root, folder, **options):
    settings = {
        "dataset": "cityscapes",
        "data_root": root,
        "network": "fcn_tiny_w-glore",
        "crop": "32,64",
        "batch_size": 2,
        "end_epoch": 2,
        "lr_base": 0.02,
        "num_workers": 0,
        "model_dir": folder,
        "log_file": f"{folder}/log.txt",
        "task_name": "t",
        "gpus": "cpu",
        **options,
    }
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a tree in Cityscapes' layout."""
    return cityscapes_tree(tmp_path_factory.mktemp("cityscapes"), {"train": 6, "val": 3, "test": 2})


def test_cityscapes_from_training_to_submission(tree, tmp_path, caplog):
    whole, parts = f"{tmp_path}/whole", f"{tmp_path}/parts"
    train_segmentation.main(arguments(tree, whole))
    # In two pieces it ends where it ends in one.
    train_segmentation.main(arguments(tree, parts, max_steps=4, max_val_batches=0))
    train_segmentation.main(arguments(tree, parts, resume="auto"))
    one, two = (read_params(f"{folder}/t_ep-0002.params") for folder in (whole, parts))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    with open(f"{whole}/t_ep-0002.json") as stream:
        manifest = json.load(stream)
    assert manifest["model"]["task"] == "segmentation"
    assert manifest["model"]["class_names"][13] == "car"
    history = manifest["position"]["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[-1]["train_loss"] < history[0]["train_loss"]

    prefix, submit = f"{tmp_path}/result/r", f"{tmp_path}/submit"
    evaluate.main(
        [f"{whole}/t_ep-0002", "--gpus", "cpu", "--output", prefix, "--submit", submit]
        + ["--flip-test", "--scales", "0.75,1", "--pictures", "1"]
    )
    with open(f"{prefix}.json") as stream:
        result = json.load(stream)
    assert len(result["iou"]) == 19
    confusion = np.loadtxt(f"{prefix}_confusion.csv", delimiter=",")
    assert confusion.sum() == 3 * 30 * 64
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    seen = union > 0
    assert result["miou"] == pytest.approx((np.diag(confusion)[seen] / union[seen]).mean())
    names = sorted(os.listdir(submit))
    assert names == [f"town_{n:06d}_000019_pred_labelIds.png" for n in range(3)]
    for name in names:
        with Image.open(f"{submit}/{name}") as written:
            assert (written.mode, written.size) == ("L", (64, 32))
        assert set(np.unique(read_mask(f"{submit}/{name}"))) <= set(CITYSCAPES.ids)
    for what in ("overlay", "errors"):
        path = f"{prefix}_town_000000_000019_leftImg8bit_{what}.png"
        assert cv2.imread(path).shape == (32, 64, 3)
    # The whole images of a validation are those of the test.
    evaluate.main([f"{whole}/t_ep-0002", "--gpus", "cpu", "--output", prefix])
    with open(f"{prefix}.json") as stream:
        assert json.load(stream)["miou"] == pytest.approx(history[-1]["val_miou"], abs=1e-6)
    # Pictures of image files; one that is none is named, and the exit code says so.
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    images = f"{tree}/leftImg8bit/val"
    status = predict.main(
        [f"{whole}/t_ep-0002", images, str(bad), "--gpus", "cpu", "--output"]
        + [f"{tmp_path}/p.jsonl", "--masks", f"{tmp_path}/masks"]
    )
    assert status == 1
    with open(f"{tmp_path}/p.jsonl") as stream:
        rows = [json.loads(line) for line in stream]
    assert len(rows) == 4
    assert "error" in rows[-1]
    assert rows[0]["mask"].endswith("_mask.png")
    assert sum(row["score"] for row in rows[0]["top"]) == pytest.approx(1, abs=1e-4)
    assert len(os.listdir(f"{tmp_path}/masks")) == 9
    # The test part has no masks that count: it is written and not scored.
    evaluate.main(
        [f"{whole}/t_ep-0002", "--gpus", "cpu", "--output", prefix, "--part", "test"]
        + ["--submit", f"{tmp_path}/server"]
    )
    assert len(os.listdir(f"{tmp_path}/server")) == 2


def test_mistakes_are_found_before_training(tree, tmp_path):
    folder = str(tmp_path)
    for options, message in (
        ({"network": "resnet18"}, "give --network fcn_resnet18"),
        ({"dataset": "folders", "data_root": ""}, "--images DIR and --masks DIR"),
        ({"context": "glora"}, "glore"),
        ({"crop": "32,64", "output_stride": 8, "network": "fcn_nothing"}, "Unknown network"),
    ):
        with pytest.raises(UsageError, match=message):
            train_segmentation.main(arguments(tree, folder, **options))
    assert not any(name.endswith(".params") for name in os.listdir(folder))


def test_folders_whose_masks_tell_the_classes(tmp_path):
    for part, count in (("train", 4), ("val", 1)):
        for index in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[8:20, 8:20] = 2
            save(f"{tmp_path}/data/{part}/images/{index}.png", np.stack([mask * 100] * 3, axis=2))
            save(f"{tmp_path}/data/{part}/masks/{index}.png", mask)
    source = SegmentationSourceOptions(dataset="folders", data_root=f"{tmp_path}/data")
    assert segment.open_part(source, "train").labels.num_classes == 3
    train_segmentation.main(
        arguments(
            f"{tmp_path}/data",
            str(tmp_path / "models"),
            dataset="folders",
            end_epoch=1,
            crop="32",
            ohem=0.2,
            head_lr=10,
        )
    )
    evaluate.main(
        [f"{tmp_path}/models/t_ep-0001", "--gpus", "cpu", "--output", f"{tmp_path}/r"]
        + ["--images", f"{tmp_path}/data/val/images", "--masks", f"{tmp_path}/data/val/masks"]
        + ["--window", "16,24", "--overlap", "0.5"]
    )
    with open(f"{tmp_path}/r.json") as stream:
        result = json.load(stream)
    assert result["iou"][1] is None or result["iou"][1] == 0  # nowhere, or predicted only
    assert result["images"] == 1


def test_masks_of_an_image_file(tmp_path):
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, 4:, 1] = 255
    found = segmenter(colour_logits)
    found.facts.palette = [[9, 0, 0], [0, 9, 0], [0, 0, 9]]
    path = save(f"{tmp_path}/street.png", image)
    shares, pictures = masks_of(found, path, f"{tmp_path}/out/street")
    assert shares.tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"street_{kind}.png" for kind in ("colours", "mask", "overlay")
    ]
    mask = read_mask(pictures["mask"])
    assert (mask[:, 4:] == 1).all()
    assert (mask[:, :4] == 0).all()
    assert (read_mask(pictures["colours"])[:, 4:] == (0, 9, 0)).all()
    assert read_mask(pictures["overlay"]).shape == (8, 12, 3)


def test_missing_program_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cityscapesscripts", None)
    monkeypatch.setitem(__import__("sys").modules, "cityscapesscripts.evaluation", None)
    with pytest.raises(UsageError, match="extra `cityscapes`"):
        official_scores([], [])


def test_submission_names():
    for image, expected in (
        ("a/berlin_000000_000019_leftImg8bit.png", "berlin_000000_000019_pred_labelIds.png"),
        ("b/street.jpg", "street.png"),
    ):
        assert evaluate_segmentation.submission_name(image) == expected
    assert numbered(2).names == ("class 0", "class 1")
