"""Files that would fill the memory, hold everything up, or end a run with a trace."""

import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from hostile import Chatty, Greedy
from images import picture, write_image

from data.common.loader import Loader, LoaderConfig
from data.common.samples import open_file
from data.image.loaders import get_image_val_loader
from data.image.options import ImageTestOptions
from data.image.records import RecordError, read_index
from data.image.source import SourceError, image_source_of_rows, read_image_records
from data.video.container import VideoError
from data.video.readers import read_frames


def write_records(path, labels):
    """Write a record file with one image for each label; return its content's places."""
    with open(path + ".jpg", "rb") as stream:
        encoded = stream.read()
    places = []
    with open(path, "wb") as stream:
        for label in labels:
            content = struct.pack("<IfQQ", 0, label, 0, 0) + encoded
            places.append(stream.tell())
            stream.write(struct.pack("<II", 0xCED7230A, len(content)) + content)
            stream.write(b"\0" * (-len(content) % 4))
    with open(path[: -len(".rec")] + ".idx", "w") as stream:
        stream.writelines(f"{key}\t{place}\n" for key, place in enumerate(places))


def read_all(source, workers, crops="centre"):
    options = ImageTestOptions(crop_size=16, batch_size=1, num_workers=workers)
    mean = std = (0.5, 0.5, 0.5)
    with get_image_val_loader(source, options, mean=mean, std=std, crops=crops) as loader:
        labels = [int(label.asnumpy()[0]) for _, label, _ in loader]
        return labels, {os.path.basename(bad.path): bad.reason for bad in loader.bad_files()}


@pytest.mark.parametrize(("workers", "crops"), [(0, "centre"), (1, "centre"), (0, "full")])
def test_images_that_are_no_files_are_left_out_at_once(tmp_path, workers, crops):
    write_image(str(tmp_path / "good.jpg"), picture(0))
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkdir(tmp_path / "folder.jpg")
    names = ("good.jpg", "zero.jpg", "pipe.jpg", "folder.jpg", "a\0b.jpg", "gone.jpg")
    rows = [(name, label) for label, name in enumerate(names)]
    began = time.monotonic()
    labels, bad = read_all(image_source_of_rows(rows, str(tmp_path)), workers, crops)
    assert time.monotonic() - began < 30
    assert labels == [0]
    for name in ("zero.jpg", "pipe.jpg", "folder.jpg"):
        assert bad.pop(name) == "it is a folder, a pipe or a device, and no file"
    # Python 3.13 has other words for it.
    assert "embedded null" in bad.pop("a\0b.jpg")
    assert bad == {"gone.jpg": "No such file or directory"}


@pytest.mark.parametrize("name", ["pipe.avi", "zero.avi", "a\0b.avi", "."])
def test_videos_that_are_no_files(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.avi")
    os.symlink("/dev/zero", tmp_path / "zero.avi")
    with pytest.raises(VideoError, match=r"and no file|null (byte|character)"):
        read_frames(os.path.join(tmp_path, name), lambda total: [0])


def test_a_file_is_opened_as_always(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with open_file(str(tmp_path / "x")) as stream:
        assert stream.read() == b"abc"


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -float("inf"), 1e9, -1.0, 0.5])
def test_labels_of_records_that_are_no_classes(tmp_path, label):
    path = str(tmp_path / "all.rec")
    write_image(path + ".jpg", picture(0))
    write_records(path, [0.0, label])
    with pytest.raises(SourceError, match=r"all\.rec.*label"):
        read_image_records(path)
    # With an index and a number of classes, labels are looked at when it is their turn.
    source = read_image_records(path, num_classes=3)
    with pytest.raises(SourceError, match=r"is no class in 0 to 2"):
        read_all(source, 0)


@pytest.mark.parametrize("offset", ["9" * 18, "9" * 19, "9" * 5000, "-1", "0x1", "²"])
def test_places_beyond_the_record_file(tmp_path, offset):
    path = str(tmp_path / "all.rec")
    write_image(path + ".jpg", picture(0))
    write_records(path, [0.0])
    (tmp_path / "all.idx").write_text(f"0\t{offset}\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"all\.idx"):
        read_index(str(tmp_path / "all.idx"), path)


def loader_of(dataset):
    return Loader(dataset, LoaderConfig(batch_size=1, num_workers=1))


def test_a_file_that_wants_all_memory_does_not_get_it():
    with loader_of(Greedy()) as loader:
        assert len(list(loader)) == 3
        (bad,) = loader.bad_files()
    assert bad.path == "number 1"
    assert bad.reason.startswith("MemoryError: Unable to allocate 16.0 GiB")


def test_what_decoders_say_does_not_reach_the_terminal(capfd):
    with loader_of(Chatty()) as loader:
        assert len(list(loader)) == 3
    assert capfd.readouterr().err == ""


def test_ctrl_c_while_workers_start_leaves_no_trace_of_theirs(root, tmp_path):
    program = (
        "import time\n"
        "from hostile import Chatty\n"
        "from data.common.loader import Loader, LoaderConfig\n"
        "loader = Loader(Chatty(), LoaderConfig(batch_size=1, num_workers=4))\n"
        "iterator = iter(loader)\n"
        "print('started', flush=True)\n"
        "try:\n"
        "    next(iterator)\n"
        "    time.sleep(20)\n"
        "except KeyboardInterrupt:\n"
        "    loader.close()\n"
    )
    path = os.pathsep.join((root, os.path.join(root, "test", "helpers")))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.3)
    # As a terminal does: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == ""
