"""Packed images: the RecordIO files that MXNet's im2rec writes, read without MXNet.

Worker processes must not load MXNet, so that ``mxnet.recordio`` cannot serve. A file is a chain of
parts: magic number, a word with a kind (3 bits) and a length (29 bits), the content, padding to
four bytes. A record whose content holds the magic number at a multiple of four is split there into
several parts. The content is ``flag, label, id, id2``, ``flag`` further labels, the encoded image
(dmlc-core ``recordio.h``; MXNet ``recordio.py``).
"""

import os
import re
import struct
from collections.abc import Sequence
from typing import IO

import numpy as np

from glore_common import GloReError, module_command, progress

MAGIC = struct.pack("<I", 0xCED7230A)
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
LARGEST_PART = (1 << 29) - 1
HEADER = struct.Struct("<IfQQ")
REMEDY = f"Copy it again, or make it again with: {module_command('dataset.im2rec')}"


class RecordError(GloReError):
    """A record file that cannot be used."""


def _read_part(stream, offset, limit=None):
    """Return (kind, content up to ``limit`` bytes, next part's offset, length); None at the end."""
    stream.seek(offset)
    head = stream.read(8)
    if not head:
        return None
    if len(head) < 8:
        raise RecordError(f"it ends within the header of the record at byte {offset}")
    if head[:4] != MAGIC:
        raise RecordError(f"there is no record at byte {offset}")
    (word,) = struct.unpack("<I", head[4:])
    length = word & ((1 << 29) - 1)
    content = stream.read(length if limit is None else min(limit, length))
    return word >> 29, content, offset + 8 + (length + 3) // 4 * 4, length


def read_record(stream: IO[bytes], offset: int) -> bytes:
    """Return the content of the record that begins at byte ``offset`` of a binary stream.

    Raises
    ------
    RecordError
        There is no record, or the file ends within it; without the file's name.
    """
    parts: list[bytes] = []
    while True:
        part = _read_part(stream, offset)
        if part is None:
            raise RecordError(f"it ends before byte {offset}")
        kind, content, following, length = part
        if len(content) < length:
            raise RecordError(f"it ends within the record at byte {offset}")
        if (kind in (WHOLE, FIRST)) == bool(parts):
            raise RecordError(f"the record at byte {offset} is no beginning of one")
        parts.append(content)
        if kind in (WHOLE, LAST):
            return MAGIC.join(parts)
        offset = following


def unpack(content: bytes) -> tuple[np.ndarray, bytes]:
    """Split a record into its labels and the encoded image.

    Returns
    -------
    labels
        float32, usually one.
    image
    """
    if len(content) < HEADER.size:
        raise RecordError(f"a record of {len(content)} bytes holds no image")
    flag, label, _, _ = HEADER.unpack_from(content)
    if flag == 0:
        return np.array([label], np.float32), content[HEADER.size :]
    end = HEADER.size + 4 * flag
    if len(content) < end:
        raise RecordError(f"a record of {len(content)} bytes cannot hold {flag} labels")
    return np.frombuffer(content, np.float32, flag, HEADER.size), content[end:]


def pack(key: int, labels: Sequence[float], image: bytes) -> bytes:
    """Return the content of a record; :func:`unpack` is the reverse."""
    if len(labels) == 1:
        return HEADER.pack(0, labels[0], key, 0) + image
    further = np.asarray(labels, np.float32).tobytes()
    return HEADER.pack(len(labels), 0.0, key, 0) + further + image


def write_record(stream: IO[bytes], content: bytes) -> None:
    """Write a record at the end of a binary stream.

    Raises
    ------
    ValueError
        It is too long for the format: half a gigabyte.
    """
    cuts = []
    at = content.find(MAGIC)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
        at = content.find(MAGIC, at + (4 if at % 4 == 0 else 1))
    starts = [0, *(cut + 4 for cut in cuts)]
    parts = [content[start:end] for start, end in zip(starts, [*cuts, len(content)])]
    if max(map(len, parts)) > LARGEST_PART:
        raise ValueError(f"{len(content)} bytes are more than a record holds")
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        kind = (WHOLE if last else FIRST) if number == 0 else (LAST if last else MIDDLE)
        stream.write(MAGIC + struct.pack("<I", kind << 29 | len(part)))
        stream.write(part + bytes(-len(part) % 4))


def first_label(content: bytes) -> float:
    """Return the first label of a record of which the first bytes are given."""
    try:
        flag, label, _, _ = HEADER.unpack_from(content)
        return struct.unpack_from("<f", content, HEADER.size)[0] if flag else label
    except struct.error:
        raise RecordError(f"a record of {len(content)} bytes holds no image") from None


def first_labels(path: str, offsets: list[int]) -> list[float]:
    """Return the first labels of some records, reading only their first bytes.

    Raises
    ------
    RecordError
    """
    found = []
    with open(path, "rb") as stream:
        for offset in offsets:
            part = _read_part(stream, offset, HEADER.size + 4)
            if part is not None:
                found.append(first_label(part[1]))
    return found


def scan_records(path: str) -> tuple[list[int], list[float]]:
    """Find all records of a file, reading only their first bytes.

    Returns
    -------
    offsets
        Where each record begins, in bytes.
    labels
        The first label of each.

    Raises
    ------
    RecordError
        The file is no record file or ends within a record.
    """
    offsets: list[int] = []
    labels: list[float] = []
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as stream:
            for offset, kind, content in progress(_parts(stream, size), f"Scanning {path}"):
                if kind in (WHOLE, FIRST):
                    offsets.append(offset)
                    labels.append(first_label(content))
    except RecordError as error:
        raise RecordError(f"{path} is damaged: {error} (of {size}). {REMEDY}") from None
    return offsets, labels


def _parts(stream, size):
    """Yield (offset, kind, first bytes) of all parts."""
    offset = 0
    while True:
        # Enough for one further label.
        part = _read_part(stream, offset, HEADER.size + 4)
        if part is None:
            return
        kind, content, following, _ = part
        if following > size:
            raise RecordError(f"it ends within the record at byte {offset}")
        yield offset, kind, content
        offset = following


def read_index(path: str, record_path: str) -> list[tuple[int, int]]:
    """Read an .idx file (rows ``key<TAB>offset``) and check it against its record file.

    Returns
    -------
    list of (int, int)
        (key, offset) in the file's order.

    Raises
    ------
    RecordError
        A malformed row (with file and line), or a record file that is cut off or another one.
    """
    rows = []
    with open(path, encoding="ascii", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            columns = line.split()
            if not columns:
                continue
            # So many digits are a place beyond any file, and more than a file can be moved to.
            if len(columns) != 2 or not all(re.fullmatch(r"\d{1,18}", c) for c in columns):
                raise RecordError(
                    f"{path}:{number}: expected 'key<TAB>offset', found {line.strip()!r}. Delete "
                    "the file to have the records found by a scan."
                )
            rows.append((int(columns[0]), int(columns[1])))
    if rows:
        _check_last(path, record_path, max(offset for _, offset in rows))
    return rows


def _check_last(path, record_path, offset):
    """Make sure that the record at ``offset`` is whole and the file's last."""
    size = os.path.getsize(record_path)
    with open(record_path, "rb") as stream:
        kind = None
        while kind not in (WHOLE, LAST):
            try:
                # Not every file can be moved to any place.
                part = _read_part(stream, offset) if offset < size else None
                if part is None or part[2] > size:
                    raise RecordError(f"it ends within the record at byte {offset}")
            except RecordError as error:
                raise RecordError(
                    f"{record_path} does not fit its index {path}: {error} (of {size}). {REMEDY}"
                ) from None
            kind, _, offset, _ = part
    if offset != size:
        raise RecordError(
            f"{record_path} does not fit its index {path}: after the last record of the index it "
            f"has {size - offset} more bytes. Delete the index to have the records found by a scan."
        )
