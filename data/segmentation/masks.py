"""Reading and writing masks: pictures whose pixels hold ids.

A palette picture gives the numbers of its colours, not the colours; a mask is turned as its EXIF
orientation says, as images are.
"""

import io

import numpy as np
from PIL import Image, ImageOps

from glore_common import atomic_path

from .labels import MaskError


def read_mask(path: str) -> np.ndarray:
    """Read a mask.

    Returns
    -------
    numpy.ndarray
        (h, w) uint8 ids of a grey or palette picture, or (h, w, 3) uint8 RGB of a colour picture.

    Raises
    ------
    MaskError
        A file that is no picture, has an alpha channel, or values above 255.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            mode = picture.mode
            array = np.asarray(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MaskError(f"the mask {path} cannot be read: {error}") from error
    if mode in ("L", "P", "RGB"):
        return array
    if mode == "1":
        return array.astype(np.uint8)
    if mode.startswith("I"):
        if array.min() < 0 or array.max() > 255:
            raise MaskError(
                f"the mask {path} has 16-bit values up to {array.max()}; ids end at 255"
            )
        return array.astype(np.uint8)
    raise MaskError(
        f"the mask {path} is a picture of kind {mode}; expected are grey or palette pictures of "
        "ids (or RGB, with a class file that says what colours mean). Remove an alpha channel."
    )


def write_mask(path: str, mask: np.ndarray) -> None:
    """Write a mask (h, w) uint8 as a grey PNG file, or (h, w, 3) as a colour one."""
    with atomic_path(path) as temporary:
        Image.fromarray(mask).save(temporary, "PNG")
