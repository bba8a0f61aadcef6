"""What is done to the frames of a clip: scaling, cropping, colour, and the array for the network.

An image is a clip of one frame: :mod:`data.image.transforms` adds what only images need.

A clip is an array (T, H, W, 3), uint8, RGB. A transform is called as ``transform(clip, rng)`` and
treats all frames alike; what is random comes from ``rng`` alone (a ``numpy.random.Generator`` or
``RandomState``; only ``uniform`` is used, which both have). Distributions and rounding are those
of facebookresearch/GloRe; ``test/golden/val_transform.npz`` pins the validation transform.
"""

import cv2
import numpy as np

from glore_common import UsageError


def pair_of(size):
    """Return (height, width) of a size given as one number or as two."""
    height, width = (size, size) if np.ndim(size) == 0 else size
    if height < 1 or width < 1:
        raise UsageError(f"a size must be positive, got {size}.")
    return int(height), int(width)


def resize_clip(clip, width, height, interpolation=cv2.INTER_LINEAR):
    """Return the clip with frames of ``width`` x ``height`` (no smoothing)."""
    if clip.shape[1:3] == (height, width):
        return clip
    resized = np.empty((len(clip), height, width, 3), np.uint8)
    for source, target in zip(clip, resized):
        # Into a fresh array, as OpenCV's `dst` is silently ignored when it does not fit.
        target[...] = cv2.resize(source, (width, height), interpolation=interpolation)
    return resized


def crop_at(clip, top, left, height, width):
    return clip[:, top : top + height, left : left + width]


def check_fits(clip, height, width):
    if clip.shape[1] < height or clip.shape[2] < width:
        raise UsageError(
            f"a crop of {width} x {height} does not fit in frames of "
            f"{clip.shape[2]} x {clip.shape[1]} (width x height): resize to a larger short side."
        )


def centre_of(clip, height, width, round_down=False):
    """Return the middle ``height`` x ``width`` pixels (a view)."""
    check_fits(clip, height, width)
    spare_y, spare_x = clip.shape[1] - height, clip.shape[2] - width
    # round() takes halves to the even neighbour, as the golden figures need.
    top, left = (
        (spare_y // 2, spare_x // 2) if round_down else (round(spare_y / 2), round(spare_x / 2))
    )
    return crop_at(clip, top, left, height, width)


def _random_place(clip, height, width, rng):
    check_fits(clip, height, width)
    left = int(rng.uniform(0, clip.shape[2] - width + 1))
    top = int(rng.uniform(0, clip.shape[1] - height + 1))
    # uniform() may round up to its open end.
    left, top = min(left, clip.shape[2] - width), min(top, clip.shape[1] - height)
    return crop_at(clip, top, left, height, width)


class Compose:
    """Apply transforms one after the other, all from one generator.

    Parameters
    ----------
    transforms : sequence of callable
    """

    def __init__(self, transforms):
        self.transforms = tuple(transforms)

    def __call__(self, clip, rng=None):
        """Return the transformed clip."""
        for transform in self.transforms:
            clip = transform(clip, rng)
        return clip


class Resize:
    """Scale to a given short side (the long side is rounded down) or an exact size.

    Parameters
    ----------
    size : int or (int, int)
        The short side, or (height, width).
    interpolation : int
        One of OpenCV's.
    """

    def __init__(self, size, interpolation=cv2.INTER_LINEAR):
        self.interpolation = interpolation
        self.short_side = int(size) if np.ndim(size) == 0 else None
        self.size = pair_of(size)

    def new_size(self, height, width):
        """Return the (height, width) that frames of ``height`` x ``width`` get."""
        if self.short_side is None:
            return self.size
        if width < height:
            return self.short_side * height // width, self.short_side
        return self.short_side, self.short_side * width // height

    def __call__(self, clip, rng=None):
        """Return the resized clip."""
        height, width = self.new_size(*clip.shape[1:3])
        return resize_clip(clip, width, height, self.interpolation)


class RandomScale:
    """Scale to a random short side, with a random change of the aspect ratio.

    The factor r is the mean of two uniform draws, inverted with probability 1/2; width is
    multiplied and height divided by r, then both are scaled to the short side drawn.

    Parameters
    ----------
    aspect_ratio : (float, float)
        Range of the draws for r.
    short_side : (float, float)
        Range of the short side in pixels.
    """

    def __init__(self, aspect_ratio=(0.8, 1.25), short_side=(224, 340)):
        if not 0 < aspect_ratio[0] <= aspect_ratio[1] or not 0 < short_side[0] <= short_side[1]:
            raise UsageError(
                "aspect_ratio and short_side must be rising pairs of positive numbers, got "
                f"{aspect_ratio} and {short_side}."
            )
        self.aspect_ratio = tuple(aspect_ratio)
        self.short_side = tuple(short_side)

    def draw_size(self, width, height, rng):
        """Return a random (width, height) for frames of ``width`` x ``height``."""
        ratio = (rng.uniform(*self.aspect_ratio) + rng.uniform(*self.aspect_ratio)) / 2
        if rng.uniform() > 0.5:
            ratio = 1 / ratio
        new_width, new_height = width * ratio, height / ratio
        factor = rng.uniform(*self.short_side) / min(new_width, new_height)
        # One more than rounding down: never below the lower end of short_side.
        return int(new_width * factor + 1), int(new_height * factor + 1)

    def __call__(self, clip, rng):
        """Return the resized clip."""
        return resize_clip(clip, *self.draw_size(clip.shape[2], clip.shape[1], rng))


class CenterCrop:
    """Cut out the middle.

    Parameters
    ----------
    size : int or (int, int)
        Side, or (height, width).
    round_down : bool
        Of an odd number of spare pixels, leave the smaller half before the crop, as MXNet's
        iterator does; else halves go to the even neighbour.
    """

    def __init__(self, size, round_down=False):
        self.size = pair_of(size)
        self.round_down = round_down

    def __call__(self, clip, rng=None):
        """Return the crop (a view)."""
        return centre_of(clip, *self.size, self.round_down)


class RandomCrop:
    """Cut out a random place, the same in all frames. ``size`` as for :class:`CenterCrop`."""

    def __init__(self, size):
        self.size = pair_of(size)

    def __call__(self, clip, rng):
        """Return the crop (a view)."""
        return _random_place(clip, *self.size, rng)


class ThreeCrop:
    """Three crops along the longer side (start, middle, end), centred on the other side.

    The result is (3, T, height, width, 3): one view of the clip per crop.
    """

    num_views = 3

    def __init__(self, size):
        self.size = pair_of(size)

    def __call__(self, clip, rng=None):
        """Return the three crops."""
        height, width = self.size
        check_fits(clip, height, width)
        spare_y, spare_x = clip.shape[1] - height, clip.shape[2] - width
        if spare_x >= spare_y:
            places = [(round(spare_y / 2), left) for left in (0, round(spare_x / 2), spare_x)]
        else:
            places = [(top, round(spare_x / 2)) for top in (0, round(spare_y / 2), spare_y)]
        return np.stack([crop_at(clip, top, left, height, width) for top, left in places])


class MixedCrop:
    """A centre crop, then crops at random places: the author's video-level test.

    The result is (num_crops, T, height, width, 3).

    Parameters
    ----------
    size : int or (int, int)
    num_crops : int
    """

    def __init__(self, size, num_crops):
        if num_crops < 1:
            raise UsageError(f"at least one crop is needed, got {num_crops}.")
        self.size = pair_of(size)
        self.num_views = num_crops

    def __call__(self, clip, rng):
        """Return the crops."""
        crops = [centre_of(clip, *self.size)]
        crops += [_random_place(clip, *self.size, rng) for _ in range(self.num_views - 1)]
        return np.stack(crops)


class RandomHorizontalFlip:
    """Mirror all frames of a clip with a given probability."""

    def __init__(self, probability=0.5):
        self.probability = probability

    def __call__(self, clip, rng):
        """Return the clip, mirrored or not (a view)."""
        return clip[:, :, ::-1] if rng.uniform() < self.probability else clip


class RandomHLS:
    """Shift hue, lightness and saturation by one random offset for all frames.

    Parameters
    ----------
    offsets : (int, int, int)
        Largest shift of hue (0..180, OpenCV's half degrees), lightness and saturation (0..255).
        Values are cut off at the ends of their ranges, the hue as well.
    """

    LIMITS = (180, 255, 255)

    def __init__(self, offsets=(15, 35, 25)):
        self.offsets = tuple(offsets)

    def __call__(self, clip, rng):
        """Return the shifted clip, uint8."""
        table = np.empty((1, 256, 3), np.uint8)
        for channel, (offset, limit) in enumerate(zip(self.offsets, self.LIMITS)):
            shift = int(rng.uniform(-offset, offset))
            table[0, :, channel] = np.clip(np.arange(256) + shift, 0, limit)
        # All frames as one tall picture: (T, H, W, 3) -> (T*H, W, 3)
        tall = np.ascontiguousarray(clip).reshape(-1, clip.shape[2], 3)
        shifted = cv2.LUT(cv2.cvtColor(tall, cv2.COLOR_RGB2HLS), table)
        return cv2.cvtColor(shifted, cv2.COLOR_HLS2RGB).reshape(clip.shape)


class PixelJitter:
    """Add uniform noise to every pixel and channel, the same to all frames of a clip.

    The ends of the noise are drawn per clip: low from U(lowest, 0), high from U(0, highest). As
    in the original the sum is not cut off at 0 and 255.

    Parameters
    ----------
    limits : (float, float)
        (lowest, highest) noise.
    per_frame : bool
        Draw the noise anew for each frame, which is what the original does (and costs T times
        the random numbers).
    """

    def __init__(self, limits=(-20, 20), per_frame=False):
        if not limits[0] <= 0 <= limits[1]:
            raise UsageError(f"the limits of the noise must enclose 0, got {limits}.")
        self.limits = tuple(limits)
        self.per_frame = per_frame

    def __call__(self, clip, rng):
        """Return the noisy clip, float32."""
        low, high = rng.uniform(self.limits[0], 0), rng.uniform(0, self.limits[1])
        shape = clip.shape if self.per_frame else clip.shape[1:]
        return clip + rng.uniform(low, high, shape).astype(np.float32)


class ToArray:
    """(…, T, H, W, 3) with values 0..255 -> (…, 3, T, H, W), float32, 0..1."""

    def __call__(self, clip, rng=None):
        """Return the array, freshly allocated and contiguous."""
        channels_first = np.moveaxis(clip, -1, -4)
        result = np.empty(channels_first.shape, np.float32)
        return np.divide(channels_first, np.float32(255), out=result, casting="unsafe")


class Normalize:
    """Subtract a mean and divide by a deviation per channel of (…, 3, T, H, W), in place.

    Parameters
    ----------
    mean, std : sequence of 3 float
        RGB, on the 0..1 scale.
    """

    def __init__(self, mean, std):
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError(
                f"mean and std need three values each, std above 0; got {mean} and {std}."
            )
        self.mean = np.asarray(mean, np.float32).reshape(3, 1, 1, 1)
        self.std = np.asarray(std, np.float32).reshape(3, 1, 1, 1)

    def __call__(self, array, rng=None):
        """Return ``array``, changed in place."""
        array -= self.mean
        array /= self.std
        return array
