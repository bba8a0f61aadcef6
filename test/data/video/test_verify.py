"""python -m data.verify: the report, the clean list and the exit code."""

import json
import logging
import sys

import pytest
from videos import DeadlyJob, run, write_list, write_video

import data.verify
from data.verify import main, verify_list
from data.video.list import FrameCounts, read_video_list
from glore_common import UsageError


@pytest.fixture
def videos(tmp_path):
    """Six files, three of them bad; returns the list's path."""
    write_video(tmp_path / "good.mp4", 20)
    write_video(tmp_path / "with space [1] ü.mp4", 9)
    write_video(tmp_path / "one.avi", 1, codec="XVID")
    whole = write_video(tmp_path / "whole.mp4", 30).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    names = ["good.mp4", "cut.mp4", "with space [1] ü.mp4", "missing.mp4", "empty.mp4", "one.avi"]
    return write_list(tmp_path, names)


def table(path):
    with open(path, encoding="utf-8") as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    return [dict(zip(rows[0], row)) for row in rows[1:]]


@pytest.mark.parametrize("options", [[], ["--quick"], ["--num-workers", "3"]])
def test_report_clean_list_and_exit_code(tmp_path, videos, capsys, options):
    assert main([videos, "--root", str(tmp_path), "--num-workers", "2", *options]) == 1
    assert "3 of 6 videos are good, 3 bad." in capsys.readouterr().out
    report = table(tmp_path / "list.verify.tsv")
    assert [row["status"] for row in report] == ["ok", "bad", "ok", "bad", "bad", "ok"]
    assert [row["frames"] for row in report] == ["20", "0", "9", "0", "0", "1"]
    assert report[2]["path"] == "with space [1] ü.mp4"
    assert "Invalid data" in report[1]["reason"]
    assert report[3]["reason"] == "No such file or directory"
    assert report[4]["reason"] == "the file is empty"
    clean = read_video_list(tmp_path / "list.clean.txt", tmp_path)
    assert [row.v_id for row in clean.rows] == ["0", "2", "5"]
    counts = FrameCounts(read_video_list(videos, tmp_path))
    assert counts.get(0, (tmp_path / "good.mp4").stat().st_size) == 20
    assert main([str(tmp_path / "list.clean.txt"), "--root", str(tmp_path)]) == 0


def test_json_report_and_shortest_length(tmp_path, videos):
    report_path = tmp_path / "out" / "report.json"
    arguments = [videos, "--root", str(tmp_path), "--min-frames", "8", "--num-workers", "1"]
    assert main([*arguments, "--report", str(report_path)]) == 1
    report = json.loads(report_path.read_text(encoding="utf-8"))
    assert report[5]["reason"] == "1 frames, fewer than 8"
    assert [row["v_id"] for row in report if row["status"] == "ok"] == ["0", "2"]


def test_places_are_checked_before_the_scan(tmp_path, videos, monkeypatch):
    monkeypatch.setattr(data.verify, "verify_list", lambda *arguments: pytest.fail("scanned"))
    for place in (tmp_path, tmp_path / "good.mp4" / "report.tsv"):
        with pytest.raises(UsageError, match="cannot be written|is a folder"):
            main([videos, "--root", str(tmp_path), "--report", str(place)])


def test_the_list_itself_is_not_overwritten(tmp_path, videos):
    with open(videos) as stream:
        before = stream.read()
    with pytest.raises(UsageError, match="must not overwrite the list"):
        main([videos, "--root", str(tmp_path), "--clean-list", videos])
    with open(videos) as stream:
        assert stream.read() == before


def test_crash_and_hang_name_their_file(tmp_path, videos, monkeypatch, caplog):
    monkeypatch.setattr(data.verify, "VerifyJob", DeadlyJob)
    caplog.set_level(logging.WARNING)
    report = verify_list(read_video_list(videos, tmp_path), num_workers=2, timeout=2.0)
    assert [row["status"] for row in report] == ["ok", "bad", "ok", "ok", "bad", "ok"]
    assert "SIGSEGV" in report[1]["reason"]
    assert "no answer within 2 s" in report[4]["reason"]
    assert "cut.mp4" in caplog.text
    assert "empty.mp4" in caplog.text


def test_as_a_command(root, tmp_path, videos):
    command = [sys.executable, "-m", "data.verify"]
    result = run([*command, videos, "--root", str(tmp_path)], cwd=root)
    assert result.returncode == 1
    assert "3 bad" in result.stdout
    assert "Traceback" not in result.stderr
    result = run([*command, str(tmp_path / "none.txt"), "--root", str(tmp_path)], cwd=root)
    assert result.returncode == 1
    assert "cannot read the video list" in result.stderr
    assert "Traceback" not in result.stderr
    assert run([*command], cwd=root).returncode == 2
