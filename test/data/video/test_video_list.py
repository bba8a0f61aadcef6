"""Video lists, mapping tables and the cache of frame counts."""

import os

import numpy as np
import pytest
from videos import write_video

from data.video.container import DECORD, FROM_START, Turn, VideoError, VideoFacts
from data.video.list import (
    FrameCounts,
    ListError,
    check_lists,
    read_video_list,
    without_absent,
)
from data.video.readers import read_frames


def write(folder, text, name="list.txt", encoding="utf-8"):
    path = os.path.join(str(folder), name)
    with open(path, "w", encoding=encoding, newline="") as stream:
        stream.write(text)
    return path


def facts(frames, size, route=DECORD):
    return VideoFacts(frames, size, route, Turn(1, True), "h264", "mov", 29.97, frames + 1, "")


def test_columns_by_spaces_or_tabs_and_paths_with_spaces(tmp_path):
    path = write(tmp_path, "7 0 a/b.avi\r\n\n8\t2\tmaking tea/a  b [1].mp4 \n x9 \t1  Übung/ß.mp4")
    videos = read_video_list(path, tmp_path, 3)
    assert [tuple(row) for row in videos.rows] == [
        ("7", 0, "a/b.avi"),
        ("8", 2, "making tea/a  b [1].mp4"),
        ("x9", 1, "Übung/ß.mp4"),
    ]
    assert videos.lines == (1, 3, 4)
    assert videos.full_path(1) == str(tmp_path / "making tea/a  b [1].mp4")


def test_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    path = write(tmp_path, "5 0 a.mp4\n", encoding="utf-8-sig")
    assert read_video_list(path, tmp_path).rows[0].v_id == "5"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("0 0 a.mp4\n1 0\n", 2, "expected 'v_id label sub/path', found 2 columns"),
        ("0 x a.mp4\n", 1, "no whole number: 'x'"),
        ("0 0 a.mp4\n\n1 3 b.mp4\n", 3, r"label 3 is out of range \(0 to 2\)"),
        ("0 -1 a.mp4\n", 1, "label -1 is out of range"),
        ("0 0 a.mp4\n1 0 b.mp4\n0 1 c.mp4\n", 3, "v_id 0 is used twice, first in line 1"),
    ],
)
def test_wrong_row_names_file_and_line(tmp_path, text, line, says):
    path = write(tmp_path, text)
    with pytest.raises(ListError, match=says) as caught:
        read_video_list(path, tmp_path, 3)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_names_in_another_encoding_are_those_of_the_files(tmp_path):
    path = write(tmp_path, "0 0 a.mp4\n1 0 ü.avi\n", encoding="latin-1")
    videos = read_video_list(path, tmp_path)
    name = videos.full_path(1)
    assert os.fsencode(name) == os.fsencode(tmp_path) + b"/\xfc.avi"
    write_video(tmp_path / "u.avi", frames=12)
    os.rename(tmp_path / "u.avi", name)
    frames, facts = read_frames(name, lambda total: [3, 5])
    assert facts.frames == 12
    np.testing.assert_array_equal(frames, read_frames(name, lambda total: [3, 5], facts=facts)[0])
    counts = FrameCounts(videos)
    counts.note(1, facts)
    counts.save()
    assert FrameCounts(videos).noted(1) == facts
    with pytest.raises(VideoError, match="\udcfc.*decord opens names in UTF-8 only"):
        read_frames(name, lambda total: [3], decoder="decord")


def test_a_list_in_utf16_is_no_list(tmp_path):
    with pytest.raises(ListError, match=r"list\.txt: this is UTF-16 text; save the list as UTF-8"):
        read_video_list(write(tmp_path, "0 0 a.mp4\n", encoding="utf-16"), tmp_path)


def test_missing_empty_and_rootless_lists(tmp_path):
    with pytest.raises(ListError, match="cannot read the video list .*none.txt"):
        read_video_list(tmp_path / "none.txt", tmp_path)
    with pytest.raises(ListError, match="is empty"):
        read_video_list(write(tmp_path, "\n\n"), tmp_path)
    with pytest.raises(ListError, match=r"nowhere does not exist.*nowhere/a\.mp4"):
        read_video_list(write(tmp_path, "0 0 a.mp4\n"), tmp_path / "nowhere")


def test_counts_are_remembered_for_the_same_list_root_and_file_size(tmp_path):
    path = write(tmp_path, "0 0 a.mp4\n1 0 b.mp4\n")
    videos = read_video_list(path, tmp_path)
    counts = FrameCounts(videos)
    counts.note(1, facts(300, 5000))
    counts.save()
    again = FrameCounts(videos)
    assert (again.get(1, 5000), again.get(1, 5001), again.get(0, 0)) == (300, None, None)
    assert again.known() == 1
    assert os.path.dirname(again.paths[0]) == str(tmp_path)
    again.note(1, facts(299, 5000))
    assert again.get(1, 5000) == 300, "a noted count gives way to a better one only"
    again.note(1, facts(299, 5000), replace=True)
    assert again.get(1, 5000) == 299
    again.note(1, facts(301, 5000, FROM_START))
    assert again.noted(1) == facts(301, 5000, FROM_START), "it is to be read in another way"

    other_root = tmp_path / "other"
    other_root.mkdir()
    assert FrameCounts(read_video_list(path, other_root)).known() == 0
    os.utime(path, ns=(1, 1))
    assert FrameCounts(videos).known() == 0, "another modification time"


def test_changed_content_forgets_the_counts(tmp_path):
    path = write(tmp_path, "0 0 a.mp4\n")
    counts = FrameCounts(read_video_list(path, tmp_path))
    counts.note(0, facts(10, 1))
    counts.save()
    stamp = os.stat(path).st_mtime_ns
    write(tmp_path, "0 0 b.mp4\n")
    os.utime(path, ns=(stamp, stamp))
    assert FrameCounts(read_video_list(path, tmp_path)).known() == 0


def test_counts_of_a_list_in_a_read_only_folder_go_to_the_cache_folder(tmp_path, monkeypatch):
    import data.video.list

    path = write(tmp_path, "0 0 a.mp4\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    videos = read_video_list(path, tmp_path)
    counts = FrameCounts(videos)

    def refuse(place, text, writing=data.video.list.write_text):
        if os.path.dirname(place) == str(tmp_path):
            raise PermissionError(13, "Permission denied", place)
        writing(place, text)

    # Permissions do not stop root, who may run this.
    monkeypatch.setattr(data.video.list, "write_text", refuse)
    counts.note(0, facts(12, 34))
    counts.save()
    assert counts.paths[1].startswith(str(tmp_path / "cache"))
    assert not os.path.exists(counts.paths[0])
    assert FrameCounts(videos).get(0, 34) == 12


def test_damaged_cache_is_ignored(tmp_path):
    videos = read_video_list(write(tmp_path, "0 0 a.mp4\n"), tmp_path)
    counts = FrameCounts(videos)
    counts.note(0, facts(12, 34))
    counts.save()
    with open(counts.paths[0], "a") as stream:
        stream.write("garbage\n")
    assert FrameCounts(videos).known() == 0


def test_absent_videos_are_left_out_in_one_line(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for name in ("a/0.avi", "a/2.avi", "3.avi"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "1.avi").symlink_to(tmp_path / "gone")
    path = write(tmp_path, "0 0 a/0.avi\n1 0 a/1.avi\n2 1 a/2.avi\n3 1 3.avi\n4 1 b/4.avi\n")
    videos = read_video_list(path, tmp_path)
    caplog.set_level("INFO")
    kept = without_absent(videos, 0.4)
    assert [row.v_id for row in kept.rows] == ["0", "2", "3"]
    assert kept.lines == (1, 3, 4)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"2 of 5 videos of {path} are not there and left out")
    with pytest.raises(ListError, match=r"2 of 5 videos .* more than --max-missing 0\.39"):
        without_absent(videos, 0.39)
    # What was noted for a video stays its own.
    counts = FrameCounts(kept)
    counts.note(1, facts(7, 1))
    counts.save()
    assert FrameCounts(videos).get(2, 1) == 7


def test_oddities_of_lists_are_said(tmp_path, caplog):
    train = read_video_list(write(tmp_path, "0 0 a.avi\n1 2 b.avi\n2 2 b.avi\n"), tmp_path)
    val = read_video_list(write(tmp_path, "0 0 a.avi\n1 1 c.avi\n", "val.txt"), tmp_path)
    check_lists(train, val, 4, ["a", "b", "c", "d"])
    assert [record.getMessage().split(" ", 1)[1].split(",")[0] for record in caplog.records] == [
        "names 1 videos more than once",
        "videos are in both lists",
        f"of 4 classes have no video in {train.path}: b",
    ]
    caplog.clear()
    check_lists(val, train, 2)
    assert "c.avi" not in caplog.text


def test_a_list_may_say_the_frame_rate(tmp_path):
    videos = read_video_list(write(tmp_path, "# fps 12.5\n0 0 a.avi\n"), tmp_path)
    assert (videos.rate, videos.lines, len(videos.rows)) == (12.5, (2,), 1)
    with pytest.raises(ListError, match="no whole number"):
        read_video_list(write(tmp_path, "0 0 a.avi\n# fps 12.5\n"), tmp_path)
