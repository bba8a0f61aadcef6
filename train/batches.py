"""Reading batches from any position on, and dividing passes into logged epochs.

What a logged epoch is comes from the original project (facebookresearch/GloRe).
"""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

from glore_common import GloReError, UsageError

VALIDATION_RUNS = 8


class BatchStream:
    """Reads batches of a sized iterable from any position on.

    Parameters
    ----------
    source
        Has a length and yields (data, label). With a method ``set_position(pass_index, batch)``
        that is used, also to say where reading ends if it takes ``stop``; else the iterable is read
        from its start and batches are skipped. With a method ``every_batch`` that is iterated over:
        it gives None for a batch of which nothing could be read.
    name
        How messages call it.
    may_be_empty
        Whether it may have no batch: one worker's share of few data.
    """

    def __init__(self, source: Any, name: str, may_be_empty: bool = False) -> None:
        self._source = source
        self._name = name
        self._iterator: Optional[Iterator] = None
        self._position: Optional[tuple[int, int]] = None
        self._stop: Optional[int] = None
        seek = getattr(source, "set_position", None)
        self._seekable = seek is not None
        self._stoppable = seek is not None and "stop" in inspect.signature(seek).parameters
        self.batches = len(source)
        if not self.batches and not may_be_empty:
            raise UsageError(f"the {name} data hold no batch: too few samples for the batch size?")

    def seek(self, pass_index: int, batch: int, stop: Optional[int] = None) -> None:
        """Make ``batch`` of the given pass the next one; costs nothing where it is already.

        ``stop`` promises that no batch from there on is going to be read: a source that reads ahead
        need not prepare it.
        """
        if self._position == (pass_index, batch) and self._stop == stop:
            return
        self.close()
        if self._seekable:
            more = {"stop": stop} if self._stoppable and stop is not None else {}
            self._source.set_position(pass_index, batch, **more)
        every_batch = getattr(self._source, "every_batch", None)
        iterator = iter(self._source) if every_batch is None else every_batch()
        if not self._seekable:
            for _ in range(batch):
                next(iterator, None)
        self._iterator = iterator
        self._position, self._stop = (pass_index, batch), stop

    def read(self) -> Optional[tuple[Any, Any]]:
        """Return the next (data, label), of the next pass where one ends.

        None is a batch of which no sample could be read. It counts as read all the same.
        """
        pass_index, batch = self._position
        if batch == self.batches:
            pass_index, batch = pass_index + 1, 0
            self.seek(pass_index, batch)
        try:
            result = next(self._iterator)
        except StopIteration:
            raise GloReError(
                f"the {self._name} data ended after {batch} of {self.batches} batches"
            ) from None
        self._position = (pass_index, batch + 1)
        return result

    def need(self) -> tuple[Any, Any]:
        """Do what :meth:`read` does where each batch must have something to learn from."""
        batch = self.read()
        if batch is None:
            raise GloReError(f"a batch of the {self._name} data has no sample that could be read")
        return batch

    def close(self) -> None:
        """Let go of the iterator, and of the workers behind it."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator = self._position = None


def epoch_bounds(epoch: int, batches: int, div: int) -> tuple[int, int, int]:
    """Return (pass, first batch, batch after the last) of a logged epoch.

    The ``div`` parts of a pass differ by one batch at most, and none has more than
    ``ceil(batches / div)``.

    Parameters
    ----------
    epoch
        Logged epoch, from 0.
    batches
        Batches per pass.
    div
        Parts of a pass; no more than there are batches.
    """
    pass_index, part = divmod(epoch, div)
    return pass_index, -(-part * batches // div), -(-(part + 1) * batches // div)


def spread_batches(batches: int, div: int, runs: int = VALIDATION_RUNS) -> list[tuple[int, int]]:
    """Return [start, stop) runs of consecutive batches that make up 1/div of a data set.

    The runs are spread evenly; few long ones instead of many single batches, so that a loader
    which reads ahead keeps its advantage.
    """
    wanted = -(-batches // div)
    runs = min(runs, wanted)
    result: list[tuple[int, int]] = []
    for index in range(runs):
        start = index * batches // runs
        stop = start + (index + 1) * wanted // runs - index * wanted // runs
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, stop))
    return result
