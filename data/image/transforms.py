"""What is done to images only; the rest they share with clips (:mod:`data.video.transforms`).

An image is treated as a clip of one frame, (1, H, W, 3) uint8 RGB: a transform of either module
takes both. ``reference`` is the augmentation that the author of the GloRe networks documents for
ImageNet (cypw/DPNs, README): mirror, random area 8 to 100 %, aspect 3/4 to 4/3, HSL 20, 40, 50.
Pixels of the validation transforms are those of MXNet's ``ImageRecordIter``, with which the
released networks were tested.
"""

import math

import cv2
import numpy as np

from glore_common import UsageError

from ..video.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomCrop,
    RandomHLS,
    RandomHorizontalFlip,
    Resize,
    ToArray,
    centre_of,
    check_fits,
    crop_at,
    pair_of,
    resize_clip,
)

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# Hue 20, saturation 40, lightness 50, in the order of the channels: hue, lightness, saturation.
HLS = (20, 50, 40)
AUGMENTATIONS = ("reference", "crop", "none")
CROPS = ("centre", "ten", "full")


def image_resize(short_side):
    """Return the resizing of images: bicubic, to a short side in pixels."""
    return Resize(short_side, cv2.INTER_CUBIC)


class RandomResizedCrop:
    """Cut out a random area of a random aspect ratio and scale it (bicubic) to one size.

    The area is uniform, the aspect ratio (width / height) uniform in its logarithm, so that wide
    and tall are equally likely. When ten draws do not fit in the image, the largest centre crop
    with an allowed aspect ratio is taken.

    Parameters
    ----------
    size : int or (int, int)
        Result: side, or (height, width).
    area : (float, float)
        Range of the area, as a part of the image's.
    aspect : (float, float)
    """

    TRIES = 10

    def __init__(self, size, area=AREA, aspect=ASPECT):
        if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1]:
            raise UsageError(
                f"area must be a rising pair in 0..1 and aspect one above 0, got {area} and "
                f"{aspect}."
            )
        self.size = pair_of(size)
        self.area = tuple(area)
        self.aspect = tuple(aspect)

    def draw_box(self, height, width, rng):
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

    def __call__(self, clip, rng):
        """Return the scaled crop."""
        crop = crop_at(clip, *self.draw_box(clip.shape[1], clip.shape[2], rng))
        return resize_clip(crop, self.size[1], self.size[0], cv2.INTER_CUBIC)


class RandomRotation:
    """Turn about the centre by a random angle; the size stays and the corners become black.

    Parameters
    ----------
    degrees : float
        The angle is uniform in -degrees .. degrees.
    """

    def __init__(self, degrees):
        if not 0 <= degrees <= 180:
            raise UsageError(f"the rotation must lie in 0..180 degrees, got {degrees}.")
        self.degrees = degrees

    def __call__(self, clip, rng):
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

    def __init__(self, size):
        self.size = pair_of(size)

    def __call__(self, clip, rng=None):
        """Return the ten crops."""
        height, width = self.size
        check_fits(clip, height, width)
        bottom, right = clip.shape[1] - height, clip.shape[2] - width
        corners = ((0, 0), (0, right), (bottom, 0), (bottom, right))
        crops = [crop_at(clip, top, left, height, width) for top, left in corners]
        crops.append(centre_of(clip, height, width, round_down=True))
        return np.stack(crops + [crop[:, :, ::-1] for crop in crops])


def default_resize(crop_size):
    """Return the short side for a crop: 256 for 224, and in proportion."""
    return round(256 * crop_size / 224)


def image_train_transform(
    crop_size, mean, std, augmentation="reference", flip=True, rotation=0, resize=None
):
    """Return a training augmentation.

    Parameters
    ----------
    crop_size : int
    mean, std : sequence of 3 float
        RGB, on the 0..1 scale.
    augmentation : {'reference', 'crop', 'none'}
        'reference': random area and aspect ratio, mirror, colours. 'crop': short side ``resize``,
        random crop, mirror. 'none': the validation transform; ``flip`` and ``rotation`` are
        not used.
    flip : bool
        False where left and right mean something.
    rotation : float
        Largest angle, in degrees.
    resize : int, optional
        Short side in pixels for 'crop' and 'none'; by default in proportion 256 : 224.

    Returns
    -------
    Compose
        (1, H, W, 3) uint8 -> (3, 1, crop_size, crop_size) float32.
    """
    if augmentation not in AUGMENTATIONS:
        raise UsageError(
            f"augmentation must be one of {', '.join(AUGMENTATIONS)}; got {augmentation!r}."
        )
    if augmentation == "none":
        return image_val_transform(crop_size, mean, std, "centre", resize)
    steps = []
    if augmentation == "crop":
        steps.append(_resize_for_crop(crop_size, resize))
    if rotation:
        steps.append(RandomRotation(rotation))
    steps.append(RandomCrop(crop_size) if augmentation == "crop" else RandomResizedCrop(crop_size))
    if flip:
        steps.append(RandomHorizontalFlip())
    if augmentation == "reference":
        steps.append(RandomHLS(HLS))
    return Compose([*steps, ToArray(), Normalize(mean, std)])


def image_val_transform(crop_size, mean, std, crops="centre", resize=None):
    """Return a transform for validation and testing.

    Parameters
    ----------
    crop_size : int
        Not used by ``crops='full'``, but for its default of ``resize``.
    mean, std, resize
        As for :func:`image_train_transform`.
    crops : {'centre', 'ten', 'full'}
        One centre crop; :class:`TenCrop`; the whole image with short side ``resize``.
    """
    if crops not in CROPS:
        raise UsageError(f"crops must be one of {', '.join(CROPS)}; got {crops!r}.")
    if crops == "full":
        steps = [image_resize(resize or default_resize(crop_size))]
    else:
        crop = CenterCrop(crop_size, round_down=True) if crops == "centre" else TenCrop(crop_size)
        steps = [_resize_for_crop(crop_size, resize), crop]
    return Compose([*steps, ToArray(), Normalize(mean, std)])


def _resize_for_crop(crop_size, resize):
    resize = default_resize(crop_size) if resize is None else resize
    if resize < crop_size:
        raise UsageError(
            f"a crop of {crop_size} pixels does not fit in images resized to a short side of "
            f"{resize}: resize to {crop_size} or more."
        )
    return image_resize(resize)
