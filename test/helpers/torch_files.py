"""PyTorch files made without PyTorch, opcode by opcode: pickling its classes would need them."""

import io
import pickle
import struct
import zipfile

from checkpoint.torch_file import STREAM_START

STORAGE = {"f4": "FloatStorage", "i8": "LongStorage", "f2": "HalfStorage", "f8": "DoubleStorage"}


def p_str(text):
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def p_int(number):
    return b"J" + struct.pack("<i", number)


def p_global(module, name):
    return f"c{module}\n{name}\n".encode()


def p_tuple(parts):
    return b"(" + b"".join(parts) + b"t"


def p_tensor(key, array, offset=0, strides=None, count=None, view=b""):
    kind = STORAGE[array.dtype.str[1:]]
    strides = strides or [step // array.itemsize for step in array.strides]
    count = array.size if count is None else count
    pid = p_tuple(
        [p_str("storage"), p_global("torch", kind), p_str(key), p_str("cpu"), p_int(count)]
        + ([view] if view else [])
    )
    arguments = [
        pid + b"Q",
        p_int(offset),
        p_tuple(map(p_int, array.shape)),
        p_tuple(map(p_int, strides)),
        b"\x89",
        p_global("collections", "OrderedDict") + b")R",
    ]
    return p_global("torch._utils", "_rebuild_tensor_v2") + p_tuple(arguments) + b"R"


def p_dict(items):
    """An OrderedDict, as PyTorch's state dicts are."""
    body = b"".join(p_str(name) + value for name, value in items)
    return p_global("collections", "OrderedDict") + b")R" + b"(" + body + b"u"


def whole(state_items):
    """A training checkpoint: epoch, state_dict, optimizer."""
    body = p_str("epoch") + p_int(7) + p_str("state_dict") + p_dict(state_items)
    body += p_str("optimizer") + b"}(" + p_str("lr") + b"G" + struct.pack(">d", 0.1) + b"u"
    return b"\x80\x02}(" + body + b"u."


def as_zip(pickled, storages, folder="archive", compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"{folder}/data/{key}", array.tobytes())
    return stream.getvalue()


def as_stream(pickled, storages, view=False):
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
    content = STREAM_START + pickle.dumps(1001, 2) + system + pickled
    content += pickle.dumps(sorted(storages), 2)
    for key in sorted(storages):
        content += struct.pack("<q", storages[key].size) + storages[key].tobytes()
    return content
