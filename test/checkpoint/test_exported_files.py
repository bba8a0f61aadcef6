"""The files of other programs that this project writes: PyTorch's and safetensors."""

import json
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import pytest

from checkpoint.params import CheckpointError
from checkpoint.safetensors_file import is_safetensors, read_safetensors, write_safetensors
from checkpoint.torch_file import ALIGNMENT, read_torch_file, write_torch_file


def some(dtype="f4"):
    generator = np.random.RandomState(0)
    shapes = {"a.weight": (3, 4, 1), "b.ä": (1,), "empty": (0, 2), "scalar": ()}
    return {n: np.asarray(generator.uniform(0, 9, s)).astype(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", "?"])
def test_a_torch_file_is_read_back_as_it_was(tmp_path, dtype):
    path = str(tmp_path / "a.pth")
    arrays = some(dtype)
    write_torch_file(path, arrays)
    found = read_torch_file(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_torch_file_is_laid_out_as_pytorch_does(tmp_path):
    path = str(tmp_path / "a.pth")
    # Neither in Fortran's order nor byte-swapped do values lie in the file.
    arrays = {"w": np.asfortranarray(some()["a.weight"]), "big": np.arange(5, dtype=">f4")}
    write_torch_file(path, arrays)
    for name, value in read_torch_file(path).items():
        np.testing.assert_array_equal(value, arrays[name])
    with zipfile.ZipFile(path) as archive:
        parts = ("data.pkl", "byteorder", "data/0", "data/1", "version")
        assert archive.namelist() == [f"archive/{part}" for part in parts]
        assert archive.read("archive/version") == b"3\n"
        content = archive.read("archive/data.pkl")
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            with open(path, "rb") as stream:
                stream.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", stream.read(4))
            assert (info.header_offset + 30 + name + extra) % ALIGNMENT == 0
    # Protocol 2 and nothing but what weights_only allows.
    assert content.startswith(pickle.PROTO + b"\x02")
    named = {argument for op, argument, _ in pickletools.genops(content) if op.name == "GLOBAL"}
    assert named == {
        "collections OrderedDict",
        "torch FloatStorage",
        "torch._utils _rebuild_tensor_v2",
    }
    with pytest.raises(CheckpointError, match="which PyTorch has not"):
        write_torch_file(path, {"c": np.zeros(1, "u2")})
    assert read_torch_file(path)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", "?"])
def test_safetensors_are_read_back_as_they_were(tmp_path, dtype):
    path = str(tmp_path / "a.safetensors")
    arrays = some(dtype)
    write_safetensors(path, arrays, {"glore": '{"ä": 1}'})
    found, metadata = read_safetensors(path)
    assert is_safetensors(path)
    assert metadata == {"glore": '{"ä": 1}'}
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_every_truncation_and_addition_of_safetensors_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(str(path), {"a": np.arange(4, dtype="f4")}, {"k": "v"})
    content = path.read_bytes()
    for length in [*range(len(content)), -1]:
        path.write_bytes(content[:length] if length >= 0 else content + b"\0")
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            read_safetensors(str(path))


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]},
        {"dtype": "F8", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 16]},
        {"shape": [4]},
        5,
    ],
)
def test_damaged_headers_of_safetensors(tmp_path, facts):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": facts}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be loaded"):
        read_safetensors(str(path))


def test_a_header_of_any_claimed_length_is_not_reserved(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(20))
    assert not is_safetensors(str(path))
    with pytest.raises(CheckpointError, match="truncated"):
        read_safetensors(str(path))
