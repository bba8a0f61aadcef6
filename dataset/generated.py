"""Data sets that a program makes: complete or absent, made once, by several processes.

The data appear in ``<folder>/raw`` under their final name when all of them are written, with a
manifest that names every file and its size: an interrupted run leaves nothing that looks finished,
and of several processes at once one makes the data while the others wait.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, Callable, NamedTuple, Optional

import cv2

from glore_common import LOGGER, GloReError, UsageError, file_lock, progress
from glore_options import Options, option, positive_int

MANIFEST = "manifest.json"
BATCH = 20  # files that a process makes at a time
LOCK = ".lock"
_WORK_PREFIX = ".making-"

Counts = dict[str, int]  # files of each class by split
# (folder, part of the items) -> (path below the folder, size in bytes) of each file.
MakePart = Callable[[str, Sequence], list[tuple[str, int]]]
# (function, items) -> size by path.
Make = Callable[[MakePart, Sequence], dict[str, int]]


@dataclasses.dataclass
class GeneratedOptions(Options):
    """What the commands of all generated data sets have."""

    title = "options"

    data_root: Optional[str] = option(
        None,
        "folder that will hold the data set's (default: the folder dataset)",
        aliases=("--root",),
        metavar="DIR",
    )
    jobs: Optional[int] = option(
        None,
        "processes (default: the number of processors, at most 8)",
        kind=positive_int,
        metavar="N",
    )
    force: bool = option(False, "make the data anew in any case")


def count_option(what: str, number: int) -> Any:
    """Declare the option of how many files each class gets; ``number`` if there are none yet."""
    text = f"{what} of each class (default: what is there, else {number})"
    return option(None, text, kind=positive_int, metavar="N")


class Recipe(NamedTuple):
    """What is made and how.

    Attributes
    ----------
    what
        For messages: "demo data".
    command
        Makes it: "python -m dataset.demo".
    unit
        What one file is: "clip".
    parameters
        Returns what the data depend on, as JSON takes it, with the counts under ``count_key``: data
        with other parameters are made anew.
    count_key
    default_counts
        Where neither the caller nor what is there decides.
    write
        ``write(raw, counts, make)`` writes all below the empty folder ``raw`` and returns the
        sizes of the files by path; ``make(function, items)`` has ``function(raw, part)`` run on
        parts of ``items``, in several processes.
    """

    what: str
    command: str
    unit: str
    parameters: Callable[[Counts], dict[str, Any]]
    count_key: str
    default_counts: Counts
    write: Callable[[str, Counts, Make], dict[str, int]]


def _check_counts(unit: str, counts: dict[str, Optional[int]], jobs: Optional[int]) -> None:
    kinds = {"train": "", "val": "validation ", "test": "test "}
    numbers = {f"{kinds[split]}{unit}s per class": number for split, number in counts.items()}
    for name, number in {**numbers, "jobs": jobs}.items():
        if number is not None and number < 1:
            raise UsageError(f"the number of {name} must be 1 or more, not {number}")


def prepare_generated(
    folder: str,
    recipe: Recipe,
    counts: dict[str, Optional[int]],
    jobs: Optional[int] = None,
    force: bool = False,
) -> None:
    """Make a data set unless it is there, complete and of this version.

    Parameters
    ----------
    folder
        The data lie in ``folder/raw``.
    recipe
    counts
        Files of each class by split; None keeps what is there, or else takes the default.
    jobs
        Processes; by default as many as there are processors, at most 8. The data do not depend
        on it.
    force
        Make the data anew in any case.

    Raises
    ------
    UsageError
        A number below 1.
    GloReError
        The place is taken by files of someone else, or cannot be written.
    """
    _check_counts(recipe.unit, counts, jobs)
    raw = os.path.join(folder, "raw")
    if not force and _what_is_wrong(raw, recipe, counts) is None:
        return
    with file_lock(os.path.join(folder, LOCK), math.inf) as alone:
        reason = "asked to" if force else _what_is_wrong(raw, recipe, counts)
        if reason is None:
            return
        # The folder only ever appears with its manifest, so one without is not of our making.
        if os.path.lexists(raw) and not os.path.exists(os.path.join(raw, MANIFEST)) and not force:
            raise GloReError(
                f"{raw} exists and was not made by this generator (it has no {MANIFEST}). Move it "
                f"away, or replace it: {recipe.command} --force"
            )
        if alone:
            for name in os.listdir(folder):
                if name.startswith(_WORK_PREFIX):
                    shutil.rmtree(os.path.join(folder, name))
        LOGGER.info("Making the %s in %s (%s)", recipe.what, raw, reason)
        work = tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=folder)
        try:
            # A folder within, as mkdtemp's own is closed to other users.
            new = os.path.join(work, "raw")
            os.mkdir(new)
            _write(new, recipe, _wanted(raw, recipe, counts), jobs or min(8, _available_cpus()))
            if os.path.lexists(raw):
                os.rename(raw, os.path.join(work, "old"))
            os.rename(new, raw)
        except OSError as error:
            raise GloReError(f"cannot write the {recipe.what} to {raw}: {error}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(work)


def _wanted(raw: str, recipe: Recipe, counts: dict[str, Optional[int]]) -> Counts:
    """Return the counts with None replaced: by what is there, or else by the default."""
    there = {}
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(raw, MANIFEST), encoding="utf-8") as stream:
            manifest = json.load(stream)
        found = manifest.get(recipe.count_key) if isinstance(manifest, dict) else None
        there = found if isinstance(found, dict) else {}
    wanted = {}
    for split, number in counts.items():
        known = there.get(split)
        known = known if isinstance(known, int) and known > 0 else recipe.default_counts[split]
        wanted[split] = known if number is None else number
    return wanted


def _write(raw: str, recipe: Recipe, counts: Counts, jobs: int) -> None:
    def make(function: MakePart, items: Sequence) -> dict[str, int]:
        made = _made(recipe, raw, function, items, jobs)
        label = f"Making the {recipe.what}"
        return dict(progress(made, label, len(items), every=5.0, unit=recipe.unit))

    files = recipe.write(raw, counts, make)
    with open(os.path.join(raw, MANIFEST), "w", encoding="utf-8") as stream:
        manifest = {**recipe.parameters(counts), "files": dict(sorted(files.items()))}
        json.dump(manifest, stream, indent=1)


def _what_is_wrong(raw: str, recipe: Recipe, counts: dict[str, Optional[int]]) -> Optional[str]:
    """Return why the data must be made (anew), or None when they are complete."""
    if not os.path.lexists(raw):
        return "they do not exist yet"
    try:
        with open(os.path.join(raw, MANIFEST), encoding="utf-8") as stream:
            manifest = json.load(stream)
        there = manifest[recipe.count_key]
        # A number that is not asked for stays what it was.
        asked = {split: number for split, number in counts.items() if number is not None}
        wanted = recipe.parameters({**{split: there[split] for split in counts}, **asked})
        files = manifest.pop("files")
    except FileNotFoundError:
        return "they have no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "their manifest is damaged"
    if manifest != wanted:
        return "they were made by another version or with other parameters"
    for path, size in files.items():
        try:
            found = os.path.getsize(os.path.join(raw, path))
        except OSError:
            return f"{path} is missing"
        if found != size:
            return f"{path} has changed"
    return None


def _start_worker():
    # Ctrl-C reaches the parent, which stops handing out work; a parent that is gone ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _made(
    recipe: Recipe, folder: str, function: MakePart, items: Sequence, jobs: int
) -> Iterator[tuple[str, int]]:
    """Run ``function(folder, part)`` on all items in ``jobs`` processes; yield what it returns."""
    batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    if jobs == 1:
        for part in batches:
            yield from function(folder, part)
        return
    # Spawned, not forked: MXNet and its threads may be loaded here, which a fork would break.
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        # Processes that are starting must not answer Ctrl-C with a trace: they inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            futures = [pool.submit(function, folder, part) for part in batches]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in concurrent.futures.as_completed(futures):
            yield from future.result()
    except BrokenProcessPool as error:
        raise GloReError(
            f"a process that makes the {recipe.what} ended unexpectedly (killed, or out of "
            f"memory); run it again, with one process if it persists: {recipe.command} --jobs 1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _available_cpus():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
