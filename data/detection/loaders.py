"""Loaders of images with objects.

Images are on two canvases, one for those that are wider than high and one for the others, each as
large as its largest image: a batch holds images of one of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.loader import Loader, LoaderConfig
from ..common.options import settled
from ..common.samples import Dataset, Sample
from ..image.decode import ImageError, decode_image
from .coco import CocoSource
from .objects import Prepared, canvas_of, label_length, pack, size_of
from .options import DetectionReadingOptions


class DetectionDataset(Dataset):
    """Images of a source with their objects, each on its canvas.

    A sample's array has the rows of the image's three channels, and below them what is true of it
    (:func:`data.detection.objects.pack`), written row by row.

    Parameters
    ----------
    source
    prepared
        How an image is changed.
    """

    kind = "image"
    uniform = False

    def __init__(self, source: CocoSource, prepared: Prepared) -> None:
        self.source = source
        self.prepared = prepared
        self.places = source.most_things
        sizes = [
            size_of(each.height, each.width, prepared.short, prepared.long)
            for each in source.pictures
        ]
        wide = [width >= height for height, width in sizes]
        largest = {
            kind: tuple(
                max(size[axis] for size, w in zip(sizes, wide) if w == kind) for axis in (0, 1)
            )
            for kind in set(wide)
        }
        self.canvases = {kind: canvas_of(*size) for kind, size in largest.items()}
        self._wide = wide

    def __getstate__(self) -> dict[str, Any]:
        # Requests tell a worker what to read: the list of all stays here.
        source = dataclasses.replace(self.source, pictures=())
        return {**self.__dict__, "source": source, "_wide": []}

    def __len__(self) -> int:
        return len(self.source.pictures)

    @property
    def origin(self) -> str:
        """Where the images come from."""
        return self.source.origin

    @property
    def advice(self) -> str:
        """What to do about bad images."""
        return f"Replace or remove the bad images of {self.origin}."

    def label_rows(self, width: int) -> int:
        """Return how many rows of a canvas's width the objects take."""
        return -(-label_length(self.places) // width)

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (1, 3 H + rows of the objects, W)."""
        height, width = self.canvases[self._wide[index]]
        return (1, 3 * height + self.label_rows(width), width)

    def name(self, index: int) -> str:
        """Return the image's path."""
        return self.source.image(index)

    def request(self, index: int) -> tuple:
        """Return the path, what is known of the image, its canvas and the shape."""
        wide = self._wide[index]
        picture = self.source.pictures[index]
        return self.source.image(index), picture, self.canvases[wide], self.shape_of(index)

    def load(self, request: tuple, rng: np.random.Generator) -> Sample:
        """Read and prepare one image.

        Raises
        ------
        ImageError
            It cannot be read, or has another size than its annotations say.
        """
        path, picture, canvas, shape = request
        image = read_image(path)
        if image.shape[:2] != (picture.height, picture.width):
            raise ImageError(
                path,
                f"it has {image.shape[1]} x {image.shape[0]} pixels, its annotations say "
                f"{picture.width} x {picture.height}",
            )
        data, truth = self.prepared(image, picture, canvas, rng)
        array = np.zeros(shape, np.float32)
        rows = 3 * canvas[0]
        array[0, :rows] = data.reshape(rows, canvas[1])
        label = pack(truth, self.places)
        array[0, rows:].reshape(-1)[: len(label)] = label
        return Sample(array, 0)

    def unpack(self, arrays: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images (n, 3, H, W) and objects (n, L) of arrays (n, rows, W)."""
        count, rows, width = arrays.shape
        height = (rows - self.label_rows(width)) // 3
        images = arrays[:, : 3 * height].reshape(count, 3, height, width)
        objects = arrays[:, 3 * height :].reshape(count, -1)
        return images, objects[:, : label_length(self.places)]


def read_image(path: str) -> np.ndarray:
    """Return an image (h, w, 3) uint8 RGB, turned as its EXIF says.

    Raises
    ------
    ImageError
        It cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return decode_image(stream.read(), path)
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from None


def get_detection_train_loader(
    source: CocoSource,
    options: DetectionReadingOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Return the loader for training: in a new order each epoch.

    It yields (images (n, 3, H, W), objects (n, L)) as ``mx.nd`` float32 on the CPU; a batch has
    images of one canvas, and the last one of each is filled up with images that were there before.
    ``mean`` and ``std`` are RGB on the 0..1 scale; ``seed``, ``rank`` and ``num_ranks`` those of
    :class:`data.common.loader.LoaderConfig`.
    """
    short, long = settled(options, "short_side"), settled(options, "long_side")
    prepared = Prepared(short, long, mean, std, options.flip)
    config = LoaderConfig.of(options, shuffle=True, seed=seed, rank=rank, num_ranks=num_ranks)
    return Loader(DetectionDataset(source, prepared), config)


def get_detection_val_loader(
    source: CocoSource,
    options: DetectionReadingOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Return the loader for validation: every image once.

    An image that cannot be read is left out. Parameters are those of
    :func:`get_detection_train_loader`.
    """
    short, long = settled(options, "short_side"), settled(options, "long_side")
    config = LoaderConfig.of(
        options, batch_size=options.val_batch, on_bad="skip", rank=rank, num_ranks=num_ranks
    )
    return Loader(DetectionDataset(source, Prepared(short, long, mean, std)), config)
