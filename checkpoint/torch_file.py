"""Read and write the tensors of a PyTorch file without PyTorch, and without running anything in it.

A ``.pth`` file is a pickle, and a pickle can call any function. This reader lets a file name only
what tensors in ordered dictionaries need and refuses every other name. It reads both of
``torch.save``'s forms: the zip archive of PyTorch 1.6 and later, and the older stream, in which
the weights of GloRe were released. The writer writes the zip form, which
``torch.load(weights_only=True)`` reads. Layouts after the PyTorch sources (torch/serialization.py).
"""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import IO, Any, Callable, NamedTuple

import numpy as np

from glore_common import atomic_path

from .params import STREAM_START, ZIP_START, Arrays, CheckpointError

_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "<b1",
}


# Where PyTorch begins a tensor's values in the archive: a file can then be mapped into memory.
ALIGNMENT = 64


class _Type(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple


# From a storage to its values.
_Load = Callable[[_Storage], np.ndarray]


class _Rebuild:
    """Stands for PyTorch's function that makes a tensor; holds nothing a pickle could change."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_ignored):
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    """Stands for PyTorch's function that makes a Parameter of a tensor."""

    __slots__ = ()

    def __call__(self, tensor, *_ignored):
        return tensor


class _Unpickler(pickle._Unpickler):
    """An unpickler that knows tensors, their storages, ordered dictionaries, and nothing else.

    Built on the implementation in Python: that in C reserves as much memory as one damaged number
    in the file asks for. State dicts are small once the tensors' values are outside the pickle.
    """

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in _TYPES:
            return _Type(_TYPES[name])
        if module == "torch" and name.endswith("Storage"):
            raise CheckpointError(f"it holds tensors of a type that is not supported: {name}")
        raise CheckpointError(
            f"it asks for {module}.{name}, which no state dict needs; files that do may run "
            "anything when loaded, so this one is refused"
        )

    def persistent_load(self, pid):
        kind, storage_type, key, _location, count, *view = pid
        if kind != "storage" or not isinstance(storage_type, _Type) or any(view):
            raise CheckpointError("it refers to something that is no plain storage")
        return _Storage(str(key), np.dtype(storage_type.dtype), int(count))


def _read_zip(stream: IO[bytes]) -> tuple[Any, _Load]:
    """Return (object, function from storage to array) of the zip form."""
    archive = zipfile.ZipFile(stream)
    # PyTorch never compresses: what all parts unpack to is bounded by the file's own size.
    if sum(info.file_size for info in archive.infolist()) > os.fstat(stream.fileno()).st_size:
        raise CheckpointError("its parts unpack to more than the file's size")
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names:
        raise CheckpointError("it is a zip file but no PyTorch file: it holds no data.pkl")

    def content(part: str) -> IO[bytes]:
        info = archive.getinfo(names[part])
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"its part {part} is compressed, which PyTorch never does")
        return archive.open(info)

    if "byteorder" in names:
        with content("byteorder") as order:
            if order.read().strip() != b"little":
                raise CheckpointError("it was written on a big-endian machine")
    with content("data.pkl") as pickled:
        found = _Unpickler(pickled).load()

    def load(storage: _Storage) -> np.ndarray:
        if f"data/{storage.key}" not in names:
            raise CheckpointError(f"its storage {storage.key} is missing")
        with content(f"data/{storage.key}") as part:
            return np.frombuffer(part.read(), storage.dtype)

    return found, load


def _read_stream(stream: IO[bytes]) -> tuple[Any, _Load]:
    """Return (object, function from storage to array) of the older form."""
    size = os.fstat(stream.fileno()).st_size
    _magic, protocol, system = (_Unpickler(stream).load() for _ in range(3))
    if protocol != 1001 or not system.get("little_endian"):
        raise CheckpointError("it is of another version or of a big-endian machine")
    found = _Unpickler(stream).load()
    keys = _Unpickler(stream).load()
    places = {}
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in _tensors(found)}
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        # The size of an item is that of the tensors on it; a storage without any ends the search.
        if key not in dtypes:
            raise CheckpointError(f"its storage {key} belongs to no tensor")
        length = count * dtypes[key].itemsize
        if count < 0 or stream.tell() + length > size:
            raise CheckpointError("it ends too early: the file is truncated")
        places[key] = (stream.tell(), count)
        stream.seek(length, os.SEEK_CUR)

    def load(storage: _Storage) -> np.ndarray:
        start, count = places[storage.key]
        stream.seek(start)
        return np.frombuffer(stream.read(count * storage.dtype.itemsize), storage.dtype)

    return found, load


def _tensors(found: Any) -> Iterator[_Tensor]:
    """Yield the tensors anywhere in nested dictionaries, lists and tuples, each container once."""
    waiting, seen = [found], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)


def _array(tensor: _Tensor, load: _Load) -> np.ndarray:
    """Return a tensor's values as an array of its own."""
    flat = load(tensor.storage)
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if any(size < 0 for size in [*shape, *strides, offset]) or len(shape) != len(strides):
        raise CheckpointError("one of its tensors has an impossible shape")
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides))
    if flat.size != tensor.storage.size or (0 not in shape and last >= flat.size):
        raise CheckpointError("one of its tensors reaches beyond its storage")
    if 0 in shape:
        return np.zeros(shape, flat.dtype)
    view = np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [step * flat.itemsize for step in strides], writeable=False
    )
    if view.size > flat.size:
        raise CheckpointError("one of its tensors repeats its values")
    return view.copy()


def state_dict_of(found: Any, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the state dict in what a file holds: all of it, or its key ``state_dict``.

    Raises
    ------
    CheckpointError
        If that is no dictionary of names to tensors.
    """
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise CheckpointError("it holds no state dict")
    for name, value in found.items():
        if not isinstance(name, str) or not is_tensor(value):
            raise CheckpointError(f"it is no plain state dict: {str(name)[:80]!r} is no tensor")
    return found


def read_torch_file(path: str) -> Arrays:
    """Return the state dict of a PyTorch file.

    Parameters
    ----------
    path
        A file of ``torch.save``: a state dict, or a dictionary with one under ``state_dict``.

    Returns
    -------
    dict
        PyTorch's names to NumPy arrays.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is truncated, or holds anything but a plain state dict.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(STREAM_START))
            stream.seek(0)
            if start.startswith(ZIP_START):
                found, load = _read_zip(stream)
            elif start == STREAM_START:
                found, load = _read_stream(stream)
            else:
                raise CheckpointError("it is no PyTorch file")
            state = state_dict_of(found, lambda value: isinstance(value, _Tensor))
            return {name: _array(tensor, load) for name, tensor in state.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # A damaged pickle can fail in any way; none of them is a bug of ours.
        raise CheckpointError(
            f"{path} cannot be loaded: it is truncated or damaged ({type(error).__name__}: {error})"
        ) from error


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(parts: list[bytes]) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _pickled(arrays: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> bytes:
    """Return the pickle of a state dict whose values lie in storages 0, 1, … of the archive."""
    ordered = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    items = []
    for key, (name, array) in enumerate(arrays.items()):
        storage = [
            _text("storage"),
            _global("torch", kinds[array.dtype.str]),
            _text(str(key)),
            _text("cpu"),
            _number(array.size),
        ]
        tensor = [
            _tuple(storage) + pickle.BINPERSID,
            _number(0),
            _tuple([_number(size) for size in array.shape]),
            _tuple([_number(step // array.itemsize) for step in array.strides]),
            pickle.NEWFALSE,  # it needs no gradient
            ordered,
        ]
        made = _global("torch._utils", "_rebuild_tensor_v2") + _tuple(tensor) + pickle.REDUCE
        items.append(_text(name) + made)
    body = ordered + pickle.MARK + b"".join(items) + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + body + pickle.STOP


def write_torch_file(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as ``torch.save`` does; the file appears whole or not at all.

    Parameters
    ----------
    path
    arrays
        PyTorch's names to arrays.

    Raises
    ------
    CheckpointError
        If PyTorch has no tensors of an array's type.
    """
    kinds = {np.dtype(dtype).str: kind for kind, dtype in _TYPES.items()}
    # As they lie in the file: one after the other, little-endian. (A shape of () stays one.)
    plain = {
        name: np.array(value, value.dtype.newbyteorder("<"), order="C", copy=True)
        for name, value in arrays.items()
    }
    for name, array in plain.items():
        if array.dtype.str not in kinds:
            raise CheckpointError(f"{name} is of type {array.dtype}, which PyTorch has not")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def put(name: str, content: bytes) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")
            assert archive.fp is not None
            start = archive.fp.tell() + 30 + len(info.filename) + 4  # header, name, extra's header
            padding = -start % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, content)

        put("data.pkl", _pickled(plain, kinds))
        put("byteorder", b"little")
        for key, array in enumerate(plain.values()):
            put(f"data/{key}", array.tobytes())
        put("version", b"3\n")


def read_with_torch(path: str) -> Arrays:
    """Do what :func:`read_torch_file` does with PyTorch's own ``torch.load(weights_only=True)``.

    Raises
    ------
    CheckpointError
        As above, and when PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError("PyTorch is not installed: pip install torch") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        state = state_dict_of(found, lambda value: isinstance(value, torch.Tensor))
        return {name: value.detach().cpu().numpy() for name, value in state.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:
        # As above. PyTorch's refusal of a pickle's content comes this way too, among advice to
        # load it all the same; only the line with the reason is passed on.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "error:" in line), lines[0])
        raise CheckpointError(f"{path} cannot be loaded with PyTorch: {reason}") from error
