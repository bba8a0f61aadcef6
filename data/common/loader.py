"""Batches of samples as MXNet arrays, read ahead by worker processes: for clips and for images.

What comes out is a pure function of (dataset, seed, epoch, number of the batch): not of the number
of workers, of their timing, or of where a run was interrupted. Each sample has its own generator,
made from (seed, epoch, index, attempt).
"""

import collections
import dataclasses
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from glore_common import GloReError, UsageError, printable, write_text
from mxnet_compat import mx, physical_cores

from .options import ReadingOptions, settled
from .pool import InlinePool, Task, WorkerError, WorkerPool, make_memory
from .samples import ORDER, REPLACEMENT, Dataset, LoadJob, generator
from .worker_main import BAD, DONE, REFUSED

LOGGER = logging.getLogger("glore.data")


class UnreadableData(GloReError):
    """Files that cannot be read, and the loader was told not (or not so often) to go on."""


class BadFile(NamedTuple):
    """A file that could not be read, why, and how often it was met."""

    path: str
    reason: str
    times: int


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How a :class:`Loader` reads its dataset.

    Attributes
    ----------
    batch_size
        Samples in a batch. With multi-crop data the crops count as samples: a batch has
        ``max(1, batch_size // views)`` items. A dataset that is not uniform has batches of
        samples of one shape, so that some are smaller: shape after shape in the order in which
        the dataset has them.
    shuffle
        Draw a new order for each epoch. If the dataset is not uniform, the last batch of each
        shape is filled up with samples of that shape that were there before.
    balanced
        With ``shuffle``, draw the samples of an epoch (as many as there are) so that all classes
        come equally often, those of a class with few samples several times.
    seed
        Not negative.
    num_workers
        Worker processes; 0 reads in this process, where a decoder crash or hang is not caught.
    prefetch
        Batches read ahead, at least 1; they take prefetch x batch bytes of memory.
    last_batch
        'keep' or 'discard' an incomplete last batch.
    rank, num_ranks
        Of the machines (or processes) that share the data, which one this is. With ``shuffle``
        or 'discard' every rank gets the same number of samples; else each sample goes to exactly
        one rank and the last ranks may have one fewer.
    with_index
        Yield (data, label, index): index, a NumPy int64 array, is the row of the video or image.
    on_bad
        'replace' an unreadable file by another sample, drawn as a function of
        (seed, epoch, index), or 'skip' it: leave it out of its batch (for evaluation).
    strict
        The first unreadable file ends it all.
    max_failures
        So many distinct unreadable files in a row end it all: in a row for one place of a batch
        with 'replace', in the order of the data with 'skip'.
    timeout
        Seconds that decoding a file may take.

    Raises
    ------
    UsageError
        Values that make no sense.
    """

    batch_size: int
    shuffle: bool = False
    balanced: bool = False
    seed: int = 0
    num_workers: int = 0
    prefetch: int = 2
    last_batch: str = "keep"
    rank: int = 0
    num_ranks: int = 1
    with_index: bool = False
    on_bad: str = "replace"
    strict: bool = False
    max_failures: int = 10
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("seed", 0),
            ("num_workers", 0),
            ("prefetch", 1),
            ("num_ranks", 1),
            ("max_failures", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= self.rank < self.num_ranks:
            raise UsageError(f"rank must be in 0..{self.num_ranks - 1}, got {self.rank}.")
        for name, known in (
            ("last_batch", ("keep", "discard")),
            ("on_bad", ("replace", "skip")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}; got {value!r}.")

    @classmethod
    def of(cls, options: ReadingOptions, **more: Any) -> "LoaderConfig":
        """Return what the options ask for; ``more`` gives the other fields, or a batch size."""
        workers = options.num_workers
        if "batch_size" not in more:
            more["batch_size"] = settled(options, "batch_size")
        return cls(
            # Unless told otherwise as many workers as physical cores, at most 8.
            num_workers=min(8, physical_cores()) if workers is None else workers,
            max_failures=options.max_failures,
            strict=options.strict_data,
            **more,
        )


def write_bad_files(loaders: Iterable["BatchSource"], path: str) -> int:
    """Write the summary of the bad files of some loaders (``path<TAB>times<TAB>reason``).

    Line ends and tabs in a name are written as ``\\n`` and ``\\t``.

    Returns
    -------
    int
        Number of bad files. With none, no file is written and an old one is removed.
    """
    files: dict[str, BadFile] = {}
    for loader in loaders:
        for bad in loader.bad_files():
            times = bad.times + (files[bad.path].times if bad.path in files else 0)
            files[bad.path] = bad._replace(times=times)
    if files:
        rows = "".join(
            f"{printable(bad.path)}\t{bad.times}\t{printable(bad.reason)}\n"
            for bad in files.values()
        )
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

    def __init__(self, config, dataset, slot_size):
        self.config = config
        self.dataset = dataset
        slots = config.prefetch if config.num_workers else 1
        self.job = LoadJob(dataset, config.seed, slots, slot_size)
        self.descriptor, memory = make_memory(self.job.memory_size)
        if config.num_workers:
            # Pickled before memory is attached: the workers map it themselves.
            self.pool = WorkerPool(
                self.job, config.num_workers, self.outcome, config.timeout, self.descriptor
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
        config = self.config
        if path in self.bad:
            self.bad[path][1] += 1
        else:
            self.bad[path] = [reason, 1]
            consequence = "it is left out" if config.on_bad == "skip" else "another one is used"
            LOGGER.warning(
                "cannot read the %s %s: %s; %s",
                self.dataset.kind,
                printable(path),
                reason,
                consequence,
            )
        batch = place.batch
        if config.strict:
            what = f"the {self.dataset.kind} {path}"
            error = UnreadableData(f"cannot read {what}: {reason} (strict: no bad file allowed)")
            self._fail(batch, error)
        elif config.on_bad == "skip":
            batch.reasons[place.number] = (path, reason)
            batch.pending -= 1
        else:
            tried_paths = {self.dataset.name(index) for index in place.tried}
            replacement = self._replacement(place, tried_paths)
            if len(tried_paths) >= config.max_failures or replacement is None:
                self._fail(batch, too_many(self.dataset, len(tried_paths), path, reason))
            else:
                place.candidate = replacement
                place.tried.append(replacement)
                self._try(place)

    def _replacement(self, place, tried_paths):
        """Return another item for a place, a function of (seed, epoch, index, attempt)."""
        attempt = len(place.tried)
        rng = generator(self.config.seed, REPLACEMENT, self.epoch, place.index, attempt)
        # A few draws nearly always do; the permutation ends the search in a small list.
        total = len(self.dataset)

        def fits(index):
            fresh = self.dataset.name(index) not in tried_paths
            return fresh and self.dataset.shape_of(index) == place.batch.shape

        for _ in range(20):
            index = int(rng.integers(total))
            if fits(index):
                return index
        for index in rng.permutation(total):
            if fits(int(index)):
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


def too_many(dataset: Dataset, count: int, path: str, reason: str) -> UnreadableData:
    """Return the error for ``count`` distinct unreadable files in a row."""
    plural = "s in a row" if count > 1 else ""
    return UnreadableData(
        f"{count} distinct {dataset.kind}{plural} could not be read, the last one {path} "
        f"({reason}). {dataset.advice}"
    )


class BatchSource:
    """Batches pass after pass, and which of them to read next.

    Attributes
    ----------
    dataset
    config
    batches
        Batches of a pass.
    num_samples
        Samples of a pass (items; a multi-crop item counts once).
    """

    batches: int
    num_samples: int

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        self.dataset = dataset
        self.config = config
        self._next_position: tuple[int, Optional[list[int]]] = (0, None)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple]:
        """Go through the batches in which anything could be read."""
        return (batch for batch in self.every_batch() if batch is not None)

    def every_batch(self) -> Iterator[Optional[tuple]]:
        """Do what ``iter()`` does, with None for a batch of which no sample could be read."""
        raise NotImplementedError

    def set_position(self, epoch: int, batch: int = 0, stop: Optional[int] = None) -> None:
        """Let the next ``iter()`` begin at ``batch`` (0 .. len) of ``epoch``.

        It ends before the batch ``stop``, by default with the pass. Nothing beyond is read.
        """
        self.set_runs(epoch, [(batch, self.batches if stop is None else stop)])

    def set_runs(self, epoch: int, runs: Sequence[tuple[int, int]]) -> None:
        """Let the next ``iter()`` go through some runs of batches of ``epoch``, and no others.

        Parameters
        ----------
        epoch
            Pass, from 0.
        runs
            (first batch, batch after the last) of each, in rising order. What is read ahead at
            the end of one is the next one's beginning.
        """
        ends = [0, *(end for run in runs for end in run)]
        for before, end in zip(ends, ends[1:]):
            if epoch < 0 or not before <= end <= self.batches:
                raise UsageError(
                    f"no batch {end} of epoch {epoch} after batch {before}: a pass has "
                    f"{self.batches} batches."
                )
        numbers = [number for first, stop in runs for number in range(first, stop)]
        self._next_position = (epoch, numbers)

    def _take_position(self) -> tuple[int, list[int]]:
        """Return (epoch, numbers of its batches) to read now; the next pass comes after it."""
        epoch, numbers = self._next_position
        self._next_position = (epoch + 1, None)
        return epoch, list(range(self.batches)) if numbers is None else numbers

    def start(self) -> None:
        """Start what can be started before the first ``iter()``, beside other preparations."""

    def bad_files(self) -> list[BadFile]:
        """Return the files that could not be read so far."""
        return []

    def close(self) -> None:
        """End what was started. Can be called again."""

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Loader(BatchSource):
    """Batches of a dataset, in a reproducible order, pass after pass.

    ``iter(loader)`` goes through one pass (epoch): what :meth:`set_position` or :meth:`set_runs`
    asked for, or else the whole pass after the last one begun. Only one iterator lives at a time.
    Batches read ahead are kept when an iterator is left and the next one continues at the same
    place.

    Parameters
    ----------
    dataset
        If it is not uniform, 'discard' is impossible; so is 'replace' without ``shuffle``, and
        ``balanced``.
    config

    Raises
    ------
    UsageError
        What is impossible for the dataset, or fewer samples than one batch.
    """

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        super().__init__(dataset, config)
        equal = config.shuffle or config.last_batch == "discard"
        impossible = config.last_batch == "discard" or config.balanced
        if not config.shuffle:
            impossible = impossible or config.on_bad == "replace"
        if not dataset.uniform and impossible:
            raise UsageError(
                f"{dataset.origin} gives samples of different shapes: these can only be read all "
                "of them; in their order without replacements, or shuffled."
            )
        self._items = max(1, config.batch_size // dataset.views)
        total, ranks = len(dataset), config.num_ranks
        self._samples = total // ranks if equal else len(range(config.rank, total, ranks))
        whole, rest = divmod(self._samples, self._items)
        self.batches = whole + (1 if rest and config.last_batch == "keep" else 0)
        if self.batches == 0 and equal and dataset.uniform:
            share = f" for each of {ranks} ranks" if ranks > 1 else ""
            raise UsageError(
                f"{dataset.origin} has {self._samples} samples{share}, fewer than one "
                f"batch of {self._items}: use a smaller batch size."
            )
        self.num_samples = min(self._samples, self.batches * self._items)
        if not dataset.uniform:
            self.batches = len(self._plan(0))
            if config.shuffle:
                self.num_samples = self.batches * self._items
        self._engine = _Engine(config, dataset, self._largest_batch())
        # Runs at the loader's end or, at the latest, at the interpreter's.
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._iterators = 0

    def start(self) -> None:
        """Start the workers now rather than at the first ``iter()``, beside other preparations."""
        self._check_open()
        self._engine.pool.start()

    def worker_pids(self) -> list[int]:
        """Return the process numbers of the workers."""
        return self._engine.pool.pids()

    def bad_files(self) -> list[BadFile]:
        """Return the files that could not be read so far."""
        with self._engine.pool.condition:
            return [BadFile(path, *facts) for path, facts in self._engine.bad.items()]

    def close(self) -> None:
        """End the workers and write what was noted. Can be called again."""
        self._finalizer()

    def _check_open(self):
        if not self._finalizer.alive:
            raise UsageError("this loader was closed.")

    def _order(self, epoch):
        """Return this rank's item indices of an epoch, in their order."""
        order = np.arange(len(self.dataset))
        config = self.config
        if config.shuffle and config.balanced:
            labels = self.dataset.labels()
            share = 1 / np.bincount(labels)[labels]
            rng = generator(config.seed, ORDER, epoch)
            order = rng.choice(order, len(order), p=share / share.sum())
        elif config.shuffle:
            order = generator(config.seed, ORDER, epoch).permutation(order)
        return order[config.rank :: config.num_ranks][: self._samples]

    def _plan(self, epoch):
        """Return the item indices of each batch of an epoch: a list of arrays."""
        if not self.dataset.uniform and self.config.shuffle:
            return self._shuffled_by_shape(epoch)
        order = self._order(epoch)
        groups = [order] if self.dataset.uniform else self._by_shape(order)
        step = self._items
        return [group[at : at + step] for group in groups for at in range(0, len(group), step)]

    def _by_shape(self, order):
        """Return the items of each shape, in the order of ``order``."""
        shapes = {}
        for index in order:
            shapes.setdefault(self.dataset.shape_of(int(index)), []).append(index)
        return [np.asarray(group) for group in shapes.values()]

    def _shuffled_by_shape(self, epoch):
        """Return whole batches of one shape each, in random order: one shape for all ranks."""
        config = self.config
        rng = generator(config.seed, ORDER, epoch)
        step = self._items * config.num_ranks
        batches = []
        for group in self._by_shape(rng.permutation(len(self.dataset))):
            # Filled up from its beginning, several times if need be.
            filled = np.resize(group, len(group) + -len(group) % step)
            parts = filled.reshape(-1, step)
            batches += [part[config.rank :: config.num_ranks] for part in parts]
        return [batches[place] for place in rng.permutation(len(batches))]

    def _largest_batch(self):
        """Return how many numbers the largest batch has."""
        if self.dataset.uniform:
            return self._items * int(np.prod(self.dataset.shape_of(0)))
        sizes = (len(b) * int(np.prod(self.dataset.shape_of(int(b[0])))) for b in self._plan(0))
        return max(sizes, default=1)

    def every_batch(self) -> Iterator[Optional[tuple]]:
        """Begin a pass; see :meth:`BatchSource.every_batch`."""
        self._check_open()
        epoch, numbers = self._take_position()
        self._iterators += 1
        plan = self._plan(epoch)
        batches = [(number, plan[number]) for number in numbers]
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
            yield result
        # One worker's share, or a part of a pass, may have nothing good while the others do.
        whole = count == self.batches and self.config.num_ranks == 1
        if failures and not read and whole:
            path, reason = list(failures.items())[-1]
            raise too_many(self.dataset, len(failures), path, reason)
        self.dataset.finish()

    def _count_failures(self, failure, failures):
        """Keep ``failures``, the distinct bad files since the last good one ('skip')."""
        if failure is None:
            failures.clear()
            return
        failures[failure[0]] = failure[1]
        if len(failures) >= self.config.max_failures:
            raise too_many(self.dataset, len(failures), *failure)

    def _convert(self, batch, kept):
        """Copy a batch out of the shared memory: (items, views, …) -> (items * views, …)."""
        memory = self._engine.job.view(batch.slot, len(batch.sources), batch.shape)
        items = memory[: len(kept)] if kept[-1] == len(kept) - 1 else memory[kept]
        views = self.dataset.views
        # Assigning copies, at once: the memory is written to again for a later batch.
        arrays = items.reshape((len(kept) * views, *items.shape[2:]))
        labels = np.repeat(np.asarray([batch.labels[i] for i in kept], np.float32), views)
        arrays, labels = self.dataset.unpack(arrays, labels)
        data = mx.nd.empty(arrays.shape, mx.cpu(), np.float32)
        data[:] = arrays
        label = mx.nd.empty(labels.shape, mx.cpu(), np.float32)
        label[:] = labels
        if not self.config.with_index:
            return data, label
        rows = [self.dataset.row_of(batch.sources[place]) for place in kept]
        return data, label, np.repeat(np.asarray(rows, np.int64), views)
