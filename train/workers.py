"""A worker among others: who it is, sums over all workers, and what they agree on.

The engine is MXNet's key-value store over ps-lite. What it does not have is built on it here: sums
of figures that are no gradients (metrics, flags), and values handed from worker 0 to the others.

Quirks of MXNet 1.9.1 that this file deals with (all measured):

* A push of one array keeps that array as its buffer, and a pull of the same key writes to it: every
  exchange pushes an array of its own.
* With gradient compression *every* push is compressed to two bits per number, and ``pushpull``
  does not work; with an optimiser on the servers they compute in float32. Figures then travel as
  the bits of integers, each bit 0 or a power that both leave exact.
* A second distributed store in one process blocks for ever: one store serves all.
* ``dist_async`` adds nothing up, and needs an optimiser on the servers from the start; see
  :class:`train.server_side.RemoteOptimizer`.
* A worker that ends waits for all others at a barrier, also when it ends by an error: see
  :meth:`Group.__exit__`.
"""

import ctypes
import json
import logging
import os
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

import numpy as np

from glore_common import HEARTBEAT_FOLDER, GloReError, UsageError
from mxnet_compat import mx

from .heartbeat import Heartbeat
from .interrupt import STOPPING
from .server_side import FIGURES, MOST_KEYS, RemoteOptimizer

LOGGER = logging.getLogger("glore.train")
# Fixed point of figures that travel as bits: 2**-32 is the smallest difference, 2**63 the bound.
FRACTION_BITS, TOTAL_BITS = 32, 96


def is_distributed(kvstore: str) -> bool:
    """Return whether a store of this name joins several processes."""
    return kvstore.startswith("dist")


class Group:
    """The workers of a run, seen from one of them; without a store it is alone.

    To be used in a ``with`` block, so that an error in one worker ends it.

    Parameters
    ----------
    store
        Distributed store.
    rank, size
        Number of this worker, and how many there are.
    heartbeat
        Told what this worker does.

    Attributes
    ----------
    asynchronous
        Whether workers push as they like (``dist_async``).
    """

    def __init__(
        self,
        store: Optional[mx.kv.KVStore] = None,
        rank: int = 0,
        size: int = 1,
        heartbeat: Optional[Heartbeat] = None,
    ) -> None:
        self.store: Any = store
        self.rank = rank
        self.size = size
        self.heartbeat = heartbeat or Heartbeat(None, rank)
        self.asynchronous = store is not None and "async" in store.type
        # What stands for a set bit; None: figures travel as they are.
        self._unit: Optional[float] = 1.0 if self.asynchronous else None
        self._keys: dict[tuple[int, str], int] = {}

    @property
    def servers(self) -> int:
        """Number of parameter servers."""
        return int(os.environ.get("DMLC_NUM_SERVER", "1"))

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes files."""
        return self.rank == 0

    @property
    def in_step(self) -> bool:
        """Whether several workers take each step together."""
        return self.size > 1 and not self.asynchronous

    @property
    def seed(self) -> tuple[int, ...]:
        """What makes this worker's randomness (dropout, mixup) differ from the others'."""
        return () if self.is_main else (self.rank,)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.heartbeat.close()
        if kind is not None and self.store is not None:
            # Others may never reach the barrier at which the store waits for them.
            library = mx.base._LIB
            mx.base.check_call(
                library.MXKVStoreSetBarrierBeforeExit(self.store.handle, ctypes.c_int(0))
            )

    def compress(self, threshold: float) -> None:
        """Have gradients sent as two bits per number: -threshold, 0 or threshold.

        What is left over is added to the next gradient (MXNet's ``2bit``).
        """
        self.store.set_gradient_compression({"type": "2bit", "threshold": threshold})
        # The servers learn of it from one of the workers.
        self.store._barrier()
        self._unit = threshold

    def exchange(self, values: Any, dtype: str = "float64") -> np.ndarray:
        """Return the sum of all workers' arrays, by one key of the store per length."""
        key = self._keys.get((len(values), dtype))
        if key is None:
            # All workers exchange the same lengths in the same order.
            key = self._keys[len(values), dtype] = FIGURES + len(self._keys)
            if key >= MOST_KEYS:
                raise GloReError("too many different lengths were exchanged between the workers")
            self.store.init(key, mx.nd.zeros((len(values),), dtype=dtype))
        total = mx.nd.zeros((len(values),), dtype=dtype)

        def pull():
            self.store.pull(key, total)
            return total.asnumpy()

        self.store.push(key, mx.nd.array(values, dtype=dtype))
        result = pull()
        if self.asynchronous:
            # Everybody's share has arrived; everybody has read the sum; it is zero again.
            self.store._barrier()
            result = pull()
            self.store._barrier()
            if self.is_main:
                self.store.push(key, mx.nd.array(-result, dtype=dtype))
                pull()
            self.store._barrier()
        return result

    def sum(self, values: Union[Sequence[float], np.ndarray]) -> np.ndarray:
        """Return the sums of figures over all workers.

        Parameters
        ----------
        values
            As many from each worker, each below 2**62 in absolute value.

        Returns
        -------
        numpy.ndarray
            float64. NaN where a worker has a NaN or an infinity.
        """
        figures = np.asarray(values, dtype=np.float64)
        if self.size == 1:
            return figures.copy()
        with self.heartbeat.phase("exchange"):
            if self._unit is None:
                return self.exchange(figures)
            return self._sum_as_bits(figures)

    def sum_totals(self, totals: dict[str, float]) -> dict[str, float]:
        """Return metric sums over all workers, which call this at the same place."""
        sums = dict(zip(totals, self.sum(list(totals.values())).tolist()))
        return {**sums, "samples": round(sums["samples"])}

    def _sum_as_bits(self, values: np.ndarray) -> np.ndarray:
        finite = np.isfinite(values)
        fixed = [round(float(v) * 2**FRACTION_BITS) if ok else 0 for v, ok in zip(values, finite)]
        # Two's complement; the last column counts what is not finite.
        rows = [[n >> bit & 1 for bit in range(TOTAL_BITS)] for n in fixed]
        bits = np.concatenate([np.array(rows, np.float32), ~finite[:, None]], axis=1)
        counts = self._sum_of_bits(bits).reshape(len(values), TOTAL_BITS + 1)
        totals = []
        for row in counts:
            number = sum(int(count) << bit for bit, count in enumerate(row[:-1]))
            # Each negative number counts 2**TOTAL_BITS too much.
            number -= int(row[-2]) << TOTAL_BITS
            totals.append(np.nan if row[-1] else number / 2**FRACTION_BITS)
        return np.array(totals)

    def _sum_of_bits(self, bits: np.ndarray) -> np.ndarray:
        sums = self.exchange(bits.reshape(-1) * np.float32(self._unit), "float32")
        return np.rint(sums / np.float32(self._unit)).astype(np.int64)

    def broadcast(self, values: Any) -> np.ndarray:
        """Return worker 0's array (float64) on all workers; the others give one of equal length."""
        values = np.asarray(values, dtype=np.float64).reshape(-1)
        if self.size == 1 or not len(values):
            return values
        with self.heartbeat.phase("exchange"):
            if not self.is_main:
                values = np.zeros_like(values)
            if self._unit is None:
                return self.exchange(values)
            bits = np.unpackbits(values.view(np.uint8)).astype(np.float32)
            return np.packbits(self._sum_of_bits(bits).astype(np.uint8)).view(np.float64)

    def broadcast_text(self, text: Optional[str]) -> Optional[str]:
        """Return worker 0's text (or None) on all workers."""
        if self.size == 1:
            return text
        own = b"" if text is None or not self.is_main else text.encode()
        length = int(self.broadcast([len(own) if text is not None else -1])[0])
        if length < 0:
            return None
        data = np.frombuffer(own, np.uint8) if self.is_main else np.zeros(length, np.uint8)
        return self.broadcast(data).astype(np.uint8).tobytes().decode()

    def decide(self, choose: Callable[[], Any], what: str) -> Any:
        """Return what ``choose()`` gives on worker 0 (JSON values) to all workers.

        Raises
        ------
        GloReError
            On all of them, if it does on worker 0; ``what`` says what cannot be done.
        """
        if not self.is_main:
            answer = json.loads(self.broadcast_text("") or "")
            if answer["error"] is not None:
                raise GloReError(f"worker 0 cannot {what}: {answer['error']}")
            return answer["chosen"]
        try:
            chosen = choose()
        except GloReError as error:
            self.broadcast_text(json.dumps({"chosen": None, "error": str(error)}))
            raise
        self.broadcast_text(json.dumps({"chosen": chosen, "error": None}))
        return chosen

    def check_equal(self, name: str, value: int) -> None:
        """Raise GloReError unless a whole number is the same on all workers."""
        total, squares = self.sum([value, value * value])
        if total != value * self.size or squares != value * value * self.size:
            raise GloReError(
                f"{name} is {value} on worker {self.rank} but not on all {self.size}: give every "
                "worker the same data and options"
            )

    def agree(self, samples: int, signal: Optional[int]) -> tuple[int, Optional[int]]:
        """Tell the others of this step's samples and of a signal; return those of all.

        Parameters
        ----------
        samples
            Of this worker's batch.
        signal
            Signal that this worker got.

        Returns
        -------
        (int, int or None)
            Samples of all workers that take this step together, and the signal that one of them
            got.
        """
        if not self.in_step:
            return samples, signal
        flags = [float(signal == number) for number in STOPPING]
        total, *told = self.sum([samples, *flags])
        heard = [number for number, count in zip(STOPPING, told) if count]
        return int(total), heard[-1] if heard else None


def join(kvstore: str) -> Group:
    """Join the other workers of a distributed run.

    Parameters
    ----------
    kvstore
        Name of the store, as ``--kv-store`` takes it.

    Returns
    -------
    Group
        Of one worker, without a store, for the stores of one process.

    Raises
    ------
    UsageError
        If the store does not fit the way in which this process was started.
    """
    workers = int(os.environ.get("DMLC_NUM_WORKER", os.environ.get("DMLC_WORKER_COUNT", "1")))
    number = os.environ.get("DMLC_TASK_ID")
    if not is_distributed(kvstore):
        if workers > 1:
            raise UsageError(
                f"this is one of {workers} workers of a job, and --kv-store {kvstore} does not "
                "join them: give --kv-store dist_sync"
            )
        return Group(heartbeat=Heartbeat(os.environ.get(HEARTBEAT_FOLDER), int(number or 0)))
    if "DMLC_PS_ROOT_URI" not in os.environ:
        raise UsageError(
            f"--kv-store {kvstore} is for a job of several processes: start it with "
            "./run_dist.sh -n WORKERS -- COMMAND (and not with -s 0)"
        )
    heartbeat = Heartbeat(os.environ.get(HEARTBEAT_FOLDER), int(number or 0))
    heartbeat.tick("joining")
    try:
        store = mx.kv.create(kvstore)
    except mx.MXNetError as error:
        raise GloReError(f"the distributed store {kvstore} cannot be made: {error}") from error
    # ps-lite counts workers as they come; the launcher's numbers are those of the log files.
    rank = store.rank if number is None else int(number)
    group = Group(store, rank, store.num_workers, heartbeat)
    if group.asynchronous:
        store.set_optimizer(RemoteOptimizer(None, group.size, group.servers, additive=True))
        store._barrier()
    present = np.zeros(group.size)
    present[min(group.rank, group.size - 1)] = 1.0
    if (group.sum(present) != 1).any():
        raise GloReError(
            f"the workers' numbers (DMLC_TASK_ID) are not 0 to {group.size - 1}, each once"
        )
    heartbeat.tick("starting")
    LOGGER.info("Worker     %d of %d (%s)", group.rank, group.size, kvstore)
    return group
