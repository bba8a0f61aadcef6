"""What every part of the port needs: errors a user can act on, safe files, progress, start-up.

``network``, ``data`` and ``train`` never import one another; this module is below all three and
imports none of them (nor MXNet).
"""

import contextlib
import difflib
import hashlib
import logging
import os
import signal
import sys
import tempfile
import time

from tqdm import tqdm

LOGGER = logging.getLogger("glore")


class GloReError(Exception):
    """A failure that the user can act on: said in one message, without a stack trace.

    Scripts started through :func:`run_main` print the message and exit with ``exit_code``.
    """

    exit_code = 1


class UsageError(GloReError):
    """A wrong command line or argument (exit code 2)."""

    exit_code = 2


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


def closest_first(name, known):
    """Sort ``known`` names by likeness to ``name`` (nearest first, letter case ignored)."""

    def distance(candidate):
        matcher = difflib.SequenceMatcher(None, name.lower(), candidate.lower())
        return (-matcher.ratio(), candidate)

    return sorted(known, key=distance)


def sha256_of(path):
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    The file is flushed to disk before the rename, so that ``path`` holds either its old content
    or all of the new one, also after a crash. On an error the temporary file is removed and
    ``path`` is left as it was. The temporary name keeps the extension: writers that choose a
    format by it (Matplotlib, OpenCV) work.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    root, extension = os.path.splitext(os.path.basename(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{root}.", suffix=f".tmp{extension}", dir=folder)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes private files; give the result the permissions open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_text(path, text):
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)


def progress(iterable, label, total=None, every=10.0, unit="it"):
    """Iterate with a progress bar on a terminal, and plain log lines elsewhere.

    Parameters
    ----------
    iterable : iterable
        What to go through.
    label : str
        Shown before the figures.
    total : int, optional
        Number of items; ``len(iterable)`` when it has one.
    every : float
        Seconds between log lines where there is no terminal.
    unit : str
        Name of one item.
    """
    if total is None and hasattr(iterable, "__len__"):
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


def run_main(main, argv=None):
    """Run a script's ``main(argv)`` and turn what it raises into a message and an exit code.

    Returns
    -------
    int
        0 on success or what ``main`` returns, 1 for a failure, 2 for bad usage, 130 when
        interrupted. Errors that are no :class:`GloReError` keep their stack trace: they are bugs.
    """
    name = os.path.basename(sys.argv[0])
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
