"""From the bytes of an image file to pixels: size, orientation and decoder are chosen here alone.

What a file is follows from its content, not from its name. The header is read by Pillow; the pixels
by OpenCV, or by Pillow where OpenCV does not know the format (GIF, AVIF: the first frame). An image
is turned as its header says, in EXIF or else in XMP, for all formats alike. (OpenCV 4.11 turns
JPEG, PNG and TIFF, and knows no XMP.)
"""

import functools
import io
import warnings
from typing import IO, NamedTuple, Optional

import cv2
import numpy as np
from PIL import Image, ImageFile

from ..common.samples import UnreadableFile
from .source import DEFAULT_MAX_PIXELS

EXIF_ORIENTATION = 0x0112
# What Pillow may read: formats that are told by their first bytes, and none that runs a program.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
# First bytes of what OpenCV may read although Pillow does not know its header (odd TIFF, a damaged
# PNG chunk that does not matter). OpenCV has a bound of its own, 2^30 pixels.
KNOWN_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM")


class ImageError(UnreadableFile):
    """An image that cannot be read."""

    kind = "image"


class Header(NamedTuple):
    """Height and width as stored, and the EXIF orientation (1 to 8) that is still to be applied."""

    height: int
    width: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the turned image."""
        swapped = self.orientation >= 5
        return (self.width, self.height) if swapped else (self.height, self.width)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Prepare Pillow and return those of the formats that it was built with."""
    # The bound is ours (see decode_image), and Pillow's would only warn.
    Image.MAX_IMAGE_PIXELS = None
    # Of a damaged file the loader says what matters, once.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def header_of(stream: IO[bytes]) -> Optional[Header]:
    """Return the header of an encoded image, or None if Pillow finds none.

    ``stream`` is a binary file; no more of it is read than the header.
    """
    formats = _formats()
    try:
        with Image.open(stream, formats=formats) as image:
            width, height = image.size
            # OpenCV and Pillow turn TIFF themselves, and Pillow's size is the turned one.
            return Header(height, width, 1 if image.format == "TIFF" else _orientation(image))
    except Exception:  # a damaged file can fail in any way
        return None


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as above: the pixels may be whole all the same
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return (H, W, 3) pixels as they are to be looked at."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def decode_image(encoded: bytes, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Decode an image.

    Parameters
    ----------
    encoded
        The file's content.
    name
        For messages.
    max_pixels
        An image whose header says more is not decoded.

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
    header = header_of(io.BytesIO(encoded))
    if header is None and not encoded.startswith(KNOWN_STARTS):
        raise ImageError(
            name, f"its {len(encoded)} bytes are no whole image of a kind that is read"
        )
    if header is not None and header.height * header.width > max_pixels:
        raise ImageError(
            name,
            f"it has {header.width} x {header.height} pixels, more than --max-pixels "
            f"{max_pixels:,}",
        )
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image: Optional[np.ndarray]
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except (cv2.error, MemoryError):
        image = None
    if image is None:
        image = _decode_with_pillow(encoded, name)
    return image if header is None else turned(image, header.orientation)


def _decode_with_pillow(encoded: bytes, name: str) -> np.ndarray:
    formats = _formats()
    # gluoncv, once imported, lets Pillow fill up what is missing.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(encoded), formats=formats) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:  # a damaged file can fail in any way
        raise ImageError(
            name, f"its {len(encoded)} bytes are no whole image that OpenCV decodes"
        ) from None
