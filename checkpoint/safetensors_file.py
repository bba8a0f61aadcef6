"""Files of the safetensors form: named arrays, and text that describes them.

A file is the length of its header in 8 bytes, the header (JSON: type, shape and place of each
array, and ``__metadata__``, texts by name), and the arrays' values, one after the other without
gaps (github.com/huggingface/safetensors). Nothing in it can be run.
"""

import json
import math
import os
import struct
from collections.abc import Mapping

import numpy as np

from glore_common import atomic_path

from .params import Arrays, CheckpointError

METADATA = "__metadata__"
TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
# The largest header that the original reader accepts.
LARGEST_HEADER = 100_000_000
ALIGNMENT = 8


def is_safetensors(path: str) -> bool:
    """Tell by its first bytes whether a file is one."""
    with open(path, "rb") as stream:
        start = stream.read(9)
    if len(start) < 9 or start[8:] != b"{":
        return False
    return 2 <= struct.unpack("<Q", start[:8])[0] <= LARGEST_HEADER


def write_safetensors(
    path: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays and what describes them; the file appears whole or not at all.

    Raises
    ------
    CheckpointError
        If an array has a type that the form has not.
    """
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    header: dict = {METADATA: dict(metadata)}
    place = 0
    for name, array in arrays.items():
        if array.dtype.str not in kinds:
            raise CheckpointError(f"{name} is of type {array.dtype}, which safetensors has not")
        header[name] = {
            "dtype": kinds[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            stream.write(array.tobytes())


def _header(path: str) -> tuple[dict, dict[str, str], int]:
    """Return the arrays' descriptions, the metadata, and where the values begin."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError("it is truncated, or no safetensors file")
        header = json.loads(stream.read(length))
    metadata = header.pop(METADATA, {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError("its metadata are no texts")
    return header, metadata, 8 + length


def _array(content: memoryview, name: str, facts: dict) -> np.ndarray:
    kind, shape, (first, last) = facts["dtype"], facts["shape"], facts["data_offsets"]
    if kind not in TYPES:
        raise CheckpointError(f"{name} is of type {kind}, which is not supported")
    dtype = np.dtype(TYPES[kind])
    count = math.prod(shape)
    sound = all(isinstance(axis, int) and axis >= 0 for axis in shape)
    if (
        not sound
        or not 0 <= first <= last <= len(content)
        or last - first != count * dtype.itemsize
    ):
        raise CheckpointError(f"the place or shape of {name} is impossible: it is damaged")
    return np.frombuffer(content[first:last], dtype).reshape(shape)


def read_safetensors(path: str) -> tuple[Arrays, dict[str, str]]:
    """Return the arrays of a file, read-only, and its metadata.

    Raises
    ------
    CheckpointError
        If it cannot be read, is truncated or damaged.
    """
    try:
        header, metadata, start = _header(path)
        with open(path, "rb") as stream:
            stream.seek(start)
            content = memoryview(stream.read())
        arrays = {name: _array(content, name, facts) for name, facts in header.items()}
        if sum(array.nbytes for array in arrays.values()) != len(content):
            raise CheckpointError("its arrays do not fill it: it is truncated or damaged")
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded: its header is damaged ({type(error).__name__}: {error})"
        ) from error
    return arrays, metadata
