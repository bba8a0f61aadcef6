"""Samples of an image source, made in any process: nothing here needs MXNet."""

import concurrent.futures
import copy
import dataclasses
import io
from collections.abc import Sequence
from typing import IO, Any, Optional

import numpy as np

from glore_common import UsageError, progress

from ..common.samples import Dataset, Sample, open_file
from ..common.transforms import Compose, Resize
from .decode import ImageError, decode_image, header_of
from .records import RecordError, read_record, unpack
from .source import DEFAULT_MAX_PIXELS, Box, ImageSource, SourceError, name_of, source_of_files


def box_within(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of the part of a box that lies in an image, in pixels."""
    left, top = (min(max(int(at), 0), size - 1) for at, size in zip(box[:2], (width, height)))
    right = min(max(round(box[0] + box[2]), left + 1), width)
    bottom = min(max(round(box[1] + box[3]), top + 1), height)
    return left, top, right - left, bottom - top


class ImageDataset(Dataset):
    """The images of a source, transformed.

    Parameters
    ----------
    source
    transform
        (1, H, W, 3) uint8 -> (views, 3, 1, h, w) or (3, 1, h, w) float32.
    size
        (h, w) that the transform gives. None: each image keeps its own, which the first step of
        ``transform``, a Resize, gives it.
    views
        Crops that the transform gives of an image.
    threads
        For reading the headers of all images, which takes place here when ``size`` is None.
    max_pixels
        An image that has more, or would have when resized, counts as unreadable.
    """

    kind = "image"

    def __init__(
        self,
        source: ImageSource,
        transform: Compose,
        size: Optional[tuple[int, int]],
        views: int = 1,
        threads: int = 8,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        self.source = source
        self.transform = transform
        self.size = size
        self.views = views
        self.max_pixels = max_pixels
        self.uniform = size is not None
        self._sizes: list[tuple[int, int]] = []
        self._stream: Optional[IO[bytes]] = (
            None  # the record file, opened by each process for itself
        )
        if size is None:
            if not isinstance(transform.transforms[0], Resize):
                raise UsageError("images of their own size need a Compose that begins with Resize.")
            self._sizes = self._read_sizes(threads)

    def __getstate__(self) -> dict[str, Any]:
        # Requests tell a worker which image to read: the list of all stays here.
        source = dataclasses.replace(self.source, samples=(), boxes={})
        return {**self.__dict__, "source": source, "_sizes": [], "_stream": None}

    def with_files(self, paths: Sequence[str]) -> "ImageDataset":
        """Return the same crops of other images, which have no labels (all are 0)."""
        if not self.uniform:
            raise UsageError("images of their own size are not read from other files.")
        other = copy.copy(self)
        other.source = source_of_files(paths)
        return other

    def __len__(self) -> int:
        return len(self.source.samples)

    @property
    def origin(self) -> str:
        """The folder, record file or list."""
        return self.source.origin

    @property
    def advice(self) -> str:
        """What to do about bad images."""
        return f"Replace or remove the bad images of {self.origin}."

    def _read_sizes(self, threads):
        """Return the (height, width) of every image after resizing."""
        short_side = self.transform.transforms[0].size[0]

        def size_of(index):
            sample = self.source.samples[index]
            try:
                if self.source.records:
                    with open(self.source.root, "rb") as stream:
                        content = unpack(read_record(stream, sample.where))[1]
                    header = header_of(io.BytesIO(content))
                else:
                    with open_file(self.source.name(index)) as stream:
                        header = header_of(stream)
                if header is None:
                    return short_side, short_side
                height, width = header.size
                box = self.source.boxes.get(sample.where)
                if box is not None:
                    _, _, width, height = box_within(box, width, height)
                return self._resized(height, width, self.source.name(index))
            except (OSError, RecordError, ImageError):
                # What cannot be read now fails again when it is its turn, and is then dealt with.
                return short_side, short_side

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            sizes = pool.map(size_of, range(len(self)))
            label = f"Reading the image sizes of {self.origin}"
            return list(progress(sizes, label, len(self), unit="image"))

    def _resized(self, height, width, name):
        """Return the (height, width) after a Resize at the beginning; raise ImageError beyond all.

        A thread of one pixel's width would fill the memory.
        """
        first = self.transform.transforms[0]
        size = first.new_size(height, width) if isinstance(first, Resize) else (height, width)
        if size[0] * size[1] > self.max_pixels:
            raise ImageError(
                name,
                f"its {width} x {height} pixels would be {size[1]} x {size[0]} when resized, more "
                f"than --max-pixels {self.max_pixels:,}",
            )
        return size

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (views, 3, h, w)."""
        return (self.views, 3, *(self.size or self._sizes[index]))

    def name(self, index: int) -> str:
        """Return the file, or the record's place."""
        return self.source.name(index)

    def request(self, index: int) -> tuple:
        """Return (where, label, shape, box)."""
        sample = self.source.samples[index]
        return (*sample, self.shape_of(index), self.source.boxes.get(sample.where))

    def finish(self) -> None:
        """Close the record file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read(self, where, label, name):
        """Return the encoded bytes of a sample and its label."""
        try:
            if not self.source.records:
                with open_file(name) as stream:
                    return stream.read(), label
            if self._stream is None:
                self._stream = open(self.source.root, "rb")  # noqa: SIM115  (see finish)
            labels, encoded = unpack(read_record(self._stream, where))
        except OSError as error:
            raise ImageError(name, error.strerror or str(error)) from None
        except RecordError as error:
            raise ImageError(name, str(error)) from None
        found = float(labels[0])
        # What is no number is in no range.
        if len(labels) != 1 or not (0 <= found < self.source.num_classes and found.is_integer()):
            raise SourceError(
                f"{name}: the label {', '.join(f'{value:g}' for value in labels)} is no class in "
                f"0 to {self.source.num_classes - 1}."
            )
        return encoded, int(found)

    def load(self, request: tuple, rng: np.random.Generator) -> Sample:
        """Read and transform one image, which ``request`` of :meth:`request` names.

        Returns
        -------
        Sample
            Array (views, 3, h, w).

        Raises
        ------
        ImageError, SourceError
        """
        where, label, shape, box = request
        name = name_of(self.source, where)
        encoded, label = self._read(where, label, name)
        image = decode_image(encoded, name, self.max_pixels)
        if box is not None:
            left, top, width, height = box_within(box, image.shape[1], image.shape[0])
            image = image[top : top + height, left : left + width]
        self._resized(image.shape[0], image.shape[1], name)
        # An image is a clip of one frame: (1, H, W, 3) -> (…, 3, 1, h, w) -> (views, 3, h, w)
        array = self.transform(image[None], rng)
        array = array.reshape((-1, *array.shape[-4:]))[:, :, 0]
        if array.shape != shape and not self.uniform:
            height, width = image.shape[:2]
            raise ImageError(name, f"it has {width} x {height} pixels, other than its header says")
        if array.shape != shape or array.dtype != np.float32:
            raise UsageError(
                f"the transform gives {array.dtype} {array.shape}, expected float32 {shape} for "
                f"{name}."
            )
        return Sample(array, label)
