"""What a loader asks of a dataset, and the job that makes one sample in a worker process.

A sample is a pure function of (dataset, seed key, item): it carries no state from one to the next,
so any number of workers gives the same batches. Nothing here needs MXNet.
"""

from typing import NamedTuple

import numpy as np

from glore_common import GloReError

# Domains of the generators below: one number each, so that they never share a stream.
ORDER, SAMPLE, REPLACEMENT = range(3)


class UnreadableFile(GloReError):
    """A file that cannot be read.

    Parameters
    ----------
    path : str
    reason : str
        What is wrong with it, without the path.
    """

    kind = "file"

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self):
        return f"cannot read the {self.kind} {self.path}: {self.reason}"


def generator(seed, domain, *position):
    """Return the generator for one use at one position of a run.

    ``position`` goes into the spawn key, not into the entropy: there, trailing zeros would make
    (seed, 1) and (seed, 1, 0) the same.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(domain, *position)))


class Sample(NamedTuple):
    """One item of a dataset: array (views, …) float32, its label, and what to note about it."""

    array: np.ndarray
    label: int
    facts: tuple = ()


class Dataset:
    """Items that are read one by one, each from one file.

    Subclasses define ``__len__`` and what raises ``NotImplementedError`` here; they are pickled
    and sent to the workers.

    Attributes
    ----------
    kind : str
        What a file is called in messages.
    views : int
        Crops of an item; all of them are rows of the batch.
    uniform : bool
        All samples have one shape. Else a loader batches those of equal shape.
    """

    kind = "file"
    views = 1
    uniform = True

    def __len__(self):
        raise NotImplementedError

    @property
    def origin(self):
        """Where the items come from, for messages."""
        raise NotImplementedError

    @property
    def advice(self):
        """What to do about unreadable files: the end of a message."""
        raise NotImplementedError

    def shape_of(self, index):
        """Return the shape of item ``index``'s array: (views, …)."""
        raise NotImplementedError

    def name(self, index):
        """Return the path (or another unique name) of what item ``index`` is read from."""
        raise NotImplementedError

    def row_of(self, index):
        """Return the row (0-based) that item ``index`` is a part of."""
        return index

    def request(self, index):
        """Return what :meth:`load` needs to be told about item ``index``; picklable."""
        return index

    def load(self, request, rng):
        """Read and transform an item, wherever this is called; all randomness is ``rng``'s.

        Returns
        -------
        Sample

        Raises
        ------
        UnreadableFile
        """
        raise NotImplementedError

    def note(self, index, facts):
        """Take up what loading item ``index`` found out (called in the loader's process)."""

    def finish(self):
        """Write what was noted (called at the end of a pass and when the loader closes)."""


class LoadJob:
    """What a worker does: load one item and put it at its place in the batch memory.

    Parameters
    ----------
    dataset : Dataset
    seed : int
    slots : int
        Batches that the memory holds.
    slot_size : int
        Numbers (float32) of the largest batch.
    """

    def __init__(self, dataset, seed, slots, slot_size):
        self.dataset = dataset
        self.seed = seed
        self.slots = slots
        self.slot_size = slot_size
        self._memory = None

    @property
    def memory_size(self):
        """Bytes that :meth:`attach` needs."""
        return 4 * self.slots * self.slot_size

    def attach(self, memory):
        """Use ``memory``, a writable buffer of :attr:`memory_size` bytes."""
        whole = np.frombuffer(memory, np.float32, self.slots * self.slot_size)
        self._memory = whole.reshape(self.slots, self.slot_size)

    def detach(self):
        """Let go of the memory."""
        self._memory = None

    def view(self, slot, items, shape):
        """Return the memory of a batch of ``items`` samples of ``shape``: (items, *shape)."""
        return self._memory[slot, : items * int(np.prod(shape))].reshape(items, *shape)

    def run(self, slot, place, request, shape, key):
        """Load what ``request`` names into ``place`` of ``slot``; return (label, facts)."""
        sample = self.dataset.load(request, generator(self.seed, SAMPLE, *key))
        self.view(slot, place + 1, shape)[place] = sample.array
        return int(sample.label), sample.facts
