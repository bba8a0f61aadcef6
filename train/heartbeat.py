"""What a worker of a job is doing, in a small file that the job's launcher watches.

The launcher names the folder in the environment variable ``HEARTBEAT_FOLDER`` of ``glore_common``;
``cluster.watch.read_heartbeat`` reads the file. It holds JSON: ``step``; ``doing``, in a word;
``ticks``, a number that grows as long as the worker goes on. Nothing here imports MXNet.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Optional

from glore_common import heartbeat_path

LOGGER = logging.getLogger("glore.train")
INTERVAL = 1.0


class Heartbeat:
    """Writes what this worker does, at most once a second, from a thread of its own.

    Where the folder cannot be written, it says so once and goes on without.

    Parameters
    ----------
    folder
        None: nothing is written.
    worker
        Number of this worker.
    """

    def __init__(self, folder: Optional[str], worker: int) -> None:
        self._state = (0, "starting", 0)
        self._written: Optional[tuple] = None
        self._end = threading.Event()
        self._thread: Optional[threading.Thread] = None
        if folder is None:
            return
        self._path = heartbeat_path(folder, worker)
        try:
            self._write()
        except OSError as error:
            LOGGER.warning(
                "The launcher cannot be told what this worker does (%s): it will not notice if the "
                "worker stands still. Give it a log folder on a file system that all machines "
                "share.",
                error,
            )
            return
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def doing(self) -> str:
        """What is being done, in a word."""
        return self._state[1]

    def tick(self, doing: str, step: Optional[int] = None) -> None:
        """Note that something new begins: ``doing``, at a step (default: that of before)."""
        before, _, ticks = self._state
        self._state = (before if step is None else step, doing, ticks + 1)

    @contextlib.contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Note that ``doing`` begins, and at the end that what was done before goes on."""
        before = self.doing
        self.tick(doing)
        try:
            yield
        finally:
            self.tick(before)

    def close(self) -> None:
        """Write the last word."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(INTERVAL)
            # A full or lost disk: the run itself will say so, and the launcher that it hears
            # nothing.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
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
