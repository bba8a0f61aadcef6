"""dataset/cub200.py: a tree in CUB's exact layout, and what is said of one that is damaged."""

import os

import cv2
import numpy as np
import pytest
from images import make_classes

from data.image.loaders import get_image_val_loader
from data.image.options import ImageTestOptions
from data.image.source import image_source_of_rows
from dataset.cub200 import hold_out, read_cub200
from glore_common import GloReError, UsageError

CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


@pytest.fixture
def tree(tmp_path):
    """CUB_200_2011 with 3 classes of 5 images; the last of each class is for testing."""
    folder = tmp_path / "CUB_200_2011"
    make_classes(folder / "images", 3, 5, (40, 50))
    rows = {"images": [], "image_class_labels": [], "train_test_split": []}
    for label, name in enumerate(CLASSES):
        os.rename(folder / "images" / f"c{label}", folder / "images" / name)
        for number in range(5):
            key = 5 * label + number + 1
            rows["images"].append(f"{key} {name}/i{number}.jpg")
            rows["image_class_labels"].append(f"{key} {label + 1}")
            rows["train_test_split"].append(f"{key} {int(number < 4)}")
    rows["classes"] = [f"{number} {name}" for number, name in enumerate(CLASSES, 1)]
    for name, lines in rows.items():
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    return folder


def read(tree, **more):
    return read_cub200(tree, num_classes=3, **more)


def change(tree, name, old, new):
    path = tree / f"{name}.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_three_parts(tree):
    splits = read(tree, val_fraction=0.25)
    assert splits == read(tree.parent, val_fraction=0.25)
    assert splits.class_names == CLASSES
    assert splits.test == tuple((f"{name}/i4.jpg", label) for label, name in enumerate(CLASSES))
    assert [label for _, label in splits.val] == [0, 1, 2]
    assert [label for _, label in splits.train] == [0] * 3 + [1] * 3 + [2] * 3
    assert not set(splits.val) & set(splits.train)
    held_out = {read(tree, val_fraction=0.25, seed=seed).val for seed in range(6)}
    assert len(held_out) > 2
    assert read(tree, val_fraction=0).val == ()
    (tree / "classes.txt").unlink()
    assert read(tree).class_names == ("class 1", "class 2", "class 3")


def test_the_rows_make_a_source_for_the_loaders(tree):
    splits = read(tree)
    source = image_source_of_rows(splits.test, splits.root, splits.class_names, origin="CUB test")
    options = ImageTestOptions(batch_size=4, num_workers=0, crop_size=32)
    with get_image_val_loader(source, options, mean=(0, 0, 0), std=(1, 1, 1)) as loader:
        ((data, label, index),) = loader
    assert data.shape == (3, 3, 32, 32)
    assert label.asnumpy().tolist() == index.tolist() == [0, 1, 2]
    assert source.class_names == CLASSES


def test_subsets_have_fewer_classes(tree):
    assert read_cub200(tree).class_names == CLASSES
    # Without the second class, whose id stays free.
    for name in ("images", "image_class_labels", "train_test_split"):
        lines = (tree / f"{name}.txt").read_text().splitlines(keepends=True)
        (tree / f"{name}.txt").write_text("".join(lines[:5] + lines[10:]))
    splits = read_cub200(tree, val_fraction=0)
    assert splits.class_names == CLASSES
    assert {label for _, label in splits.train} == {0, 2}
    (tree / "classes.txt").write_text(f"1 {CLASSES[0]}\n3 {CLASSES[2]}\n")
    splits = read_cub200(tree, val_fraction=0)
    assert splits.class_names == (CLASSES[0], CLASSES[2])
    assert [label for _, label in splits.train] == [0] * 4 + [1] * 4
    (tree / "classes.txt").unlink()
    splits = read_cub200(tree, val_fraction=0)
    assert splits.class_names == ("class 1", "class 3")
    assert {label for _, label in splits.test} == {0, 1}
    (tree / "classes.txt").write_text(f"1 {CLASSES[0]}\n")
    with pytest.raises(GloReError, match=r"labels\.txt:6: class 3 is out of range"):
        read_cub200(tree)


def test_boxes(tree):
    with pytest.raises(GloReError, match=r"bounding_boxes\.txt is missing"):
        read_cub200(tree, with_boxes=True)
    rows = [f"{key} {key}.0 2.0 20.0 30.0\n" for key in range(1, 16)]
    (tree / "bounding_boxes.txt").write_text("".join(rows))
    splits = read_cub200(tree, with_boxes=True)
    path, label = splits.test[0]
    assert splits.boxes[path] == (5.0, 2.0, 20.0, 30.0)
    assert read_cub200(tree).boxes == {}
    source = image_source_of_rows(splits.test, splits.root, splits.class_names, boxes=splits.boxes)
    assert len(source.boxes) == 3
    pixels = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    for crops, shape in (("full", (48, 32)), ("centre", (32, 32))):
        options = ImageTestOptions(batch_size=1, num_workers=0, crop_size=32, resize=32)
        with get_image_val_loader(source, options, crops=crops, **pixels) as loader:
            data = next(iter(loader))[0].asnumpy()
        assert data.shape == (1, 3, *shape)
        image = cv2.imread(os.path.join(splits.root, path))[2:32, 5:25, ::-1]
        expected = cv2.resize(image, (32, 48), interpolation=cv2.INTER_CUBIC)
        expected = expected[8:40] if crops == "centre" else expected
        np.testing.assert_allclose(data[0], expected.transpose(2, 0, 1) / 255, atol=1e-6)
    (tree / "bounding_boxes.txt").write_text("".join(rows[:-1]))
    with pytest.raises(GloReError, match=r"boxes\.txt has no row for image 15"):
        read_cub200(tree, with_boxes=True)
    (tree / "bounding_boxes.txt").write_text("1 0 0 5 0\n" + "".join(rows[1:]))
    with pytest.raises(GloReError, match=r"boxes\.txt:1: expected .*not empty"):
        read_cub200(tree, with_boxes=True)


def test_held_out_part_is_stratified():
    rows = [(f"{number}.jpg", number % 3) for number in range(90)] + [
        ("one", 7),
        ("a", 8),
        ("b", 8),
    ]
    train, held_out = hold_out(rows, 0.1, seed=3)
    assert sorted(train + held_out) == sorted(rows)
    assert [sum(label == k for _, label in held_out) for k in (0, 1, 2, 7, 8)] == [3, 3, 3, 0, 1]
    assert list(train) == [row for row in rows if row in set(train)]
    assert hold_out(rows, 0.1, seed=3) == (train, held_out)
    assert hold_out(rows, 0.1, seed=4)[1] != held_out
    with pytest.raises(UsageError, match="held-out fraction must be in 0"):
        hold_out(rows, 1.0, seed=0)


@pytest.mark.parametrize("name", ["images", "image_class_labels", "train_test_split"])
def test_missing_file(tree, name):
    (tree / f"{name}.txt").unlink()
    with pytest.raises(GloReError, match=rf"{name}\.txt is missing.*CUB_200_2011\.tgz"):
        read(tree)


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("images", "2 001", "two 001", r"images\.txt:2: expected 'image_id path', found 'two 001"),
        ("image_class_labels", "7 2", "7", r"image_class_labels\.txt:7: expected .*found '7'"),
        ("image_class_labels", "7 2", "7 x", r"image_class_labels\.txt:7: .*whole numbers"),
        ("image_class_labels", "7 2", "7 4", r"labels\.txt:7: class 4 is out of range \(1 to 3\)"),
        ("image_class_labels", "7 2", "7 0", r"labels\.txt:7: class 0 is out of range"),
        (
            "image_class_labels",
            "7 2\n",
            "",
            r"labels\.txt has no row for image 7 of .*images\.txt:7",
        ),
        ("images", "15 003", "16 003", r"labels\.txt has no row for image 16 of .*images\.txt:15"),
        ("train_test_split", "\n3 1", "\n2 1", r"split\.txt:3: 2 is there twice, first in line 2"),
        ("train_test_split", "\n3 1", "\n3 2", r"split\.txt:3: expected 1 .training. or 0"),
        (
            "classes",
            "2 002",
            "4 002",
            r"classes\.txt has no class 2; expected are the classes 1 to",
        ),
    ],
)
def test_damaged_file(tree, name, old, new, says):
    change(tree, name, old, new)
    with pytest.raises(GloReError, match=says):
        read(tree)


def test_empty_parts_and_folders(tree):
    path = tree / "train_test_split.txt"
    path.write_text("".join(f"{key} 1\n" for key in range(1, 16)))
    with pytest.raises(GloReError, match="names no test images"):
        read(tree)
    path.write_text("\n")
    with pytest.raises(GloReError, match=r"split\.txt is empty: expected rows"):
        read(tree)
    with pytest.raises(GloReError, match=r"nowhere/images\.txt is missing"):
        read(tree / "nowhere")
