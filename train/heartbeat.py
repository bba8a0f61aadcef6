"""What a worker of a job is doing, in a small file that the job's launcher watches.

``launch.py`` names the folder in ``GLORE_PROGRESS_DIR``. Nothing here imports MXNet.
"""

import contextlib
import json
import os
import threading

from glore_common import GloReError

FOLDER = "GLORE_PROGRESS_DIR"
INTERVAL = 1.0


def path_of(folder, worker):
    """Return the file of a worker."""
    return os.path.join(folder, f"worker-{worker}.json")


def read(folder, worker):
    """Return what a worker last wrote, or None if there is nothing (whole) yet.

    Returns
    -------
    dict or None
        ``step``; ``doing``; ``ticks``, a number that grows as long as it goes on.
    """
    try:
        with open(path_of(folder, worker), encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


class Progress:
    """Writes what this worker does, at most once a second, from a thread of its own.

    Parameters
    ----------
    folder : str or None
        None: nothing is written.
    worker : int
        Number of this worker.

    Attributes
    ----------
    doing : str
        What is being done.
    """

    def __init__(self, folder, worker):
        self._path = None if folder is None else path_of(folder, worker)
        self._state = (0, "starting", 0)
        self._written = None
        self._end = threading.Event()
        self._thread = None
        if self._path is not None:
            try:
                self._write()
            except OSError as error:
                raise GloReError(f"cannot report progress to the launcher: {error}") from error
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    @property
    def doing(self):
        """What is being done, in a word."""
        return self._state[1]

    def tick(self, doing, step=None):
        """Note that something new begins: ``doing``, at a step (default: that of before)."""
        before, _, ticks = self._state
        self._state = (before if step is None else step, doing, ticks + 1)

    @contextlib.contextmanager
    def phase(self, doing):
        """Note that ``doing`` begins, and at the end that what was done before goes on."""
        before = self.doing
        self.tick(doing)
        try:
            yield
        finally:
            self.tick(before)

    def close(self):
        """Write the last word."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def _run(self):
        ended = False
        while not ended:
            ended = self._end.wait(INTERVAL)
            # A full or lost disk: the run itself will say so, and the launcher that it hears
            # nothing.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self):
        state = self._state
        if state == self._written:
            return
        step, doing, ticks = state
        # Renamed, so that no reader meets half of it. Not flushed to disk: it is for now.
        temporary = f"{self._path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"step": step, "doing": doing, "ticks": ticks}, stream)
        os.replace(temporary, self._path)
        self._written = state
