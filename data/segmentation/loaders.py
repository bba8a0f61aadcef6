"""Loaders of images and masks, for training (augmented crops) and validation (whole images)."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from glore_common import progress

from ..common.loader import Loader, LoaderConfig
from ..common.options import settled
from ..common.samples import Dataset, Sample
from ..image.decode import ImageError, decode_image, header_of
from .labels import IGNORED, MaskError
from .masks import read_mask
from .options import SegmentationReadingOptions
from .source import THREADS, SegmentationSource
from .transforms import Augmented, Whole


def read_pair(image_path: str, mask_path: Optional[str], labels: Any) -> tuple:
    """Return an image (h, w, 3) uint8 RGB and its train ids (h, w) uint8.

    Raises
    ------
    ImageError
        An image that cannot be read.
    MaskError
        A mask that cannot be used, or has another size.
    """
    try:
        with open(image_path, "rb") as stream:
            image = decode_image(stream.read(), image_path)
    except OSError as error:
        raise ImageError(image_path, error.strerror or str(error)) from None
    if mask_path is None:
        return image, np.full(image.shape[:2], IGNORED, np.uint8)
    mask = labels.train_ids(read_mask(mask_path), mask_path)
    if mask.shape != image.shape[:2]:
        raise MaskError(
            f"the image {image_path} has {image.shape[1]} x {image.shape[0]} pixels, its mask "
            f"{mask_path} {mask.shape[1]} x {mask.shape[0]} (width x height)"
        )
    return image, mask


class SegmentationDataset(Dataset):
    """Images and masks of a source, transformed.

    Parameters
    ----------
    source
    transform
        See :class:`data.segmentation.transforms.Whole`.
    size
        (h, w) that the transform gives. None: each image keeps its own, whose headers are read.
    """

    kind = "image"

    def __init__(
        self,
        source: SegmentationSource,
        transform: Whole,
        size: Optional[tuple[int, int]] = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.size = size
        self.uniform = size is not None
        self._sizes: list[tuple[int, int]] = [] if size else self._read_sizes()

    def __getstate__(self) -> dict[str, Any]:
        # Requests tell a worker what to read: the list of all stays here.
        return {**self.__dict__, "source": dataclasses.replace(self.source, pairs=()), "_sizes": []}

    def __len__(self) -> int:
        return len(self.source.pairs)

    @property
    def origin(self) -> str:
        """Where the images come from."""
        return self.source.origin

    @property
    def advice(self) -> str:
        """What to do about bad images."""
        return f"Replace or remove the bad images of {self.origin}."

    def _read_sizes(self) -> list[tuple[int, int]]:
        def size_of(index: int) -> tuple[int, int]:
            try:
                with open(self.source.image(index), "rb") as stream:
                    # What cannot be read now fails again when it is its turn.
                    header = header_of(stream)
                    return header.size if header else (1, 1)
            except OSError:
                return 1, 1

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            sizes = pool.map(size_of, range(len(self)))
            label = f"Reading the image sizes of {self.origin}"
            return list(progress(sizes, label, len(self), unit="image"))

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (1, 4, h, w)."""
        return (1, 4, *(self.size or self._sizes[index]))

    def name(self, index: int) -> str:
        """Return the image's path."""
        return self.source.image(index)

    def request(self, index: int) -> tuple:
        """Return the paths and the shape."""
        return self.source.image(index), self.source.mask(index), self.shape_of(index)

    def load(self, request: tuple, rng: np.random.Generator) -> Sample:
        """Read and transform one image and its mask: (1, 4, h, w).

        Raises
        ------
        ImageError, MaskError
        """
        image_path, mask_path, shape = request
        image, mask = read_pair(image_path, mask_path, self.source.labels)
        array = self.transform(image, mask, rng)[None]
        if array.shape != shape:
            raise ImageError(image_path, "it has another size than its header says")
        return Sample(array, 0)

    def unpack(self, arrays: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images (n, 3, h, w) and train ids (n, h, w), which are the last channel."""
        return arrays[:, :-1], arrays[:, -1]


def get_segmentation_train_loader(
    source: SegmentationSource,
    options: SegmentationReadingOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Return the loader for training: augmented crops, in a new order each epoch.

    It yields (data (n, 3, h, w), train ids (n, h, w)) as ``mx.nd`` float32 on the CPU. ``mean`` and
    ``std`` are RGB on the 0..1 scale; ``seed``, ``rank`` and ``num_ranks`` those of
    :class:`data.common.loader.LoaderConfig`.
    """
    crop = settled(options, "crop")
    transform = Augmented(
        mean,
        std,
        crop,
        settled(options, "scale_range"),
        options.flip,
        settled(options, "colours"),
    )
    config = LoaderConfig.of(
        options, shuffle=True, seed=seed, last_batch="discard", rank=rank, num_ranks=num_ranks
    )
    return Loader(SegmentationDataset(source, transform, crop), config)


def get_segmentation_val_loader(
    source: SegmentationSource,
    options: SegmentationReadingOptions,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    with_index: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Return the loader for validation: every image once, whole, with its mask.

    A batch has images of one size, size after size in the order in which they come up. An image
    that cannot be read is left out. Parameters are those of :func:`get_segmentation_train_loader`;
    ``with_index`` has it yield (data, train ids, index).
    """
    config = LoaderConfig.of(
        options,
        batch_size=options.val_batch,
        with_index=with_index,
        on_bad="skip",
        rank=rank,
        num_ranks=num_ranks,
    )
    return Loader(SegmentationDataset(source, Whole(mean, std)), config)
