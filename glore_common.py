"""What every part of the port needs: errors a user can act on, safe files, progress, start-up.

This module is below all rooms and imports none of them (nor MXNet).
"""

import contextlib
import ctypes
import difflib
import errno
import hashlib
import io
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import IO, Callable, Optional, TypeVar, Union

import portalocker
from tqdm import tqdm

LOGGER = logging.getLogger("glore")
# Names the script that hands over to another one, so that messages carry its name.
CALLED_AS = "GLORE_CALLED_AS"
# What a disk or its owner says, and no bug of ours.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Names the folder in which the workers of a job leave word of what they do; see heartbeat_path.
HEARTBEAT_FOLDER = "GLORE_HEARTBEAT_DIR"
PathLike = Union[str, "os.PathLike[str]"]
T = TypeVar("T")


class GloReError(Exception):
    """A failure that the user can act on: said in one message, without a stack trace.

    Scripts started through :func:`run_main` print the message and exit with ``exit_code``.
    """

    exit_code = 1


class UsageError(GloReError):
    """A wrong command line or argument (exit code 2)."""

    exit_code = 2


class Locked(GloReError):
    """A lock that another process holds, and did not give back in time."""


def command(name: str) -> str:
    """Say how the user calls a command of this project.

    ``command("train_kinetics")`` is ``python train_kinetics.py`` in a checkout and
    ``glore train-kinetics`` where the wheel is installed. Messages that tell the user what to run
    use it, so that they can be copied.
    """
    if __package__:
        return f"glore {name.replace('_', '-')}"
    return f"python {name.replace('-', '_')}.py"


def module_command(name: str) -> str:
    """Say how the user runs a module: ``python -m data.verify`` or ``… glore.data.verify``."""
    return f"python -m {__package__}.{name}" if __package__ else f"python -m {name}"


def closest_first(name: str, known: Iterable[str]) -> list[str]:
    """Sort ``known`` names by likeness to ``name`` (nearest first, letter case ignored)."""

    def distance(candidate: str) -> tuple[float, str]:
        matcher = difflib.SequenceMatcher(None, name.lower(), candidate.lower())
        return (-matcher.ratio(), candidate)

    return sorted(known, key=distance)


def sha256_of(path: PathLike) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[str]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    File and folder are flushed to disk, so that ``path`` holds either its old content or all of
    the new one, also after a crash. On an error the temporary file is removed and
    ``path`` is left as it was. The temporary name keeps the extension: writers that choose a
    format by it (Matplotlib, OpenCV) work.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    root, extension = os.path.splitext(os.path.basename(path))
    temporary = os.path.join(folder, f".{root}.{secrets.token_hex(8)}.tmp{extension}")
    # The kernel applies the umask. tempfile's files are private, and os.umask, which opening them
    # up would take, changes it for all threads.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        # Some file systems cannot flush a folder; the rename is then as safe as they make it.
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        # Writing to an open file does not say which; the user knows the last name alone.
        if error.errno is not None and error.filename in (None, temporary):
            error.filename, error.filename2 = path, None
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def temporaries(folder: str, stems: Iterable[str]) -> list[str]:
    """Return what is left of :func:`atomic_path` for names that begin so, by killed processes."""
    if not os.path.isdir(folder):
        return []
    begin = "|".join(re.escape(stem) for stem in stems)
    pattern = re.compile(rf"\.({begin}).*\.[0-9a-f]{{16}}\.tmp(\.\w+)?")
    return [
        os.path.join(folder, name) for name in sorted(os.listdir(folder)) if pattern.fullmatch(name)
    ]


def missing_folders(folder: PathLike) -> list[str]:
    """Return a folder and those above it that are not there yet, the deepest first."""
    found, folder = [], os.path.abspath(folder)
    while not os.path.lexists(folder):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found


def take_back(path: PathLike, folders: Iterable[str]) -> None:
    """Remove a file that turned out to be for nothing, and those of the folders that are empty."""
    with contextlib.suppress(OSError):
        os.remove(path)
        for folder in folders:
            os.rmdir(folder)


def check_writable(path: PathLike, what: str, size: int = 0) -> None:
    """Make sure that a file can be written, without writing anything.

    Parameters
    ----------
    path
        Of the file, whose folder need not exist yet.
    what
        How messages call it.
    size
        Bytes that it will take.

    Raises
    ------
    GloReError
        If the folder is read-only or no folder, or the disk has not so much room.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        raise UsageError(f"{what} {path} is a folder: name a file")
    folder = os.path.dirname((missing_folders(os.path.dirname(path)) or [path])[-1])
    if not os.path.isdir(folder):
        raise UsageError(f"{what} {path} cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise GloReError(f"{what} {path} cannot be written: {folder} is read-only for this user")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < size:
        raise GloReError(
            f"{what} {path} cannot be written: it takes {size / 2**20:.0f} MiB, the disk of "
            f"{folder} has {free / 2**20:.0f} MiB left"
        )


def write_text(path: PathLike, text: str) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8.

    A file name that is not UTF-8 has lone surrogates in Python. They are written as ``\\udcdf``,
    which JSON, and with it :func:`os.fsencode`, turns into the name's own bytes again.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        stream.write(text)


def printable(text: str) -> str:
    """Return text that any terminal and log takes: one line, without lone surrogates."""
    line = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def file_lock(path: PathLike, timeout: float = 0.0) -> Iterator[bool]:
    """Hold a lock on ``path`` (made when missing) against other processes.

    The system gives it back when the process ends, however that ends. The file says who holds it,
    and is its holder's alone to delete.

    Parameters
    ----------
    path
        Its folder is made, too.
    timeout
        Seconds to wait for another holder; ``math.inf`` for as long as it takes.

    Yields
    ------
    bool
        False where the file system has no locks (the log says so): the holder is then not known
        to be alone.

    Raises
    ------
    Locked
        If another process holds it; the message names that.
    GloReError
        If the file cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise GloReError(f"cannot write to {path}: {error.strerror or error}") from error
    with contextlib.ExitStack() as closing:
        closing.enter_context(stream)
        deadline, waiting = time.monotonic() + timeout, False
        while True:
            try:
                portalocker.lock(stream, portalocker.LOCK_EX | portalocker.LOCK_NB)
                has_locks = True
                if _is_open_file(stream, path):
                    break
                # Its holder took it back: what was locked is no file any more.
                stream = closing.enter_context(open(path, "a+", encoding="utf-8"))
            except portalocker.AlreadyLocked as error:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                if time.monotonic() >= deadline:
                    raise Locked(f"{holder} holds {path}") from error
                if not waiting:
                    LOGGER.info("%s holds %s; waiting for it", holder, path)
                waiting = True
                time.sleep(0.1)
            except portalocker.LockException as error:
                LOGGER.warning("%s cannot be locked (%s): this may not be alone", path, error)
                has_locks = False
                break
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        try:
            yield has_locks
        finally:
            # For those who find it held again, before its next holder has signed it.
            stream.truncate(0)


def _is_open_file(stream: IO[str], path: PathLike) -> bool:
    """Return whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def heartbeat_path(folder: str, worker: int) -> str:
    """Return the file in which a worker (its number) tells a job's launcher what it does."""
    return os.path.join(folder, f"worker-{worker}.json")


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends; a ``preexec_fn``. Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def progress(
    iterable: Iterable[T],
    label: str,
    total: Optional[int] = None,
    every: float = 10.0,
    unit: str = "it",
) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, and plain log lines elsewhere.

    Parameters
    ----------
    iterable
        What to go through.
    label
        Shown before the figures.
    total
        Number of items; ``len(iterable)`` when it has one.
    every
        Seconds between log lines where there is no terminal.
    unit
        Name of one item.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        yield from tqdm(iterable, desc=label, total=total, unit=unit, dynamic_ncols=True)
        return
    last = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            LOGGER.info("%s: %d%s %s", label, done, f"/{total}" if total else "", unit)


def called_as() -> str:
    """Return the name of the command that the user called, for messages."""
    return os.environ.get(CALLED_AS) or os.path.basename(sys.argv[0])


def run_main(
    main: Callable[[Optional[list[str]]], Optional[int]], argv: Optional[list[str]] = None
) -> int:
    """Run a script's ``main(argv)`` and turn what it raises into a message and an exit code.

    Returns
    -------
    int
        0 on success or what ``main`` returns, 1 for a failure, 2 for bad usage, 130 when
        interrupted. Errors that are no :class:`GloReError` keep their stack trace: they are bugs.
    """
    name = called_as()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes may have letters that a terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except GloReError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone (``... | head``): nothing is left to say, nor to whom.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "a file"
        print(f"{name}: error: {where}: {error.strerror}", file=sys.stderr, flush=True)
        return 1
