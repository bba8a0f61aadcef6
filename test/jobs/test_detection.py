"""Training, testing and using detectors."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from coco_files import annotation, coloured_boxes, content, write_coco

from checkpoint.params import read_params
from data.detection.coco import read_coco
from data.detection.objects import mask_in_image
from data.detection.rle import decode
from glore_common import GloReError, UsageError
from jobs import detect, evaluate, export, extract_features, predict, train_detection
from jobs.options import DetectionOptions, DetectionSourceOptions
from network.detector import Found

BASE = {
    "dataset": "json",
    "network": "mask_rcnn_tiny",
    "short_side": 64,
    "long_side": 80,
    "batch_size": 2,
    "end_epoch": 2,
    "lr_base": 0.02,
    "lr_schedule": "cosine",
    "warmup_steps": 0,
    "num_workers": 0,
    "train_proposals": 60,
    "anchor_samples": 32,
    "roi_samples": 16,
    "val_batch": 2,
    "log_frequency": 2,
    "gpus": "cpu",
    "task_name": "t",
}


def arguments(parts, folder, **options):
    sources = {}
    for part, (path, images) in parts.items():
        prefix = "" if part == "train" else "val_"
        sources.update({f"{prefix}annotations": path, f"{prefix}images": images})
    settings = {
        **BASE,
        **sources,
        "model_dir": folder,
        "log_file": f"{folder}/log.txt",
        **options,
    }
    return [
        word
        for name, value in settings.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return files of rectangles: {part: (file, images)}."""
    return coloured_boxes(tmp_path_factory.mktemp("boxes"), {"train": 6, "val": 3})


# --- masks in images ------------------------------------------------------------------------------


def test_a_mask_of_ones_is_pasted_on_the_pixels_of_its_box():
    """gluon-cv PR 997, torchvision 5845: 100 pixels for a box of 10 x 10."""
    ones = np.ones((28, 28), np.float32)
    pasted = detect.paste(ones, (10, 10, 20, 20), 40, 40)
    assert pasted.sum() == 100
    assert pasted[10:20, 10:20].all()
    for box in ((3, 4, 300, 200), (0, 0, 1, 1), (5.5, 5.5, 30.5, 20.5)):
        whole = detect.paste(ones, box, 210, 310)
        left, top, right, bottom = (int(np.ceil(v - 0.5)) for v in box)
        assert whole.sum() == (right - left) * (bottom - top)
    half = ones.copy()
    half[:, 14:] = 0
    assert detect.paste(half, (10, 10, 20, 20), 40, 40).sum() == 50
    # What reaches beyond the image is cut, and what has no area is nothing.
    assert detect.paste(ones, (-5, -5, 5, 5), 40, 40).sum() == 25
    assert detect.paste(ones, (35, 35, 50, 50), 40, 40).sum() == 25
    for box in ((10, 10, 10, 20), (10, 10, 5, 5), (60, 60, 70, 70), (10.6, 10.6, 10.9, 10.9)):
        assert detect.paste(ones, box, 40, 40).sum() == 0


def test_results_are_plain_numbers_with_the_ids_of_the_data():
    """detectron2 1731: results in the original ids; NumPy's scalars are no JSON."""
    found = Found(
        np.array([[1.0, 2.0, 11.0, 22.0]], np.float32),
        np.array([0.123456789], np.float32),
        np.array([1]),
        np.ones((1, 28, 28), np.float32),
    )
    masks = detect.masks_of(found, 40, 50)
    (row,) = detect.rows_of(found, masks, 77, (3, 9))
    again = json.loads(json.dumps(row))
    assert again["category_id"] == 9
    assert again["image_id"] == 77
    assert again["bbox"] == [1, 2, 10, 20]
    assert again["score"] == 0.123457
    assert decode(again["segmentation"]).sum() == 200
    nothing = found._replace(boxes=found.boxes[:0], scores=found.scores[:0], masks=None)
    assert detect.masks_of(nothing, 5, 5) == []


def test_pictures_show_boxes_and_masks():
    image = np.zeros((50, 100, 3), np.uint8)
    mask = np.zeros((50, 100), bool)
    mask[20:40, 20:60] = True
    shown = detect.draw(
        image, np.array([[20, 20, 60, 40]]), np.array([0]), ["thing 0.9"], [mask], 3
    )
    assert shown.shape == (200, 400, 3)
    assert shown[120, 160].any()  # within the mask
    assert not shown[190, 390].any()
    assert detect.draw(image, np.zeros((0, 4)), np.zeros(0, int), [], [], 3).max() == 0
    assert len({tuple(c) for c in detect.colours_of(80)}) == 80


# --- jobs -----------------------------------------------------------------------------------------


def test_from_training_to_results(parts, tmp_path):
    pytest.importorskip("pycocotools")
    whole, pieces = f"{tmp_path}/whole", f"{tmp_path}/pieces"
    train_detection.main(arguments(parts, whole, block="gc:ratio=1/4"))
    # In two pieces it ends where it ends in one.
    more = {"block": "gc:ratio=1/4"}
    train_detection.main(arguments(parts, pieces, max_steps=5, max_val_batches=0, **more))
    train_detection.main(arguments(parts, pieces, resume="auto", **more))
    one, two = (read_params(f"{folder}/t_ep-0002.params") for folder in (whole, pieces))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    assert any("_gc_" in name for name in one)
    with open(f"{whole}/t_ep-0002.json") as stream:
        manifest = json.load(stream)
    assert manifest["model"]["task"] == "detection"
    assert manifest["model"]["class_names"] == ["red", "blue"]
    assert manifest["model"]["input"]["data_shape"] == [3, 64, 80]
    history = manifest["position"]["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert {"train_loss-mask", "val_loss-rpn-class", "val_ap50"} <= history[-1].keys()
    with open(f"{whole}/log.txt") as stream:
        log = stream.read()
    assert "loss-rpn-class" in log
    assert "6 images with 9 objects to train, 3 images to validate, 2 classes" in log

    prefix, submit = f"{tmp_path}/result/r", f"{tmp_path}/submit/rows.json"
    checkpoint = f"{whole}/t_ep-0002"
    evaluate.main(
        [checkpoint, "--gpus", "cpu", "--output", prefix, "--submit", submit, "--pictures", "1"]
        + ["--proposals", "100", "--min-score", "0.01"]
    )
    with open(f"{prefix}.json") as stream:
        result = json.load(stream)
    assert result["images"] == 3
    assert set(result["box"]) == set(result["mask"]) == {
        "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    }  # fmt: skip
    with open(f"{prefix}_per-class.csv") as stream:
        rows = stream.read().splitlines()
    assert rows[0].startswith("class,name,objects,box_ap,")
    assert [row.split(",")[:3] for row in rows[1:]] == [["0", '"red"', "3"], ["1", '"blue"', "2"]]
    for name in ("box-precision", "mask-precision", "1_found", "1_true"):
        assert cv2.imread(f"{prefix}_{name}.png") is not None
    with open(submit) as stream:
        found = json.load(stream)
    assert len(found) == result["detections"] > 0
    assert {row["image_id"] for row in found} <= {1, 2, 3}
    assert {row["category_id"] for row in found} <= {1, 2}
    assert [decode(row["segmentation"]).shape for row in found if row["image_id"] == 1][0] == (
        80,
        64,
    )
    # The same images by other files; a file that is none is named, and the exit code says so.
    evaluate.main(
        [checkpoint, "--gpus", "cpu", "--output", f"{tmp_path}/again", "--pictures", "0"]
        + ["--images", parts["val"][1], "--annotations", parts["val"][0]]
        + ["--proposals", "100", "--min-score", "0.01"]
    )
    with open(f"{tmp_path}/again.json") as stream:
        again = json.load(stream)
    assert again["box"] == result["box"]
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    status = predict.main(
        [checkpoint, parts["val"][1], str(bad), "--gpus", "cpu", "--min-score", "0.01"]
        + ["--output", f"{tmp_path}/p.jsonl", "--masks", f"{tmp_path}/pictures"]
    )
    assert status == 1
    with open(f"{tmp_path}/p.jsonl") as stream:
        rows = [json.loads(line) for line in stream]
    assert len(rows) == 4
    assert "error" in rows[-1]
    assert sorted(os.listdir(f"{tmp_path}/pictures")) == [f"{n}_objects.png" for n in (1, 2, 3)]
    thing = rows[0]["objects"][0]
    assert thing["name"] in ("red", "blue")
    assert decode(thing["mask"]).shape == (rows[0]["height"], rows[0]["width"])
    files = [checkpoint, parts["val"][1], "--gpus", "cpu"]
    for command, more, message in (
        (predict.main, [*files, "--format", "csv"], "JSON lines, not as CSV"),
        (
            predict.main,
            [*files, "--backend", "onnx"],
            "--backend onnx is for networks that classify",
        ),
        (extract_features.main, [*files, "--to", f"{tmp_path}/f"], "finds objects: .*predict"),
        (export.main, [checkpoint, f"{tmp_path}/x.onnx"], "A detector has no logits"),
        (evaluate.main, [checkpoint, "--part", "test"], "the data set has no part test"),
        (evaluate.main, [checkpoint, "--images", "x"], "give both --images DIR and --annotations"),
    ):
        with pytest.raises(UsageError, match=message):
            command(more)


def test_a_killed_run_goes_on_where_it_was(parts, tmp_path, root):
    """SIGKILL in the middle: the next start ends in the parameters of a run without it."""
    whole, killed = f"{tmp_path}/whole", f"{tmp_path}/killed"
    options = {"save_every_steps": 2, "end_epoch": 5, "max_val_batches": 1}
    train_detection.main(arguments(parts, whole, **options))
    os.makedirs(killed)
    command = [sys.executable, f"{root}/train_detection.py", *arguments(parts, killed, **options)]
    with open(f"{killed}/out.txt", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=root)
        deadline, seen = time.monotonic() + 120, False
        while process.poll() is None and not seen and time.monotonic() < deadline:
            seen = os.path.exists(f"{killed}/t_step-0000006.json")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(f"{killed}/out.txt") as stream:
        assert seen, stream.read()
    assert not os.path.exists(f"{killed}/t_ep-0005.params")
    train_detection.main(arguments(parts, killed, resume="auto", **options))
    one, two = (read_params(f"{folder}/t_ep-0005.params") for folder in (whole, killed))
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


def settled(*words):
    from glore_options import parse

    options = parse(DetectionOptions(), list(words), "")
    train_detection.settle_detection(options)
    return options


def test_defaults_are_gcnets_and_gluoncvs_are_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = settled("--gpus", "cpu")
    plan = options.schedule
    assert options.network.network == "mask_rcnn_resnet50_v1b_w-gc"
    assert (plan.lr_base, plan.lr_step_epochs, plan.warmup_steps) == (0.02, (8, 11), 500)
    assert plan.warmup_factor == pytest.approx(1 / 3)
    assert (plan.clip_norm, options.run.end_epoch, options.data.batch_size) == (35, 12, 16)
    assert (options.data.short_side, options.data.long_side) == (800, 1333)
    assert (options.devices.batch_norm, options.detection.frozen_stages) == ("local", 0)
    task = train_detection.task_of(options)
    assert task.proposals[0] == (2000, 2000, 2000, 0.7, False)
    assert (task.anchors.number, task.rois.number, task.rois.positives) == (256, 512, 0.25)
    assert task.beta == pytest.approx(1 / 9)
    pretrained = settled("--pretrained", f"{tmp_path}/x.params", "--gpus", "cpu")
    assert pretrained.devices.batch_norm == "frozen"
    assert pretrained.detection.frozen_stages == 2
    theirs = settled("--style", "gluoncv", "--batch-size", "8", "--gpus", "cpu")
    assert (theirs.schedule.lr_step_epochs, theirs.run.end_epoch) == ((17, 23), 26)
    assert theirs.schedule.clip_norm == 0
    assert theirs.schedule.lr_base == pytest.approx(0.01)
    assert train_detection.task_of(theirs).proposals[0] == (12000, 12000, 2000, 0.7, True)
    own = settled("--lr-steps", "100,200", "--warmup-epochs", "1", "--gpus", "cpu")
    assert own.schedule.lr_step_epochs is None
    assert own.schedule.warmup_steps is None
    named = settled("--dataset", "demo", "--block", "gc:ratio=1/4", "--gpus", "cpu")
    assert named.network.network == "mask_rcnn_tiny"
    assert named.checkpoints.task_name == "demo_mask_rcnn_tiny_gc-ratio-1-4"


def test_mistakes_are_found_before_training(parts, tmp_path):
    folder = str(tmp_path / "models")
    other = write_coco(f"{tmp_path}/other", content([annotation(1)]))
    for options, error, message in (
        ({"network": "resnet18_v1"}, UsageError, "give --network mask_rcnn_resnet18_v1"),
        ({"network": "fcn_tiny"}, UsageError, "fcn_tiny is for segmentation: .*train_segmentation"),
        ({"annotations": None}, UsageError, "--images DIR and --annotations FILE"),
        ({"annotations": f"{tmp_path}/none.json"}, GloReError, "cannot be read"),
        ({"block": "gd"}, UsageError, "gc"),
        ({"short_side": 100}, UsageError, "--short-side 100 is longer than --long-side 80"),
        ({"dtype": "float16"}, UsageError, "float16 is not for detectors"),
        ({"precise_bn": True}, UsageError, "precise BatchNorm is not for detectors"),
        ({"val_annotations": other[0], "val_images": other[1]}, UsageError, "class 0 is 'cat'"),
        (
            {"dataset": "coco", "data_root": str(tmp_path), "annotations": None},
            UsageError,
            "instances_train2017.json is missing",
        ),
    ):
        with pytest.raises(error, match=message):
            train_detection.main(arguments(parts, folder, **options))
    os.remove(f"{other[1]}/1.png")
    with pytest.raises(GloReError, match="1 of 1 images of .* are missing"):
        train_detection.main(
            arguments({"train": other, "val": other}, folder, network="mask_rcnn_tiny")
        )
    made = os.listdir(folder) if os.path.isdir(folder) else []
    assert not any(name.endswith(".params") for name in made)


def test_coco_in_its_own_tree(tmp_path):
    row = annotation(1)
    for part in ("train", "val"):
        _, images = write_coco(f"{tmp_path}/made/{part}", content([row]))
        os.makedirs(f"{tmp_path}/annotations", exist_ok=True)
        os.rename(images, f"{tmp_path}/{part}2017")
        os.rename(
            f"{tmp_path}/made/{part}/objects.json",
            f"{tmp_path}/annotations/instances_{part}2017.json",
        )
    unlabelled = content([])
    del unlabelled["annotations"]
    with open(f"{tmp_path}/annotations/image_info_test-dev2017.json", "w") as stream:
        json.dump(unlabelled, stream)
    source = DetectionSourceOptions(data_root=str(tmp_path))
    assert len(detect.open_part(source, "train", training=True).pictures) == 1
    assert detect.open_part(source, "val").names == ("cat", "dog")
    assert detect.open_part(source, "test").pictures[0].things == ()
    assert detect.open_part(DetectionSourceOptions(dataset="json"), "val") is None


def test_the_demo_is_coco_files_and_its_masks_fit_its_boxes(tmp_path):
    from dataset import prepare_demo_harbours
    from dataset.demo_harbours import BUOY, SAILING, WAITING, render_scene

    root = prepare_demo_harbours(str(tmp_path), images=12, val_images=2, jobs=1).root
    source = read_coco(f"{root}/annotations/instances_train.json", f"{root}/train")
    assert len(source.pictures) == 12
    assert source.names == ("waiting ship", "sailing ship", "buoy")
    kinds = set()
    for number, picture in enumerate(source.pictures):
        # Ships wait where the signal is red, and sail where it is green.
        expected = {BUOY, (WAITING, SAILING)[number % 2]}
        assert {thing.label for thing in picture.things} <= expected
        kinds |= {thing.label for thing in picture.things}
        for thing in picture.things:
            mask = mask_in_image(thing, picture.height, picture.width)
            down, right = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            found = (right[0], down[0], right[-1] + 1, down[-1] + 1)
            assert found == pytest.approx(thing.box, abs=1.5)
    assert kinds == {WAITING, SAILING, BUOY}
    first, _ = render_scene("red", (1, 0, 0))
    again, _ = render_scene("red", (1, 0, 0))
    np.testing.assert_array_equal(first, again)
    # Made once.
    before = os.stat(f"{root}/manifest.json").st_mtime_ns
    prepare_demo_harbours(str(tmp_path))
    assert os.stat(f"{root}/manifest.json").st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("block", ["none", "gc"])
def test_the_demo_is_learnt(tmp_path, block):
    """A quarter of the demo's training finds most objects; ships' classes take longer."""
    pytest.importorskip("pycocotools")
    words = ["--dataset", "demo", "--data-root", f"{tmp_path}/data", "--block", block]
    words += ["--end-epoch", "3", "--max-val-batches", "1", "--gpus", "cpu", "--task-name", "t"]
    folder = f"{tmp_path}/models"
    train_detection.main([*words, "--model-dir", folder, "--log-file", f"{tmp_path}/log.txt"])
    evaluate.main([f"{folder}/t_ep-0003", "--gpus", "cpu", "--output", f"{tmp_path}/r"])
    with open(f"{tmp_path}/r.json") as stream:
        result = json.load(stream)
    assert result["box"]["ap50"] >= 0.5
    assert result["mask"]["ap50"] >= 0.5
    assert result["box"]["ap_large"] is None
