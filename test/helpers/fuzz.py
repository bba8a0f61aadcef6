"""Give one reader of files many damaged ones: python fuzz.py READER COUNT SEED.

Prints how many were read and how many refused; anything else than a GloReError, or a signal, ends
it otherwise than with 0. A program of its own, so that a crash is seen and ends no test run.
"""

import collections
import json
import math
import os
import random
import re
import sys
import tempfile
import warnings

import numpy as np
from torch_files import as_zip, p_tensor, whole

from checkpoint.graph import read_symbol
from checkpoint.manifest import Manifest, Position, read_manifest, write_manifest
from checkpoint.params import infer_shapes, is_label, param_shapes, read_params, write_params
from checkpoint.safetensors_file import read_safetensors, write_safetensors
from checkpoint.torch_file import read_torch_file
from cluster.hosts import read_hosts
from data.image.records import read_index, read_record, scan_records, unpack
from data.image.source import read_image_list
from data.video.list import read_video_list
from dataset import read_mapping_table
from glore_common import GloReError
from glore_options import read_config
from jobs.options import KineticsOptions
from mxnet_compat import mx
from network import get_symbol

NUMBERS = (b"-1", b"0", b"255", b"65536", b"2147483648", b"-9223372036854775808", b"1e999", b"nan")
WORDS = (b"[", b"]", b"{", b"}", b'"', b",", b"null", b"true", b"\0", b"\xff\xfe", b"../", b"\n")


def mutated(content, rng):
    """Return a content with one to four changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.choice((1, 2, 8, 64, len(data)))]
        elif kind == 2:
            data[place:place] = rng.choice(WORDS) * rng.choice((1, 1, 2, 50))
        elif kind == 3:
            part = data[place : place + rng.choice((1, 8, 100))]
            data[place:place] = part
        elif kind == 4:
            found = list(re.finditer(rb"-?\d+", bytes(data[:200_000])))
            if found:
                match = rng.choice(found)
                data[match.start() : match.end()] = rng.choice(NUMBERS)
        elif kind == 5 and len(data) >= 8:
            place = min(place, len(data) - 8)
            data[place : place + 8] = rng.choice(
                (b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f\0\0\0\0", rng.randbytes(8))
            )
        elif kind == 6:
            data[:] = data[: max(1, place)]
    return bytes(data)


def of_symbol(folder):
    symbol, _ = get_symbol("resnet18_w-glore_1-1", 4, crop_size=64)
    symbol.save(path := os.path.join(folder, "x-symbol.json"))

    def read(path):
        # A graph that is taken must also be one that can be used.
        found = infer_shapes(read_symbol(path), {"data": (1, 3, 64, 64)})
        if sum(math.prod(shape) for _, shape in found) > 2**26:
            return
        args, auxs = param_shapes(symbol := read_symbol(path), {"data": (1, 3, 64, 64)})
        values = {name: mx.nd.ones(shape) for name, shape in {**args, **auxs}.items()}
        values.update(
            (name, mx.nd.ones((1,))) for name in symbol.list_arguments() if is_label(name)
        )
        values["data"] = mx.nd.ones((1, 3, 64, 64))
        try:
            executor = symbol.bind(
                mx.cpu(),
                {name: values[name] for name in symbol.list_arguments()},
                aux_states={name: values[name] for name in symbol.list_auxiliary_states()},
            )
            for output in executor.forward():
                output.wait_to_read()
        except mx.MXNetError as error:
            raise GloReError(str(error)) from error

    return path, read


def of_params(folder):
    path = os.path.join(folder, "x.params")
    write_params(path, {"arg:w": np.ones((2, 3), "float32"), "aux:v": np.ones(4, "float32")})
    return path, read_params


def of_manifest(folder):
    path = os.path.join(folder, "x.json")
    write_manifest(path, Manifest(Position(step=3), options={"run": {"end_epoch": 4}}))

    def read(path):
        # With a fitting checksum, as who crafts a file would write it.
        from checkpoint import manifest

        try:
            with open(path, encoding="utf-8") as stream:
                content = json.load(stream)
            content.pop("checksum", None)
            content["checksum"] = manifest._checksum(content)
            with open(path, "w", encoding="utf-8") as stream:
                json.dump(content, stream)
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
        return read_manifest(path)

    return path, read


def of_torch(folder):
    path = os.path.join(folder, "x.pth")
    storages = {"0": np.arange(6, dtype="float32"), "1": np.ones(2, "float32")}
    with open(path, "wb") as stream:
        stream.write(
            as_zip(
                whole([(n, p_tensor(k, storages[k])) for n, k in (("a", "0"), ("b", "1"))]),
                storages,
            )
        )
    return path, read_torch_file


def of_safetensors(folder):
    path = os.path.join(folder, "x.safetensors")
    write_safetensors(path, {"a": np.ones((2, 3), "float32"), "b": np.ones(2, "float16")}, {})
    return path, read_safetensors


def of_records(folder):
    path = os.path.join(folder, "x.rec")
    record = mx.recordio.MXIndexedRecordIO(os.path.join(folder, "x.idx"), path, "w")
    for index in range(3):
        record.write_idx(index, mx.recordio.pack((0, float(index), index, 0), b"image" * index))
    record.close()

    def read(path):
        places, _ = scan_records(path)
        with open(path, "rb") as stream:
            for place in places:
                unpack(read_record(stream, place))

    return path, read


def of_index(folder):
    path, _ = of_records(folder)
    return os.path.join(folder, "x.idx"), lambda index: read_index(index, path)


def of_text(folder, text, read):
    path = os.path.join(folder, "x.txt")
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
    return path, read


READERS = {
    "symbol": of_symbol,
    "params": of_params,
    "manifest": of_manifest,
    "torch": of_torch,
    "safetensors": of_safetensors,
    "records": of_records,
    "index": of_index,
    "video-list": lambda folder: of_text(
        folder, "0 1 a/b.avi\n1 0 c d.avi\n", lambda path: read_video_list(path, folder, 2)
    ),
    "image-list": lambda folder: of_text(
        folder, "a/b.jpg 1\nc d.jpg 0\n", lambda path: read_image_list(path, folder)
    ),
    "mapping": lambda folder: of_text(
        folder, "0\tabseiling\n1\tair drumming\n", lambda path: read_mapping_table(path)
    ),
    "hosts": lambda folder: of_text(folder, "node1 slots=4\nnode2:2\n# no\n", read_hosts),
    "options": lambda folder: of_text(
        folder,
        "run: {end_epoch: 3}\nbatch_size: 8\nlr_steps: [1, 2.4e5]\n",
        lambda path: read_config(path, KineticsOptions()),
    ),
}


def main(name, count, seed):
    """Run it; return the exit code."""
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        path, read = READERS[name](folder)
        with open(path, "rb") as stream:
            content = stream.read()
        read(path)
        for number in range(count):
            changed = mutated(content, rng)
            with open(path, "wb") as stream:
                stream.write(changed)
            try:
                read(path)
                outcomes["read"] += 1
            except GloReError:
                outcomes["refused"] += 1
            except BaseException:
                print(f"{name}, file {number}: {changed[:300]!r}", file=sys.stderr)
                raise
    print(f"{name}: {count} files, {outcomes['read']} read, {outcomes['refused']} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
