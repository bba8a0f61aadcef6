"""The golden validation transform, and the distributions of the random ones."""

import cv2
import numpy as np
import pytest

from data.common import transforms
from data.video.loaders import train_transform, val_transform
from data.video.transforms import MixedCrop, PixelJitter, RandomScale, ThreeCrop, ToNoisyInput
from glore_common import UsageError
from network.specs import MEAN, STD

PIXELS = {"mean": MEAN, "std": STD}


def picture_clip(frames=3, height=60, width=80, seed=0):
    noise = np.random.RandomState(seed).randint(0, 256, (frames, height, width, 3))
    return noise.astype(np.uint8)


def still_clip(frames=4, height=60, width=80, seed=0):
    return np.repeat(picture_clip(1, height, width, seed), frames, 0)


def test_validation_equals_golden(golden):
    assert pytest.approx((0.486275, 0.458824, 0.407843), abs=1e-6) == MEAN
    assert pytest.approx((0.234825,) * 3, abs=1e-6) == STD
    arrays = golden("val_transform.npz")
    result = val_transform(224, **PIXELS)(arrays["clip"])
    assert result.shape == (3, 2, 224, 224)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[:, :, ::8, ::8], arrays["out"], rtol=0, atol=1e-6)


def test_resize_keeps_the_aspect_and_rounds_down():
    assert transforms.Resize(30)(picture_clip(2, 61, 85)).shape == (2, 30, 41, 3)
    assert transforms.Resize(30)(picture_clip(2, 85, 61)).shape == (2, 41, 30, 3)
    assert transforms.Resize((20, 33))(picture_clip()).shape == (3, 20, 33, 3)
    clip = picture_clip()
    assert transforms.Resize(60)(clip) is clip


def test_center_crop_is_in_the_middle():
    clip = np.zeros((1, 9, 12, 3), np.uint8)
    clip[:, 2:7, 3:8] = 1  # spare columns 7: left 4 by rounding 3.5 to even
    crop = transforms.CenterCrop(5)(clip)
    assert crop.shape == (1, 5, 5, 3)
    np.testing.assert_array_equal(crop[..., 0].sum((0, 1)), [5, 5, 5, 5, 0])


def test_random_scale_distribution():
    scale = RandomScale((0.8, 1.25), (224, 340))
    rng = np.random.default_rng(0)
    sizes = np.array([scale.draw_size(320, 240, rng) for _ in range(4000)], float)
    short = sizes.min(1)
    assert short.min() == 225
    assert short.max() == 340
    assert abs(short.mean() - 282.5) < 2.5
    ratio = np.sqrt(sizes[:, 0] / sizes[:, 1] / (320 / 240))
    # The mean of two draws is rarely at an end; inverted half of the time it is symmetric in log.
    assert 0.8 <= ratio.min() < 0.83
    assert 1.2 < ratio.max() <= 1.26
    assert abs(np.log(ratio).mean()) < 0.008
    draws = np.random.default_rng(1).uniform(0.8, 1.25, (4000, 2)).mean(1)
    assert abs(np.abs(np.log(ratio)).mean() - np.abs(np.log(draws)).mean()) < 0.004


def test_random_scale_resizes_all_frames_as_opencv():
    clip = picture_clip()
    width, height = RandomScale((1, 1), (40, 50)).draw_size(80, 60, np.random.default_rng(3))
    scaled = RandomScale((1, 1), (40, 50))(clip, np.random.default_rng(3))
    np.testing.assert_array_equal(scaled[2], cv2.resize(clip[2], (width, height)))


def test_random_crop_reaches_every_place_and_cuts_all_frames_alike():
    clip = np.zeros((2, 6, 7, 3), np.uint8)
    clip[..., 0], clip[..., 1] = np.arange(6)[:, None], np.arange(7)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        crop = transforms.RandomCrop((4, 5))(clip, rng)
        assert crop.shape == (2, 4, 5, 3)
        np.testing.assert_array_equal(crop[0], crop[1])
        seen.add(tuple(crop[0, 0, 0, :2]))
    assert seen == {(top, left) for top in range(3) for left in range(3)}


def test_crop_larger_than_the_frame_is_an_error():
    for crop in (
        transforms.CenterCrop(61),
        transforms.RandomCrop(61),
        ThreeCrop(61),
        MixedCrop(61, 2),
    ):
        with pytest.raises(UsageError, match="61 x 61 does not fit in frames of 80 x 60"):
            crop(picture_clip(), np.random.default_rng(0))


@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20)])
def test_three_crops_along_the_longer_side(height, width):
    clip = picture_clip(2, height, width)
    crops = ThreeCrop(20)(clip)
    assert crops.shape == (3, 2, 20, 20, 3)
    for crop, start in zip(crops, (0, 15, 30)):
        part = clip[:, :, start : start + 20] if width > height else clip[:, start : start + 20]
        np.testing.assert_array_equal(crop, part)


def test_mixed_crop_has_the_centre_first_and_random_others():
    clip = picture_clip()
    crops = MixedCrop(20, 5)(clip, np.random.default_rng(0))
    np.testing.assert_array_equal(crops[0], transforms.CenterCrop(20)(clip))
    assert len({crop.tobytes() for crop in crops}) == 5
    again = MixedCrop(20, 5)(clip, np.random.default_rng(0))
    np.testing.assert_array_equal(crops, again)


def test_flip_mirrors_half_of_the_clips():
    clip, rng = picture_clip(), np.random.default_rng(0)
    mirrored = 0
    for _ in range(400):
        result = transforms.RandomHorizontalFlip()(clip, rng)
        mirrored += np.array_equal(result, clip[:, :, ::-1])
        assert np.array_equal(result, clip) or np.array_equal(result, clip[:, :, ::-1])
    assert 160 < mirrored < 240


class Scripted:
    """A generator whose uniform() gives the ends asked for."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low=0.0, high=1.0, size=None):
        return self.values.pop(0)


def test_hls_adds_one_offset_to_each_channel_and_cuts_off():
    clip = still_clip()
    result = transforms.RandomHLS((15, 35, 25))(clip, Scripted(14.9, -34.2, 10.0))
    hls = cv2.cvtColor(clip[0], cv2.COLOR_RGB2HLS).astype(int) + [14, -34, 10]
    hls = np.clip(hls, 0, [180, 255, 255]).astype(np.uint8)
    np.testing.assert_array_equal(result[0], cv2.cvtColor(hls, cv2.COLOR_HLS2RGB))
    np.testing.assert_array_equal(result, np.repeat(result[:1], len(result), 0))


def test_hls_offsets_stay_in_their_ranges():
    seen = []

    class Spy:
        def uniform(self, low, high):
            seen.append((low, high))
            return low

    transforms.RandomHLS((15, 35, 25))(still_clip(1), Spy())
    assert seen == [(-15, 15), (-35, 35), (-25, 25)]


def test_jitter_is_uniform_noise_alike_for_all_frames():
    clip = still_clip(4, 100, 120)
    noise = PixelJitter((-20, 20))(clip, np.random.default_rng(5)) - clip
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise[3], noise[0], atol=2e-5)
    low, high = noise.min(), noise.max()
    assert -20 <= low < 0 < high <= 20
    assert abs(noise.mean() - (low + high) / 2) < 0.2
    assert abs(noise.std() - (high - low) / np.sqrt(12)) < 0.2
    ends = np.array(
        [
            (lambda noise: (noise.min(), noise.max()))(
                PixelJitter((-20, 20))(still_clip(1), np.random.default_rng(seed)) - still_clip(1)
            )
            for seed in range(100)
        ]
    )
    assert abs(ends[:, 0].mean() + 10) < 2
    assert abs(ends[:, 1].mean() - 10) < 2
    free = PixelJitter((-20, 20), per_frame=True)(clip, np.random.default_rng(5)) - clip
    assert np.abs(free[3] - free[0]).mean() > 0.1


def test_array_and_normalize():
    clip = picture_clip(3, 4, 5)
    array = transforms.ToArray()(clip)
    assert array.shape == (3, 3, 4, 5)
    assert array.flags.c_contiguous
    np.testing.assert_allclose(array[1, 2], clip[2, :, :, 1] / 255, rtol=1e-6)
    expected = (array - np.reshape([0.1, 0.2, 0.3], (3, 1, 1, 1))) / 0.5
    result = transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))(array)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    views = np.stack([clip, clip[:, ::-1]])
    assert transforms.ToArray()(views).shape == (2, 3, 3, 4, 5)
    np.testing.assert_array_equal(transforms.ToArray()(views)[0], transforms.ToArray()(clip))


def test_training_transform_depends_on_the_generator_only():
    clip = picture_clip(4, 120, 160)
    augment = train_transform(56, **PIXELS, flip=True)
    results = [augment(clip.copy(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert results[0].shape == (3, 4, 56, 56)
    assert results[0].dtype == np.float32
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).mean() > 0.05
    old = augment(clip.copy(), np.random.RandomState(1))
    assert old.shape == (3, 4, 56, 56)


def test_training_transform_treats_all_frames_alike():
    result = train_transform(56, **PIXELS)(still_clip(5, 120, 160), np.random.default_rng(4))
    np.testing.assert_allclose(result[:, 1:], np.repeat(result[:, :1], 4, 1), atol=1e-4)


def test_no_flip_where_the_dataset_forbids_it():
    kinds = [type(step) for step in train_transform(56, **PIXELS, flip=False).transforms]
    assert transforms.RandomHorizontalFlip not in kinds
    assert kinds[:2] == [RandomScale, transforms.RandomCrop]
    assert train_transform(112, **PIXELS).transforms[0].short_side == (112, 170)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomScale((1.2, 0.8), (224, 340)),
        lambda: RandomScale((0.0, 0.8), (224, 340)),
        lambda: RandomScale((-0.5, 0.8), (224, 340)),
        lambda: RandomScale((0.8, 1.2), (340, 224)),
        lambda: RandomScale((0.8, 1.2), (0, 224)),
        lambda: PixelJitter((5, 20)),
        lambda: PixelJitter((1, 20)),
        lambda: PixelJitter((-20, -1)),
        lambda: transforms.Normalize((0, 0, 0), (1, 0, 1)),
        lambda: transforms.CenterCrop(0),
        lambda: MixedCrop(10, 0),
    ],
)
def test_senseless_arguments(make):
    with pytest.raises(UsageError):
        make()


def test_one_pass_to_the_network_gives_the_same_numbers():
    rng = np.random.default_rng(3)
    views = rng.integers(0, 256, (2, 3, 20, 30, 3), dtype=np.uint8)[:, :, 2:15, ::-1]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    steps = transforms.Compose([transforms.ToArray(), transforms.Normalize(mean, std)])
    for clip in (views, views[0]):
        result = transforms.ToInput(mean, std)(clip)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, steps(clip))
    noisy = transforms.Compose([PixelJitter((-20, 20)), steps])
    np.testing.assert_allclose(
        ToNoisyInput((-20, 20), mean, std)(views[0], np.random.default_rng(5)),
        noisy(views[0], np.random.default_rng(5)),
        atol=2e-6,
    )


def test_ranges_may_be_one_value():
    scale = RandomScale((0.5, 0.5), (1, 1))
    assert scale.draw_size(100, 100, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("height", "width", "places"),
    [
        (10, 20, [(3, 0), (3, 8), (3, 16)]),
        (20, 10, [(0, 3), (8, 3), (16, 3)]),
        # Of equal sides the width is the longer one.
        (10, 10, [(3, 0), (3, 3), (3, 6)]),
    ],
)
def test_three_crops_lie_at_start_middle_and_end(height, width, places):
    clip = np.arange(height * width * 3, dtype=np.uint8).reshape(1, height, width, 3)
    found = ThreeCrop(4)(clip)
    for crop, (top, left) in zip(found, places):
        np.testing.assert_array_equal(crop[0], clip[0, top : top + 4, left : left + 4])


class Fixed:
    """A generator whose every draw is the end of its range."""

    def __init__(self, end):
        self.end = end

    def uniform(self, low, high):
        return (low, high)[self.end]


@pytest.mark.parametrize("end", [0, 1])
def test_shifted_colours_are_cut_off_at_the_ends(end):
    clip = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
    clip[0, 0] = 255
    clip[0, 1] = 0
    for channel, limit in enumerate((180, 255, 255)):
        offsets = [0, 0, 0]
        offsets[channel] = 60
        expected = []
        for frame in clip:
            shifted = cv2.cvtColor(frame, cv2.COLOR_RGB2HLS).astype(int)
            shifted[..., channel] += 60 if end else -60
            shifted[..., channel] = shifted[..., channel].clip(0, limit)
            expected.append(cv2.cvtColor(shifted.astype(np.uint8), cv2.COLOR_HLS2RGB))
        found = transforms.RandomHLS(offsets)(clip, Fixed(end))
        np.testing.assert_array_equal(found, np.stack(expected))
