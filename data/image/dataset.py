"""Samples of an image source, made in any process: nothing here needs MXNet.

Files and records are decoded by OpenCV, which turns images as their EXIF orientation says.
"""

import concurrent.futures
import copy
import dataclasses
import io
from collections.abc import Sequence
from typing import IO, Any, Optional

import cv2
import numpy as np
from PIL import Image

from glore_common import UsageError, progress

from ..common.samples import Dataset, Sample, UnreadableFile
from ..common.transforms import Compose, Resize
from .records import RecordError, read_record, unpack
from .source import ImageSource, SourceError, name_of, source_of_files

EXIF_ORIENTATION = 0x0112


class ImageError(UnreadableFile):
    """An image that cannot be read."""

    kind = "image"


def decode_image(encoded: bytes, name: str) -> np.ndarray:
    """Decode an image.

    Returns
    -------
    numpy.ndarray
        (H, W, 3) uint8, RGB.

    Raises
    ------
    ImageError
    """
    if not encoded:
        raise ImageError(name, "the file is empty")
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ImageError(name, f"its {len(encoded)} bytes are no whole image that OpenCV decodes")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(stream: IO[bytes]) -> Optional[tuple[int, int]]:
    """Return (height, width) of an encoded image from its header, or None if there is none.

    ``stream`` is a binary file; no more of it is read than the header.
    """
    try:
        with Image.open(stream) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
            return (width, height) if turned else (height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


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
    """

    kind = "image"

    def __init__(
        self,
        source: ImageSource,
        transform: Compose,
        size: Optional[tuple[int, int]],
        views: int = 1,
        threads: int = 8,
    ) -> None:
        self.source = source
        self.transform = transform
        self.size = size
        self.views = views
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
        source = dataclasses.replace(self.source, samples=())
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
        resize = self.transform.transforms[0]

        def size_of(index):
            sample = self.source.samples[index]
            try:
                if self.source.records:
                    with open(self.source.root, "rb") as stream:
                        found = image_size(io.BytesIO(unpack(read_record(stream, sample.where))[1]))
                else:
                    with open(self.source.name(index), "rb") as stream:
                        found = image_size(stream)
            except (OSError, RecordError):
                found = None
            # What cannot be read now fails again when it is its turn, and is then dealt with.
            return resize.new_size(*found) if found else (resize.size[0], resize.size[0])

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            sizes = pool.map(size_of, range(len(self)))
            label = f"Reading the image sizes of {self.origin}"
            return list(progress(sizes, label, len(self), unit="image"))

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return (views, 3, h, w)."""
        return (self.views, 3, *(self.size or self._sizes[index]))

    def name(self, index: int) -> str:
        """Return the file, or the record's place."""
        return self.source.name(index)

    def request(self, index: int) -> tuple:
        """Return (where, label, shape)."""
        return (*self.source.samples[index], self.shape_of(index))

    def finish(self) -> None:
        """Close the record file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read(self, where, label, name):
        """Return the encoded bytes of a sample and its label."""
        try:
            if not self.source.records:
                with open(name, "rb") as stream:
                    return stream.read(), label
            if self._stream is None:
                self._stream = open(self.source.root, "rb")  # noqa: SIM115  (see finish)
            labels, encoded = unpack(read_record(self._stream, where))
        except OSError as error:
            raise ImageError(name, error.strerror or str(error)) from None
        except RecordError as error:
            raise ImageError(name, str(error)) from None
        found = float(labels[0])
        if len(labels) != 1 or found != int(found) or not 0 <= found < self.source.num_classes:
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
        where, label, shape = request
        name = name_of(self.source, where)
        encoded, label = self._read(where, label, name)
        image = decode_image(encoded, name)
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
