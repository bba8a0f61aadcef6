"""Pack images into record files, with the options of MXNet's im2rec.

Classes, and what counts as an image, are those of :func:`data.image.source.read_image_folder`. What
cannot be read is named and left out. A file appears when it is whole, or not at all.
"""

import argparse
import collections
import concurrent.futures
import logging
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple, Optional

import cv2
import numpy as np

from glore_common import (
    GloReError,
    UsageError,
    atomic_path,
    module_command,
    printable,
    progress,
    write_text,
)

from .decode import decode_image
from .records import pack, scan_records, write_record
from .source import EXTENSIONS, SourceError, files_below, is_image, read_image_folder

LOGGER = logging.getLogger("glore.data")
COMMAND = "dataset.im2rec"
SHUFFLE_SEED = 100  # im2rec's
# Lists that belong to a prefix: its own, and those of chunks and parts.
PART = r"(_\d+)?(_train|_val|_test)?\.lst"


class Row(NamedTuple):
    """One line of a list: key of the record, labels, path below the root."""

    key: int
    labels: tuple[float, ...]
    path: str


def parse_args(argv: Optional[list[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=module_command(COMMAND),
        description="Make a list of images (--list), or pack the images of a list.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prefix", help="of PREFIX.lst, PREFIX.rec and PREFIX.idx")
    parser.add_argument("root", nargs="?", help="folder of the images")
    lists = parser.add_argument_group("lists")
    lists.add_argument("--list", action="store_true", help="make PREFIX.lst")
    lists.add_argument(
        "--recursive",
        action="store_true",
        help="a class for each folder in ROOT, in sorted order, with the images in and below it; "
        "else the images directly in ROOT, all of class 0",
    )
    lists.add_argument("--exts", nargs="+", default=list(EXTENSIONS), help="names that count")
    lists.add_argument(
        "--labels",
        metavar="FILE",
        help="classes of the images of a folder without class folders, as ILSVRC's val "
        "(default: the development kit's or another known one near ROOT)",
    )
    lists.add_argument(
        "--classes-of",
        metavar="FOLDER",
        help="number the classes as this folder has them: that of the training images",
    )
    lists.add_argument("--chunks", type=int, default=1, help="number of lists")
    lists.add_argument("--train-ratio", type=float, default=1.0, help="share of PREFIX_train.lst")
    lists.add_argument("--test-ratio", type=float, default=0.0, help="share of PREFIX_test.lst")
    lists.add_argument(
        "--no-shuffle", dest="shuffle", action="store_false", help="keep the sorted order"
    )
    packing = parser.add_argument_group("packing")
    packing.add_argument(
        "--pass-through",
        action="store_true",
        help="keep the files' bytes; each is decoded once all the same, to find bad ones",
    )
    packing.add_argument("--resize", type=int, default=0, help="shorter side; 0: as it is")
    packing.add_argument("--center-crop", action="store_true", help="cut to a square")
    packing.add_argument("--quality", type=int, default=95, help="JPEG 1-100, PNG 0-9")
    packing.add_argument("--num-thread", type=int, default=1, help="threads")
    packing.add_argument(
        "--color", type=int, default=1, choices=(-1, 0, 1), help="1: colour, 0: grey, -1: as is"
    )
    packing.add_argument("--encoding", default=".jpg", choices=(".jpg", ".png"), help="format")
    packing.add_argument("--pack-label", action="store_true", help="keep all labels of a row")
    parser.add_argument(
        "--index", action="store_true", help="only make PREFIX.idx anew, for PREFIX.rec"
    )
    args = parser.parse_args(argv)
    if args.root is None and not args.index:
        parser.error("the following arguments are required: root")
    if args.chunks < 1 or args.num_thread < 1:
        parser.error("--chunks and --num-thread must be at least 1")
    ratios = args.train_ratio, args.test_ratio
    if min(ratios) < 0 or sum(ratios) > 1:
        parser.error("--train-ratio and --test-ratio are shares: at least 0, together at most 1")
    args.prefix = os.path.abspath(args.prefix)
    return args


# --- lists ----------------------------------------------------------------------------------------


def rows_of_folder(args: argparse.Namespace) -> list[Row]:
    """Return the rows for the images of a folder, and say which classes there are.

    Raises
    ------
    SourceError
    """
    root = os.path.abspath(args.root)
    endings = tuple(ending.lower() for ending in args.exts)
    if args.recursive or args.labels:
        names = read_image_folder(args.classes_of).class_names if args.classes_of else None
        source = read_image_folder(root, names, args.labels)
        pairs = [(str(sample.where), sample.label) for sample in source.samples]
        for number, name in enumerate(source.class_names or ()):
            print(printable(name), number)
    else:
        if not os.path.isdir(root):
            raise SourceError(f"the image folder {root} does not exist; expected a folder.")
        pairs = [(name, 0) for name in files_below(root) if is_image(name) and os.sep not in name]
        LOGGER.warning(
            "%s: all %d images get the label 0; with --recursive each folder is a class, with "
            "--labels FILE a file says the classes",
            root,
            len(pairs),
        )
    pairs = [(name, label) for name, label in pairs if name.lower().endswith(endings)]
    if not pairs:
        raise SourceError(f"{root} has no images ({', '.join(args.exts)}).")
    return [Row(key, (float(label or 0),), path) for key, (path, label) in enumerate(pairs)]


def make_lists(args: argparse.Namespace) -> int:
    """Write the lists; return the number of images that cannot be in one."""
    rows = rows_of_folder(args)
    listed = [row for row in rows if not re.search(r"[\t\n\r]", row.path)]
    for row in rows:
        if re.search(r"[\t\n\r]", row.path):
            LOGGER.error(
                "%s cannot be in a list: its name has a tab or a line end; rename it",
                printable(row.path),
            )
    if args.shuffle:
        random.Random(SHUFFLE_SEED).shuffle(listed)
    size = -(-len(listed) // args.chunks)
    for number in range(args.chunks):
        chunk = listed[number * size : (number + 1) * size]
        name = args.prefix + (f"_{number}" if args.chunks > 1 else "")
        if args.train_ratio == 1.0:
            _write_list(f"{name}.lst", chunk)
            continue
        test, train = int(size * args.test_ratio), int(size * args.train_ratio)
        if args.test_ratio:
            _write_list(f"{name}_test.lst", chunk[:test])
        if args.train_ratio + args.test_ratio < 1.0:
            _write_list(f"{name}_val.lst", chunk[test + train :])
        _write_list(f"{name}_train.lst", chunk[test : test + train])
    return len(rows) - len(listed)


def _write_list(path: str, rows: Sequence[Row]) -> None:
    text = "".join(
        "\t".join([str(row.key), *(f"{label:f}" for label in row.labels), row.path]) + "\n"
        for row in rows
    )
    # The names' own bytes, which need not be UTF-8.
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(os.fsencode(text))
    classes = len({row.labels for row in rows})
    LOGGER.info("%s: %d images of %d classes", path, len(rows), classes)


def read_list(path: str) -> list[Row]:
    """Read a list.

    Raises
    ------
    SourceError
        If a row is none, with file and line.
    """
    rows = []
    with open(path, "rb") as stream:
        lines = os.fsdecode(stream.read()).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        try:
            key, *labels = columns[:-1]
            row = Row(int(key), tuple(float(label) for label in labels), columns[-1])
            if not row.labels:
                raise ValueError
        except ValueError:
            raise SourceError(
                f"{path}:{number}: expected 'number<TAB>label<TAB>path', found {printable(line)!r}"
            ) from None
        rows.append(row)
    return rows


# --- packing --------------------------------------------------------------------------------------


def encode(row: Row, args: argparse.Namespace) -> bytes:
    """Return the record of an image.

    Raises
    ------
    OSError, GloReError, cv2.error
        If it cannot be read or encoded.
    """
    path = os.path.join(args.root, row.path)
    with open(path, "rb") as stream:
        content = stream.read()
    image = decode_image(content, path)
    if not args.pass_through:
        content = _encoded(content, image, args)
    return pack(row.key, row.labels if args.pack_label else row.labels[:1], content)


def _encoded(content: bytes, rgb: np.ndarray, args: argparse.Namespace) -> bytes:
    if args.color == -1:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise GloReError("OpenCV cannot decode it as it is (--color -1)")
    else:
        image = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR if args.color else cv2.COLOR_RGB2GRAY)
    height, width = image.shape[:2]
    if args.center_crop:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
        height = width = side
    if args.resize:
        if height > width:
            size = (args.resize, height * args.resize // width)
        else:
            size = (width * args.resize // height, args.resize)
        image = cv2.resize(image, size)
    kind = cv2.IMWRITE_JPEG_QUALITY if args.encoding == ".jpg" else cv2.IMWRITE_PNG_COMPRESSION
    done, encoded = cv2.imencode(args.encoding, image, [kind, args.quality])
    if not done:
        raise GloReError("OpenCV cannot encode it")
    return encoded.tobytes()


def records(
    rows: Sequence[Row], args: argparse.Namespace, bad: list[tuple[str, str]]
) -> Iterator[tuple[Row, bytes]]:
    """Yield the records of the images that can be read, in order; name the others in ``bad``."""

    def attempt(row):
        try:
            return encode(row, args), ""
        except OSError as error:
            return None, error.strerror or str(error)
        except (GloReError, cv2.error, ValueError, MemoryError) as error:
            return None, " ".join(str(getattr(error, "reason", error)).split())

    ahead = 4 * args.num_thread
    with concurrent.futures.ThreadPoolExecutor(args.num_thread) as pool:
        waiting: collections.deque = collections.deque()
        todo = iter(rows)
        try:
            while True:
                while len(waiting) < ahead and (row := next(todo, None)) is not None:
                    waiting.append((row, pool.submit(attempt, row)))
                if not waiting:
                    return
                row, future = waiting.popleft()
                record, reason = future.result()
                if record is None:
                    path = os.path.join(args.root, row.path)
                    bad.append((path, reason))
                    LOGGER.error("cannot read the image %s: %s", printable(path), reason)
                else:
                    yield row, record
        finally:
            for _, future in waiting:
                future.cancel()


def pack_list(path: str, args: argparse.Namespace) -> int:
    """Pack the images of a list; return how many could not be read.

    Raises
    ------
    GloReError
        If none could.
    """
    stem = os.path.splitext(path)[0]
    rows = read_list(path)
    bad: list[tuple[str, str]] = []
    written = 0
    # Innermost the .rec file, which is renamed first: with the old index it is refused.
    with atomic_path(f"{stem}.idx") as index, atomic_path(f"{stem}.rec") as temporary:
        with open(temporary, "wb") as stream, open(index, "w", encoding="ascii") as places:
            found = progress(records(rows, args, bad), f"Packing {path}", len(rows), unit="image")
            for row, record in found:
                places.write(f"{row.key}\t{stream.tell()}\n")
                _write(stream, record, row.path)
                written += 1
        if not written:
            raise GloReError(f"{path}: none of its {len(rows)} images could be read")
    report = f"{stem}_bad-files.tsv"
    if bad:
        write_text(report, "".join(f"{printable(name)}\t{reason}\n" for name, reason in bad))
    elif os.path.exists(report):
        os.remove(report)
    LOGGER.info(
        "%s.rec: %d of %d images%s",
        stem,
        written,
        len(rows),
        f"; {len(bad)} could not be read and are left out: {report}" if bad else "",
    )
    return len(bad)


def _write(stream: IO[bytes], record: bytes, name: str) -> None:
    try:
        write_record(stream, record)
    except ValueError as error:
        raise GloReError(f"{printable(name)} cannot be packed: {error}") from error


def lists_of(prefix: str) -> list[str]:
    """Return the lists of a prefix, or all in it if it is a folder."""
    folder, base = (prefix, "") if os.path.isdir(prefix) else os.path.split(prefix)
    pattern = re.compile(rf"{re.escape(base)}{PART}" if base else r"[^.].*\.lst")
    try:
        names = sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error.strerror}") from error
    if not names:
        raise UsageError(
            f"there is no list {prefix}.lst: make it first, with {module_command(COMMAND)} --list "
            f"--recursive {prefix} ROOT"
        )
    return [os.path.join(folder, name) for name in names]


def make_index(prefix: str) -> None:
    """Write PREFIX.idx for PREFIX.rec."""
    path = f"{prefix}.rec"
    if not os.path.isfile(path):
        raise SourceError(f"the record file {path} does not exist.")
    offsets, _ = scan_records(path)
    rows = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets))
    write_text(f"{prefix}.idx", rows)
    LOGGER.info("%s.idx: %d records", prefix, len(offsets))


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command; return 1 if an image was left out."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.index:
        make_index(args.prefix)
        return 0
    if args.list:
        return min(1, make_lists(args))
    return min(1, sum(pack_list(path, args) for path in lists_of(args.prefix)))
