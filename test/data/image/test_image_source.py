"""Folders of classes, record files and lists: what is found in them, and what is said."""

import logging
import os
import shutil
import struct

import numpy as np
import pytest
from images import make_classes, picture, run_im2rec, write_image

from data.image.records import RecordError, read_record, scan_records, unpack
from data.image.source import (
    ImageSource,
    SourceError,
    image_source_of_rows,
    open_image_source,
    read_image_folder,
    read_image_list,
    read_image_records,
)
from glore_common import UsageError
from mxnet_compat import mx


@pytest.fixture(scope="module")
def packed(tmp_path_factory, root):
    """A folder of 3 x 4 images and the record file that im2rec makes of it."""
    folder = tmp_path_factory.mktemp("packed")
    classes = make_classes(folder / "classes")
    return classes, run_im2rec(root, str(folder / "all"), classes)


@pytest.fixture
def records(packed, tmp_path):
    """A copy of the record file and its index, to be damaged."""
    for extension in (".rec", ".idx"):
        shutil.copy(packed[1][:-4] + extension, tmp_path / ("all" + extension))
    return str(tmp_path / "all.rec")


def test_folder_of_classes_in_sorted_order_with_any_extension(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "A/x.JPeG", "a/y.bmp", "a/z.webp", "a/sub/deep.jpg"):
        write_image(str(tmp_path / name), picture(0))
    for name in ("a/notes.txt", "a/._y.bmp", ".hidden/x.jpg", "loose.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    source = open_image_source(tmp_path)
    assert source.class_names == ("A", "a", "b")
    assert source.num_classes == 3
    found = [(where.replace(os.sep, "/"), label) for where, label in source.samples]
    assert found == [
        ("A/x.JPeG", 0),
        ("a/sub/deep.jpg", 1),
        ("a/y.bmp", 1),
        ("a/z.webp", 1),
        ("b/10.jpg", 2),
        ("b/2.PNG", 2),
    ]
    assert source.name(0) == str(tmp_path / "A" / "x.JPeG")
    with pytest.raises(AttributeError):
        source.root = "frozen"


def test_folder_with_the_classes_of_training(tmp_path, caplog):
    make_classes(tmp_path, 2, 1)
    source = read_image_folder(tmp_path, ("zebra", "c1", "c0"))
    assert [label for _, label in source.samples] == [1, 2]
    assert "no folder for 1 classes: zebra" in caplog.text
    with pytest.raises(
        SourceError, match=r"folder c1, which is none of the 1 classes.*nearest: c0"
    ):
        read_image_folder(tmp_path, ("c0",))
    with pytest.raises(SourceError, match="has 2 classes, more than the 1 of the network"):
        open_image_source(tmp_path, num_classes=1)
    caplog.clear()
    assert open_image_source(tmp_path, num_classes=5).num_classes == 5
    assert "has 2 classes, the network 5" in caplog.text


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere does not exist: expected a folder"):
        open_image_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="nowhere does not exist; expected a folder"):
        read_image_folder(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="has no folders: expected one folder of images for each"):
        open_image_source(tmp_path)
    make_classes(tmp_path, 1, 1)
    for name in "defg":
        (tmp_path / name).mkdir()
    with pytest.raises(SourceError, match=r"without images: d, e, f and 1 more\. Remove them"):
        open_image_source(tmp_path)
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError, match=r"file\.txt is neither a folder .* nor a \.rec file"):
        open_image_source(tmp_path / "file.txt")


def test_records_of_im2rec_equal_what_mxnet_reads(packed):
    classes, path = packed
    source = open_image_source(path)
    assert (len(source.samples), source.num_classes, source.class_names) == (12, 3, None)
    theirs = mx.recordio.MXIndexedRecordIO(path[:-4] + ".idx", path, "r")
    with open(path, "rb") as stream, open(path[:-4] + ".lst") as listing:
        rows = [line.rstrip().split("\t") for line in listing]
        for (key, _, name), sample in zip(rows, source.samples):
            content = read_record(stream, sample.where)
            assert content == theirs.read_idx(int(key))
            labels, encoded = unpack(content)
            assert labels.tolist() == [sample.label]
            with open(os.path.join(classes, name), "rb") as file:
                assert encoded == file.read()
            assert name.startswith(f"c{sample.label}")


def test_records_without_index_and_without_scan(records):
    offsets, labels = scan_records(records)
    unscanned = read_image_records(records, num_classes=3)
    assert [sample.label for sample in unscanned.samples] == [None] * 12
    os.remove(records[:-4] + ".idx")
    source = read_image_records(records, num_classes=3)
    assert [tuple(sample) for sample in source.samples] == list(zip(offsets, labels))
    assert offsets == sorted(sample.where for sample in unscanned.samples)
    with pytest.raises(SourceError, match=r"\(byte \d+\): label 2 is out of range \(0 to 1\)"):
        read_image_records(records, num_classes=2)


def test_records_with_the_magic_number_inside_and_with_several_labels(tmp_path):
    path = str(tmp_path / "odd.rec")
    magic = struct.pack("<I", 0xCED7230A)
    contents = [magic, b"abcd" + magic * 3 + b"e", b"ab" + magic + b"cd", b"", b"x" * 5 + magic]
    writer = mx.recordio.MXRecordIO(path, "w")
    packs = [
        mx.recordio.pack(mx.recordio.IRHeader(0, number, number, 0), content)
        for number, content in enumerate(contents)
    ]
    packs.append(mx.recordio.pack(mx.recordio.IRHeader(2, [5.0, 7.0], 9, 0), b"two"))
    for pack in packs:
        writer.write(pack)
    writer.close()
    offsets, labels = scan_records(path)
    assert labels == [0, 1, 2, 3, 4, 5]
    with open(path, "rb") as stream:
        found = [read_record(stream, offset) for offset in offsets]
    assert found == packs
    assert [unpack(content)[1] for content in found] == [*contents, b"two"]
    np.testing.assert_array_equal(unpack(found[-1])[0], [5, 7])


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("missing", [3, 200, 5000])
def test_record_file_that_is_cut_off(records, indexed, missing):
    size = os.path.getsize(records)
    os.truncate(records, size - missing)
    if not indexed:
        os.remove(records[:-4] + ".idx")
    with pytest.raises(RecordError, match=r"all\.rec .*it ends (within|before)") as caught:
        read_image_records(records, num_classes=3)
    assert "python -m dataset.im2rec" in str(caught.value)


def test_record_file_and_index_that_do_not_fit(records, tmp_path):
    index = records[:-4] + ".idx"
    with open(index) as stream:
        rows = stream.readlines()
    rows.sort(key=lambda row: int(row.split()[1]))
    with open(index, "w") as stream:
        stream.writelines(rows[:-1])
    with pytest.raises(RecordError, match=r"has \d+ more bytes\. Delete the index"):
        read_image_records(records, num_classes=3)
    with open(index, "w") as stream:
        stream.writelines([*rows[:4], "4 x\n"])
    with pytest.raises(RecordError, match=r"all\.idx:5: expected 'key<TAB>offset', found '4 x'"):
        read_image_records(records, num_classes=3)
    with open(index, "w") as stream:
        stream.writelines(["77\t12\n", *rows])
    with pytest.raises(RecordError, match="names byte 12 .* where no record begins"):
        read_image_records(records)
    (tmp_path / "text.rec").write_text("this is no record file")
    with pytest.raises(RecordError, match="text.rec is damaged: there is no record at byte 0"):
        open_image_source(tmp_path / "text.rec")
    (tmp_path / "empty.rec").touch()
    with pytest.raises(SourceError, match="empty.rec holds no records"):
        open_image_source(tmp_path / "empty.rec")
    with pytest.raises(SourceError, match=r"absent\.rec does not exist"):
        open_image_source(tmp_path / "absent.rec")


def test_lists_of_files(tmp_path):
    make_classes(tmp_path, 2, 2)
    path = tmp_path / "part.txt"
    path.write_text("c0/i0.jpg 0\n\nc1/with a space.jpg\t1\r\n")
    source = read_image_list(path, tmp_path)
    expected = ImageSource(
        str(tmp_path), (("c0/i0.jpg", 0), ("c1/with a space.jpg", 1)), 2, origin=str(path)
    )
    assert source == expected
    assert open_image_source(source) is source
    assert read_image_list(path, tmp_path, class_names="abc").num_classes == 3
    with pytest.raises(SourceError, match=r"part\.txt:3: label 1 is out of range \(0 to 0\)"):
        read_image_list(path, tmp_path, num_classes=1)
    path.write_text("c0/i0.jpg 0\nc0/i1.jpg one\n")
    with pytest.raises(SourceError, match=r"part\.txt:2: expected 'path label'.*'c0/i1.jpg one'"):
        read_image_list(path, tmp_path)
    path.write_text("\n")
    with pytest.raises(SourceError, match=r"part\.txt names no images"):
        read_image_list(path, tmp_path)
    with pytest.raises(SourceError, match=r"cannot read the image list .*: No such file"):
        read_image_list(tmp_path / "none.txt", tmp_path)


def test_explicit_rows(tmp_path):
    source = image_source_of_rows([("a.jpg", 1), ("b.jpg", 0)], tmp_path, ("x", "y"))
    assert source.num_classes == 2
    assert source.name(1) == str(tmp_path / "b.jpg")
    with pytest.raises(SourceError, match=r"CUB: a\.jpg: label -1 is out of range"):
        image_source_of_rows([("a.jpg", -1)], tmp_path, origin="CUB")
    with pytest.raises(SourceError, match="none does not exist; expected a folder"):
        image_source_of_rows([("a.jpg", 0)], tmp_path / "none")


def test_scan_says_why_it_scans(records, caplog):
    caplog.set_level(logging.INFO, "glore.data")
    read_image_records(records)
    assert "no index" not in caplog.text
    os.remove(records[:-4] + ".idx")
    read_image_records(records)
    assert "has no index" in caplog.text
