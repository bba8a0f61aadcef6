"""Says so when a job stands still, and who keeps the others waiting."""

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Callable, Optional

from glore_common import heartbeat_path

from .job import Child, Failure

LOGGER = logging.getLogger("glore.cluster")
# What a worker is said to do while it needs something of the others.
WAITING = ("joining", "exchange")
Heartbeat = dict[str, Any]


def read_heartbeat(folder: str, worker: int) -> Optional[Heartbeat]:
    """Return what a worker last said that it does, or None if there is nothing (whole) yet.

    The keys are ``step``; ``doing``; and ``ticks``, a number that grows as long as it goes on.
    """
    try:
        with open(heartbeat_path(folder, worker), encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def heartbeat_folder(folder: str, workers: int) -> Iterator[str]:
    """Make the folder of the workers' heartbeats, without those of an earlier run.

    Yields
    ------
    str
        A file in it that is there as long as the block: who sees it shares the folder.
    """
    os.makedirs(folder, exist_ok=True)
    for worker in range(workers):
        with contextlib.suppress(FileNotFoundError):
            os.remove(heartbeat_path(folder, worker))
    with tempfile.NamedTemporaryFile(prefix="seen-", dir=folder) as marker:
        yield marker.name


class Watch:
    """Looks at what the workers report, and complains once nobody gets on.

    Parameters
    ----------
    read
        Number of a worker -> its heartbeat, or None; see :func:`read_heartbeat`.
    workers
        How many there are.
    warn_after
        Seconds of standstill until a message, and between messages.
    end_after
        Seconds of standstill until the job is ended; 0: never.
    clock
        Seconds; for tests.
    """

    def __init__(
        self,
        read: Callable[[int], Optional[Heartbeat]],
        workers: int,
        warn_after: float,
        end_after: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.read = read
        self.warn_after = warn_after
        self.end_after = end_after
        self.clock = clock
        now = clock()
        self.last: dict[int, Optional[Heartbeat]] = dict.fromkeys(range(workers))
        self.since = dict.fromkeys(range(workers), now)
        self.warned = now
        self.unseen: set[Optional[str]] = set()

    def __call__(self, running: list[Child]) -> Optional[Failure]:
        """Look once; ``running`` are the worker processes.

        A worker keeps the job if it has stood still for ``warn_after`` and does not itself wait
        for others. Since all wait for the slowest, one that gets on proves that nothing stands
        still only if it is not the others' fault; so each worker is looked at by itself.
        """
        now = self.clock()
        running = self._seen(running)
        numbers = [child.role.index for child in running]
        for number in numbers:
            news = self.read(number)
            if news != self.last[number]:
                self.last[number], self.since[number] = news, now
        still = [n for n in numbers if now - self.since[n] > self.warn_after]
        if not still:
            self.warned = now - self.warn_after
            return None
        longest = max(now - self.since[number] for number in still)
        message = f"No progress for {longest:.0f} s: {self.describe(still, running, now)}"
        if self.end_after and longest > self.end_after:
            return Failure(message, 1)
        if now - self.warned >= self.warn_after:
            self.warned = now
            LOGGER.warning("%s", message)
        return None

    def _seen(self, running: list[Child]) -> list[Child]:
        """Return the workers whose heartbeat is seen here; say once of a host that it is not."""
        for child in running:
            if child.sees is False and child.role.host not in self.unseen:
                self.unseen.add(child.role.host)
                LOGGER.warning(
                    "The log folder is not shared with %s: whether the workers there get on is not "
                    "seen here, and a standstill of theirs goes unnoticed. A --log-dir that all "
                    "machines share mends it",
                    child.role.host,
                )
        return [child for child in running if child.role.host not in self.unseen]

    def describe(self, still: list[int], running: list[Child], now: float) -> str:
        """Return who stands still at what, and who is to blame."""
        hosts = {child.role.index: child.role.host for child in running}

        def shown(number: int) -> str:
            where = f" on {hosts[number]}" if hosts[number] else ""
            news = self.last[number]
            if news is None:
                return f"worker {number}{where} has not reported anything"
            what = f"step {news['step']}, {news['doing']}"
            return f"worker {number}{where}: {what} for {now - self.since[number]:.0f} s"

        silent = [number for number in still if self.last[number] is None]
        if len(silent) == len(running):
            return (
                "no worker reports what it does (the scripts of this project do once they run; "
                "others show by their own output whether they get on)"
            )
        waiting = {n for n in still if (self.last[n] or {}).get("doing") in WAITING}
        lines = "; ".join(shown(number) for number in still)
        guilty = [number for number in self.last if number not in waiting]
        if guilty:
            names = ", ".join(f"worker {number}" for number in guilty)
            return f"{lines}. The others wait for {names}" if waiting else lines
        return (
            f"{lines}. All of them wait: a server or the scheduler does not answer, or the network "
            "between them is down or behind a firewall"
        )
