"""Loaders of images: the same batches from files, records and any number of workers; bad files."""

import dataclasses
import os
import shutil

import cv2
import numpy as np
import pytest
from images import MEAN, STD, KillingImages, make_classes, pack, picture, write_image
from PIL import Image

from data.common.loader import Loader, LoaderConfig, UnreadableData, write_bad_files
from data.image.decode import header_of
from data.image.loaders import (
    get_image_train_loader,
    get_image_val_loader,
    image_val_transform,
)
from data.image.options import ImageOptions, ImageTestOptions
from data.image.source import (
    ImageSource,
    SourceError,
    image_source_of_rows,
    open_image_source,
)
from glore_common import GloReError, UsageError
from mxnet_compat import mx
from train.batches import BatchStream

BASIC = {"crop_size": 32, "batch_size": 5, "num_workers": 0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of 3 x 4 images of many sizes and a record file of them, in the same order."""
    folder = tmp_path_factory.mktemp("packed")
    classes = make_classes(folder / "classes")
    return classes, pack(classes, str(folder / "all"))


def opened(source, num_classes=None):
    return source if isinstance(source, ImageSource) else open_image_source(source, num_classes)


def train(source, prefetch=2, mean=MEAN, std=STD, seed=1, rank=0, num_ranks=1, **more):
    options = ImageOptions(**{**BASIC, "rotation": 10, **more})
    loader = get_image_train_loader(
        opened(source), options, mean=mean, std=std, seed=seed, rank=rank, num_ranks=num_ranks
    )
    if prefetch != 2:
        loader = Loader(loader.dataset, dataclasses.replace(loader.config, prefetch=prefetch))
    return loader


def val(source, num_classes=None, mean=MEAN, std=STD, **more):
    names = ("crops", "with_index", "rank", "num_ranks")
    arguments = {name: more.pop(name) for name in names if name in more}
    return get_image_val_loader(
        opened(source, num_classes),
        ImageTestOptions(**{**BASIC, **more}),
        mean=mean,
        std=std,
        **arguments,
    )


def collect(loader):
    return [
        tuple(part if isinstance(part, np.ndarray) else part.asnumpy() for part in batch)
        for batch in loader
    ]


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        for part, counterpart in zip(one, other):
            np.testing.assert_array_equal(part, counterpart)


def decoded(path):
    return cv2.imread(str(path))[..., ::-1]


def test_validation_batches_hold_the_centre_crops_in_order(packed):
    source = open_image_source(packed[0])
    with val(source) as loader:
        batches = collect(loader)
        assert (len(loader), loader.num_samples, source.num_classes) == (3, 12, 3)
        assert source.class_names == ("c0", "c1", "c2")
    assert [len(data) for data, *_ in batches] == [5, 5, 2]
    data, label, index = (np.concatenate(parts) for parts in zip(*batches))
    assert data.dtype == label.dtype == np.float32
    assert index.tolist() == list(range(12))
    assert label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for number in range(12):
        image = decoded(source.name(number))
        expected = image_val_transform(32, MEAN, STD)(image[None])[:, 0]
        np.testing.assert_array_equal(data[number], expected)
    with val(packed[0], with_index=False) as loader:
        assert_equal(collect(loader), [batch[:2] for batch in batches])


@pytest.mark.parametrize("kind", [0, 1])
def test_same_batches_for_any_number_of_workers_and_after_resuming(packed, kind):
    results = []
    for num_workers, prefetch in ((0, 1), (1, 1), (3, 2)):
        with train(packed[kind], num_workers=num_workers, prefetch=prefetch) as loader:
            assert (len(loader), loader.num_samples) == (2, 10)
            results.append([collect(loader), collect(loader)])
            loader.set_position(1, 1)
            assert_equal(collect(loader), results[-1][1][1:])
    for epochs in results[1:]:
        assert_equal(epochs[0], results[0][0])
        assert_equal(epochs[1], results[0][1])
    data, label = results[0][0][0]
    assert data.shape == (5, 3, 32, 32)
    assert label.dtype == np.float32
    assert not np.array_equal(data, results[0][1][0][0])
    with train(packed[kind], seed=2) as loader:
        assert not np.array_equal(collect(loader)[0][0], data)


def test_files_and_records_give_the_same_pixels(packed):
    with val(packed[0], crops="ten", batch_size=40) as files:
        expected = collect(files)
    with val(packed[1], crops="ten", batch_size=40, num_workers=2) as records:
        found = collect(records)
        assert records.dataset.source.class_names is None
    assert_equal(found, expected)
    data, _, index = (np.concatenate(parts) for parts in zip(*found))
    assert data.shape == (120, 3, 32, 32)
    assert index.tolist() == np.repeat(np.arange(12), 10).tolist()


def test_ten_crops_begin_with_the_top_left_one(packed):
    source = open_image_source(packed[0])
    with val(source, crops="ten", batch_size=10) as loader:
        data, _, index = collect(loader)[3]
    assert index.tolist() == [3] * 10
    whole = image_val_transform(32, MEAN, STD, "full", 37)(decoded(source.name(3))[None])[:, 0]
    np.testing.assert_array_equal(data[0], whole[:, :32, :32])
    np.testing.assert_array_equal(data[8], whole[:, -32:, -32:][:, :, ::-1])


def test_full_images_are_batched_by_size(tmp_path):
    sizes = [(40, 60), (60, 40), (40, 60), (50, 50), (80, 120), (60, 40), (60, 90)]
    rows = []
    for number, size in enumerate(sizes):
        write_image(str(tmp_path / f"{number}.png"), picture(number, *size))
        rows.append((f"{number}.png", number))
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = image_source_of_rows([*rows, ("bad.png", 0)], tmp_path)
    results = []
    for num_workers in (0, 2):
        with val(source, crops="full", resize=36, batch_size=3, num_workers=num_workers) as loader:
            assert (len(loader), loader.num_samples) == (4, 8)
            results.append(collect(loader))
            loader.set_position(0, 2)
            assert_equal(collect(loader), results[0][2:])
            assert [bad.path for bad in loader.bad_files()] == [str(tmp_path / "bad.png")]
    assert_equal(*results)
    # 36 x 54: 0, 2, 4, then 6; 54 x 36: 1, 5; 36 x 36: 3 and the one that cannot be read
    assert [index.tolist() for *_, index in results[0]] == [[0, 2, 4], [6], [1, 5], [3]]
    shapes = [data.shape[2:] for data, *_ in results[0]]
    assert shapes == [(36, 54), (36, 54), (54, 36), (36, 36)]
    resize = image_val_transform(32, MEAN, STD, "full", 36)
    for data, label, index in results[0]:
        assert label.tolist() == index.tolist()
        for image, row in zip(data, index):
            expected = resize(decoded(tmp_path / f"{row}.png")[None])[:, 0]
            np.testing.assert_array_equal(image, expected)
    with val(source, crops="full", resize=36, batch_size=1) as loader:
        assert [index.tolist() for *_, index in collect(loader)] == [
            [0],
            [2],
            [4],
            [6],
            [1],
            [5],
            [3],
        ]


def test_images_are_turned_as_exif_says(tmp_path):
    path = str(tmp_path / "turned.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(picture(0, 60, 80)).save(path, exif=exif)
    with open(path, "rb") as stream:
        assert header_of(stream).size == (80, 60)
    with val(
        image_source_of_rows([("turned.jpg", 0)], tmp_path), crops="full", resize=30
    ) as loader:
        ((data, *_),) = collect(loader)
    assert data.shape == (1, 3, 40, 30)


@pytest.fixture
def damaged(tmp_path):
    """A folder of 3 x 4 images, three of which cannot be read."""
    root = make_classes(tmp_path / "classes")
    with open(os.path.join(root, "c0", "i1.jpg"), "r+b") as stream:
        stream.truncate(300)
    open(os.path.join(root, "c1", "i1.jpg"), "wb").close()
    with open(os.path.join(root, "c2", "i3.jpg"), "wb") as stream:
        stream.write(b"<html>not found</html>")
    return root


def test_bad_images_are_replaced_in_training_and_listed(damaged, tmp_path, caplog):
    results = []
    for num_workers in (0, 2):
        with train(damaged, batch_size=4, num_workers=num_workers) as loader:
            results.append(collect(loader))
            assert write_bad_files([loader], str(tmp_path / "bad.tsv")) == 3
    assert_equal(*results)
    assert [len(data) for data, _ in results[0]] == [4, 4, 4]
    with open(tmp_path / "bad.tsv") as stream:
        rows = sorted(line.rstrip("\n").split("\t") for line in stream)
    names = [os.path.join(damaged, *p) for p in (("c0", "i1.jpg"), ("c1", "i1.jpg"))]
    assert [row[0] for row in rows[:2]] == names
    assert rows[0][2] == "its 300 bytes are no whole image that OpenCV decodes"
    assert rows[1][2] == "the file is empty"
    assert "cannot read the image" in caplog.text
    assert "another one is used" in caplog.text


def test_bad_images_are_left_out_of_validation(damaged):
    for options in ({"num_workers": 2}, {"crops": "full", "resize": 36}):
        with val(damaged, **options) as loader:
            batches = collect(loader)
        index = np.concatenate([index for *_, index in batches])
        assert sorted(index.tolist()) == [0, 2, 3, 4, 6, 7, 8, 9, 10]
        label = np.concatenate([label for _, label, _ in batches])
        np.testing.assert_array_equal(label, index // 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_without_a_readable_image_counts_as_read(damaged, num_workers):
    # The last batch of four holds the third class's last image alone, which is a web page.
    source = image_source_of_rows(
        [(f"c{number // 4}/i{number % 4}.jpg", 0) for number in (0, 2, 3, 4, 6, 7, 8, 9, 11)],
        damaged,
    )
    with val(source, batch_size=4, num_workers=num_workers) as loader:
        assert len(loader) == 3
        batches = list(loader.every_batch())
        assert [batch is None for batch in batches] == [False, False, True]
        assert [len(index) for *_, index in loader] == [4, 4]
        loader.set_position(0, 2)
        assert list(loader.every_batch()) == [None]
        stream = BatchStream(loader, "validation")
        stream.seek(0, 1)
        assert stream.read()[0].shape[0] == 4
        assert stream.read() is None
        # The pass is over, and the next one begins.
        assert stream.read()[0].shape[0] == 4
        stream.seek(0, 2)
        with pytest.raises(GloReError, match="validation data has no sample that could be read"):
            stream.need()
    # One worker's share may be unreadable while that of the others is not.
    with val(source, batch_size=4, rank=8, num_ranks=9) as loader:
        assert list(loader.every_batch()) == [None]
    alone = image_source_of_rows([("c2/i3.jpg", 0)], damaged)
    with val(alone) as loader, pytest.raises(UnreadableData, match="1 distinct image could not"):
        list(loader)


def test_strict_and_too_many_bad_images(damaged):
    with (
        train(damaged, batch_size=12, strict_data=True) as loader,
        pytest.raises(UnreadableData, match=r"cannot read the image .*\.jpg: .*strict"),
    ):
        collect(loader)
    for name in os.listdir(os.path.join(damaged, "c1")):
        os.truncate(os.path.join(damaged, "c1", name), 10)
    with (
        val(os.path.join(damaged), max_failures=4) as loader,
        pytest.raises(
            UnreadableData, match="4 distinct images in a row .*Replace or remove the bad"
        ),
    ):
        collect(loader)


def test_image_that_kills_its_worker_is_replaced(packed):
    with train(packed[0]) as loader:
        dataset = loader.dataset
    source, transform = dataset.source, dataset.transform
    images = KillingImages(source, transform, (32, 32))
    with Loader(images, LoaderConfig(12, shuffle=True, num_workers=2)) as loader:
        ((data, label),) = collect(loader)
        (bad,) = loader.bad_files()
    assert len(data) == 12
    assert bad.path == source.name(5)
    assert "killed by SIGKILL, twice" in bad.reason
    assert len(label) == 12


def test_workers_neither_load_mxnet_nor_decord(packed):
    with train(packed[1], num_workers=1) as loader:
        collect(loader)
        (pid,) = loader.worker_pids()
        with open(f"/proc/{pid}/maps") as stream:
            mapped = stream.read()
    assert "libmxnet" not in mapped
    assert "decord" not in mapped
    assert "cv2" in mapped


def test_label_of_a_record_is_checked_when_it_is_read(packed):
    # Labels up to 2, but the user says two classes: with an index nothing is read before.
    for num_workers in (0, 1):
        with (
            val(packed[1], num_classes=2, num_workers=num_workers) as loader,
            pytest.raises(
                SourceError, match=r"all\.rec \(byte \d+\): the label 2 is no class in 0"
            ),
        ):
            collect(loader)


def test_ranks_share_the_images(packed):
    labels = []
    for rank in range(3):
        with val(packed[0], rank=rank, num_ranks=3) as loader:
            labels.append([index.tolist() for *_, index in collect(loader)])
    assert labels == [[[0, 3, 6, 9]], [[1, 4, 7, 10]], [[2, 5, 8, 11]]]


def test_too_large_a_batch(packed):
    with pytest.raises(UsageError, match="classes has 12 samples, fewer than one batch of 13"):
        train(packed[0], batch_size=13)
    with pytest.raises(UsageError, match="reader must be one of own, native"):
        val(packed[1], record_reader="theirs")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A record file of larger images with fine detail, for comparing pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    make_classes(folder / "classes", 2, 5, (300, 411))
    for number, size in enumerate([(257, 344), (343, 256), (290, 281)]):
        noise = np.random.RandomState(number).randint(0, 256, (*size, 3)).astype(np.uint8)
        detail = cv2.GaussianBlur(noise, (0, 0), 1)
        write_image(str(folder / "classes" / "c1" / f"odd{number}.jpg"), detail)
    return pack(str(folder / "classes"), str(folder / "large"))


def test_native_reader_gives_the_same_validation_pixels(photographs):
    released = {
        "crop_size": 224,
        "mean": (124 / 255, 117 / 255, 104 / 255),
        "std": (1 / (0.0167 * 255),) * 3,
        "resize": 256,
        "batch_size": 4,
    }
    with val(photographs, num_workers=0, **released) as own:
        expected = collect(own)
    with val(photographs, record_reader="native", num_workers=2, **released) as native:
        found = collect(native)
        assert (len(native), native.num_samples, native.dataset.source.num_classes) == (4, 13, 2)
    assert [len(data) for data, *_ in found] == [4, 4, 4, 1]
    levels = []
    for (data, label, index), (other, other_label, other_index) in zip(expected, found):
        np.testing.assert_array_equal(label, other_label)
        np.testing.assert_array_equal(index, other_index)
        levels.append(np.abs(data - other).max((1, 2, 3)) / 0.0167)
    # Two versions of OpenCV round the bicubic filter, and JPEG's colours, by one level of 255.
    assert np.concatenate(levels).max() < 2.01
    # A shift by one pixel would be far more.
    shifted = np.abs(expected[0][0][..., 1:] - expected[0][0][..., :-1]).max() / 0.0167
    assert shifted > 5


def native(source, **more):
    return train(source, record_reader="native", **{"num_workers": 2, **more})


@pytest.mark.parametrize("augmentation", ["reference", "crop", "none"])
def test_native_training_is_repeatable_for_any_number_of_threads(photographs, augmentation):
    results = []
    for threads in (1, 2, 4):
        with native(photographs, num_workers=threads, augmentation=augmentation) as loader:
            assert (len(loader), loader.num_samples) == (2, 10)
            results.append([collect(loader), collect(loader)])
            loader.set_position(1, 1)
            assert_equal(collect(loader), results[-1][1][1:])
            assert_equal(collect(loader), collect_epoch(photographs, augmentation, 2))
    for epochs in results[1:]:
        assert_equal(epochs[0], results[0][0])
        assert_equal(epochs[1], results[0][1])
    first, second = results[0][0][0][0], results[0][1][0][0]
    assert first.shape == (5, 3, 32, 32)
    assert not np.array_equal(first, second)
    with native(photographs, seed=2, augmentation=augmentation) as loader:
        assert not np.array_equal(collect(loader)[0][0], first)
    # Normalised pixels, on the 0..1 scale.
    assert (
        np.abs(first * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1)) - 0.5).max() < 0.51
    )


def collect_epoch(path, augmentation, epoch):
    with native(path, augmentation=augmentation) as loader:
        loader.set_position(epoch)
        return collect(loader)


def test_native_ranks_share_an_indexed_file(photographs, tmp_path):
    # Every image has pixels of its own: without augmentation they tell which it is.
    seen = []
    for rank in range(2):
        with native(
            photographs, rank=rank, num_ranks=2, batch_size=3, augmentation="none"
        ) as loader:
            assert (len(loader), loader.num_samples) == (2, 6)
            seen.append({image.tobytes() for data, _ in collect(loader) for image in data})
    assert [len(part) for part in seen] == [6, 6]
    assert not seen[0] & seen[1]
    path = shutil.copy(photographs, tmp_path / "bare.rec")
    with pytest.raises(UsageError, match=r"only for training and with an \.idx file"):
        native(path, rank=0, num_ranks=2)


def test_native_ranks_take_equally_many_steps(photographs):
    # Of 13 images MXNet gives 5, 5 and 3 to the ranks.
    for rank in range(3):
        with native(
            photographs, rank=rank, num_ranks=3, batch_size=3, augmentation="none"
        ) as loader:
            assert (len(loader), loader.num_samples) == (1, 3)
            assert [len(data) for data, _ in collect(loader)] == [3]


def test_what_the_native_reader_refuses(packed, photographs, tmp_path):
    with pytest.raises(UsageError, match=r"reader='native' reads \.rec files"):
        native(packed[0])
    with pytest.raises(UsageError, match="centre crops only"):
        val(packed[1], record_reader="native", crops="ten")
    with pytest.raises(UsageError, match="rotates by whole degrees, not 7.5"):
        native(packed[1], rotation=7.5)
    with pytest.raises(UsageError, match="does not know strict"):
        native(packed[1], strict_data=True)
    with pytest.raises(UsageError, match="fewer than one batch of 14"):
        native(photographs, batch_size=14)
    with pytest.raises(UsageError, match="does not fit in images resized to a short side of 30"):
        val(packed[1], record_reader="native", resize=30)
    # MXNet itself would end the process at these.
    path = shutil.copy(photographs, tmp_path / "cut.rec")
    os.truncate(path, os.path.getsize(path) - 100)
    with pytest.raises(GloReError, match="ends within the record"):
        native(str(path))
    with (
        val(packed[1], record_reader="native", num_classes=2) as loader,
        pytest.raises(GloReError, match="the label 2 is no class in 0 to 1"),
    ):
        collect(loader)


def test_batches_are_arrays_of_their_own(packed):
    """A batch does not change when later ones are read: neither reader hands out its memory."""
    for loader in (train(packed[1]), native(packed[1])):
        with loader:
            first, second = (data for data, _ in loader)
            copy = first.asnumpy()
            list(loader)
            np.testing.assert_array_equal(first.asnumpy(), copy)
            assert isinstance(second, mx.nd.NDArray)
            assert second.context == mx.cpu()
