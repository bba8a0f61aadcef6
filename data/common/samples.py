"""What a loader asks of a dataset, and the job that makes one sample in a worker process.

A sample is a pure function of (dataset, seed key, item): it carries no state from one to the next,
so any number of workers gives the same batches. Nothing here needs MXNet.
"""

import errno
import os
import stat
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, Optional

import numpy as np

from glore_common import GloReError

# Domains of the generators below: one number each, so that they never share a stream.
ORDER, SAMPLE, REPLACEMENT = range(3)


class UnreadableFile(GloReError):
    """A file that cannot be read; ``reason`` says what is wrong with it, without the path."""

    kind = "file"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the {self.kind} {self.path}: {self.reason}"


def open_file(path: str) -> IO[bytes]:
    """Open a file of samples for reading.

    A pipe would be waited for, and a device such as ``/dev/zero`` read until memory is full.

    Raises
    ------
    OSError
        It cannot be opened, or is no plain file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, and no file")
    return open(handle, "rb")


def generator(seed: int, domain: int, *position: int) -> np.random.Generator:
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

    Subclasses define ``__len__`` and what raises ``NotImplementedError`` here. Each worker gets a
    copy, pickled, of which only :meth:`prepare` and :meth:`load` are called: what belongs to single
    items comes in requests, and a subclass leaves its list of them out of the pickle
    (``__getstate__``).

    Attributes
    ----------
    kind
        What a file is called in messages.
    views
        Crops of an item; all of them are rows of the batch.
    uniform
        All samples have one shape. Else a loader batches those of equal shape.
    """

    kind = "file"
    views = 1
    uniform = True

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def origin(self) -> str:
        """Where the items come from, for messages."""
        raise NotImplementedError

    @property
    def advice(self) -> str:
        """What to do about unreadable files: the end of a message."""
        raise NotImplementedError

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Return the shape of item ``index``'s array: (views, …)."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the path (or another unique name) of what item ``index`` is read from."""
        raise NotImplementedError

    def row_of(self, index: int) -> int:
        """Return the row (0-based) that item ``index`` is a part of."""
        return index

    def labels(self) -> np.ndarray:
        """Return the class of every item, for sampling that depends on it."""
        raise NotImplementedError

    def request(self, index: int) -> Any:
        """Return all that :meth:`load` needs to know about item ``index``; small and picklable."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Get a worker process ready (called once in each)."""

    def load(self, request: Any, rng: np.random.Generator) -> Sample:
        """Read and transform an item, wherever this is called; all randomness is ``rng``'s.

        Raises
        ------
        UnreadableFile
        """
        raise NotImplementedError

    def unpack(self, arrays: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return data and label of a batch: samples' arrays (n, …) and labels (n,).

        A dataset whose labels are more than a number has them in the arrays.
        """
        return arrays, labels

    def note(self, index: int, facts: tuple) -> None:
        """Take up what loading item ``index`` found out (called in the loader's process)."""

    def finish(self) -> None:
        """Write what was noted (called at the end of a pass and when the loader closes)."""


class LoadJob:
    """What a worker does: load one item and put it at its place in the batch memory.

    Parameters
    ----------
    dataset, seed
    slots
        Batches that the memory holds.
    slot_size
        Numbers (float32) of the largest batch.
    """

    def __init__(self, dataset: Dataset, seed: int, slots: int, slot_size: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.slots = slots
        self.slot_size = slot_size
        self._memory: Optional[np.ndarray] = None

    @property
    def memory_size(self) -> int:
        """Bytes that :meth:`attach` needs."""
        return 4 * self.slots * self.slot_size

    def prepare(self, memory: Any) -> None:
        """Get ready in a worker, which has mapped ``memory``."""
        self.attach(memory)
        self.dataset.prepare()

    def attach(self, memory: Any) -> None:
        """Use ``memory``, a writable buffer of :attr:`memory_size` bytes."""
        whole = np.frombuffer(memory, np.float32, self.slots * self.slot_size)
        self._memory = whole.reshape(self.slots, self.slot_size)

    def detach(self) -> None:
        """Let go of the memory."""
        self._memory = None

    def view(self, slot: int, items: int, shape: Sequence[int]) -> np.ndarray:
        """Return the memory of a batch of ``items`` samples of ``shape``: (items, *shape)."""
        assert self._memory is not None, "no memory was attached"
        return self._memory[slot, : items * int(np.prod(shape))].reshape(items, *shape)

    def run(
        self, slot: int, place: int, request: Any, shape: Sequence[int], key: Sequence[int]
    ) -> tuple[int, tuple]:
        """Load what ``request`` names into ``place`` of ``slot``; return (label, facts)."""
        sample = self.dataset.load(request, generator(self.seed, SAMPLE, *key))
        self.view(slot, place + 1, shape)[place] = sample.array
        return int(sample.label), sample.facts
