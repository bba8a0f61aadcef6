"""Signals that end a run, once it has been saved."""

import os
import signal
import threading

from glore_common import GloReError


class Interrupted(GloReError):
    """A signal ended the run; what was learnt has been saved.

    Parameters
    ----------
    number : int
        The signal.
    message : str
        What was saved where.
    """

    def __init__(self, number, message):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


class StopSignals:
    """Remembers SIGINT and SIGTERM while in a ``with`` block; a second one acts as usual.

    Attributes
    ----------
    number : int or None
        The signal that came.
    """

    def __init__(self):
        self.number = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_):
        self._restore()

    def _restore(self):
        while self._before:
            signal.signal(*self._before.popitem())

    def _remember(self, number, _frame):
        self.number = number
        self._restore()
        # No logging in a signal handler: it may have interrupted the logging.
        os.write(2, b"\nStopping after the step at hand, then saving; once more aborts at once.\n")
