"""A class for each pixel of an image of any size: whole, mirrored, at several sizes, in windows."""

import dataclasses
import logging
import math
from typing import Optional

import cv2
import numpy as np

from data.segmentation.labels import (
    CITYSCAPES,
    IGNORED,
    VOC,
    Labels,
    ade20k,
    numbered,
    read_classes,
)
from data.segmentation.loaders import read_pair
from data.segmentation.masks import write_mask
from data.segmentation.source import (
    SegmentationSource,
    highest_id,
    read_ade20k,
    read_cityscapes,
    read_folders,
    read_voc,
)
from data.segmentation.transforms import as_array
from dataset import prepare_demo_streets
from glore_common import UsageError
from mxnet_compat import mx
from network.builder import logits
from network.memory import activation_bytes

from .model import Model, ModelFacts
from .options import PixelViewOptions, SegmentationSourceOptions

LOGGER = logging.getLogger("glore")
# Measured with fcn_resnet50_w-glore: what is alive at once by the graph takes three times that,
# as MXNet's memory planner and oneDNN's scratch need more, and a process takes half a GB without.
MEMORY_FACTOR, MEMORY_BASE = 3.0, 0.5
SMALLEST_WINDOW = 64


def window_places(size: int, window: int, overlap: float) -> list[int]:
    """Return where windows begin that cover ``size`` pixels, the last one flush with the end.

    Neighbours share ``overlap`` of a window at least. One that is larger than the image is one.
    """
    spare = size - window
    if spare <= 0:
        return [0]
    steps = math.ceil(spare / max(1, math.floor(window * (1 - overlap))))
    return [round(index * spare / steps) for index in range(steps + 1)]


class Segmenter:
    """A network that segments, and how it looks at images.

    Parameters
    ----------
    model
    contexts
        The first one is used.
    views
    """

    def __init__(self, model: Model, contexts: list, views: PixelViewOptions) -> None:
        self.facts = model.facts
        self.views = views
        self.context = contexts[0]
        self.block = model.block([self.context])
        self._graph = logits(model.symbol)
        self._windows: dict[tuple[int, int], tuple[int, int]] = {}

    def memory(self, height: int, width: int) -> float:
        """Return about how many GB an image takes that is seen at once."""
        alive = activation_bytes(self._graph, {"data": (1, 3, height, width)}).inference
        return MEMORY_BASE + MEMORY_FACTOR * alive / 1e9

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Return the window (height, width) that is slid over an image of this size.

        It is the image's own size where nothing else is asked for and memory suffices.
        """
        if self.views.window is not None:
            return min(self.views.window[0], height), min(self.views.window[1], width)
        size = height, width
        if size not in self._windows:
            window = size
            while self.memory(*window) > self.views.memory_limit:
                longer = int(window[1] > window[0])
                window = tuple(  # type: ignore[assignment]
                    -(-side // 2) if axis == longer else side for axis, side in enumerate(window)
                )
                if min(window) < SMALLEST_WINDOW:
                    raise UsageError(
                        f"--memory-limit {self.views.memory_limit:g} GB is too little for this "
                        f"network: a window of {SMALLEST_WINDOW} pixels takes more"
                    )
            if window != size:
                LOGGER.warning(
                    "An image of %d x %d pixels would take about %.1f GB: it is seen in windows of "
                    "%d x %d (--window, --memory-limit %g)",
                    width,
                    height,
                    self.memory(height, width),
                    window[1],
                    window[0],
                    self.views.memory_limit,
                )
            self._windows[size] = window
        return self._windows[size]

    def _softmax(self, array: np.ndarray) -> np.ndarray:
        """Return class probabilities (classes, h, w) of one part of an image (3, h, w)."""
        data = mx.nd.array(array[None], ctx=self.context)
        return mx.nd.softmax(self.block(data), axis=1)[0].asnumpy()

    def _slid(self, array: np.ndarray) -> np.ndarray:
        height, width = array.shape[1:]
        rows, columns = self.window(height, width)
        total = np.zeros((self.facts.num_classes, height, width), np.float32)
        times = np.zeros((height, width), np.float32)
        for top in window_places(height, rows, self.views.overlap):
            for left in window_places(width, columns, self.views.overlap):
                place = np.s_[..., top : top + rows, left : left + columns]
                part = self._softmax(np.ascontiguousarray(array[place]))
                total[place] += part
                times[place] += 1
        total /= times
        return total

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the probability of each class at each pixel, averaged over all views.

        Parameters
        ----------
        image
            (h, w, 3) uint8 RGB.

        Returns
        -------
        numpy.ndarray
            (classes, h, w) float32.
        """
        height, width = image.shape[:2]
        total = np.zeros((self.facts.num_classes, height, width), np.float32)
        count = 0
        for scale in self.views.scales:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            seen = image
            if size != (width, height):
                seen = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            array = as_array(seen, self.facts.mean, self.facts.std)
            for mirrored in (False, True) if self.views.flip_test else (False,):
                found = self._slid(array[..., ::-1] if mirrored else array)
                found = found[..., ::-1] if mirrored else found
                for index, plane in enumerate(found):
                    if size != (width, height):
                        plane = cv2.resize(
                            np.ascontiguousarray(plane), (width, height), interpolation=1
                        )
                    total[index] += plane
                count += 1
        return total / count

    def classes(self, image: np.ndarray) -> np.ndarray:
        """Return the likeliest class of each pixel, (h, w) uint8."""
        return self.probabilities(image).argmax(axis=0).astype(np.uint8)


def palette_of(facts: ModelFacts) -> np.ndarray:
    """Return the colours of a network's classes in pictures, (classes, 3) uint8 RGB."""
    if facts.palette is not None:
        return np.array(facts.palette, np.uint8)
    return numbered(facts.num_classes).colours


def colour_mask(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return a picture (h, w, 3) uint8 of train ids; black where a pixel is not labelled."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[mask]


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the image (h, w, 3) with the colours of its classes over it."""
    return cv2.addWeighted(image, 0.45, colour_mask(mask, palette), 0.55, 0)


def error_map(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return a picture: right pixels grey, wrong ones red, pixels without a label black."""
    picture = np.zeros((*truth.shape, 3), np.uint8)
    picture[(truth != IGNORED) & (found == truth)] = 160
    picture[(truth != IGNORED) & (found != truth)] = (230, 30, 30)
    return picture


def masks_of(segmenter: Segmenter, path: str, stem: str) -> tuple[np.ndarray, dict[str, str]]:
    """Segment an image file; write ``STEM_mask.png``, ``STEM_colours.png``, ``STEM_overlay.png``.

    The mask has a class number for each pixel.

    Returns
    -------
    shares, pictures
        (classes,) share of the pixels of each class; the paths by ``mask``, ``colours``,
        ``overlay``.

    Raises
    ------
    ImageError
        If the image cannot be read.
    """
    palette = palette_of(segmenter.facts)
    image, _ = read_pair(path, None, None)
    mask = segmenter.classes(image)
    made = {
        "mask": mask,
        "colours": colour_mask(mask, palette),
        "overlay": overlay(image, mask, palette),
    }
    pictures = {kind: f"{stem}_{kind}.png" for kind in made}
    for kind, picture in made.items():
        write_mask(pictures[kind], picture)
    return np.bincount(
        mask.reshape(-1), minlength=segmenter.facts.num_classes
    ) / mask.size, pictures


DEFAULT_ROOTS = {
    "cityscapes": "dataset/Cityscapes",
    "voc": "dataset/VOC2012",
    "ade20k": "dataset/ADEChallengeData2016",
}
READERS = {"cityscapes": read_cityscapes, "voc": read_voc, "ade20k": read_ade20k}


def labels_of_folders(options: SegmentationSourceOptions) -> Optional[Labels]:
    """Return the classes that the options name; None where the masks must tell."""
    if options.classes:
        labels = read_classes(options.classes)
        if options.num_classes not in (None, labels.num_classes):
            raise UsageError(
                f"--num-classes {options.num_classes}: {options.classes} has {labels.num_classes}"
            )
        return labels
    return numbered(options.num_classes) if options.num_classes else None


def labels_of(options: SegmentationSourceOptions, facts: ModelFacts) -> Labels:
    """Return the classes of a trained network, for masks of other folders."""
    known = {"cityscapes": CITYSCAPES, "voc": VOC, "ade20k": ade20k()}.get(options.dataset)
    labels = known or labels_of_folders(options)
    plain = numbered(facts.num_classes, facts.class_names)
    return labels or dataclasses.replace(plain, colours=palette_of(facts))


def open_part(
    options: SegmentationSourceOptions, part: str, labels: Optional[Labels] = None
) -> Optional[SegmentationSource]:
    """Return the images and masks of a part of the data set that the options name.

    Parameters
    ----------
    options
    part
        ``train``, ``val`` or ``test``.
    labels
        Of folders without a class file: those of the training part.

    Returns
    -------
    None for folders that have no such part.
    """
    if options.dataset in READERS:
        return READERS[options.dataset](options.data_root or DEFAULT_ROOTS[options.dataset], part)
    labels = labels or labels_of_folders(options)
    if options.dataset == "demo":
        config = prepare_demo_streets(options.data_root)
        colours = np.array(config.colours, np.uint8)
        plain = numbered(len(config.class_names), config.class_names)
        images, masks = (f"{config.root}/{part}/{kind}" for kind in ("images", "masks"))
        return read_folders(images, masks, dataclasses.replace(plain, colours=colours), "demo")
    images, masks = {
        "train": (options.images, options.masks),
        "val": (options.val_images, options.val_masks),
    }.get(part, (None, None))
    if options.data_root:
        images = images or f"{options.data_root}/{part}/images"
        masks = masks or f"{options.data_root}/{part}/masks"
    if part == "train" and not (images and masks):
        raise UsageError("--dataset folders needs --images DIR and --masks DIR, or --data-root DIR")
    if not images or not masks:
        return None
    if labels is None:
        # As many classes as the masks' highest value asks for.
        found = highest_id(read_folders(images, masks, numbered(IGNORED - 1)))
        labels = numbered(found + 1)
    return read_folders(images, masks, labels)
