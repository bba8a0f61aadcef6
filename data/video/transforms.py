"""What is done to clips only; the rest they share with images (:mod:`data.common.transforms`)."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from glore_common import UsageError

from ..common.transforms import (
    Normalize,
    Size,
    centre_of,
    check_fits,
    crop_at,
    pair_of,
    random_place,
    resize_clip,
)


class RandomScale:
    """Scale to a random short side, with a random change of the aspect ratio.

    The factor r is the mean of two uniform draws, inverted with probability 1/2; width is
    multiplied and height divided by r, then both are scaled to the short side drawn.

    Parameters
    ----------
    aspect_ratio
        Range of the draws for r.
    short_side
        Range of the short side in pixels.
    """

    def __init__(self, aspect_ratio: Sequence[float], short_side: Sequence[float]) -> None:
        if not 0 < aspect_ratio[0] <= aspect_ratio[1] or not 0 < short_side[0] <= short_side[1]:
            raise UsageError(
                "aspect_ratio and short_side must be rising pairs of positive numbers, got "
                f"{aspect_ratio} and {short_side}."
            )
        self.aspect_ratio = tuple(aspect_ratio)
        self.short_side = tuple(short_side)

    def draw_size(self, width: int, height: int, rng: Any) -> tuple[int, int]:
        """Return a random (width, height) for frames of ``width`` x ``height``."""
        ratio = (rng.uniform(*self.aspect_ratio) + rng.uniform(*self.aspect_ratio)) / 2
        if rng.uniform() > 0.5:
            ratio = 1 / ratio
        new_width, new_height = width * ratio, height / ratio
        factor = rng.uniform(*self.short_side) / min(new_width, new_height)
        # One more than rounding down: never below the lower end of short_side.
        return int(new_width * factor + 1), int(new_height * factor + 1)

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the resized clip."""
        return resize_clip(clip, *self.draw_size(clip.shape[2], clip.shape[1], rng))


class ThreeCrop:
    """Three crops along the longer side (start, middle, end), centred on the other side.

    The result is (3, T, height, width, 3): one view of the clip per crop.
    """

    num_views = 3

    def __init__(self, size: Size) -> None:
        self.size = pair_of(size)

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
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
    """

    def __init__(self, size: Size, num_crops: int) -> None:
        if num_crops < 1:
            raise UsageError(f"at least one crop is needed, got {num_crops}.")
        self.size = pair_of(size)
        self.num_views = num_crops

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the crops."""
        crops = [centre_of(clip, *self.size)]
        crops += [random_place(clip, *self.size, rng) for _ in range(self.num_views - 1)]
        return np.stack(crops)


class PixelJitter:
    """Add uniform noise to every pixel and channel, the same to all frames of a clip.

    The ends of the noise are drawn per clip: low from U(lowest, 0), high from U(0, highest). As
    in the original the sum is not cut off at 0 and 255.

    Parameters
    ----------
    limits
        (lowest, highest) noise.
    per_frame
        Draw the noise anew for each frame, which is what the original does (and costs T times
        the random numbers).
    """

    def __init__(self, limits: Sequence[float], per_frame: bool = False) -> None:
        if not limits[0] <= 0 <= limits[1]:
            raise UsageError(f"the limits of the noise must enclose 0, got {limits}.")
        self.limits = tuple(limits)
        self.per_frame = per_frame

    def draw(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return noise for a clip: (H, W, 3), or (T, H, W, 3), float32."""
        low, high = rng.uniform(self.limits[0], 0), rng.uniform(0, self.limits[1])
        shape = clip.shape if self.per_frame else clip.shape[1:]
        return rng.uniform(low, high, shape).astype(np.float32)

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the noisy clip, float32."""
        return clip + self.draw(clip, rng)


class ToNoisyInput:
    """:class:`PixelJitter` (one noise for all frames), then the network's input, in one pass.

    Parameters
    ----------
    limits
        As for :class:`PixelJitter`.
    mean, std
        As for :class:`data.common.transforms.Normalize`.
    """

    def __init__(
        self, limits: Sequence[float], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.jitter = PixelJitter(limits)
        normalize = Normalize(mean, std)
        # (pixel / 255 - mean) / std = pixel * gain + offset
        self.gain = (1 / (255 * normalize.std)).reshape(3)
        self.offset = (-normalize.mean / normalize.std).reshape(3)

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """(T, H, W, 3) uint8 -> (3, T, H, W) float32."""
        noise = cv2.split(self.jitter.draw(clip, rng) * self.gain + self.offset)
        result = np.empty((3, *clip.shape[:3]), np.float32)
        for number, frame in enumerate(clip):
            for channel, plane in enumerate(cv2.split(frame)):
                gain, target = float(self.gain[channel]), result[channel, number]
                cv2.scaleAdd(plane.astype(np.float32), gain, noise[channel], dst=target)
        return result
