"""Says so when a job stands still, and who keeps the others waiting."""

import logging
import time

from .job import Failure

LOGGER = logging.getLogger("glore.cluster")
# What a worker is said to do while it needs something of the others.
WAITING = ("joining", "exchange")


class Watch:
    """Looks at what the workers report, and complains once nobody gets on.

    Parameters
    ----------
    read : callable
        Number of a worker -> what it reports (``step``, ``doing``, ``ticks``), or None.
    workers : int
        How many there are.
    warn_after : float
        Seconds of standstill until a message, and between messages.
    end_after : float
        Seconds of standstill until the job is ended; 0: never.
    clock : callable
        Seconds; for tests.
    """

    def __init__(self, read, workers, warn_after, end_after=0.0, clock=time.monotonic):
        self.read = read
        self.warn_after = warn_after
        self.end_after = end_after
        self.clock = clock
        now = clock()
        self.last = dict.fromkeys(range(workers))
        self.since = dict.fromkeys(range(workers), now)
        self.warned = now

    def __call__(self, running):
        """Look once; ``running`` are the worker processes (:class:`cluster.job.Child`).

        A worker keeps the job if it has stood still for ``warn_after`` and does not itself wait
        for others. Since all wait for the slowest, one that gets on proves that nothing stands
        still only if it is not the others' fault; so each worker is looked at by itself.
        """
        now = self.clock()
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

    def describe(self, still, running, now):
        """Return who stands still at what, and who is to blame."""
        hosts = {child.role.index: child.role.host for child in running}

        def shown(number):
            where = f" on {hosts[number]}" if hosts[number] else ""
            news = self.last[number]
            if news is None:
                return f"worker {number}{where} has not reported anything"
            what = f"step {news['step']}, {news['doing']}"
            return f"worker {number}{where}: {what} for {now - self.since[number]:.0f} s"

        silent = [number for number in still if self.last[number] is None]
        if len(silent) == len(self.last):
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
