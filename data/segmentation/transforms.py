"""What is done to an image and its mask together.

Both are treated alike in space; the mask is resized to the nearest neighbour, so that it keeps its
values, and what is added around it is ignored. An image is a clip of one frame, as elsewhere.
"""

from collections.abc import Sequence
from typing import Any, Optional

import cv2
import numpy as np

from glore_common import UsageError

from ..common.transforms import Normalize, RandomHLS, Size, ToArray, pair_of
from .labels import IGNORED

# Hue (half degrees), lightness, saturation.
COLOURS = (9, 40, 40)


def as_array(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return (3, h, w) float32, normalised, of an image (h, w, 3) uint8 RGB."""
    # (1, h, w, 3) -> (3, 1, h, w) -> (3, h, w)
    return Normalize(mean, std)(ToArray()(image[None]))[:, 0]


def resized(image: np.ndarray, mask: np.ndarray, height: int, width: int) -> tuple:
    """Return image (bilinear) and mask (nearest neighbour) of another size."""
    if image.shape[:2] == (height, width):
        return image, mask
    size = (width, height)
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_LINEAR),
        # cv2.INTER_NEAREST is off by half a pixel; the exact one is not.
        cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT),
    )


class Whole:
    """The image as it is.

    Parameters
    ----------
    mean, std
        RGB, on the 0..1 scale.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return (4, h, w) float32: the normalised image, and the mask.

        Parameters
        ----------
        image
            (h, w, 3) uint8 RGB.
        mask
            (h, w) uint8 train ids.
        rng
            Source of all randomness.
        """
        array = as_array(image, self.mean, self.std)
        return np.concatenate([array, mask[None].astype(np.float32)])


class Augmented(Whole):
    """Random scale, random crop of one size, mirror, colours.

    Parameters
    ----------
    mean, std
        RGB, on the 0..1 scale; what is added around a small image becomes 0.
    crop
        (height, width) of the result.
    scale
        Range of the factor that images are resized by.
    flip
        Mirror half of the images.
    colours
        Shift hue, lightness and saturation.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        crop: Size,
        scale: Sequence[float] = (0.5, 2.0),
        flip: bool = True,
        colours: bool = True,
    ) -> None:
        super().__init__(mean, std)
        if not 0 < scale[0] <= scale[1]:
            raise UsageError(f"the scale must be a rising pair above 0, got {scale}")
        self.crop = pair_of(crop)
        self.scale = tuple(scale)
        self.flip = flip
        self.colours: Optional[RandomHLS] = RandomHLS(COLOURS) if colours else None

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: Any = None) -> np.ndarray:
        """Return (4, height, width) float32; see :class:`Whole`."""
        factor = rng.uniform(*self.scale)
        height, width = (max(1, round(side * factor)) for side in mask.shape)
        image, mask = resized(image, mask, height, width)
        rows, columns = self.crop
        # uniform() may round up to its open end.
        top, left = (
            min(int(rng.uniform(0, max(spare, 0) + 1)), max(spare, 0))
            for spare in (height - rows, width - columns)
        )
        image = image[top : top + rows, left : left + columns]
        mask = mask[top : top + rows, left : left + columns]
        if self.flip and rng.uniform(0, 1) < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.colours is not None:
            image = self.colours(image[None], rng)[0]
        result = np.zeros((4, rows, columns), np.float32)
        result[3] = IGNORED
        # A small image lies in the upper left corner.
        result[:, : mask.shape[0], : mask.shape[1]] = super().__call__(image, mask)
        return result
