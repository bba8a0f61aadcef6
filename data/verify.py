"""Find the videos of a list that cannot be read: ``python -m data.verify LIST --root ROOT``.

Decodes every frame of every video (``--quick``: some frames spread over it) in parallel worker
processes, writes a report and a list without the bad rows, and notes the frame counts in the
list's cache. ``--exact`` also compares frames with those that FFmpeg gives when it decodes a video
from its start. Exit code: 0 when all videos are good, 1 when some are bad, 2 for bad usage.
"""

import argparse
import collections
import json
import logging
import os
import sys
from typing import Any, Optional

from glore_common import UsageError, check_writable, module_command, progress, run_main, write_text

from .common.pool import Task, WorkerError, WorkerPool
from .common.worker_main import BAD, DONE, REFUSED
from .video.container import VideoFacts
from .video.list import FrameCounts, VideoList, read_video_list
from .video.readers import by_decord
from .video.verify_job import VerifyJob

LOGGER = logging.getLogger("glore.data")
COLUMNS = (
    *("v_id", "label", "path", "status", "frames", "announced", "reason"),
    *("reader", "codec", "container", "fps", "rotation", "seconds"),
)


class _Results:
    """Outcomes as they come, taken from the pool in any order."""

    def __init__(self):
        self.ready = collections.deque()

    def outcome(self, task, kind, value):
        self.ready.append((task, kind, value))

    def in_turn(self, pool, count):
        """Yield ``count`` outcomes."""
        for _ in range(count):
            with pool.condition:
                pool.run_until(lambda: self.ready)
                outcome = self.ready.popleft()
            yield outcome


def verify_list(
    video_list: VideoList,
    num_workers: int = 1,
    quick: bool = False,
    timeout: float = 300.0,
    min_frames: int = 1,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """Check every video of a list.

    Parameters
    ----------
    video_list
    num_workers
        Worker processes, at least 1.
    quick
        Decode some frames instead of all.
    timeout
        Seconds that one video may take.
    min_frames
        Videos with fewer frames count as bad.
    exact
        Compare frames with those of the whole video, decoded from its start.

    Returns
    -------
    list of dict
        One per row, in the list's order, with the keys :data:`COLUMNS`. ``status`` is 'ok' or
        'bad'; a video of which only the first frames can be decoded is bad.
    """
    if num_workers < 1 or timeout <= 0:
        raise UsageError("at least one worker and a time-out above 0 are needed.")
    counts = FrameCounts(video_list)
    report: list[dict[str, Any]] = [
        {
            **dict.fromkeys(COLUMNS, ""),
            **dict(zip(COLUMNS, (*row, "bad", 0, 0, "it was not checked"))),
        }
        for row in video_list.rows
    ]
    results = _Results()
    pool = WorkerPool(VerifyJob(quick, exact), num_workers, results.outcome, timeout)
    try:
        pool.start()
        with pool.condition:
            for index in range(len(report)):
                path = video_list.full_path(index)
                pool.submit(Task((path,), path, index))
        outcomes = results.in_turn(pool, len(report))
        for task, kind, value in progress(outcomes, "verify", len(report), unit="video"):
            entry = report[task.context]
            if kind == DONE:
                facts, reason = value
                entry.update(_columns_of(facts))
                if facts.frames:
                    counts.note(task.context, facts, replace=not quick)
                if not reason and facts.frames < min_frames:
                    reason = f"{facts.frames} frames, fewer than {min_frames}"
                entry.update(status="bad" if reason else "ok", reason=reason)
            elif kind == BAD:
                entry["reason"] = value
            elif kind == REFUSED:
                raise value
            else:
                raise WorkerError(f"error while checking {task.what}:\n{value}")
            if entry["status"] == "bad":
                LOGGER.warning("%s: %s", task.what, entry["reason"])
    finally:
        pool.close()
        counts.save()
    return report


def _columns_of(facts: VideoFacts) -> dict[str, Any]:
    """Return the columns of a report that say what is known of a file."""
    return {
        "frames": facts.frames,
        "announced": facts.announced,
        "reader": "decord" if by_decord(facts) else "pyav",
        "codec": facts.codec,
        "container": facts.container,
        "fps": round(facts.rate, 3),
        "rotation": str(facts.turn),
        "seconds": round(facts.frames / facts.rate, 3) if facts.rate else "",
    }


def write_report(report: list[dict[str, Any]], path: str) -> None:
    """Write what :func:`verify_list` found: JSON for a name ending in .json, else a TSV table."""
    if path.endswith(".json"):
        write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        return

    def cell(value):
        # A tab or line end in a path or reason would break the table.
        return str(value).replace("\t", " ").replace("\r", " ").replace("\n", " ")

    rows = ["\t".join(COLUMNS)]
    rows += ["\t".join(cell(entry[key]) for key in COLUMNS) for entry in report]
    write_text(path, "\n".join(rows) + "\n")


def write_clean_list(video_list: VideoList, report: list[dict[str, Any]], path: str) -> None:
    """Write the list without its bad rows; the other lines stay as they are."""
    with open(video_list.path, encoding="utf-8-sig") as stream:
        lines = stream.read().split("\n")
    good = [
        lines[number - 1].rstrip("\r")
        for number, entry in zip(video_list.lines, report)
        if entry["status"] == "ok"
    ]
    head = [] if video_list.rate is None else [f"# fps {video_list.rate:g}"]
    write_text(path, "".join(line + "\n" for line in head + good))


def _check_places(video_list, *paths):
    """Refuse places that cannot be written before hours of scanning rather than after."""
    for path in paths:
        if os.path.realpath(path) == os.path.realpath(video_list.path):
            raise UsageError(f"the output must not overwrite the list itself: {path}")
        check_writable(path, "--report or --clean-list:")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=module_command("data.verify"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("list", help="video list: rows 'v_id label sub/path'")
    parser.add_argument("--root", required=True, help="folder that the paths start from")
    parser.add_argument("--num-classes", type=int, help="check the labels against this number")
    parser.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count() or 1,
        help="worker processes (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="decode some frames, not all")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compare frames with those that decoding from the start gives",
    )
    parser.add_argument(
        "--min-frames", type=int, default=1, help="shorter videos are bad (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="seconds that one video may take (default: %(default)g)",
    )
    parser.add_argument(
        "--report", help="report, .tsv or .json (default: LIST with .verify.tsv for its extension)"
    )
    parser.add_argument(
        "--clean-list", help="list of the good videos (default: LIST with .clean.txt likewise)"
    )
    return parser


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    video_list = read_video_list(arguments.list, arguments.root, arguments.num_classes)
    stem = os.path.splitext(video_list.path)[0]
    report_path = arguments.report or stem + ".verify.tsv"
    clean_path = arguments.clean_list or stem + ".clean.txt"
    _check_places(video_list, report_path, clean_path)
    report = verify_list(
        video_list,
        arguments.num_workers,
        arguments.quick,
        arguments.timeout,
        arguments.min_frames,
        arguments.exact,
    )
    write_report(report, report_path)
    write_clean_list(video_list, report, clean_path)
    bad = sum(entry["status"] == "bad" for entry in report)
    print(f"{len(report) - bad} of {len(report)} videos are good, {bad} bad.")
    print(f"report: {report_path}\nclean list: {clean_path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
