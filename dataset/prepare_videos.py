"""Turn downloaded videos into the layout of ``dataset/config.py``: transcode, and write the lists.

    # Kinetics, from the annotation files of the release and the folder of a downloader
    python -m dataset.prepare_videos --dataset Kinetics \
        --csv train.csv --csv validate.csv --videos DOWNLOADED
    # folders of class folders
    python -m dataset.prepare_videos --dataset Kinetics --train-videos TRAIN --val-videos VAL
    python -m dataset.prepare_videos --dataset Kinetics --videos ALL --val-fraction 0.1
    # UCF101 and HMDB51, from the official split files; their videos are small enough as they are
    python -m dataset.prepare_videos --dataset UCF101 --splits ucfTrainTestlist --videos UCF-101 \
        --link

The encoding is the one that facebookresearch/GloRe trained on: MPEG-4 in AVI, no sound, the short
side scaled down to 288 pixels at 512 kb/s. Finished videos are skipped, so the same command goes on
where an interrupted one stopped.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import cv2

from glore_common import (
    GloReError,
    UsageError,
    progress,
    run_main,
    write_text,
)

from .config import get_config, list_datasets
from .folder_lock import folder_lock
from .video_plans import (
    plan_from_csv,
    plan_from_folders,
    plan_from_one_folder,
    plan_hmdb51,
    plan_ucf101,
    validation_file,
    validation_fraction,
)

SHORT_SIDE = 288
BITRATE = "512k"
SETTINGS = "prepare_settings.json"
REPORT = "prepare_report.txt"
_PARTIAL_PREFIX = ".partial-"


class TranscodeError(Exception):
    """One video could not be made; the message is the reason."""


def find_ffmpeg():
    """Return the path of an FFmpeg: imageio-ffmpeg's, else the one on the PATH.

    Raises
    ------
    GloReError
        There is neither.
    """
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        found = shutil.which("ffmpeg")
    if found is None:
        raise GloReError(
            "FFmpeg is needed to transcode videos and was not found: pip install imageio-ffmpeg "
            "(extra `prepare`), or install ffmpeg so that it is on the PATH, or use --link to take "
            "the videos as they are"
        )
    return found


def ffmpeg_command(ffmpeg, source, target, short_side, bitrate, trim=None):
    """Return the command line that makes ``target`` (MPEG-4 in AVI).

    The short side becomes ``short_side``, or stays when it is smaller, and both sides are made
    even, which the 4:2:0 pictures of MPEG-4 need; the other side keeps the proportions.
    """
    short = f"max(2\\,trunc(min(min(iw\\,ih)\\,{short_side})/2)*2)"
    scale = f"scale=w='if(gt(iw\\,ih)\\,-2\\,{short})':h='if(gt(iw\\,ih)\\,{short}\\,-2)'"
    cut = ["-ss", str(trim[0]), "-t", str(trim[1] - trim[0])] if trim else []
    return [
        *(ffmpeg, "-nostdin", "-hide_banner", "-loglevel", "error", "-y"),
        *cut,
        # An absolute path cannot be taken for an option or a protocol.
        *("-i", os.path.abspath(source), "-map", "0:v:0", "-an", "-vf", scale),
        *("-c:v", "mpeg4", "-b:v", bitrate, "-threads", "1", "-f", "avi"),
        os.path.abspath(target),
    ]


class _Runner:
    """Makes videos in threads; ``stop`` ends the FFmpegs that are running."""

    def __init__(self, make_command, timeout):
        self._make_command = make_command
        self._timeout = timeout
        self._running = set()
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self):
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _run(self, command):
        with self._lock:
            if self._stopped:
                raise TranscodeError("stopped")
            # A session of its own: Ctrl-C in the terminal reaches us, and we end it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            _, errors = process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise TranscodeError(f"FFmpeg took longer than {self._timeout:g} s") from None
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            lines = errors.decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1].strip()[:300] if lines else f"exit code {process.returncode}"
            raise TranscodeError(f"FFmpeg: {reason}")

    def transcode(self, job):
        """Make one video; it has its name only when it is complete."""
        folder, name = os.path.split(job.target)
        os.makedirs(folder, exist_ok=True)
        # One name per target, so that a killed run's remains are overwritten by the next one; a
        # digest, as the name itself may already be as long as names can be.
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        partial = os.path.join(folder, f"{_PARTIAL_PREFIX}{digest}.avi")
        try:
            self._run(self._make_command(job.source, partial, trim=job.trim))
            # FFmpeg ends with 0 on some damaged files without having written a frame.
            capture = cv2.VideoCapture(partial, cv2.CAP_FFMPEG)
            readable, _ = capture.read()
            capture.release()
            if not readable:
                raise TranscodeError("no frame could be read from the result")
            os.replace(partial, job.target)
        except OSError as error:
            raise TranscodeError(str(error)) from error
        finally:
            if os.path.exists(partial):
                os.remove(partial)


def _link(job):
    """Let ``job.target`` be a link to its source."""
    if not os.path.isfile(job.source):
        raise TranscodeError("the file has disappeared")
    try:
        os.makedirs(os.path.dirname(job.target), exist_ok=True)
        if os.path.lexists(job.target):
            os.remove(job.target)
        os.symlink(os.path.abspath(job.source), job.target)
    except OSError as error:
        raise TranscodeError(str(error)) from error


def _is_done(job):
    # A link to a file that has gone, or an empty file, is not done.
    try:
        return os.path.getsize(job.target) > 0
    except OSError:
        return False


def run_jobs(todo, make, jobs, stop=None):
    """Make the videos ``todo`` with ``make(job)`` in ``jobs`` threads.

    Returns
    -------
    list of (str, str)
        Source and reason of each failure. A full disk stops the run instead.
    """
    failures = []
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(make, job): job for job in todo}
        finished = concurrent.futures.as_completed(futures)
        for future in progress(finished, "Preparing videos", len(todo), unit="video"):
            try:
                future.result()
            except TranscodeError as error:
                if "No space left" in str(error):
                    raise GloReError(
                        "the disk is full; free some space and start the same command again: it "
                        "goes on where it stopped"
                    ) from error
                failures.append((futures[future].source, str(error)))
    except BaseException:
        if stop is not None:
            stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return sorted(failures)


def write_lists(config, plan, seed):
    """Write every list of the plan and the mapping table; return list file -> number of rows.

    Rows whose video is not there are left out. The order is shuffled with ``seed``, so that a
    part of a list is not a few classes only; a row's ``v_id`` does not change when a video that
    failed succeeds later.
    """
    counts = {}
    for path, rows in sorted(plan.lists.items()):
        ordered = list(rows.items())
        random.Random(f"{seed} {os.path.basename(path)}").shuffle(ordered)
        lines = [
            f"{v_id} {label} {sub_path}\n"
            for v_id, (sub_path, (label, target)) in enumerate(ordered)
            if _is_done(plan.jobs[target])
        ]
        write_text(path, "".join(lines))
        counts[path] = len(lines)
    table = "".join(f"{label}\t{name}\n" for label, name in enumerate(plan.classes))
    write_text(config.mapping_table, table)
    return counts


def _check_settings(raw, settings, overwrite):
    """Refuse to mix videos of different settings in one folder."""
    path = os.path.join(raw, SETTINGS)
    if overwrite or not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as stream:
            before = json.load(stream)
    except (OSError, ValueError) as error:
        raise GloReError(f"cannot read {path} ({error}); remove it to go on") from error
    if before != settings:
        raise UsageError(
            f"the videos in {raw} were prepared with {_shown(before)}, this is {_shown(settings)}; "
            "use the same settings, --overwrite to make all of them anew, or another --data-root"
        )


def _shown(settings):
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _report(plan, failures):
    """Return the text of the report: what is missing and what failed."""
    lines = [f"failed\t{source}\t{reason}" for source, reason in plan.problems + failures]
    lines += [f"missing\t{name}" for name in plan.missing]
    text = "\n".join(lines) + "\n" if lines else "All videos are there.\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _describe(config, plan, done, todo, link):
    rows = [
        f"{config.name}: {len(plan.classes)} classes, {len(plan.jobs)} videos: {done} done, "
        f"{len(todo)} to {'link' if link else 'transcode'}"
    ]
    for path, content in sorted(plan.lists.items()):
        rows.append(f"  {len(content):7d} rows  {path}")
    if plan.missing:
        rows.append(f"  {len(plan.missing):7d} missing, e.g. {plan.missing[0]}")
    for source, reason in plan.problems[:5]:
        rows.append(f"  unusable: {source}: {reason}")
    return "\n".join(rows)


def prepare(config, plan, jobs, short_side, bitrate, timeout, link, overwrite, seed, dry_run):
    """Carry out a plan: make the videos that are missing, then write lists and report.

    Raises
    ------
    GloReError
        Videos failed (the lists hold the others), the disk is full, or another process is at it.
    """
    raw = os.path.join(config.root, "raw")
    settings = {"link": True} if link else {"short_side": short_side, "bitrate": bitrate}
    _check_settings(raw, settings, overwrite)
    # Videos that lie where they belong already
    own = {
        job.target
        for job in plan.jobs.values()
        if os.path.abspath(job.source) == os.path.abspath(job.target)
    }
    if own and not link:
        raise UsageError(
            f"{min(own)} lies where its transcoded version would go; move the downloaded videos "
            "elsewhere, or take them as they are with --link"
        )
    todo = [
        job
        for job in plan.jobs.values()
        if job.target not in own and (overwrite or not _is_done(job))
    ]
    make = runner = None
    if link:
        make = _link
    elif todo:
        command = functools.partial(
            ffmpeg_command, find_ffmpeg(), short_side=short_side, bitrate=bitrate
        )
        runner = _Runner(command, timeout)
        make = runner.transcode
    print(_describe(config, plan, len(plan.jobs) - len(todo), todo, link), flush=True)
    if dry_run:
        for job in todo[:3]:
            example = f"{job.target} -> {job.source}"
            if not link:
                example = shlex.join(command(job.source, job.target, trim=job.trim))
            print(f"  e.g. {example}")
        print("Dry run: nothing was written.")
        return

    with folder_lock(config.root, wait=False):
        write_text(os.path.join(raw, SETTINGS), json.dumps(settings) + "\n")
        failures = run_jobs(todo, make, jobs, runner.stop if runner else None) if todo else []
        counts = write_lists(config, plan, seed)
        report = os.path.join(raw, REPORT)
        write_text(report, _report(plan, failures))
    for path, count in counts.items():
        print(f"{count} rows in {path}")
    failed = len(failures) + len(plan.problems)
    if plan.missing:
        print(f"{len(plan.missing)} videos of the annotation are missing; see {report}")
    if failed or (plan.missing and plan.missing_is_failure):
        what = [f"{failed} videos failed"] if failed else []
        what += [f"{len(plan.missing)} are missing"] if plan.missing else []
        raise GloReError(
            f"{' and '.join(what)}; {report} names them with the reasons. The lists hold the "
            "others; the same command tries again"
        )


def _parser():
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.prepare_videos",
        description="Transcode downloaded videos and write the lists that training reads.",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help=", ".join(name for name in list_datasets() if name != "Demo"),
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="folder that will hold NAME/raw (default: dataset)"
    )
    group = parser.add_argument_group("where the videos are")
    group.add_argument(
        "--videos",
        action="append",
        metavar="DIR",
        help="downloaded videos; may be repeated with --csv",
    )
    group.add_argument("--train-videos", metavar="DIR", help="training videos in class folders")
    group.add_argument("--val-videos", metavar="DIR", help="validation videos in class folders")
    group = parser.add_argument_group("which video is what")
    group.add_argument(
        "--csv", action="append", metavar="FILE", help="Kinetics annotation; may be repeated"
    )
    group.add_argument(
        "--splits", metavar="DIR", help="folder of the official split files (UCF101, HMDB51)"
    )
    group.add_argument("--val-fraction", type=float, metavar="F", help="of each class, drawn")
    group.add_argument(
        "--val-file",
        metavar="FILE",
        help="paths of the validation videos below --videos, a line each",
    )
    group.add_argument(
        "--mapping-table", metavar="FILE", help="labels of the classes (default: sorted by name)"
    )
    group.add_argument(
        "--seed", type=int, default=1, help="of --val-fraction and of the lists' order (default: 1)"
    )
    group = parser.add_argument_group("how they are made")
    group.add_argument(
        "--link", action="store_true", help="link to the videos as they are, do not transcode"
    )
    group.add_argument(
        "--short-side",
        type=int,
        default=SHORT_SIDE,
        metavar="N",
        help=f"pixels (default: {SHORT_SIDE})",
    )
    group.add_argument("--bitrate", default=BITRATE, help=f"512k to 640k (default: {BITRATE})")
    group.add_argument(
        "--trim",
        action="store_true",
        help="files named by their YouTube id alone are whole videos: cut the annotated seconds",
    )
    group.add_argument(
        "--jobs", type=int, metavar="N", help="videos at a time (default: number of processors)"
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds per video (default: 600)"
    )
    group.add_argument("--overwrite", action="store_true", help="make finished videos anew")
    group.add_argument("--dry-run", action="store_true", help="say what would be done")
    return parser


def _check_options(options):
    """Raise UsageError for options that do not go together or are out of range."""
    kinds = [
        name
        for name, given in (
            ("--csv", options.csv),
            ("--splits", options.splits),
            ("--train-videos/--val-videos", options.train_videos or options.val_videos),
            ("--val-fraction", options.val_fraction is not None),
            ("--val-file", options.val_file),
        )
        if given
    ]
    if len(kinds) != 1:
        raise UsageError(
            "say which videos train and which validate by exactly one of --csv, --splits, "
            "--train-videos with --val-videos, --val-fraction, --val-file; "
            + (f"given: {', '.join(kinds)}" if kinds else "none is given")
        )
    kind = kinds[0]
    if kind.startswith("--train"):
        if not (options.train_videos and options.val_videos) or options.videos:
            raise UsageError("--train-videos and --val-videos go together, without --videos")
    elif not options.videos:
        raise UsageError(f"{kind} needs --videos, the folder of the downloaded videos")
    elif len(options.videos) > 1 and kind != "--csv":
        raise UsageError(f"{kind} takes one --videos folder, {len(options.videos)} are given")
    if options.trim and (kind != "--csv" or options.link):
        raise UsageError("--trim needs --csv and cannot be used with --link")
    if options.splits and options.mapping_table:
        raise UsageError("--mapping-table does not go with --splits, which fix the labels")
    if not re.fullmatch(r"[1-9]\d*[kM]?", options.bitrate):
        raise UsageError(f"--bitrate must be a number such as 512k, not {options.bitrate!r}")
    if options.short_side < 16:
        raise UsageError(f"--short-side must be 16 pixels or more, not {options.short_side}")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs must be 1 or more, not {options.jobs}")
    if not 0 < options.timeout < math.inf:
        raise UsageError(f"--timeout must be a positive number of seconds, not {options.timeout}")


def make_plan(options):
    """Return the configuration and the plan that the options ask for."""
    _check_options(options)
    config = get_config(options.dataset, options.data_root)
    if config.name == "Demo":
        raise UsageError(f"the demo data are generated: python -m {__package__}.demo")
    table, link = options.mapping_table, options.link
    if options.csv:
        if config.name != "Kinetics":
            raise UsageError("--csv is for Kinetics")
        plan = plan_from_csv(config, options.csv, options.videos, table, link, options.trim)
    elif options.splits:
        planners = {"UCF101": plan_ucf101, "HMDB51": plan_hmdb51}
        if config.name not in planners:
            raise UsageError(f"--splits is for {' and '.join(planners)}")
        plan = planners[config.name](options.data_root, options.splits, options.videos[0], link)
    elif options.train_videos:
        plan = plan_from_folders(config, options.train_videos, options.val_videos, table, link)
    else:
        folder = options.videos[0]
        if options.val_file:
            is_val = validation_file(options.val_file, folder)
        else:
            is_val = validation_fraction(options.val_fraction, options.seed)
        plan = plan_from_one_folder(config, folder, is_val, table, link)
    return config, plan


def _raise_interrupt(number, frame):
    raise KeyboardInterrupt


def main(argv=None):
    """Run the command line."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, plan = make_plan(options)
    # A polite kill ends the FFmpegs as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        prepare(
            config,
            plan,
            jobs=options.jobs or os.cpu_count() or 1,
            short_side=options.short_side,
            bitrate=options.bitrate,
            timeout=options.timeout,
            link=options.link,
            overwrite=options.overwrite,
            seed=options.seed,
            dry_run=options.dry_run,
        )
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where it stopped.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
