"""Read and write the tensors of a PyTorch file without PyTorch, and without running anything in it.

A ``.pth`` file is a pickle, and a pickle can call any function. This reader lets a file name only
what ``torch.load(weights_only=True)`` lets it name, and what else commonly lies beside weights
(NumPy's scalars, ``argparse.Namespace``); all of it stands for inert values here. Every other name
is refused. Both of ``torch.save``'s forms are read: the zip archive of PyTorch 1.6 and later, and
the older stream, in which the weights of GloRe were released. The writer writes the zip form, which
``torch.load(weights_only=True)`` reads. Layouts after the PyTorch sources (torch/serialization.py,
torch/_weights_only_unpickler.py).
"""

import logging
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any, Callable, NamedTuple, Optional

import numpy as np

from glore_common import atomic_path

from .params import STREAM_START, ZIP_START, Arrays, CheckpointError, listing
from .paths import split_key

LOGGER = logging.getLogger("glore")


# Where PyTorch begins a tensor's values in the archive: a file can then be mapped into memory.
ALIGNMENT = 64


class _Type(NamedTuple):
    """A type of numbers: NumPy's, or only a size where NumPy has none; and PyTorch's name of it."""

    dtype: str
    name: str
    known: bool = True


def _types(*rows):
    return {row[0]: _Type(row[1], row[0], *row[2:]) for row in rows}


_STORAGES = _types(
    ("DoubleStorage", "<f8"),
    ("FloatStorage", "<f4"),
    ("HalfStorage", "<f2"),
    ("BFloat16Storage", "<u2"),
    ("LongStorage", "<i8"),
    ("IntStorage", "<i4"),
    ("ShortStorage", "<i2"),
    ("CharStorage", "<i1"),
    ("ByteStorage", "<u1"),
    ("BoolStorage", "<b1"),
    ("UntypedStorage", "<u1"),
    ("ComplexFloatStorage", "<c8"),
    ("ComplexDoubleStorage", "<c16"),
    ("QInt8Storage", "<i1", False),
    ("QUInt8Storage", "<u1", False),
    ("QInt32Storage", "<i4", False),
    ("QUInt4x2Storage", "<u1", False),
    ("QUInt2x4Storage", "<u1", False),
)
_DTYPES = _types(
    *(("float64", "<f8"), ("double", "<f8"), ("float32", "<f4"), ("float", "<f4")),
    *(("float16", "<f2"), ("half", "<f2"), ("bfloat16", "<u2")),
    *(("int64", "<i8"), ("long", "<i8"), ("int32", "<i4"), ("int", "<i4"), ("int16", "<i2")),
    *(("short", "<i2"), ("int8", "<i1"), ("uint8", "<u1"), ("uint16", "<u2"), ("uint32", "<u4")),
    *(("uint64", "<u8"), ("bool", "<b1"), ("complex64", "<c8"), ("cfloat", "<c8")),
    *(("complex128", "<c16"), ("cdouble", "<c16")),
    *((name, "<u2", False) for name in ("complex32", "chalf")),
    *((f"float8_{kind}", "<u1", False) for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")),
    *(("float8_e8m0fnu", "<u1", False), ("float4_e2m1fn_x2", "<u1", False)),
    *(("quint8", "<u1", False), ("qint8", "<i1", False), ("qint32", "<i4", False)),
    *(("quint4x2", "<u1", False), ("quint2x4", "<u1", False)),
)
_BFLOAT16 = ("BFloat16Storage", "bfloat16")
# Storages that stand for no type of NumPy: nothing is written as one of them.
_READ_ONLY = (_BFLOAT16[0], "UntypedStorage")
# Tensors that no network here has. A file that holds one is read as long as it is no weight.
_OTHER_TENSORS = {
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_xla_tensor": "a tensor of another device",
    "_rebuild_hpu_tensor": "a tensor of another device",
}
# Names without consequences: nothing of them is made.
_INERT = {
    ("torch", "device"),
    ("torch", "Tensor"),
    ("torch", "Generator"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_get_layout"),
    *(("torch", f"per_{what}_affine") for what in ("tensor", "channel")),
    *(("torch", f"per_{what}_symmetric") for what in ("tensor", "channel")),
    ("torch", "per_channel_affine_float_qparams"),
    *(("torch", name) for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc")),
    *(("torch", name) for name in ("sparse_bsr", "sparse_bsc", "jagged")),
    *(("torch", name) for name in ("contiguous_format", "preserve_format")),
    *(("torch", name) for name in ("channels_last", "channels_last_3d")),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(("pathlib", f"{pure}{kind}Path") for pure in ("", "Pure") for kind in ("Posix", "Windows")),
    *(("builtins", name) for name in ("int", "long", "float", "bool", "str", "unicode")),
    *(("builtins", name) for name in ("list", "dict", "tuple")),
    *(("datetime", name) for name in ("date", "datetime", "timedelta")),
}
# Plain containers, which stand for themselves. (A device's Size is a tuple, a Counter a dict.)
_CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): dict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
}


class _Inert:
    """Stands for an object that has no bearing on the weights; takes everything, keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_arguments, **_keywords):
        return object.__new__(cls)

    def __init__(self, *_arguments, **_keywords):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        """Take an item of a list."""

    def extend(self, values):
        """Take items of a list."""

    def add(self, value):
        """Take an item of a set."""


class _Storage(NamedTuple):
    key: str
    type: _Type
    size: int
    # A view begins here, in numbers of the storage.
    start: int = 0


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple
    # Of its numbers, where the storage's own are bytes.
    type: Optional[_Type] = None

    def __setstate__(self, state):
        # Of a Parameter of PyTorch 0.3: whether it wants a gradient.
        pass


class _Other(NamedTuple):
    """A tensor that cannot be read: what it is."""

    what: str

    def __setstate__(self, state):
        pass


# From a storage to its values.
_Load = Callable[[_Storage], np.ndarray]


class _Call:
    """Stands for a function of PyTorch; made afresh for each mention, so nothing can be changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)


def _rebuild_tensor_v3(storage, offset, shape, strides, _grad, _hooks, kind, *_ignored):
    return _Tensor(storage, offset, shape, strides, kind)


def _rebuild_from_type(function, _type, arguments, _state):
    if not isinstance(function, _Call):
        raise CheckpointError("one of its tensors is made by something that makes none")
    return function(*arguments)


def _bytes_of(text, encoding="latin1"):
    # How pickle writes bytes for Python 2.
    if encoding != "latin1" or not isinstance(text, str):
        raise CheckpointError("it encodes something that is no text")
    return text.encode("latin1")


def _byte_array(content=b"", *encoding):
    content = _bytes_of(content, *encoding) if encoding else content
    if not isinstance(content, bytes):
        raise CheckpointError("it makes an array of bytes of something else")
    return content


_FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): lambda *call: _Tensor(*call[:4]),
    ("torch._utils", "_rebuild_tensor_v2"): lambda *call: _Tensor(*call[:4]),
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch.nn.parameter", "Parameter"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "defaultdict"): lambda *_: {},
    ("_codecs", "encode"): _bytes_of,
    ("builtins", "bytearray"): _byte_array,
}


def _other_tensor(what):
    return lambda *_: _Other(what)


class _Unpickler(pickle._Unpickler):
    """An unpickler that knows tensors, their storages, plain containers, and nothing else.

    Built on the implementation in Python: that in C reserves as much memory as one damaged number
    in the file asks for. State dicts are small once the tensors' values are outside the pickle.

    Attributes
    ----------
    storages
        Those that were mentioned, by key.
    """

    def __init__(self, stream: IO[bytes], views: bool = False) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}
        self._views = views

    def find_class(self, module, name):
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if (module, name) in _FUNCTIONS:
            return _Call(_FUNCTIONS[module, name])
        if (module, name) in _INERT or module == "numpy.dtypes":
            return _Inert
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            raise CheckpointError(f"it holds tensors of a type that is not supported: {name}")
        if module == "torch._utils" and name in _OTHER_TENSORS:
            return _Call(_other_tensor(_OTHER_TENSORS[name]))
        raise CheckpointError(
            f"it asks for {module}.{name}, which torch.load(weights_only=True) does not load "
            "either: a file that does may run anything when loaded, so this one is refused. Save "
            "the weights alone: torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, pid):
        kind, storage_type, key, _location, count, *view = pid
        if kind != "storage" or not isinstance(storage_type, _Type):
            raise CheckpointError("it refers to something that is no plain storage")
        storage = _Storage(str(key), storage_type, int(count))
        self.storages[storage.key] = storage
        if any(view):
            # (key of the view, where it begins, how many numbers it has), of the older form only
            if not self._views or len(view) != 1:
                raise CheckpointError("it refers to something that is no plain storage")
            _, start, size = view[0]
            if start < 0 or size < 0 or start + size > storage.size:
                raise CheckpointError("one of its storages reaches beyond another")
            return storage._replace(start=int(start))
        return storage


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
            return np.frombuffer(part.read(), storage.type.dtype)

    return found, load


def _read_stream(stream: IO[bytes]) -> tuple[Any, _Load]:
    """Return (object, function from storage to array) of the older form."""
    size = os.fstat(stream.fileno()).st_size
    _magic, protocol, system = (_Unpickler(stream).load() for _ in range(3))
    if protocol != 1001 or not system.get("little_endian"):
        raise CheckpointError("it is of another version or of a big-endian machine")
    unpickler = _Unpickler(stream, views=True)
    found = unpickler.load()
    keys = _Unpickler(stream).load()
    places = {}
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        if key not in unpickler.storages:
            raise CheckpointError(f"its storage {key} belongs to no tensor")
        length = count * np.dtype(unpickler.storages[key].type.dtype).itemsize
        if count < 0 or stream.tell() + length > size:
            raise CheckpointError("it ends too early: the file is truncated")
        places[key] = (stream.tell(), count)
        stream.seek(length, os.SEEK_CUR)

    def load(storage: _Storage) -> np.ndarray:
        start, count = places[storage.key]
        dtype = np.dtype(storage.type.dtype)
        stream.seek(start)
        return np.frombuffer(stream.read(count * dtype.itemsize), dtype)

    return found, load


def _array(tensor: _Tensor, load: _Load) -> np.ndarray:
    """Return a tensor's values as an array of its own; bfloat16 as float32."""
    storage, kind = tensor.storage, tensor.type or tensor.storage.type
    if not isinstance(storage, _Storage) or not isinstance(kind, _Type):
        raise CheckpointError("one of its tensors is made of something else")
    if not kind.known:
        raise CheckpointError(f"it holds tensors of a type that is not supported: {kind.name}")
    flat = load(storage)
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset + storage.start
    if any(size < 0 for size in [*shape, *strides, offset]) or len(shape) != len(strides):
        raise CheckpointError("one of its tensors has an impossible shape")
    if flat.size != storage.size:
        raise CheckpointError("one of its tensors reaches beyond its storage")
    flat = flat.view(kind.dtype)
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides))
    if 0 not in shape and last >= flat.size:
        raise CheckpointError("one of its tensors reaches beyond its storage")
    if 0 in shape:
        return np.zeros(shape, flat.dtype)
    view = np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [step * flat.itemsize for step in strides], writeable=False
    )
    if view.size > flat.size:
        raise CheckpointError("one of its tensors repeats its values")
    if kind.name in _BFLOAT16:
        # The upper half of a float32.
        return (view.astype(np.uint32) << 16).view(np.float32)
    return view.copy()


def _is_state(found: Any, is_tensor: Callable[[Any], bool]) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(n, str) and is_tensor(v) for n, v in _without_extra(found).items())
    )


def _without_extra(state: dict) -> dict:
    """Leave out what modules keep beside their tensors."""
    return {n: v for n, v in state.items() if not str(n).endswith("_extra_state")}


def state_dict_of(
    found: Any, is_tensor: Callable[[Any], bool], key: Optional[str] = None, where: str = "the file"
) -> dict[str, Any]:
    """Return the state dict in what a file holds: all of it, or what lies under one of its keys.

    Parameters
    ----------
    found
        What was unpickled.
    is_tensor
    key
        Where it is; by default the one key with a state dict, which the log says.
    where
        The file, for the log.

    Raises
    ------
    CheckpointError
        If that is no dictionary of names to tensors, or several are and no key is given.
    """
    nested: dict[str, Any] = {}
    if isinstance(found, dict):
        nested = {str(n): v for n, v in found.items() if _is_state(v, is_tensor)}
    if key is not None:
        if key not in nested:
            raise CheckpointError(
                f"it has no state dict under {key!r}; it has some under: {listing(nested)}"
            )
        return _without_extra(nested[key])
    if not _is_state(found, is_tensor) and len(nested) > 1:
        raise CheckpointError(
            f"it holds several state dicts, under {listing(nested)}: say which one by its key, as "
            f"{where}:{next(iter(nested))}"
        )
    if len(nested) == 1:
        ((name, found),) = nested.items()
        LOGGER.info("%s: the weights under %r are taken", where, name)
    elif isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise CheckpointError("it holds no state dict")
    state = _without_extra(found)
    for name, value in state.items():
        if not isinstance(name, str) or not is_tensor(value):
            raise CheckpointError(f"it is no plain state dict: {str(name)[:80]!r} is no tensor")
    return state


def read_torch_file(path: str) -> Arrays:
    """Return the state dict of a PyTorch file.

    Parameters
    ----------
    path
        A file of ``torch.save``: a state dict, or a dictionary with one under one of its keys. Of
        several, ``FILE:KEY`` says which.

    Returns
    -------
    dict
        PyTorch's names to NumPy arrays.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is truncated, or holds anything but a plain state dict.
    """
    path, key = split_key(path)
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
            state = state_dict_of(found, lambda v: isinstance(v, (_Tensor, _Other)), key, path)
            for name, tensor in state.items():
                if isinstance(tensor, _Other):
                    raise CheckpointError(f"{name} is {tensor.what}, which no network here has")
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
    kinds = {
        np.dtype(kind.dtype).str: name
        for name, kind in _STORAGES.items()
        if kind.known and name not in _READ_ONLY
    }
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
    path, key = split_key(path)
    try:
        import torch
    except ImportError as error:
        raise CheckpointError("PyTorch is not installed: pip install torch") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        state = state_dict_of(found, lambda v: isinstance(v, torch.Tensor), key, path)
        return {
            # NumPy has no bfloat16.
            name: (v.float() if v.dtype == torch.bfloat16 else v).detach().cpu().numpy()
            for name, v in state.items()
        }
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:
        # As above. PyTorch's refusal of a pickle's content comes this way too, among advice to
        # load it all the same; only the line with the reason is passed on.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "error:" in line), lines[0])
        raise CheckpointError(f"{path} cannot be loaded with PyTorch: {reason}") from error
