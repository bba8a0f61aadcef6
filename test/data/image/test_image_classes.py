"""One definition of classes and images: folders, ILSVRC's flat folder, records of one label."""

import logging
import os

import numpy as np
import pytest
from images import make_classes, pack, picture, write_image
from scipy.io import savemat

from data.image.ilsvrc import classes_of_network, imagenet_synsets, read_flat_folder
from data.image.source import (
    SourceError,
    open_image_source,
    read_image_folder,
    read_image_records,
    with_classes,
)


def touch(root, *names):
    for name in names:
        path = os.path.join(str(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()


def labels(source):
    return {str(where).replace(os.sep, "/"): label for where, label in source.samples}


def test_deep_folders_all_extensions_and_what_is_left(tmp_path, caplog):
    touch(
        tmp_path,
        *(f"a/x.{e}" for e in ("jpg", "jpe", "jfif", "TIF", "tiff", "gif", "ppm", "jp2", "webp")),
        *("a/deep/er/y.png", "b/z.bmp", "b/notes.txt", "b/more.txt", "b/clip.mp4", "b/README"),
        *(
            "b/Thumbs.db",
            "b/.hidden.jpg",
            "b/.ipynb_checkpoints/z.jpg",
            ".cache/q.jpg",
            "loose.jpg",
        ),
    )
    found = labels(read_image_folder(tmp_path))
    assert sorted(found.values()) == [0] * 10 + [1]
    assert found["a/deep/er/y.png"] == 0
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "5 files are left out: 2 .txt, 1 without an extension, 1 .mp4, 1 images in no class folder"
    )


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a/x.jpg")
    os.symlink(tmp_path / "a", tmp_path / "a" / "again")
    os.symlink(tmp_path / "elsewhere", tmp_path / "a" / "broken")
    assert labels(read_image_folder(tmp_path)) == {"a/x.jpg": 0}


def test_a_folder_called_as_an_image(tmp_path):
    touch(tmp_path, "a/x.jpg/inner.png", "a/y.jpg")
    assert set(labels(read_image_folder(tmp_path))) == {"a/x.jpg/inner.png", "a/y.jpg"}


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    touch(tmp_path, "train/a/x.jpg", "val/a/y.jpg")
    with pytest.raises(SourceError, match="train, val, which look like parts of a data set"):
        read_image_folder(tmp_path)


def test_classes_are_mapped_by_name(tmp_path, caplog):
    touch(tmp_path, "a/x.jpg", "c/y.jpg")
    os.mkdir(tmp_path / "b")
    assert labels(open_image_source(tmp_path, 3, ["a", "b", "c"])) == {"a/x.jpg": 0, "c/y.jpg": 2}
    assert "has no images of 1 classes: b" in caplog.text
    # A checkpoint without names, of as many classes: the sorted folders, one of them empty.
    assert labels(open_image_source(tmp_path, 3)) == {"a/x.jpg": 0, "c/y.jpg": 2}
    os.rmdir(tmp_path / "b")
    assert labels(open_image_source(tmp_path, 3, ["a", "b", "c"])) == {"a/x.jpg": 0, "c/y.jpg": 2}
    assert "has no folder for 1 classes: b" in caplog.text
    with pytest.raises(SourceError, match=r"2 such in all: a, c\. Rename"):
        open_image_source(tmp_path, 3, ["b", "d", "e"])
    source = with_classes(read_image_folder(tmp_path), ["c", "b", "a"])
    assert labels(source) == {"a/x.jpg": 2, "c/y.jpg": 0}
    assert source.num_classes == 3
    with pytest.raises(SourceError, match="the class c, which is none of the 1 classes"):
        with_classes(read_image_folder(tmp_path), ["a"])


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"Stra\xdfe")
    touch(tmp_path, f"{name}/{name}.jpg", "b/x.jpg")
    source = read_image_folder(tmp_path)
    assert source.class_names == tuple(sorted(("b", name)))
    assert os.path.exists(source.name(0))
    with pytest.raises(SourceError) as caught:
        read_image_folder(tmp_path, ["b"])
    assert "Stra\\udcdfe" in str(caught.value)


# --- ILSVRC ---------------------------------------------------------------------------------------

SYNSETS = ("n03", "n01", "n02")  # in the order of the kit's numbers
NAMES = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in range(1, 5)]
EXPECTED = dict(zip(NAMES, (2, 1, 0, 0)))  # n03, n02, n01, n01 in sorted order


def meta(path):
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = np.array(
        [(i, w, "a, b", 0) for i, w in enumerate(SYNSETS, 1)] + [(4, "n9", "x", 3)], kind
    )
    savemat(path, {"synsets": rows.reshape(-1, 1)})


@pytest.fixture
def flat(tmp_path):
    touch(tmp_path / "imagenet" / "val", *NAMES)
    return tmp_path / "imagenet" / "val"


@pytest.mark.parametrize("table", ["meta.mat", "map_clsloc.txt"])
def test_flat_folder_with_the_development_kit(flat, table):
    kit = flat.parent / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n3\n2\n2\n")
    with pytest.raises(SourceError, match=r"neither meta\.mat nor map_clsloc\.txt"):
        open_image_source(flat)
    if table == "meta.mat":
        meta(kit / table)
    else:
        (kit / table).write_text("n03 1 kit_fox\nn01 2 setter\nn02 3 husky\n")
    assert labels(open_image_source(flat)) == EXPECTED
    # With the classes of a checkpoint, and of a part of the images.
    os.remove(flat / NAMES[0])
    found = open_image_source(flat, 4, ["n02", "n01", "n05", "n03"])
    assert labels(found) == dict(zip(NAMES[1:], (0, 1, 1)))
    with pytest.raises(SourceError, match="has the class n01, which is none"):
        open_image_source(flat, 1, ["n02"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n"
            + "".join(
                f"{name[:-5]},{synset} 85 1 499 272 {synset} 1 2 3 4\n"
                for name, synset in zip(NAMES, ("n03", "n02", "n01", "n01"))
            ),
        ),
        ("imagenet_2012_validation_synset_labels.txt", "n03\nn02\nn01\nn01\n"),
        ("val.txt", "".join(f"{name} {label}\n" for name, label in EXPECTED.items())),
    ],
)
def test_flat_folder_with_other_lists(flat, name, content):
    (flat.parent / name).write_text(content)
    assert labels(open_image_source(flat)) == EXPECTED
    assert labels(open_image_source(flat, labels=str(flat.parent / name))) == EXPECTED


def test_flat_folder_without_labels_says_what_to_do(flat):
    with pytest.raises(SourceError, match=r"has 4 images but no class folders.*devkit|Sort them"):
        open_image_source(flat)
    (flat.parent / "val.txt").write_text(f"{NAMES[0]} 0\n")
    with pytest.raises(SourceError, match=f"does not say of which class {NAMES[1]}"):
        open_image_source(flat)
    touch(flat, "another.JPEG")
    listing = flat.parent / "imagenet_2012_validation_synset_labels.txt"
    listing.write_text("n01\n" * 4)
    with pytest.raises(SourceError, match="has 4 lines for 5 images"):
        read_flat_folder(str(flat), labels=str(listing))


def test_networks_of_imagenet_know_their_synsets(tmp_path):
    synsets = imagenet_synsets()
    assert len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    touch(tmp_path, f"{synsets[7]}/x.jpg", f"{synsets[900]}/y.jpg")
    assert classes_of_network(tmp_path, 1000) == synsets
    assert classes_of_network(tmp_path, 200) is None
    found = open_image_source(tmp_path, 1000, classes_of_network(tmp_path, 1000))
    assert sorted(labels(found).values()) == [7, 900]
    touch(tmp_path, "birds/z.jpg")
    assert classes_of_network(tmp_path, 1000) is None


# --- records of one label -------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 5])
def test_records_of_one_label_are_said(tmp_path, caplog, num_classes):
    folder = make_classes(tmp_path / "one", 1, 3)
    path = pack(folder, str(tmp_path / "one"))
    with caplog.at_level(logging.WARNING):
        read_image_records(path, num_classes)
    assert "all 3 labels that were looked at are 0" in caplog.text
    assert "--labels FILE" in caplog.text
    caplog.clear()
    write_image(os.path.join(folder, "..", "two", "c0", "x.jpg"), picture(0))
    write_image(os.path.join(folder, "..", "two", "c1", "x.jpg"), picture(1))
    read_image_records(pack(str(tmp_path / "two"), str(tmp_path / "two")), num_classes)
    assert caplog.text == ""
