"""Turn downloaded videos into the layout of ``dataset/config.py``: transcode, and write the lists.

    # Kinetics, from the annotation files of the release and the folder of a downloader
    python -m dataset.prepare_videos --dataset Kinetics \
        --csv train.csv --csv validate.csv --videos DOWNLOADED
    # folders of class folders
    python -m dataset.prepare_videos --dataset Kinetics --train-videos TRAIN --val-videos VAL
    python -m dataset.prepare_videos --dataset Kinetics --videos ALL --val-fraction 0.1
    # a data set of your own: FOLDER holds a folder per class, or train/ and val/ with such folders
    python -m dataset.prepare_videos --dataset mine --videos FOLDER
    # UCF101 and HMDB51, from the official split files; their videos are small enough as they are
    python -m dataset.prepare_videos --dataset UCF101 --splits ucfTrainTestlist --videos UCF-101 \
        --link

The encoding is the one that facebookresearch/GloRe trained on: MPEG-4 in AVI, no sound, the short
side scaled down to 288 pixels at 512 kb/s. Finished videos are skipped, so the same command goes on
where an interrupted one stopped.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, Callable, NoReturn, Optional

import cv2

from data.video.container import VideoError, frame_rates
from data.video.readers import count_decodable_frames
from glore_common import (
    GloReError,
    UsageError,
    end_with_parent,
    file_lock,
    module_command,
    progress,
    run_main,
    write_text,
)
from glore_options import (
    JobOptions,
    Options,
    group,
    number,
    option,
    parse,
    positive_float,
    positive_int,
    seed,
)

from .config import DatasetConfig, get_config, list_datasets
from .generated import LOCK
from .video_plans import (
    Job,
    Plan,
    plan_from_csv,
    plan_from_folders,
    plan_from_one_folder,
    plan_hmdb51,
    plan_ucf101,
    validation_file,
    validation_fraction,
)

SHORT_SIDE = 288
VAL_FRACTION = 0.1
# A path that does not exist.
NOWHERE = "/nonexistent"
# Frames per second.
USUAL_RATES = (
    5,
    10,
    12,
    12.5,
    15,
    20,
    24000 / 1001,
    24,
    25,
    30000 / 1001,
    30,
    50,
    60000 / 1001,
    60,
)
BITRATE = "512k"
SETTINGS = "prepare_settings.json"
REPORT = "prepare_report.txt"
_PARTIAL_PREFIX = ".partial-"


def bit_rate(text: str) -> str:
    """Return a bit rate as FFmpeg reads it."""
    if not re.fullmatch(r"[1-9]\d*[kM]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 512k")
    return text


@dataclasses.dataclass
class SourceOptions(Options):
    """Where the videos are, and which of them is what."""

    title = "which videos"

    dataset: str = option(
        "",
        ", ".join(name for name in list_datasets() if name != "Demo")
        + ", or any name for a data set of your own (default: none, name it)",
        metavar="NAME",
    )
    data_root: Optional[str] = option(
        None, "folder that will hold NAME/raw (default: dataset)", metavar="DIR"
    )
    videos: tuple[str, ...] = option(
        (), "downloaded videos; with --csv several", metavar="DIR", several=True
    )
    train_videos: Optional[str] = option(None, "training videos in class folders", metavar="DIR")
    val_videos: Optional[str] = option(None, "validation videos in class folders", metavar="DIR")
    csv: tuple[str, ...] = option(
        (), "Kinetics annotation; there may be several", metavar="FILE", several=True
    )
    splits: Optional[str] = option(
        None, "folder of the official split files (UCF101, HMDB51)", metavar="DIR"
    )
    val_fraction: Optional[float] = option(
        None,
        "of each class, drawn (a data set of your own: 0.1)",
        kind=number(float, high=1.0, above=0.0),
        metavar="F",
    )
    val_file: Optional[str] = option(
        None, "paths of the validation videos below --videos, a line each", metavar="FILE"
    )
    mapping_table: Optional[str] = option(
        None, "labels of the classes (default: sorted by name)", metavar="FILE"
    )
    random_seed: int = option(
        1, "of --val-fraction and of the lists' order", kind=seed, aliases=("--seed",)
    )


@dataclasses.dataclass
class MakingOptions(Options):
    """How the videos are made."""

    title = "how they are made"

    link: bool = option(False, "link to the videos as they are, do not transcode")
    short_side: int = option(SHORT_SIDE, "pixels", kind=number(int, 16), metavar="N")
    bitrate: str = option(BITRATE, "512k to 640k", kind=bit_rate)
    fps: Optional[float] = option(
        None,
        "frames per second of all videos, which the lists then record (default: each as it is)",
        kind=positive_float,
    )
    trim: bool = option(
        False,
        "files named by their YouTube id alone are whole videos: cut the annotated seconds",
    )
    jobs: Optional[int] = option(
        None,
        "videos at a time (default: number of processors)",
        kind=positive_int,
        metavar="N",
    )
    timeout: float = option(600.0, "seconds per video", kind=positive_float, metavar="S")
    overwrite: bool = option(False, "make finished videos anew")
    dry_run: bool = option(False, "say what would be done")

    def settings(self) -> dict[str, Any]:
        """Return what the videos of a folder have in common."""
        if self.link:
            return {"link": True}
        rate = {} if self.fps is None else {"fps": self.fps}
        return {"short_side": self.short_side, "bitrate": self.bitrate, **rate}


@dataclasses.dataclass
class PrepareOptions(JobOptions):
    """All options of the command."""

    source: SourceOptions = group(SourceOptions)
    making: MakingOptions = group(MakingOptions)


class TranscodeError(Exception):
    """One video could not be made; the message is the reason."""


def find_ffmpeg() -> str:
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


def ffmpeg_command(
    ffmpeg: str,
    source: str,
    target: str,
    short_side: int,
    bitrate: str,
    trim: Optional[tuple[int, int]] = None,
    fps: Optional[float] = None,
) -> list[str]:
    """Return the command line that makes ``target`` (MPEG-4 in AVI), of FFmpeg's choice of stream.

    ``fps`` makes it of another frame rate.

    The short side becomes ``short_side``, or stays when it is smaller, and both sides are made
    even, which the 4:2:0 pictures of MPEG-4 need; the other side keeps the proportions.
    """
    short = f"max(2\\,trunc(min(min(iw\\,ih)\\,{short_side})/2)*2)"
    scale = f"scale=w='if(gt(iw\\,ih)\\,-2\\,{short})':h='if(gt(iw\\,ih)\\,{short}\\,-2)'"
    cut = ["-ss", str(trim[0]), "-t", str(trim[1] - trim[0])] if trim else []
    rate = f"fps={fps:.6f}," if fps else ""
    return [
        *(ffmpeg, "-nostdin", "-hide_banner", "-loglevel", "error", "-y"),
        *cut,
        # An absolute path cannot be taken for an option or a protocol.
        *("-i", os.path.abspath(source), "-an", "-sn", "-dn", "-vf", rate + scale),
        *("-c:v", "mpeg4", "-b:v", bitrate, "-threads", "1", "-f", "avi"),
        os.path.abspath(target),
    ]


def rate_for(source: str, asked: Optional[float] = None) -> Optional[float]:
    """Return the frame rate to ask FFmpeg for: None where it finds the right one by itself.

    A browser's recording has time stamps in milliseconds and no rate: FFmpeg takes it for one of
    1000 frames per second, and the bit rate is spent on copies of frames.
    """
    if asked or not os.path.isfile(source):
        return asked
    try:
        announced, real = frame_rates(source)
    except VideoError:  # FFmpeg says what is wrong with it
        return None
    if not real or announced <= 1.5 * real:
        return None
    usual = min(USUAL_RATES, key=lambda rate: abs(rate - real))
    return usual if abs(usual - real) < 0.02 * usual else real


class _Runner:
    """Makes videos in threads; ``stop`` ends the FFmpegs that are running."""

    def __init__(
        self,
        make_command: Callable[..., list[str]],
        timeout: float,
        fps: Optional[float] = None,
    ) -> None:
        self._make_command = make_command
        self._fps = fps
        self._timeout = timeout
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _run(self, command: list[str]) -> None:
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
                preexec_fn=end_with_parent,
                # A static FFmpeg dies of the host's character sets, which it would load for the
                # names in MPEG-TS.
                env={**os.environ, "GCONV_PATH": NOWHERE},
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

    def transcode(self, job: Job) -> None:
        """Make one video, of the first copy that is whole; it has its name when it is complete."""
        reasons = []
        for source in (job.source, *job.others):
            try:
                self._transcode(dataclasses.replace(job, source=source))
                return
            except TranscodeError as error:
                if self._stopped or "No space left" in str(error):
                    raise
                reasons.append(str(error))
        raise TranscodeError("; ".join(dict.fromkeys(reasons)))

    def _transcode(self, job: Job) -> None:
        folder, name = os.path.split(job.target)
        os.makedirs(folder, exist_ok=True)
        # One name per target, so that a killed run's remains are overwritten by the next one; a
        # digest, as the name itself may already be as long as names can be.
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        partial = os.path.join(folder, f"{_PARTIAL_PREFIX}{digest}.avi")
        try:
            rate = rate_for(job.source, self._fps)
            more = {"fps": rate} if rate else {}
            self._run(self._make_command(job.source, partial, trim=job.trim, **more))
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


def _link(job: Job) -> None:
    """Let ``job.target`` be a link to its source, or to the first of its copies that is whole."""
    if job.others:
        job = dataclasses.replace(job, source=_first_whole((job.source, *job.others)))
    if not os.path.isfile(job.source):
        raise TranscodeError("the file has disappeared")
    try:
        os.makedirs(os.path.dirname(job.target), exist_ok=True)
        if os.path.lexists(job.target):
            os.remove(job.target)
        os.symlink(os.path.abspath(job.source), job.target)
    except OSError as error:
        raise TranscodeError(str(error)) from error


def _first_whole(copies: Sequence[str]) -> str:
    reasons = []
    for path in copies:
        try:
            _, reason = count_decodable_frames(path)
        except VideoError as error:
            reason = error.reason
        if not reason:
            return path
        reasons.append(reason)
    raise TranscodeError("; ".join(reasons))


def _is_done(job: Job) -> bool:
    # A link to a file that has gone, or an empty file, is not done.
    try:
        return os.path.getsize(job.target) > 0
    except OSError:
        return False


def run_jobs(
    todo: Sequence[Job],
    make: Callable[[Job], None],
    jobs: int,
    stop: Callable[[], None] = lambda: None,
) -> list[tuple[str, str]]:
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
        stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return sorted(failures)


def write_lists(
    config: DatasetConfig, plan: Plan, seed: int, fps: Optional[float] = None
) -> dict[str, int]:
    """Write every list of the plan and the mapping table; return list file -> number of rows.

    A list of videos of one rate, ``fps``, says so in its first line.

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
        head = [f"# fps {fps:g}\n"] if fps else []
        write_text(path, "".join(head + lines))
        counts[path] = len(lines)
    table = "".join(f"{label}\t{name}\n" for label, name in enumerate(plan.classes))
    write_text(config.mapping_table, table)
    return counts


def _earlier_settings(raw: str, settings: dict[str, Any], overwrite: bool) -> Optional[dict]:
    """Return the settings of the videos that are there; refuse to mix them with others.

    None if there are no videos, or, with ``overwrite``, no telling.
    """
    path = os.path.join(raw, SETTINGS)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            before = json.load(stream)
    except (OSError, ValueError) as error:
        if overwrite:
            return None
        raise GloReError(f"cannot read {path} ({error}); remove it to go on") from error
    if before != settings and not overwrite:
        raise UsageError(
            f"the videos in {raw} were prepared with {_shown(before)}, this is {_shown(settings)}; "
            "use the same settings, --overwrite to make all of them anew, or another --data-root"
        )
    return before


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _report(plan: Plan, failures: list[tuple[str, str]]) -> str:
    """Return the text of the report: what is missing and what failed."""
    lines = [f"failed\t{source}\t{reason}" for source, reason in plan.problems + failures]
    lines += [f"missing\t{name}" for name in plan.missing]
    text = "\n".join(lines) + "\n" if lines else "All videos are there.\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _describe(config: DatasetConfig, plan: Plan, todo: Sequence[Job], link: bool) -> str:
    done = len(plan.jobs) - len(todo)
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


def _todo(plan: Plan, making: MakingOptions) -> list[Job]:
    """Return the videos to make."""
    sources = {os.path.abspath(job.source) for job in plan.jobs.values()}
    taken = {target for target in plan.jobs if os.path.abspath(target) in sources}
    own = set()
    if making.link:
        # Videos that lie where they belong already
        own = {t for t in taken if os.path.abspath(plan.jobs[t].source) == os.path.abspath(t)}
    if taken - own:
        raise UsageError(
            f"{min(taken - own)} lies where its transcoded version would go, or another video; "
            "move the downloaded videos elsewhere, or take them as they are with --link"
        )
    return [
        job
        for job in plan.jobs.values()
        if job.target not in own and (making.overwrite or not _is_done(job))
    ]


def prepare(config: DatasetConfig, plan: Plan, making: MakingOptions, seed: int) -> None:
    """Carry out a plan: make the videos that are missing, then write lists and report.

    Raises
    ------
    GloReError
        Videos failed (the lists hold the others), the disk is full, or another process is at it.
    """
    raw = os.path.join(config.root, "raw")
    settings = making.settings()
    before = _earlier_settings(raw, settings, making.overwrite)
    todo = _todo(plan, making)
    make, stop = _link, lambda: None
    if todo and not making.link:
        command = functools.partial(
            ffmpeg_command,
            find_ffmpeg(),
            short_side=making.short_side,
            bitrate=making.bitrate,
        )
        runner = _Runner(command, making.timeout, making.fps)
        make, stop = runner.transcode, runner.stop
    print(_describe(config, plan, todo, making.link), flush=True)
    if making.dry_run:
        for job in todo[:3]:
            example = f"{job.target} -> {job.source}"
            if not making.link:
                example = shlex.join(command(job.source, job.target, trim=job.trim, fps=making.fps))
            print(f"  e.g. {example}")
        print("Dry run: nothing was written.")
        return

    with file_lock(os.path.join(config.root, LOCK)):
        if making.overwrite and before != settings:
            # However this run ends, no video of the old settings is left under the new ones.
            for job in todo:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(job.target)
        write_text(os.path.join(raw, SETTINGS), json.dumps(settings) + "\n")
        failures = run_jobs(todo, make, making.jobs or os.cpu_count() or 1, stop) if todo else []
        counts = write_lists(config, plan, seed, making.fps)
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


def _check_options(source: SourceOptions, making: MakingOptions) -> None:
    """Raise UsageError for options that do not go together."""
    if not source.dataset:
        raise UsageError("name the data set: --dataset NAME")
    given = {
        "--csv": source.csv,
        "--splits": source.splits,
        "--train-videos/--val-videos": source.train_videos or source.val_videos,
        "--val-fraction": source.val_fraction,
        "--val-file": source.val_file,
    }
    kinds = [name for name, value in given.items() if value]
    if (
        not kinds
        and source.videos
        and source.dataset.lower() not in map(str.lower, list_datasets())
    ):
        kinds = ["--videos"]
    if len(kinds) != 1:
        raise UsageError(
            "say which videos train and which validate by exactly one of --csv, --splits, "
            "--train-videos with --val-videos, --val-fraction, --val-file; "
            + (f"given: {', '.join(kinds)}" if kinds else "none is given")
        )
    kind = kinds[0]
    if kind.startswith("--train"):
        if not (source.train_videos and source.val_videos) or source.videos:
            raise UsageError("--train-videos and --val-videos go together, without --videos")
    elif not source.videos:
        raise UsageError(f"{kind} needs --videos, the folder of the downloaded videos")
    elif len(source.videos) > 1 and kind != "--csv":
        raise UsageError(f"{kind} takes one --videos folder, {len(source.videos)} are given")
    if making.trim and (kind != "--csv" or making.link):
        raise UsageError("--trim needs --csv and cannot be used with --link")
    if making.fps and making.link:
        raise UsageError("--fps makes new videos: it cannot be used with --link")
    if source.splits and source.mapping_table:
        raise UsageError("--mapping-table does not go with --splits, which fix the labels")


def make_plan(source: SourceOptions, making: MakingOptions) -> tuple[DatasetConfig, Plan]:
    """Return the configuration and the plan that the options ask for."""
    _check_options(source, making)
    config = get_config(source.dataset, source.data_root, new=True)
    if config.is_own:
        # Its classes are those that are found now, whatever an earlier run made.
        config = dataclasses.replace(config, num_classes=0)
    if config.name == "Demo":
        raise UsageError(f"the demo data are generated: {module_command('dataset.demo')}")
    table, link = source.mapping_table, making.link
    if source.csv:
        if config.name != "Kinetics" and not config.is_own:
            raise UsageError("--csv is for Kinetics, or a data set of your own like it")
        plan = plan_from_csv(config, source.csv, source.videos, table, link, making.trim)
    elif source.splits:
        planners = {"UCF101": plan_ucf101, "HMDB51": plan_hmdb51}
        if config.name not in planners:
            raise UsageError(f"--splits is for {' and '.join(planners)}")
        plan = planners[config.name](source.data_root, source.splits, source.videos[0], link)
    elif source.train_videos and source.val_videos:
        plan = plan_from_folders(config, source.train_videos, source.val_videos, table, link)
    else:
        folder = source.videos[0]
        parts = [os.path.join(folder, part) for part in ("train", "val")]
        if (
            source.val_fraction is None
            and source.val_file is None
            and all(map(os.path.isdir, parts))
        ):
            return config, plan_from_folders(config, parts[0], parts[1], table, link)
        if source.val_file is None:
            fraction = VAL_FRACTION if source.val_fraction is None else source.val_fraction
            is_val = validation_fraction(fraction, source.random_seed)
        else:
            is_val = validation_file(str(source.val_file), folder)
        plan = plan_from_one_folder(config, folder, is_val, table, link)
    return config, plan


def _raise_interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line."""
    description = "Transcode downloaded videos and write the lists that training reads."
    program = module_command("dataset.prepare_videos")
    options = parse(PrepareOptions(), argv, description, prog=program)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, plan = make_plan(options.source, options.making)
    # A polite kill ends the FFmpegs as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        prepare(config, plan, options.making, options.source.random_seed)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where it stopped.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
