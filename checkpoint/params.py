"""Parameters on disk (``.params``), their names and shapes, and whether they fit a network.

Files are in MXNet's own form. They are read by a reader of our own that checks every length:
MXNet's trusts a damaged file's numbers.
"""

import errno
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np

from glore_common import GloReError, UsageError, atomic_path
from mxnet_compat import mx

# An error lists this many names of a kind and counts the others.
LISTED = 10
# A list of arrays (src/ndarray/ndarray.cc, NDArray::Save): this number, a reserved one, the number
# of arrays, the arrays, the number of names, the names, all counts in 64 bits.
LIST_MAGIC = 0x112
# Each array begins with one of these numbers; older ones with their number of dimensions.
ARRAY_V1, ARRAY_V2, ARRAY_V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DTYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "<u1", 4: "<i4", 5: "<i1", 6: "<i8", 7: "<b1"}
MAX_DIMENSIONS = 32
# First bytes of PyTorch's files: a zip archive; and, of its older form, a pickle of protocol 2 with
# an integer that marks the file.
ZIP_START = b"PK\x03\x04"
STREAM_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class CheckpointError(GloReError):
    """What is stored cannot be read, does not fit the network, or would be lost."""


class SaveError(CheckpointError):
    """A file could not be written whole; what was there before is untouched."""


def is_label(name: str) -> bool:
    """Return whether an argument is a label (``softmax_label``): data, not a parameter."""
    return name.endswith("label")


def infer_shapes(
    symbol: mx.sym.Symbol, input_shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and shape of every variable and output of a graph, in graph order.

    Parameters
    ----------
    symbol
        Any graph. Nodes may share a name.
    input_shapes
        Shape of each input with its batch axis.

    Returns
    -------
    list of (name, shape)
        A shape that does not follow from the inputs' is (), or has zeros.

    Raises
    ------
    UsageError
        If the graph does not take inputs of these names or shapes.
    """
    unknown = sorted(set(input_shapes) - set(symbol.list_arguments()))
    if unknown:
        raise UsageError(f"the network has no input {', '.join(unknown)}")
    internals = symbol.get_internals()
    try:
        _, shapes, _ = internals.infer_shape_partial(**input_shapes)
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(
            f"the network does not take inputs of shapes {dict(input_shapes)}: {reason}"
        ) from error
    names = internals.list_outputs()
    return [(n, tuple(shape or ())) for n, shape in zip(names, shapes or [()] * len(names))]


def param_shapes(
    symbol: mx.sym.Symbol, input_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes of a network's parameters.

    Parameters
    ----------
    symbol
        The network.
    input_shapes
        Shape of each input with its batch axis: ``{"data": (1, 3, 8, 224, 224)}``. Labels need
        none.

    Returns
    -------
    args, auxs
        Name to shape, in the symbol's order, without inputs and labels.

    Raises
    ------
    UsageError
        If the network does not take inputs of these shapes.
    """
    found = dict(infer_shapes(symbol, input_shapes))
    args = {
        name: found[name]
        for name in symbol.list_arguments()
        if name not in input_shapes and not is_label(name)
    }
    auxs = {name: found[name] for name in symbol.list_auxiliary_states()}
    for name, shape in [*args.items(), *auxs.items()]:
        if not shape or 0 in shape:
            raise UsageError(
                f"the shape of {name} does not follow from {dict(input_shapes)}; give the shape of "
                "every input of the network"
            )
    return args, auxs


def listing(names: Iterable[str], listed: Optional[int] = LISTED) -> str:
    """Join names for a message; beyond so many the others are counted."""
    names = list(names)
    more = ""
    if listed is not None and len(names) > listed:
        more = f" and {len(names) - listed} more"
    return ", ".join(names[:listed]) + more


def any_matches(patterns: Iterable[str], name: str) -> bool:
    """Return whether one of the regular expressions is found in ``name``."""
    return any(re.search(pattern, name) for pattern in patterns)


def compare(
    expected: Mapping[str, Optional[tuple]],
    given: Mapping[str, Any],
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    listed: Optional[int] = LISTED,
) -> list[str]:
    """Return one line for each kind of difference between wanted and given parameters.

    Parameters
    ----------
    expected
        Name to shape; a shape of None is not compared.
    given
        Name to array.
    allow_missing, allow_extra
        Regular expressions of names that may be missing, or be there in excess.
    listed
        Names of a kind that a line has; None: all.
    """
    lines = []
    missing = [n for n in expected if n not in given and not any_matches(allow_missing, n)]
    extra = [n for n in given if n not in expected and not any_matches(allow_extra, n)]
    wrong = [
        f"{name} is {tuple(given[name].shape)}, the network has {shape}"
        for name, shape in expected.items()
        if shape is not None and name in given and tuple(given[name].shape) != shape
    ]
    for kind, found in [("missing", missing), ("extra", extra), ("of another shape", wrong)]:
        if found:
            lines.append(f"{kind} ({len(found)}): {listing(found, listed)}")
    return lines


def check(
    symbol: mx.sym.Symbol,
    arg_params: Mapping[str, Any],
    aux_params: Mapping[str, Any],
    input_shapes: Optional[Mapping],
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    where: str = "the parameters",
) -> None:
    """Raise one error that lists everything in which parameters do not fit a network.

    Parameters
    ----------
    symbol
        The network.
    arg_params, aux_params
        Name to array (anything with a ``shape``).
    input_shapes
        Shapes of the inputs with the batch axis; None compares names only.
    allow_missing, allow_extra
        Regular expressions of names that may be missing or be there in excess.
    where
        What the message calls the parameters, such as the file that they come from.

    Raises
    ------
    CheckpointError
    """
    args: Mapping[str, Optional[tuple]]
    auxs: Mapping[str, Optional[tuple]]
    if input_shapes is None:
        args = {n: None for n in symbol.list_arguments() if n != "data" and not is_label(n)}
        auxs = dict.fromkeys(symbol.list_auxiliary_states())
    else:
        args, auxs = param_shapes(symbol, input_shapes)

    def lines(listed: Optional[int]) -> list[str]:
        return [
            f"{kind}, {line}"
            for kind, expected, given in [
                ("arguments", args, arg_params),
                ("auxiliary states", auxs, aux_params),
            ]
            for line in compare(expected, given, allow_missing, allow_extra, listed)
        ]

    raise_misfit(lines, f"{where} do not fit the network")


def raise_misfit(
    lines: Callable[[Optional[int]], list[str]], message: str, advice: str = ""
) -> None:
    """Raise CheckpointError unless there are no lines of :func:`compare`.

    Parameters
    ----------
    lines
        Of so many names each; those with all names (None) go to a file, where that is longer.
    message
        What the error begins with.
    advice
        What it ends with.
    """
    shown, whole = lines(LISTED), lines(None)
    if not shown:
        return
    message += ":\n  " + "\n  ".join(shown)
    if whole != shown:
        # A file of the system's folder for such: a refused run leaves nothing beside the user's.
        handle, path = tempfile.mkstemp(prefix="glore-mismatch-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write("\n".join(whole) + "\n")
        message += f"\n  All names are in {path}"
    raise CheckpointError(message + (f"\n{advice}" if advice else ""))


def check_finite(params: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if a value is NaN or infinite, naming the parameters.

    oneDNN's rectifier turns NaN into 0: a network with such weights can look healthy.
    """
    bad = [name for name, value in params.items() if not np.isfinite(numpy_of(value, name)).all()]
    if bad:
        raise CheckpointError(
            f"{where} holds values that are not finite (NaN or infinite) in {listing(bad)}: the "
            "training that made it diverged, or the file is damaged. Take an earlier checkpoint."
        )


def numpy_of(value: Any, name: str) -> np.ndarray:
    """Return a parameter (NumPy array, NDArray or PyTorch tensor) as a NumPy array."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, mx.nd.NDArray):
        return value.asnumpy()
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    raise CheckpointError(f"{name} is no array but a {type(value).__name__}")


class _Reader:
    """Reads numbers from bytes, and never past their end."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def take(self, length: int) -> memoryview:
        """Return the next ``length`` bytes, without a copy."""
        if length > len(self.content) - self.position:
            raise CheckpointError(
                f"the file is truncated or damaged: {length} bytes are expected at byte "
                f"{self.position}, {len(self.content) - self.position} are there"
            )
        self.position += length
        return self.content[self.position - length : self.position]

    def numbers(self, form: str) -> tuple:
        """Return the next numbers, in the form of ``struct`` (little-endian)."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))


def _read_array(reader: _Reader) -> np.ndarray:
    """Return the next array of a ``.params`` file."""
    (magic,) = reader.numbers("I")
    if magic in (ARRAY_V2, ARRAY_V3):
        storage, ndim = reader.numbers("ii")
        if storage != 0:
            raise CheckpointError("it holds a sparse array, which no network here has")
    elif magic == ARRAY_V1:
        (ndim,) = reader.numbers("i")
    else:
        ndim = magic
    if not 0 < ndim <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"the file is damaged: an array of {ndim} dimensions before byte {reader.position}"
        )
    legacy = magic not in (ARRAY_V1, ARRAY_V2, ARRAY_V3)
    shape = reader.numbers(f"{ndim}{'I' if legacy else 'q'}")
    _device, _index, flag = reader.numbers("iii")
    if flag not in DTYPES or min(shape) < 1:
        raise CheckpointError(
            f"the file is damaged: shape {shape}, type {flag} before byte {reader.position}"
        )
    count = 1
    for size in shape:
        count *= size
    dtype = np.dtype(DTYPES[flag])
    return np.frombuffer(reader.take(count * dtype.itemsize), dtype).reshape(shape)


def read_params(path: str) -> Arrays:
    """Return the arrays of a ``.params`` file by their names in the file; they are read-only.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, truncated, damaged or of another kind. It is never loaded
        in part.
    """
    try:
        with open(path, "rb") as stream:
            content = memoryview(stream.read())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise CheckpointError(f"{path} is empty")
    if len(content) < 8 or struct.unpack("<Q", content[:8])[0] != LIST_MAGIC:
        raise CheckpointError(f"{path} is no MXNet .params file{_what_else(bytes(content[:16]))}")
    reader = _Reader(content)
    try:
        _magic, _reserved, count = reader.numbers("QQQ")
        arrays = [_read_array(reader) for _ in range(count)]
        (named,) = reader.numbers("Q")
        names = [bytes(reader.take(reader.numbers("Q")[0])).decode() for _ in range(named)]
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if reader.position != len(content):
        raise CheckpointError(
            f"{path} is damaged: {len(content) - reader.position} bytes follow its end"
        )
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise CheckpointError(
            f"{path} does not name its arrays: {len(arrays)} arrays, {len(set(names))} names"
        )
    return dict(zip(names, arrays))


def _what_else(start: bytes) -> str:
    """Say what a file looks like by its first bytes."""
    if start.startswith(ZIP_START) or STREAM_START.startswith(start[: len(STREAM_START)]):
        return "; it looks like a PyTorch file (.pth)"
    if start.startswith(b"\x80"):
        return "; it looks like a pickle, which is not loaded: it could run anything"
    if start.lstrip().startswith((b"{", b"<")):
        return "; it is text"
    return ""


def write_params(path: str, arrays: Mapping[str, Any]) -> None:
    """Write NDArrays or NumPy arrays to a ``.params`` file, which appears whole or not at all.

    The bytes are those of ``mx.nd.save``, which is not used because it does not notice when the
    last part does not reach the disk.

    Raises
    ------
    SaveError
        If the disk is full or read-only, a quota or limit is reached, or what was written is not
        what is there.
    """
    size = 0
    try:
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as stream:
                size += stream.write(struct.pack("<QQQ", LIST_MAGIC, 0, len(arrays)))
                for name, value in arrays.items():
                    array = np.ascontiguousarray(numpy_of(value, name))
                    size += stream.write(_array_head(array, name))
                    size += stream.write(array.data.cast("B"))
                end = struct.pack("<Q", len(arrays)) + b"".join(
                    struct.pack("<Q", len(name.encode())) + name.encode() for name in arrays
                )
                size += stream.write(end)
                stream.flush()
                os.fsync(stream.fileno())
            with open(temporary, "rb") as stream:
                stream.seek(-len(end), os.SEEK_END)
                if os.path.getsize(temporary) != size or stream.read() != end:
                    raise SaveError(f"{path}: what was read back is not what was written")
    except OSError as error:
        reason = error.strerror or error
        raise SaveError(f"{path} cannot be written: {reason}. {_way_out(error)}") from error


def _array_head(array: np.ndarray, name: str) -> bytes:
    """Return what stands before an array's numbers: version, storage, shape, device, type."""
    flags = [flag for flag, dtype in DTYPES.items() if np.dtype(dtype) == array.dtype]
    if not flags or not array.size:
        raise CheckpointError(f"{name}: MXNet has no file form of {array.dtype} {array.shape}")
    # On a CPU (device 1, number 0), which is everywhere; 0: dense.
    shape = array.shape or (1,)
    return struct.pack(f"<Iii{len(shape)}qiii", ARRAY_V2, 0, len(shape), *shape, 1, 0, flags[0])


def _way_out(error: OSError) -> str:
    """Say what to do about a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room, or keep fewer checkpoints with --keep."
    if error.errno == errno.EFBIG:
        return "Raise the limit of file sizes (ulimit -f)."
    return "Give another folder with --model-dir."


def split(
    params: Mapping[str, Any], where: str, symbol: Optional[mx.sym.Symbol] = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split {name in a file: array} into arguments and auxiliary states.

    Names without ``arg:`` and ``aux:``, as Gluon's save_parameters writes them, are told apart by
    ``symbol``.

    Raises
    ------
    CheckpointError
        If one is there twice, or cannot be told apart.
    """
    parts: dict[str, dict[str, Any]] = {"arg": {}, "aux": {}}
    states = set(symbol.list_auxiliary_states()) if symbol is not None else None
    for name, value in params.items():
        kind, colon, rest = name.partition(":")
        if not (colon and kind in parts):
            if states is None:
                raise CheckpointError(
                    f"{where}: {name[:80]!r} begins with neither arg: nor aux:; this is no "
                    "checkpoint of a symbol"
                )
            kind, rest = ("aux" if name in states else "arg"), name
        if rest in parts[kind]:
            raise CheckpointError(f"{where}: {rest} is there twice")
        parts[kind][rest] = value
    return parts["arg"], parts["aux"]
