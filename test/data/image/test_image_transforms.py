"""Distributions and pixels of the transforms that images have beyond those of clips."""

import cv2
import numpy as np
import pytest
from images import MEAN, STD, picture

from data.image import transforms
from data.image.loaders import image_train_transform, image_val_transform
from glore_common import UsageError


def clip_of(image):
    return image[None]


def test_validation_pixels():
    image = picture(1, 61, 90)
    # short side 61 -> 40; 90 * 40 / 61 = 59.02 is rounded down, an odd spare of 59 - 32 = 27 too
    resized = cv2.resize(image, (59, 40), interpolation=cv2.INTER_CUBIC)
    expected = (resized[4:36, 13:45] / 255 - MEAN) / STD
    result = image_val_transform(32, MEAN, STD, resize=40)(clip_of(image))
    assert result.shape == (3, 1, 32, 32)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[:, 0], expected.transpose(2, 0, 1), atol=1e-5)


def test_ten_crops_in_their_order():
    image = picture(2, 41, 50)
    crops = transforms.TenCrop(40)(clip_of(image))
    assert crops.shape == (10, 1, 40, 40, 3)
    places = [(0, 0), (0, 10), (1, 0), (1, 10), (0, 5)]
    for number, (top, left) in enumerate(places):
        part = image[top : top + 40, left : left + 40]
        np.testing.assert_array_equal(crops[number, 0], part)
        np.testing.assert_array_equal(crops[number + 5, 0], part[:, ::-1])
    with pytest.raises(UsageError, match="does not fit"):
        transforms.TenCrop(42)(clip_of(image))


def test_full_image_keeps_its_aspect():
    result = image_val_transform(32, MEAN, STD, "full", 36)(clip_of(picture(3, 60, 90)))
    assert result.shape == (3, 1, 36, 54)
    # without a size, in proportion 256 : 224
    result = image_val_transform(28, MEAN, STD, "full")(clip_of(picture(3, 60, 90)))
    assert result.shape == (3, 1, 32, 48)


def test_random_resized_crop_distribution():
    crop, rng = transforms.RandomResizedCrop(20), np.random.default_rng(0)
    boxes = np.array([crop.draw_box(400, 500, rng) for _ in range(4000)], float)
    top, left, height, width = boxes.T
    area, aspect = height * width / (400 * 500), width / height
    assert 0.078 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    assert (top >= 0).all()
    assert (top + height <= 400).all()
    assert (left >= 0).all()
    assert (left + width <= 500).all()
    # Small areas always fit: there, the aspect ratio is symmetric and the area uniform.
    small = area < 0.5
    assert abs(np.log(aspect[small]).mean()) < 0.012
    assert abs(area[small].mean() - 0.29) < 0.01
    assert abs(np.log(aspect[small]).std() - np.log(4 / 3) / np.sqrt(3)) < 0.006
    assert abs((left / (500 - width + 1))[small].mean() - 0.5) < 0.03


def test_random_resized_crop_scales_its_box():
    image, crop = picture(4), transforms.RandomResizedCrop((20, 30))
    top, left, height, width = crop.draw_box(60, 80, np.random.default_rng(3))
    result = crop(clip_of(image), np.random.default_rng(3))
    part = image[top : top + height, left : left + width]
    np.testing.assert_array_equal(
        result[0], cv2.resize(part, (30, 20), interpolation=cv2.INTER_CUBIC)
    )
    # Nothing fits in a strip: the largest centre crop with an allowed aspect ratio.
    fixed = transforms.RandomResizedCrop(20, (1, 1))
    assert fixed.draw_box(30, 300, np.random.default_rng(0)) == (0, 130, 30, 40)
    assert fixed.draw_box(300, 30, np.random.default_rng(0)) == (130, 0, 40, 30)
    for options in ({"area": (0, 1)}, {"area": (0.5, 1.5)}, {"aspect": (2, 1)}):
        with pytest.raises(UsageError, match="rising pair"):
            transforms.RandomResizedCrop(20, **options)


class Fixed:
    """A generator that always draws one end of the range."""

    def uniform(self, low, high):
        return high


def test_rotation_turns_about_the_centre():
    image = np.zeros((41, 61, 3), np.uint8)
    image[20, 30:] = 255  # from the centre to the right
    turned = transforms.RandomRotation(90)(clip_of(image), Fixed())[0]
    expected = np.zeros_like(image)
    expected[:21, 30] = 255  # counter-clockwise: upwards
    np.testing.assert_array_equal(turned, expected)
    white = np.full((1, 41, 61, 3), 255, np.uint8)
    slightly = transforms.RandomRotation(10)(white[:, :, ::-1], Fixed())[0]
    assert slightly[0, 0].tolist() == [0, 0, 0]
    assert slightly[20, 30].tolist() == [255, 255, 255]
    angles = []
    line = np.zeros((1, 101, 101, 3), np.uint8)
    line[0, 50, 51:] = 255
    rng = np.random.default_rng(0)
    for _ in range(300):
        y, x = np.nonzero(transforms.RandomRotation(10)(line, rng)[0, :, :, 0] > 100)
        angles.append(np.degrees(np.arctan2(50 - y.mean(), x.mean() - 50)))
    assert -10.5 < min(angles) < -8.5
    assert 8.5 < max(angles) < 10.5
    assert abs(np.mean(angles)) < 1.2
    with pytest.raises(UsageError, match="0..180 degrees"):
        transforms.RandomRotation(-1)


def test_reference_augmentation_is_a_function_of_the_generator():
    augment = image_train_transform(32, MEAN, STD, rotation=10)
    image = clip_of(picture(5))
    first = augment(image, np.random.default_rng(1))
    assert first.shape == (3, 1, 32, 32)
    np.testing.assert_array_equal(first, augment(image, np.random.default_rng(1)))
    assert not np.array_equal(first, augment(image, np.random.default_rng(2)))
    assert [type(step).__name__ for step in augment.transforms] == [
        "RandomRotation",
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "RandomHLS",
        "ToArray",
        "Normalize",
    ]
    assert augment.transforms[3].offsets == (20, 50, 40)  # hue, lightness, saturation


def test_plain_crop_and_none():
    image = clip_of(picture(6, 40, 60))
    crop = image_train_transform(32, MEAN, STD, "crop", flip=False, resize=40)
    whole = image_val_transform(32, MEAN, STD, "full", 40)(image)
    places = set()
    for seed in range(40):
        part = crop(image, np.random.default_rng(seed))
        found = [
            (top, left)
            for top in range(9)
            for left in range(29)
            if np.array_equal(whole[..., top : top + 32, left : left + 32], part)
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 30
    none = image_train_transform(32, MEAN, STD, "none", rotation=10)
    np.testing.assert_array_equal(
        none(image, np.random.default_rng(0)), image_val_transform(32, MEAN, STD)(image)
    )


def test_senseless_requests():
    with pytest.raises(UsageError, match="augmentation must be one of reference, crop, none"):
        image_train_transform(32, MEAN, STD, "full")
    with pytest.raises(UsageError, match="crops must be one of centre, ten, full; got 'center'"):
        image_val_transform(32, MEAN, STD, "center")
    with pytest.raises(UsageError, match="crop of 32 pixels does not fit .* short side of 30"):
        image_val_transform(32, MEAN, STD, resize=30)
