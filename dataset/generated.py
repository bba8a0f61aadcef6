"""Data sets that a program makes: complete or absent, made once, by several processes.

The data appear in ``<folder>/raw`` under their final name when all of them are written, with a
manifest that names every file and its size: an interrupted run leaves nothing that looks finished,
and of several processes at once one makes the data while the others wait.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Callable, NamedTuple

import cv2

from glore_common import LOGGER, GloReError, UsageError, progress

from .folder_lock import folder_lock

MANIFEST = "manifest.json"
BATCH = 20  # files that a process makes at a time
_WORK_PREFIX = ".making-"


class Recipe(NamedTuple):
    """What is made and how.

    Attributes
    ----------
    what : str
        For messages: "demo data".
    command : str
        Makes it: "python -m dataset.demo".
    unit : str
        What one file is: "clip".
    parameters : callable
        ``parameters(counts)`` returns what the data depend on, a dict that JSON takes, with
        ``counts`` under the key ``count_key``: data with other parameters are made anew.
    count_key : str
    default_counts : dict
        Files of each class by split, where neither the caller nor what is there decides.
    write : callable
        ``write(raw, counts, make)`` writes all below the empty folder ``raw`` and returns the
        sizes of the files by path; ``make(function, items)`` has ``function(raw, part)``, which
        returns (path, size) pairs, run on parts of ``items`` and returns all pairs as a dict.
    """

    what: str
    command: str
    unit: str
    parameters: Callable
    count_key: str
    default_counts: dict
    write: Callable


def _check_counts(unit, counts, jobs):
    """Raise UsageError for a number below 1 (``counts``: split -> number or None)."""
    names = {"train": f"{unit}s per class", "val": f"validation {unit}s per class"}
    for split, number in counts.items():
        _check_number(names.get(split, f"{split} {unit}s per class"), number)
    _check_number("jobs", jobs)


def _check_number(name, number):
    if number is not None and number < 1:
        raise UsageError(f"the number of {name} must be 1 or more, not {number}")


def prepare_generated(folder, recipe, counts, jobs=None, force=False):
    """Make a data set unless it is there, complete and of this version.

    Parameters
    ----------
    folder : str
        The data lie in ``folder/raw``.
    recipe : Recipe
    counts : dict
        Files of each class by split; None keeps what is there, or else takes the default.
    jobs : int, optional
        Processes; by default as many as there are processors, at most 8. The data do not depend
        on it.
    force : bool
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
    with folder_lock(folder) as alone:
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


def _wanted(raw, recipe, counts):
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


def _write(raw, recipe, counts, jobs):
    def make(function, items):
        made = _made(recipe, raw, function, items, jobs)
        label = f"Making the {recipe.what}"
        return dict(progress(made, label, len(items), every=5.0, unit=recipe.unit))

    files = recipe.write(raw, counts, make)
    with open(os.path.join(raw, MANIFEST), "w", encoding="utf-8") as stream:
        manifest = {**recipe.parameters(counts), "files": dict(sorted(files.items()))}
        json.dump(manifest, stream, indent=1)


def _what_is_wrong(raw, recipe, counts):
    """Return why the data must be made (anew), or None when they are complete."""
    if not os.path.lexists(raw):
        return "they do not exist yet"
    try:
        with open(os.path.join(raw, MANIFEST), encoding="utf-8") as stream:
            manifest = json.load(stream)
        there = manifest[recipe.count_key]
        # A number that is not asked for stays what it was.
        wanted = recipe.parameters(
            {split: there[split] if counts[split] is None else counts[split] for split in counts}
        )
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


def _made(recipe, folder, function, items, jobs):
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
        futures = [pool.submit(function, folder, part) for part in batches]
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


def add_arguments(parser, recipe, folder):
    """Add the options that the commands of all generated data sets have.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    recipe : Recipe
    folder : str
        What the data root will hold: "Demo/raw".
    """

    def add(*names, **more):
        parser.add_argument(*names, default=argparse.SUPPRESS, **more)

    add(
        "--root",
        "--data-root",
        metavar="DIR",
        help=f"folder that will hold {folder} (default: the folder dataset)",
    )
    kinds = {"train": ("", "training"), "val": ("val-", "validation"), "test": ("test-", "test")}
    for split, number in recipe.default_counts.items():
        prefix, name = kinds[split]
        add(
            f"--{prefix}{recipe.unit}s-per-class",
            type=int,
            metavar="N",
            help=f"{name} {recipe.unit}s of each class (default: what is there, else {number})",
        )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="processes (default: the number of processors, at most 8)",
    )
    parser.add_argument("--force", action="store_true", help="make the data anew in any case")
