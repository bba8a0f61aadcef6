"""What is done to the frames of clips and to images: sizes, crops, colours, the network's array.

A clip is an array (T, H, W, 3), uint8, RGB; an image is a clip of one frame. A transform is called
as ``transform(clip, rng)`` and treats all frames alike; what is random comes from ``rng`` alone (a
``numpy.random.Generator`` or ``RandomState``; only ``uniform`` is used, which both have).
Distributions and rounding are those of facebookresearch/GloRe;
``test/golden/val_transform.npz`` pins the validation transform.
"""

from collections.abc import Sequence
from typing import Any, Union

import cv2
import numpy as np

from glore_common import UsageError

# A side, or (height, width).
Size = Union[int, tuple[int, int]]


def pair_of(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or as two."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    if height < 1 or width < 1:
        raise UsageError(f"a size must be positive, got {size}.")
    return int(height), int(width)


def resize_clip(
    clip: np.ndarray, width: int, height: int, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Return the clip with frames of ``width`` x ``height`` (no smoothing)."""
    if clip.shape[1:3] == (height, width):
        return clip
    resized = np.empty((len(clip), height, width, 3), np.uint8)
    for source, target in zip(clip, resized):
        # Into a fresh array, as OpenCV's `dst` is silently ignored when it does not fit.
        target[...] = cv2.resize(source, (width, height), interpolation=interpolation)
    return resized


def default_resize(crop_size: int) -> int:
    """Return the short side that a centre crop is cut from: 256 for 224, and in proportion."""
    return round(256 * crop_size / 224)


def crop_at(clip: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return a part of all frames (a view)."""
    return clip[:, top : top + height, left : left + width]


def check_fits(clip: np.ndarray, height: int, width: int) -> None:
    """Raise UsageError where the frames are smaller than a crop."""
    if clip.shape[1] < height or clip.shape[2] < width:
        raise UsageError(
            f"a crop of {width} x {height} does not fit in frames of "
            f"{clip.shape[2]} x {clip.shape[1]} (width x height): resize to a larger short side."
        )


def centre_of(clip: np.ndarray, height: int, width: int, round_down: bool = False) -> np.ndarray:
    """Return the middle ``height`` x ``width`` pixels (a view)."""
    check_fits(clip, height, width)
    spare_y, spare_x = clip.shape[1] - height, clip.shape[2] - width
    # round() takes halves to the even neighbour, as the golden figures need.
    top, left = (
        (spare_y // 2, spare_x // 2) if round_down else (round(spare_y / 2), round(spare_x / 2))
    )
    return crop_at(clip, top, left, height, width)


def random_place(clip: np.ndarray, height: int, width: int, rng: Any) -> np.ndarray:
    """Return ``height`` x ``width`` pixels at a random place, the same in all frames (a view)."""
    check_fits(clip, height, width)
    left = int(rng.uniform(0, clip.shape[2] - width + 1))
    top = int(rng.uniform(0, clip.shape[1] - height + 1))
    # uniform() may round up to its open end.
    left, top = min(left, clip.shape[2] - width), min(top, clip.shape[1] - height)
    return crop_at(clip, top, left, height, width)


class Compose:
    """Apply transforms one after the other, all from one generator."""

    def __init__(self, transforms: Sequence) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return the transformed clip."""
        for transform in self.transforms:
            clip = transform(clip, rng)
        return clip


class Resize:
    """Scale to a given short side (the long side is rounded down) or an exact size.

    Parameters
    ----------
    size
        The short side, or (height, width).
    interpolation
        One of OpenCV's.
    """

    def __init__(self, size: Size, interpolation: int = cv2.INTER_LINEAR) -> None:
        self.interpolation = interpolation
        self.short_side = None if isinstance(size, Sequence) else int(size)
        self.size = pair_of(size)

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that frames of ``height`` x ``width`` get."""
        if self.short_side is None:
            return self.size
        if width < height:
            return self.short_side * height // width, self.short_side
        return self.short_side, self.short_side * width // height

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return the resized clip."""
        height, width = self.new_size(*clip.shape[1:3])
        return resize_clip(clip, width, height, self.interpolation)


class CenterCrop:
    """Cut out the middle.

    Parameters
    ----------
    size
        Side, or (height, width).
    round_down
        Of an odd number of spare pixels, leave the smaller half before the crop, as MXNet's
        iterator does; else halves go to the even neighbour.
    """

    def __init__(self, size: Size, round_down: bool = False) -> None:
        self.size = pair_of(size)
        self.round_down = round_down

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return the crop (a view)."""
        return centre_of(clip, *self.size, self.round_down)


class RandomCrop:
    """Cut out a random place, the same in all frames. ``size`` as for :class:`CenterCrop`."""

    def __init__(self, size: Size) -> None:
        self.size = pair_of(size)

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the crop (a view)."""
        return random_place(clip, *self.size, rng)


class RandomHorizontalFlip:
    """Mirror all frames of a clip with a given probability."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the clip, mirrored or not (a view)."""
        return clip[:, :, ::-1] if rng.uniform() < self.probability else clip


class RandomHLS:
    """Shift hue, lightness and saturation by one random offset for all frames.

    Parameters
    ----------
    offsets
        Largest shift of hue (0..180, OpenCV's half degrees), lightness and saturation (0..255).
        Values are cut off at the ends of their ranges, the hue as well.
    """

    LIMITS = (180, 255, 255)

    def __init__(self, offsets: Sequence[float]) -> None:
        self.offsets = tuple(offsets)

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the shifted clip, uint8."""
        table = np.empty((1, 256, 3), np.uint8)
        for channel, (offset, limit) in enumerate(zip(self.offsets, self.LIMITS)):
            shift = int(rng.uniform(-offset, offset))
            table[0, :, channel] = np.clip(np.arange(256) + shift, 0, limit)
        # All frames as one tall picture: (T, H, W, 3) -> (T*H, W, 3)
        tall = np.ascontiguousarray(clip).reshape(-1, clip.shape[2], 3)
        shifted = cv2.LUT(cv2.cvtColor(tall, cv2.COLOR_RGB2HLS), table)
        return cv2.cvtColor(shifted, cv2.COLOR_HLS2RGB).reshape(clip.shape)


class ToArray:
    """(…, T, H, W, 3) with values 0..255 -> (…, 3, T, H, W), float32, 0..1."""

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return the array, freshly allocated and contiguous."""
        channels_first = np.moveaxis(clip, -1, -4)
        result = np.empty(channels_first.shape, np.float32)
        return np.divide(channels_first, np.float32(255), out=result, casting="unsafe")


class ToInput:
    """:class:`ToArray` and :class:`Normalize` in one pass over bytes: the same numbers, faster.

    Parameters
    ----------
    mean, std
        As for :class:`Normalize`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.normalize = Normalize(mean, std)
        # What each of the 256 values of a channel becomes: (3, 256)
        levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, axis=-1)
        self.tables = self.normalize(ToArray()(levels)).reshape(3, 256)

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
        """(…, T, H, W, 3) uint8 -> (…, 3, T, H, W) float32."""
        frames = clip.reshape(-1, *clip.shape[-4:])
        result = np.empty((len(frames), 3, *frames.shape[1:4]), np.float32)
        for view, array in zip(frames, result):
            for number, frame in enumerate(view):
                for plane, table, target in zip(cv2.split(frame), self.tables, array[:, number]):
                    cv2.LUT(plane, table, dst=target)
        return result.reshape(*clip.shape[:-4], *result.shape[1:])


class Normalize:
    """Subtract a mean and divide by a deviation per channel of (…, 3, T, H, W), in place.

    Parameters
    ----------
    mean, std
        RGB, on the 0..1 scale.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError(
                f"mean and std need three values each, std above 0; got {mean} and {std}."
            )
        self.mean = np.asarray(mean, np.float32).reshape(3, 1, 1, 1)
        self.std = np.asarray(std, np.float32).reshape(3, 1, 1, 1)

    def __call__(self, array: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return ``array``, changed in place."""
        array -= self.mean
        array /= self.std
        return array
