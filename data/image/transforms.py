"""What is done to images only; the rest they share with clips (:mod:`data.common.transforms`).

An image is treated as a clip of one frame, (1, H, W, 3) uint8 RGB.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from glore_common import UsageError

from ..common.transforms import Size, centre_of, check_fits, crop_at, pair_of, resize_clip

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# Hue 20, saturation 40, lightness 50, in the order of the channels: hue, lightness, saturation.
HLS = (20, 50, 40)


class RandomResizedCrop:
    """Cut out a random area of a random aspect ratio and scale it (bicubic) to one size.

    The area is uniform, the aspect ratio (width / height) uniform in its logarithm, so that wide
    and tall are equally likely. When ten draws do not fit in the image, the largest centre crop
    with an allowed aspect ratio is taken.

    Parameters
    ----------
    size
        Result: side, or (height, width).
    area
        Range of the area, as a part of the image's.
    aspect
        Range of width / height.
    """

    TRIES = 10

    def __init__(
        self, size: Size, area: Sequence[float] = AREA, aspect: Sequence[float] = ASPECT
    ) -> None:
        if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1]:
            raise UsageError(
                f"area must be a rising pair in 0..1 and aspect one above 0, got {area} and "
                f"{aspect}."
            )
        self.size = pair_of(size)
        self.area = tuple(area)
        self.aspect = tuple(aspect)

    def draw_box(self, height: int, width: int, rng: Any) -> tuple[int, int, int, int]:
        """Return a random (top, left, height, width) in an image of ``height`` x ``width``."""
        low, high = (math.log(value) for value in self.aspect)
        for _ in range(self.TRIES):
            area = rng.uniform(*self.area) * height * width
            aspect = math.exp(rng.uniform(low, high))
            box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < box_height <= height and 0 < box_width <= width:
                top = min(int(rng.uniform(0, height - box_height + 1)), height - box_height)
                left = min(int(rng.uniform(0, width - box_width + 1)), width - box_width)
                return top, left, box_height, box_width
        aspect = min(max(width / height, self.aspect[0]), self.aspect[1])
        box_height = min(height, max(1, round(width / aspect)))
        box_width = min(width, max(1, round(height * aspect)))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the scaled crop."""
        crop = crop_at(clip, *self.draw_box(clip.shape[1], clip.shape[2], rng))
        return resize_clip(crop, self.size[1], self.size[0], cv2.INTER_CUBIC)


class RandomRotation:
    """Turn about the centre by a random angle; the size stays and the corners become black.

    Parameters
    ----------
    degrees
        The angle is uniform in -degrees .. degrees.
    """

    def __init__(self, degrees: float) -> None:
        if not 0 <= degrees <= 180:
            raise UsageError(f"the rotation must lie in 0..180 degrees, got {degrees}.")
        self.degrees = degrees

    def __call__(self, clip: np.ndarray, rng: Any) -> np.ndarray:
        """Return the turned frames."""
        height, width = clip.shape[1:3]
        centre = ((width - 1) / 2, (height - 1) / 2)
        matrix = cv2.getRotationMatrix2D(centre, rng.uniform(-self.degrees, self.degrees), 1.0)
        # A mirrored or cropped clip is a view, which OpenCV does not take.
        frames = [
            cv2.warpAffine(np.ascontiguousarray(frame), matrix, (width, height)) for frame in clip
        ]
        return np.stack(frames)


class TenCrop:
    """Four corners and the centre, then the same mirrored: (10, T, height, width, 3).

    The order is top left, top right, bottom left, bottom right, centre.
    """

    num_views = 10

    def __init__(self, size: Size) -> None:
        self.size = pair_of(size)

    def __call__(self, clip: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return the ten crops."""
        height, width = self.size
        check_fits(clip, height, width)
        bottom, right = clip.shape[1] - height, clip.shape[2] - width
        corners = ((0, 0), (0, right), (bottom, 0), (bottom, right))
        crops = [crop_at(clip, top, left, height, width) for top, left in corners]
        crops.append(centre_of(clip, height, width, round_down=True))
        return np.stack(crops + [crop[:, :, ::-1] for crop in crops])
