"""data/image/pack.py: packing names bad files, numbers classes as training does, leaves no half."""

import io
import os

import numpy as np
import pytest
from images import make_classes, picture, write_image

from data.image import pack as packing
from data.image.pack import main, read_list
from data.image.records import MAGIC, read_index, read_record, unpack, write_record
from data.image.source import read_image_folder, read_image_records
from glore_common import GloReError, UsageError, run_main


def listed(prefix, folder, *options):
    return main(["--list", "--recursive", *options, str(prefix), str(folder)])


def records(prefix):
    """{key: (labels, image)} of a record file."""
    with open(f"{prefix}.rec", "rb") as stream:
        return {
            key: unpack(read_record(stream, offset))
            for key, offset in read_index(f"{prefix}.idx", f"{prefix}.rec")
        }


@pytest.fixture
def mixed(tmp_path):
    """Classes of .webp, hidden folders, an image deep down, a page called .jpg, a Latin-1 name."""
    root = tmp_path / "mix"
    for number, name in enumerate(
        ("a/0.jpg", "a/.ipynb_checkpoints/0.jpg", "b/0.webp", "c/0.jpg", "c/deep/1.png")
    ):
        write_image(str(root / name), picture(number))
    (root / "b" / "page.jpg").write_bytes(b"<html>404</html>")
    os.rename(root / "c" / "0.jpg", os.path.join(str(root), "c", os.fsdecode(b"Stra\xdfe.jpg")))
    return root


def test_classes_are_those_of_the_folder(mixed, tmp_path, capsys):
    prefix = tmp_path / "packed"
    assert listed(prefix, mixed) == 0
    assert capsys.readouterr().out == "a 0\nb 1\nc 2\n"
    rows = {row.path: row.labels for row in read_list(f"{prefix}.lst")}
    source = read_image_folder(mixed)
    assert rows == {sample.where: (sample.label,) for sample in source.samples}
    # A part without a class, numbered as the whole.
    write_image(str(tmp_path / "val" / "c" / "x.jpg"), picture(7))
    assert listed(tmp_path / "val", tmp_path / "val", "--classes-of", str(mixed)) == 0
    assert [row.labels for row in read_list(f"{tmp_path}/val.lst")] == [(2.0,)]


@pytest.mark.parametrize("options", [(), ("--pass-through",), ("--num-thread", "3")])
def test_bad_images_are_named_and_the_others_packed(mixed, tmp_path, caplog, options):
    prefix = tmp_path / "packed"
    listed(prefix, mixed)
    with caplog.at_level("INFO"):
        assert main([*options, str(prefix), str(mixed)]) == 1
    assert caplog.text.count(f"cannot read the image {mixed}/b/page.jpg: its 16 bytes") == 1
    assert f"{prefix}.rec: 4 of 5 images; 1 could not be read" in caplog.text
    with open(f"{prefix}_bad-files.tsv") as stream:
        assert stream.read().startswith(f"{mixed}/b/page.jpg\tits 16 bytes")
    found = read_image_records(f"{prefix}.rec")
    assert sorted(sample.label for sample in found.samples) == [0, 1, 2, 2]
    (mixed / "b" / "page.jpg").unlink()
    listed(prefix, mixed)
    assert main([*options, str(prefix), str(mixed)]) == 0
    assert not os.path.exists(f"{prefix}_bad-files.tsv")
    assert sorted(os.listdir(tmp_path)) == ["mix", "packed.idx", "packed.lst", "packed.rec"]


def test_lists_name_what_is_missing_or_no_file(tmp_path, caplog):
    root = make_classes(tmp_path / "classes", 1, 2)
    (tmp_path / "classes" / "c0" / "folder.jpg").mkdir()
    (tmp_path / "p.lst").write_text(
        "0\t0.0\tc0/i0.jpg\n1\t0\tc0/folder.jpg\n2\t0\tc0/gone.jpg\n\n3\t1\t2\tc0/i1.jpg\n"
    )
    assert main([str(tmp_path / "p"), root]) == 1
    assert "folder.jpg: Is a directory" in caplog.text
    assert "gone.jpg: No such file" in caplog.text
    assert set(records(tmp_path / "p")) == {0, 3}
    assert main(["--pack-label", str(tmp_path / "p"), root]) == 1
    assert records(tmp_path / "p")[3][0].tolist() == [1, 2]
    (tmp_path / "p.lst").write_text("zero\t0\tc0/i0.jpg\n")
    with pytest.raises(GloReError, match=r"p\.lst:1: expected 'number<TAB>label<TAB>path'"):
        main([str(tmp_path / "p"), root])
    (tmp_path / "p.lst").write_text("0\t0\tgone.jpg\n")
    with pytest.raises(GloReError, match="none of its 1 images could be read"):
        main([str(tmp_path / "p"), root])
    with pytest.raises(UsageError, match="make it first"):
        main([str(tmp_path / "other"), root])


def test_interrupted_packing_leaves_what_was_there(tmp_path, monkeypatch):
    root = make_classes(tmp_path / "classes", 2, 3)
    prefix = tmp_path / "packed"
    listed(prefix, root)
    assert main([str(prefix), root]) == 0
    before = {name: (tmp_path / f"packed{name}").read_bytes() for name in (".rec", ".idx")}
    count = 0

    def interrupted(stream, record, name):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        write_record(stream, record)

    monkeypatch.setattr(packing, "_write", interrupted)
    assert run_main(main, [str(prefix), root]) == 130
    assert before == {name: (tmp_path / f"packed{name}").read_bytes() for name in before}
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_flat_folders(tmp_path, caplog):
    for number in range(3):
        write_image(str(tmp_path / "val" / f"{number}.jpg"), picture(number))
    prefix, folder = str(tmp_path / "val"), str(tmp_path / "val")
    with pytest.raises(GloReError, match="no class folders"):
        listed(prefix, folder)
    assert main(["--list", prefix, folder]) == 0
    assert "all 3 images get the label 0" in caplog.text
    (tmp_path / "labels.txt").write_text("0.jpg 4\n1.jpg 0\n2.jpg 4\n")
    assert main(["--list", "--labels", str(tmp_path / "labels.txt"), f"{prefix}_x", folder]) == 0
    rows = {row.path: row.labels[0] for row in read_list(f"{prefix}_x.lst")}
    assert rows == {"0.jpg": 4, "1.jpg": 0, "2.jpg": 4}


def test_names_that_no_list_holds(tmp_path, caplog):
    write_image(str(tmp_path / "f" / "a" / "new\nline.jpg"), picture(0))
    write_image(str(tmp_path / "f" / "a" / "x.jpg"), picture(1))
    assert listed(tmp_path / "p", tmp_path / "f") == 1
    assert "a/new\\nline.jpg cannot be in a list" in caplog.text
    assert [row.path for row in read_list(f"{tmp_path}/p.lst")] == ["a/x.jpg"]


def test_chunks_and_parts(tmp_path):
    root = make_classes(tmp_path / "classes", 2, 5)
    listed(tmp_path / "p", root, "--train-ratio", "0.5", "--test-ratio", "0.3")
    sizes = {name: len(read_list(f"{tmp_path}/p_{name}.lst")) for name in ("train", "test", "val")}
    assert sizes == {"train": 5, "test": 3, "val": 2}
    assert main([str(tmp_path / "p"), root]) == 0
    assert len(records(tmp_path / "p_train")) == 5
    listed(tmp_path / "q", root, "--chunks", "3", "--no-shuffle")
    assert [len(read_list(f"{tmp_path}/q_{n}.lst")) for n in range(3)] == [4, 4, 2]


def test_sizes_and_the_index(tmp_path):
    root = make_classes(tmp_path / "classes", 1, 2, (60, 80))
    listed(tmp_path / "p", root)
    options = ("--resize", "30", "--center-crop", "--encoding", ".png", "--quality", "3")
    assert main([*options, str(tmp_path / "p"), root]) == 0
    from data.image.decode import decode_image

    shapes = {decode_image(image, "x").shape for _, image in records(tmp_path / "p").values()}
    assert shapes == {(30, 30, 3)}
    index = (tmp_path / "p.idx").read_text()
    (tmp_path / "p.idx").unlink()
    assert main(["--index", str(tmp_path / "p")]) == 0
    assert sorted(line.split()[1] for line in index.splitlines()) == sorted(
        line.split()[1] for line in (tmp_path / "p.idx").read_text().splitlines()
    )


def test_records_with_the_magic_number_inside_are_what_mxnet_writes(tmp_path):
    from mxnet_compat import mx

    rng = np.random.RandomState(0)
    contents = [rng.bytes(10) + MAGIC, MAGIC * 3, b"abcd" + MAGIC + b"x", b"ab" + MAGIC + b"c", b""]
    contents += [rng.bytes(7) for _ in range(3)]
    theirs, ours = str(tmp_path / "theirs.rec"), io.BytesIO()
    writer = mx.recordio.MXRecordIO(theirs, "w")
    for content in contents:
        writer.write(content)
        write_record(ours, content)
    writer.close()
    with open(theirs, "rb") as stream:
        assert stream.read() == ours.getvalue()
