"""Batches of samples as MXNet arrays, read ahead by worker processes: for clips and for images.

What comes out is a pure function of (dataset, seed, epoch, number of the batch): not of the number
of workers, of their timing, or of where a run was interrupted. Each sample has its own generator,
made from (seed, epoch, index, attempt).
"""

import collections
import logging
import os
import weakref
from typing import NamedTuple

import numpy as np

from glore_common import GloReError, UsageError, write_text
from mxnet_compat import mx

from .pool import InlinePool, Task, WorkerError, WorkerPool, make_memory
from .samples import ORDER, REPLACEMENT, LoadJob, generator
from .worker_main import BAD, DONE, REFUSED

LOGGER = logging.getLogger("glore.data")


class UnreadableData(GloReError):
    """Files that cannot be read, and the loader was told not (or not so often) to go on."""


class BadFile(NamedTuple):
    """A file that could not be read, why, and how often it was met."""

    path: str
    reason: str
    times: int


def write_bad_files(loaders, path):
    """Write the summary of the bad files of some loaders (``path<TAB>times<TAB>reason``).

    Parameters
    ----------
    loaders : iterable of Loader
    path : str

    Returns
    -------
    int
        Number of bad files. With none, no file is written and an old one is removed.
    """
    files = {}
    for loader in loaders:
        for bad in loader.bad_files():
            times = bad.times + (files[bad.path].times if bad.path in files else 0)
            files[bad.path] = bad._replace(times=times)
    if files:
        rows = "".join(f"{bad.path}\t{bad.times}\t{bad.reason}\n" for bad in files.values())
        write_text(path, rows)
    elif os.path.exists(path):
        os.remove(path)
    return len(files)


class _Batch:
    """One batch on its way."""

    def __init__(self, slot, number, indices, shape):
        self.slot = slot
        self.shape = shape  # of every sample
        self.number = number
        self.indices = indices
        self.labels = [0] * len(indices)
        self.sources = [None] * len(indices)  # the item that took each place; None: skipped
        self.reasons = {}  # place -> (path, reason) of what was skipped
        self.pending = len(indices)
        self.error = None
        self.cancelled = False


class _Place:
    """One sample of a batch, with what was tried for it."""

    __slots__ = ("batch", "candidate", "index", "number", "tried")

    def __init__(self, batch, number, index):
        self.batch = batch
        self.number = number
        self.index = index
        self.candidate = index
        self.tried = [index]


class _Engine:
    """Keeps batches of one epoch in flight. Apart from the loader so that that can be collected."""

    def __init__(self, options, dataset, slot_size):
        self.options = options
        self.dataset = dataset
        slots = options.prefetch if options.num_workers else 1
        self.job = LoadJob(dataset, options.seed, slots, slot_size)
        self.descriptor, memory = make_memory(self.job.memory_size)
        if options.num_workers:
            # Pickled before memory is attached: the workers map it themselves.
            self.pool = WorkerPool(
                self.job, options.num_workers, self.outcome, options.timeout, self.descriptor
            )
        else:
            self.pool = InlinePool(self.job, self.outcome)
        self.job.attach(memory)
        self.bad = {}  # path -> [reason, times]
        self.free = list(range(slots))
        self.flight = collections.deque()
        self.todo = collections.deque()
        self.epoch = None

    def direct(self, epoch, batches):
        """Have ``batches``, (number, indices) pairs of ``epoch``, read (condition held).

        What is in flight is kept when it is the beginning of what is wanted.
        """
        wanted = [number for number, _ in batches]
        present = [batch.number for batch in self.flight]
        same = self.epoch == epoch and present == wanted[: len(present)]
        if not same or any(batch.error for batch in self.flight):
            self._cancel()
        self.epoch = epoch
        self.todo = collections.deque(batches[len(self.flight) :])
        self.fill()

    def _cancel(self):
        for batch in self.flight:
            batch.cancelled = True
        for task in self.pool.discard(lambda task: task.context.batch.cancelled):
            task.context.batch.pending -= 1
        for batch in self.flight:
            if batch.pending == 0:
                self.free.append(batch.slot)
            # Else a worker still writes to its slot, and outcome() frees it.
        self.flight.clear()

    def fill(self):
        """Start batches while there is memory for them (condition held)."""
        while self.todo and self.free:
            number, indices = self.todo.popleft()
            shape = self.dataset.shape_of(int(indices[0]))
            batch = _Batch(self.free.pop(), number, indices, shape)
            self.flight.append(batch)
            for place, index in enumerate(indices):
                self._try(_Place(batch, place, int(index)))

    def _try(self, place):
        """Submit ``place.candidate``, or deal with its being known as bad."""
        path = self.dataset.name(place.candidate)
        if path in self.bad:
            self._failed(place, self.bad[path][0])
            return
        key = (self.epoch, place.index, len(place.tried) - 1)
        batch, request = place.batch, self.dataset.request(place.candidate)
        arguments = (batch.slot, place.number, request, batch.shape, key)
        self.pool.submit(Task(arguments, path, place))

    def outcome(self, task, kind, value):
        """Take what came of a task (condition held, in the pool's thread)."""
        place = task.context
        batch = place.batch
        if batch.cancelled:
            batch.pending -= 1
            if batch.pending == 0:
                self.free.append(batch.slot)
                self.fill()
        elif kind == DONE:
            label, facts = value
            self.dataset.note(place.candidate, facts)
            batch.labels[place.number] = label
            batch.sources[place.number] = place.candidate
            batch.pending -= 1
        elif kind == BAD:
            self._failed(place, value)
        elif kind == REFUSED:
            self._fail(batch, value)
        else:
            self._fail(batch, WorkerError(f"error while reading {task.what}:\n{value}"))

    def _fail(self, batch, error):
        batch.pending -= 1
        batch.error = batch.error or error

    def _failed(self, place, reason):
        """Note a bad file and go on with another candidate, if one may be used."""
        path = self.dataset.name(place.candidate)
        options = self.options
        if path in self.bad:
            self.bad[path][1] += 1
        else:
            self.bad[path] = [reason, 1]
            consequence = "it is left out" if options.on_bad == "skip" else "another one is used"
            LOGGER.warning(
                "cannot read the %s %s: %s; %s", self.dataset.kind, path, reason, consequence
            )
        batch = place.batch
        if options.strict:
            what = f"the {self.dataset.kind} {path}"
            error = UnreadableData(f"cannot read {what}: {reason} (strict: no bad file allowed)")
            self._fail(batch, error)
        elif options.on_bad == "skip":
            batch.reasons[place.number] = (path, reason)
            batch.pending -= 1
        else:
            tried_paths = {self.dataset.name(index) for index in place.tried}
            replacement = self._replacement(place, tried_paths)
            if len(tried_paths) >= options.max_failures or replacement is None:
                self._fail(batch, too_many(self.dataset, len(tried_paths), path, reason))
            else:
                place.candidate = replacement
                place.tried.append(replacement)
                self._try(place)

    def _replacement(self, place, tried_paths):
        """Return another item for a place, a function of (seed, epoch, index, attempt)."""
        attempt = len(place.tried)
        rng = generator(self.options.seed, REPLACEMENT, self.epoch, place.index, attempt)
        # A few draws nearly always do; the permutation ends the search in a small list.
        total = len(self.dataset)
        for _ in range(20):
            index = int(rng.integers(total))
            if self.dataset.name(index) not in tried_paths:
                return index
        for index in rng.permutation(total):
            if self.dataset.name(int(index)) not in tried_paths:
                return int(index)
        return None

    def close(self):
        """End workers, free the batch memory, write what was noted."""
        self.pool.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            self.job.detach()
            self.dataset.finish()


def too_many(dataset, count, path, reason):
    """Return the error for ``count`` distinct unreadable files in a row."""
    plural = "s in a row" if count > 1 else ""
    return UnreadableData(
        f"{count} distinct {dataset.kind}{plural} could not be read, the last one {path} "
        f"({reason}). {dataset.advice}"
    )


class _Options(NamedTuple):
    seed: int
    num_workers: int
    prefetch: int
    on_bad: str
    strict: bool
    max_failures: int
    timeout: float


class Loader:
    """Batches of a dataset, in a reproducible order, pass after pass.

    ``iter(loader)`` goes through one pass (epoch): from the position given by
    :meth:`set_position`, or else from the start of the pass after the last one begun. Only one
    iterator lives at a time. Batches read ahead are kept when an iterator is left and the next one
    continues at the same place.

    Parameters
    ----------
    dataset : Dataset
        If it is not uniform, ``shuffle``, ``discard`` and ``replace`` are impossible.
    batch_size : int
        Samples in a batch. With multi-crop data the crops count as samples: a batch has
        ``max(1, batch_size // views)`` items. A dataset that is not uniform has batches of
        samples of one shape, so that some are smaller: shape after shape in the order in which
        the dataset has them.
    shuffle : bool
        Draw a new order for each epoch.
    seed : int
        Not negative.
    num_workers : int
        Worker processes; 0 reads in this process, where a decoder crash or hang is not caught.
    prefetch : int
        Batches read ahead, at least 1; they take prefetch x batch bytes of memory.
    last_batch : {'keep', 'discard'}
        What to do with an incomplete last batch.
    rank, num_ranks : int
        Of the machines (or processes) that share the data, which one this is. With ``shuffle``
        or ``discard`` every rank gets the same number of samples; else each sample goes to
        exactly one rank and the last ranks may have one fewer.
    with_index : bool
        Yield (data, label, index): index, a NumPy int64 array, is the row of the video or image.
    on_bad : {'replace', 'skip'}
        An unreadable file is replaced by another sample, drawn as a function of
        (seed, epoch, index), or left out of its batch (for evaluation).
    strict : bool
        The first unreadable file ends it all.
    max_failures : int
        So many distinct unreadable files in a row end it all: in a row for one place of a batch
        with 'replace', in the order of the data with 'skip'.
    timeout : float
        Seconds that decoding a file may take.

    Raises
    ------
    UsageError
        Arguments that make no sense, or fewer samples than one batch.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        shuffle=False,
        seed=0,
        num_workers=0,
        prefetch=2,
        last_batch="keep",
        rank=0,
        num_ranks=1,
        with_index=False,
        on_bad="replace",
        strict=False,
        max_failures=10,
        timeout=60.0,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
            ("prefetch", prefetch, 1),
            ("num_ranks", num_ranks, 1),
            ("max_failures", max_failures, 1),
        ):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= rank < num_ranks:
            raise UsageError(f"rank must be in 0..{num_ranks - 1}, got {rank}.")
        for name, value, known in (
            ("last_batch", last_batch, ("keep", "discard")),
            ("on_bad", on_bad, ("replace", "skip")),
        ):
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if not dataset.uniform and (shuffle or last_batch == "discard" or on_bad == "replace"):
            raise UsageError(
                f"{dataset.origin} gives samples of different shapes: these can only be read in "
                "their order, all of them, and without replacements."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self._items = max(1, batch_size // dataset.views)
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._num_ranks = rank, num_ranks
        self._with_index = with_index
        self._max_failures = max_failures
        self._on_bad = on_bad
        total = len(dataset)
        equal = shuffle or last_batch == "discard"
        self._samples = total // num_ranks if equal else len(range(rank, total, num_ranks))
        whole, rest = divmod(self._samples, self._items)
        self._length = whole + (1 if rest and last_batch == "keep" else 0)
        if self._length == 0 and equal:
            share = f" for each of {num_ranks} ranks" if num_ranks > 1 else ""
            raise UsageError(
                f"{dataset.origin} has {self._samples} samples{share}, fewer than one "
                f"batch of {self._items}: use a smaller batch size."
            )
        options = _Options(seed, num_workers, prefetch, on_bad, strict, max_failures, timeout)
        self._length = self._length if dataset.uniform else len(self._plan(0))
        self._engine = _Engine(options, dataset, self._largest_batch())
        # Runs at the loader's end or, at the latest, at the interpreter's.
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._next_position = (0, 0)
        self._iterators = 0

    def __len__(self):
        return self._length

    @property
    def num_samples(self):
        """Number of samples of a pass (items; a multi-crop item counts once)."""
        return min(self._samples, self._length * self._items)

    def set_position(self, epoch, batch=0):
        """Let the next ``iter()`` begin at ``batch`` (0 .. len) of ``epoch``."""
        if epoch < 0 or not 0 <= batch <= self._length:
            raise UsageError(
                f"no batch {batch} of epoch {epoch}: a pass has {self._length} batches."
            )
        self._next_position = (epoch, batch)

    def start(self):
        """Start the workers now rather than at the first ``iter()``, beside other preparations."""
        self._check_open()
        self._engine.pool.start()

    def worker_pids(self):
        """Return the process numbers of the workers."""
        pool = self._engine.pool
        return pool.pids() if isinstance(pool, WorkerPool) else []

    def bad_files(self):
        """Return the files that could not be read so far, a list of :class:`BadFile`."""
        with self._engine.pool.condition:
            return [BadFile(path, *facts) for path, facts in self._engine.bad.items()]

    def close(self):
        """End the workers and write what was noted. Can be called again."""
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _check_open(self):
        if not self._finalizer.alive:
            raise UsageError("this loader was closed.")

    def _order(self, epoch):
        """Return this rank's item indices of an epoch, in their order."""
        order = np.arange(len(self.dataset))
        if self._shuffle:
            order = generator(self._seed, ORDER, epoch).permutation(order)
        return order[self._rank :: self._num_ranks][: self._samples]

    def _plan(self, epoch):
        """Return the item indices of each batch of an epoch: a list of arrays."""
        order = self._order(epoch)
        groups = [order]
        if not self.dataset.uniform:
            shapes = {}
            for index in order:
                shapes.setdefault(self.dataset.shape_of(int(index)), []).append(index)
            groups = [np.asarray(group) for group in shapes.values()]
        step = self._items
        return [group[at : at + step] for group in groups for at in range(0, len(group), step)]

    def _largest_batch(self):
        """Return how many numbers the largest batch has."""
        if self.dataset.uniform:
            return self._items * int(np.prod(self.dataset.shape_of(0)))
        sizes = (len(b) * int(np.prod(self.dataset.shape_of(int(b[0])))) for b in self._plan(0))
        return max(sizes, default=1)

    def __iter__(self):
        self._check_open()
        epoch, first = self._next_position
        self._next_position = (epoch + 1, 0)
        self._iterators += 1
        plan = self._plan(epoch)
        batches = [(number, plan[number]) for number in range(first, self._length)]
        self._engine.pool.start()
        with self._engine.pool.condition:
            self._engine.direct(epoch, batches)
        return self._batches(self._iterators, len(batches))

    def _batches(self, ticket, count):
        engine = self._engine
        condition = engine.pool.condition
        failures, read = {}, 0
        for _ in range(count):
            with condition:
                self._check_open()
                if ticket != self._iterators:
                    raise RuntimeError("this iterator was replaced by a newer one of its loader")
                # Nothing is in flight while workers still write to the memory of a batch that a
                # new position made useless.
                engine.pool.run_until(lambda: engine.flight and engine.flight[0].pending == 0)
                if engine.flight[0].error is not None:
                    raise engine.flight[0].error
                batch = engine.flight.popleft()
            kept = [place for place, source in enumerate(batch.sources) if source is not None]
            read += len(kept)
            try:
                for place in range(len(batch.sources)):
                    self._count_failures(batch.reasons.get(place), failures)
                result = self._convert(batch, kept) if kept else None
            finally:
                with condition:
                    engine.free.append(batch.slot)
                    engine.fill()
            if result is not None:
                yield result
        if failures and not read:
            path, reason = list(failures.items())[-1]
            raise too_many(self.dataset, len(failures), path, reason)
        self.dataset.finish()

    def _count_failures(self, failure, failures):
        """Keep ``failures``, the distinct bad files since the last good one ('skip')."""
        if failure is None:
            failures.clear()
            return
        failures[failure[0]] = failure[1]
        if len(failures) >= self._max_failures:
            raise too_many(self.dataset, len(failures), *failure)

    def _convert(self, batch, kept):
        """Copy a batch out of the shared memory: (items, views, …) -> (items * views, …)."""
        memory = self._engine.job.view(batch.slot, len(batch.sources), batch.shape)
        items = memory[: len(kept)] if kept[-1] == len(kept) - 1 else memory[kept]
        views = self.dataset.views
        # Assigning copies, at once: the memory is written to again for a later batch.
        data = mx.nd.empty((len(kept) * views, *items.shape[2:]), mx.cpu(), np.float32)
        data[:] = items.reshape(data.shape)
        label = mx.nd.empty(len(data), mx.cpu(), np.float32)
        label[:] = np.repeat(np.asarray([batch.labels[i] for i in kept], np.float32), views)
        if not self._with_index:
            return data, label
        rows = [self.dataset.row_of(batch.sources[place]) for place in kept]
        return data, label, np.repeat(np.asarray(rows, np.int64), views)
