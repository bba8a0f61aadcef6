"""Reading batches from any position on, and dividing passes into logged epochs.

What a logged epoch is comes from the original project (facebookresearch/GloRe).
"""

from glore_common import GloReError, UsageError

VALIDATION_RUNS = 8


class BatchStream:
    """Reads batches of a sized iterable from any position on.

    Parameters
    ----------
    source : iterable
        Has a length and yields (data, label). With a method ``set_position(pass_index, batch)``
        that is used; else the iterable is read from its start and batches are skipped.
    name : str
        How messages call it.
    may_be_empty : bool
        Whether it may have no batch: one worker's share of few data.
    """

    def __init__(self, source, name, may_be_empty=False):
        self._source = source
        self._name = name
        self._iterator = None
        self._position = None
        self.batches = len(source)
        if not self.batches and not may_be_empty:
            raise UsageError(f"the {name} data hold no batch: too few samples for the batch size?")

    def seek(self, pass_index, batch):
        """Make ``batch`` of the given pass the next one; costs nothing where it is already."""
        if self._position == (pass_index, batch):
            return
        self.close()
        if hasattr(self._source, "set_position"):
            self._source.set_position(pass_index, batch)
            self._iterator = iter(self._source)
        else:
            self._iterator = iter(self._source)
            for _ in range(batch):
                next(self._iterator, None)
        self._position = (pass_index, batch)

    def read(self):
        """Return the next (data, label), of the next pass where one ends."""
        pass_index, batch = self._position
        if batch == self.batches:
            self.seek(pass_index + 1, 0)
            pass_index, batch = self._position
        try:
            data, label = next(self._iterator)
        except StopIteration:
            raise GloReError(
                f"the {self._name} data ended after {batch} of {self.batches} batches"
            ) from None
        self._position = (pass_index, batch + 1)
        return data, label

    def close(self):
        """Let go of the iterator, and of the workers behind it."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = self._position = None


def epoch_bounds(epoch, batches, div):
    """Return (pass, first batch, batch after the last) of a logged epoch.

    The ``div`` parts of a pass differ by one batch at most, and none has more than
    ``ceil(batches / div)``.

    Parameters
    ----------
    epoch : int
        Logged epoch, from 0.
    batches : int
        Batches per pass.
    div : int
        Parts of a pass; no more than there are batches.
    """
    pass_index, part = divmod(epoch, div)
    return pass_index, -(-part * batches // div), -(-(part + 1) * batches // div)


def spread_batches(batches, div, runs=VALIDATION_RUNS):
    """Return [start, stop) runs of consecutive batches that make up 1/div of a data set.

    The runs are spread evenly; few long ones instead of many single batches, so that a loader
    which reads ahead keeps its advantage.
    """
    wanted = -(-batches // div)
    runs = min(runs, wanted)
    result = []
    for index in range(runs):
        start = index * batches // runs
        size = (index + 1) * wanted // runs - index * wanted // runs
        result.append((start, start + size))
    return result
