"""Signals that end a run, once it has been saved."""

import os
import signal
import threading
from typing import Any, Optional

from glore_common import GloReError


class Interrupted(GloReError):
    """A signal ended the run; what was learnt has been saved.

    Parameters
    ----------
    number
        The signal.
    message
        What was saved where.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


# Ctrl-C, the end of a job, a terminal that is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Remembers SIGINT, SIGTERM and SIGHUP while in a ``with`` block; a second one acts as usual.

    Attributes
    ----------
    number
        The signal that came.
    agreed
        The one that all workers know of, as of their last step together.
    """

    def __init__(self) -> None:
        self.number: Optional[int] = None
        self.agreed: Optional[int] = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                # nohup has a closed terminal ignored: that is an answer already.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _remember(self, number: int, _frame: Any) -> None:
        self.number = number
        self._restore()
        # No logging in a signal handler: it may have interrupted the logging.
        os.write(2, b"\nStopping after the step at hand, then saving; once more aborts at once.\n")
