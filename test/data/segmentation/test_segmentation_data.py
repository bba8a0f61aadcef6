"""Images and masks: what is read, what is refused, and how training changes them."""

import dataclasses
import logging
import os

import cv2
import numpy as np
import pytest
from PIL import Image
from segmentation_files import cityscapes_tree, picture, save

from data.segmentation import source as sources
from data.segmentation.labels import (
    CITYSCAPES,
    IGNORED,
    VOC,
    MaskError,
    ade20k,
    colours_of,
    numbered,
    read_classes,
)
from data.segmentation.loaders import (
    get_segmentation_train_loader,
    get_segmentation_val_loader,
    read_pair,
)
from data.segmentation.masks import read_mask, write_mask
from data.segmentation.options import SegmentationReadingOptions
from data.segmentation.source import check, read_cityscapes, read_folders
from data.segmentation.transforms import Augmented, Whole
from glore_common import UsageError

STILL = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def folders(root, pairs):
    """Write (image, mask) arrays into two folders; return the folders."""
    for index, (image, mask) in enumerate(pairs):
        save(f"{root}/images/{index}.png", image)
        save(f"{root}/masks/{index}.png", mask)
    return f"{root}/images", f"{root}/masks"


def test_cityscapes_ids():
    assert CITYSCAPES.num_classes == 19
    assert CITYSCAPES.ids == (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
    mask = CITYSCAPES.train_ids(np.array([[0, 7, 13, 26, 33, 29]], np.uint8), "m.png")
    assert mask.tolist() == [[IGNORED, 0, 4, 13, 18, IGNORED]]
    assert CITYSCAPES.names[13] == "car"
    assert tuple(CITYSCAPES.colours[13]) == (0, 0, 142)


def test_cityscapes_is_read_and_checked(tmp_path):
    source = read_cityscapes(cityscapes_tree(tmp_path, {"train": 3, "test": 1}), "train")
    assert len(source.pairs) == 3
    found = check(source)
    assert found.pixels.sum() == 3 * 30 * 64  # the ego vehicle takes two rows
    assert found.highest == 26
    test = read_cityscapes(str(tmp_path), "test")
    assert test.mask(0) is None
    assert check(test) is None
    os.remove(source.mask(1))
    with pytest.raises(MaskError, match=r"1 of 3 masks .*town_000001_000019_gtFine_labelIds"):
        read_cityscapes(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 13), "these are train ids"),
        ((3, 255), "values that are no class: 255"),
        ((7, 34), "34"),
    ],
)
def test_train_ids_in_place_of_ids_are_refused(tmp_path, values, message):
    """mcordts/cityscapesScripts 78: silently wrong otherwise."""
    cityscapes_tree(tmp_path, {"train": 1}, ids=(values[0],))
    source = read_cityscapes(str(tmp_path), "train")
    mask = np.full((32, 64), values[0], np.uint8)
    mask[4:] = values[1]
    save(source.mask(0), mask)
    with pytest.raises(MaskError, match=message) as caught:
        check(source)
    assert "gtFine_labelIds.png" in str(caught.value)


def test_a_label_beyond_the_classes_is_refused_with_file_value_and_count(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2, 3:6] = 3
    source = read_folders(*folders(tmp_path, [(picture(8, 8), mask)]), numbered(2))
    with pytest.raises(MaskError, match=r"masks/0.png has 3 pixels .*no class: 3"):
        check(source)
    # The loader refuses them as well, where the check was left out.
    options = SegmentationReadingOptions(
        batch_size=1, crop=(8, 8), scale_range=(1, 1), colours=True, num_workers=0
    )
    with pytest.raises(MaskError, match="no class: 3"):
        next(iter(get_segmentation_train_loader(source, options, **STILL)))


def test_ade20k_is_shifted_once(tmp_path):
    """mmsegmentation 2493."""
    labels = ade20k()
    mask = np.array([[0, 1, 150]], np.uint8)
    assert labels.train_ids(mask, "m").tolist() == [[IGNORED, 0, 149]]
    with pytest.raises(MaskError):
        labels.train_ids(np.array([[255]], np.uint8), "m")
    root = tmp_path / "ADEChallengeData2016"
    save(f"{root}/images/training/a.jpg", picture(4, 3))
    save(f"{root}/annotations/training/a.png", np.tile(mask, (4, 1)))
    source = sources.read_ade20k(str(tmp_path), "train")
    assert check(source).pixels[[0, 149]].tolist() == [4, 4]


def test_voc_train_is_train(tmp_path):
    """Not trainval (gluon-cv PR 464); masks are palette pictures with 255 for ignored."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b"):
        save(f"{base}/JPEGImages/{name}.jpg", picture(4, 6))
        mask = Image.fromarray(np.array([[0, 1, 15, 255, 20, 0]] * 4, np.uint8)).convert("P")
        mask.putpalette(colours_of(256).ravel().tolist())
        save(f"{base}/SegmentationClass/{name}.png", mask)
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in (("train", "a\n"), ("val", "b\n"), ("trainval", "a\nb\n")):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    source = sources.read_voc(str(tmp_path), "train")
    assert [pair.image for pair in source.pairs] == [os.path.join("JPEGImages", "a.jpg")]
    assert check(source).pixels[[0, 1, 15, 20]].tolist() == [8, 4, 4, 4]
    assert VOC.names[15] == "person"


def test_kinds_of_pictures(tmp_path):
    ids = np.array([[0, 1, 15, 255]], np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putpalette(colours_of(256).ravel().tolist())
    for name, value, expected in (
        ("p", palette, ids),
        ("l", ids, ids),
        ("one", Image.fromarray(np.array([[False, True]])), [[0, 1]]),
        ("sixteen", Image.fromarray(np.array([[0, 200]], np.uint16)), [[0, 200]]),
    ):
        assert (
            read_mask(save(f"{tmp_path}/{name}.png", value)).tolist() == np.array(expected).tolist()
        ), name
    for name, value, message in (
        ("la", Image.fromarray(ids).convert("LA"), "alpha"),
        ("rgba", Image.fromarray(ids).convert("RGBA"), "alpha"),
        ("deep", Image.fromarray(np.array([[300]], np.uint16)), "up to 300"),
    ):
        with pytest.raises(MaskError, match=message):
            read_mask(save(f"{tmp_path}/{name}.png", value))
    rgb = save(f"{tmp_path}/rgb.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(MaskError, match="colour picture"):
        numbered(2).train_ids(read_mask(rgb), rgb)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MaskError, match=r"text.png cannot be read"):
        read_mask(f"{tmp_path}/text.png")


def test_class_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# id name r g b\n4 wide road 1 2 3\n9 - 0 0 0\n7 sky 9 9 9\n8 sky 8 8 8\n")
    labels = read_classes(str(path))
    assert labels.names == ("wide road", "sky")
    assert labels.ids == (4, 7)
    assert labels.train_ids(np.array([[4, 9, 7, 8, 255]], np.uint8), "m").tolist() == [
        [0, IGNORED, 1, 1, IGNORED]
    ]
    colours = np.array([[[1, 2, 3], [0, 0, 0], [8, 8, 8]]], np.uint8)
    assert labels.train_ids(colours, "m").tolist() == [[0, IGNORED, 1]]
    with pytest.raises(MaskError, match=r"m has 1 pixels of colours .*\(5, 5, 5\)"):
        labels.train_ids(np.full((1, 1, 3), 5, np.uint8), "m")
    for text, message in (
        ("1 a\n1 b\n", "classes.txt:2: the id 1 is there twice"),
        ("x a\n", "classes.txt:1: expected"),
        ("300 a\n", "classes.txt:1"),
        ("1 a 1 2 3\n2 b\n", "colours for some ids"),
        ("# none\n", "names no class"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_classes(str(path))


def test_size_of_image_and_mask_must_agree(tmp_path):
    pairs = [(picture(64, 128), np.zeros((32, 64), np.uint8))]
    source = read_folders(*folders(tmp_path, pairs), numbered(2))
    message = r"images/0.png has 128 x 64 pixels, its mask .*masks/0.png 64 x 32"
    for look in (
        lambda: check(source, contents=False),
        lambda: read_pair(source.image(0), source.mask(0), source.labels),
    ):
        with pytest.raises(MaskError, match=message):
            look()


def test_exif_turns_images_and_masks_alike(tmp_path):
    """One rule for both: each is turned as its own EXIF orientation says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = 255
    path = save(f"{tmp_path}/images/a.jpg", image, exif=exif, quality=95)
    mask = np.zeros((40, 20), np.uint8)
    mask[:20] = 1
    save(f"{tmp_path}/masks/a.png", mask)
    source = read_folders(f"{tmp_path}/images", f"{tmp_path}/masks", numbered(2))
    check(source)
    read, ids = read_pair(path, source.mask(0), source.labels)
    assert read.shape == (40, 20, 3)
    assert ((read[..., 0] > 128) == (ids == 1)).all()
    turned = save(f"{tmp_path}/m.png", np.arange(8, dtype=np.uint8).reshape(2, 4), exif=exif)
    assert read_mask(turned).tolist() == [[4, 0], [5, 1], [6, 2], [7, 3]]


def test_jpeg_masks_are_warned_of(tmp_path, caplog):
    save(f"{tmp_path}/images/a.png", picture(8, 8))
    save(f"{tmp_path}/masks/a.jpg", np.zeros((8, 8), np.uint8))
    with caplog.at_level(logging.WARNING):
        read_folders(f"{tmp_path}/images", f"{tmp_path}/masks", numbered(2))
    assert "a.jpg is a JPEG file" in caplog.text


def test_folders_without_partners(tmp_path):
    images, masks = folders(tmp_path, [(picture(8, 8), np.zeros((8, 8), np.uint8))])
    save(f"{images}/lost.png", picture(8, 8))
    with pytest.raises(MaskError, match=r"1 of 2 masks .*lost.png"):
        read_folders(images, masks, numbered(1))
    save(f"{masks}/0.bmp", np.zeros((8, 8), np.uint8))
    with pytest.raises(MaskError, match="two masks for 0"):
        read_folders(images, masks, numbered(1))


def test_masks_keep_their_values_at_any_scale():
    generator = np.random.default_rng(0)
    mask = np.tile(np.array([[0, 2, 2, 0]], np.uint8), (7, 3))
    transform = Augmented(**STILL, crop=(9, 30), scale=(0.5, 2.0), colours=False)
    for _ in range(30):
        array = transform(picture(*mask.shape), mask, generator)
        assert array.shape == (4, 9, 30)
        assert set(np.unique(array[3])) <= {0, 2, IGNORED}


def test_image_and_mask_move_together():
    """A mask that is drawn into its image still fits after every change of place."""
    generator = np.random.default_rng(1)
    mask = cv2.resize(generator.integers(0, 2, (6, 8)).astype(np.uint8), (80, 60), None, 0, 0, 0)
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    transform = Augmented(**STILL, crop=(48, 64), scale=(0.8, 1.5), colours=False)
    for _ in range(20):
        array = transform(image, mask, generator)
        labelled = array[3] != IGNORED
        # Bilinear and nearest differ along borders only.
        same = (array[0] > 0.5) == (array[3] == 1)
        assert same[labelled].mean() > 0.95
        assert (array[:3, ~labelled] == 0).all()


def test_small_images_are_padded_with_the_ignored_label():
    array = Augmented(**STILL, crop=(8, 8), scale=(1.0, 1.0), flip=False)(
        picture(5, 6), np.zeros((5, 6), np.uint8), np.random.default_rng(0)
    )
    assert (array[3, :5, :6] == 0).all()
    assert (array[3] == IGNORED).sum() == 64 - 30


def test_loaders(tmp_path):
    pairs = []
    for index, size in enumerate([(16, 24), (16, 24), (20, 16), (16, 24)]):
        pairs.append((picture(*size, seed=index), np.full(size, index % 2, np.uint8)))
    source = read_folders(*folders(tmp_path, pairs), numbered(2))
    options = SegmentationReadingOptions(
        batch_size=2,
        crop=(12, 12),
        scale_range=(0.5, 2.0),
        colours=True,
        num_workers=0,
        val_batch=2,
    )
    first, second = (
        [
            (data.asnumpy(), label.asnumpy())
            for data, label in get_segmentation_train_loader(
                source, dataclasses.replace(options, num_workers=workers), seed=5, **STILL
            )
        ]
        for workers in (0, 1)
    )
    assert [data.shape for data, _ in first] == [(2, 3, 12, 12)] * 2
    assert [label.shape for _, label in first] == [(2, 12, 12)] * 2
    for one, two in zip(first, second):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])
    # Whole images: every pixel once, batches of one size.
    seen = []
    for data, label, index in get_segmentation_val_loader(
        source, options, with_index=True, **STILL
    ):
        assert data.shape[2:] == label.shape[1:]
        for position, number in enumerate(index):
            image, mask = pairs[number]
            assert (label[position].asnumpy() == mask).all()
            # (h, w, 3) -> (3, h, w)
            pixels = np.moveaxis(image, 2, 0) / np.float32(255)
            np.testing.assert_allclose(data[position].asnumpy(), pixels, atol=1e-6)
        seen += list(index)
    assert sorted(seen) == [0, 1, 2, 3]


def test_whole_and_written_masks(tmp_path):
    mask = np.array([[0, 7], [255, 33]], np.uint8)
    write_mask(f"{tmp_path}/m.png", mask)
    assert (read_mask(f"{tmp_path}/m.png") == mask).all()
    array = Whole(**STILL)(picture(2, 2), mask)
    assert (array[3] == mask).all()
    assert (
        sources.highest_id(read_folders(*folders(tmp_path, [(picture(2, 2), mask)]), numbered(34)))
        == 33
    )
