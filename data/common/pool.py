"""Processes that run a job on many items, watched: one may crash or hang without taking the rest.

A thread of the parent hands each idle worker one task, so that when a worker dies or does not
answer in time it is known which file it was at. The worker is replaced and the work goes on.
Arrays travel through memory that both sides map; it has no name, so nothing can be left behind.
See :mod:`data.common.worker_main` for the other side and for why these are not forks.

The parent never waits for a worker to read: the job lies in a file that they all map, and a task is
small and goes to a worker that has read all before it, so that it fits into the pipe.
"""

import collections
import logging
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import connection as pipes
from typing import Any, Callable, Optional

from .worker_main import BAD, READY, run_job

LOGGER = logging.getLogger("glore.data")
# Seconds between looks at the workers' clocks, and until a worker must have started.
TICK, START_TIMEOUT = 0.5, 120.0
# Workers that may die one after the other before any of them is ready.
FAILED_STARTS = 3
# Bytes of a pickled task. A pipe (a pair of Unix sockets) holds some 200 kB on Linux.
LARGEST_TASK = 32 << 10


class WorkerError(RuntimeError):
    """An error inside a worker that is a bug, with the worker's traceback."""


class Task:
    """One call of the job.

    Parameters
    ----------
    arguments
        For ``job.run``.
    what
        Names the task in messages: the file it reads.
    context
        For the receiver of the outcome.
    """

    __slots__ = ("arguments", "context", "crashed", "crashes", "what")

    def __init__(self, arguments: tuple, what: str, context: Any = None) -> None:
        self.arguments = arguments
        self.what = what
        self.context = context
        self.crashes = 0
        self.crashed = -math.inf  # when a worker was last lost at it


def make_memory(size: int) -> tuple[int, mmap.mmap]:
    """Return (file descriptor, mmap) of ``size`` bytes that other processes can map too."""
    if hasattr(os, "memfd_create"):
        # Unlike a file in /dev/shm this is not bound by the small limit that containers set there.
        descriptor = os.memfd_create("glore-batches")
    else:
        with tempfile.TemporaryFile() as stream:
            descriptor = os.dup(stream.fileno())
    os.ftruncate(descriptor, size)
    return descriptor, mmap.mmap(descriptor, size)


class InlinePool:
    """The pool without processes: tasks run in the caller when it waits for them.

    Nothing guards the process against a decoder that crashes or hangs.
    """

    def __init__(self, job: Any, on_outcome: Callable[[Task, str, Any], None]) -> None:
        self.condition = threading.Condition()
        self._job = job
        self._on_outcome = on_outcome
        self._tasks: collections.deque[Task] = collections.deque()

    def start(self) -> None:
        """Do nothing: there is nothing to start."""

    def pids(self) -> list[int]:
        """Return no process numbers."""
        return []

    def submit(self, task: Task) -> None:
        """Queue a task (:attr:`condition` held)."""
        self._tasks.append(task)

    def discard(self, unwanted: Callable[[Task], bool]) -> list[Task]:
        """Remove queued tasks for which ``unwanted(task)`` is true and return them."""
        removed = [task for task in self._tasks if unwanted(task)]
        self._tasks = collections.deque(task for task in self._tasks if not unwanted(task))
        return removed

    def run_until(self, finished: Callable[[], Any]) -> None:
        """Run tasks until ``finished()``."""
        while not finished():
            task = self._tasks.popleft()
            self._on_outcome(task, *run_job(self._job, task.arguments))

    def close(self) -> None:
        """Drop what is queued."""
        self._tasks.clear()


class _Worker:
    """One process, the pipe to it and the task it is at."""

    def __init__(self, number, process, connection):
        self.number = number
        self.process = process
        self.connection = connection
        self.ready = False
        self.task = None
        self.born = self.since = time.monotonic()


def _package_folder():
    """Return (folder to start workers in, name of the worker's module)."""
    package = __package__
    folder = os.path.dirname(os.path.abspath(__file__))
    for _ in package.split("."):
        folder = os.path.dirname(folder)
    return folder, f"{package}.worker_main"


def _died(returncode):
    if returncode is None:
        return "closed its pipe"
    if returncode < 0:
        try:
            return f"was killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"was killed by signal {-returncode}"
    return f"ended with exit code {returncode}"


class WorkerPool(InlinePool):
    """Run ``job.run(*arguments)`` in worker processes.

    Parameters
    ----------
    job
        Picklable, importable without MXNet, with ``run`` and ``prepare(memory)``, which is called
        once in each worker.
    num_workers
    on_outcome
        ``on_outcome(task, kind, value)``, called in the pool's thread with :attr:`condition` held;
        kinds as for :func:`data.common.worker_main.run_job`, and ``FAILED`` with a traceback.
    timeout
        Seconds a task may take before its worker counts as hung.
    memory
        File descriptor to map in the workers, or -1.
    """

    def __init__(
        self,
        job: Any,
        num_workers: int,
        on_outcome: Callable[[Task, str, Any], None],
        timeout: float = 60.0,
        memory: int = -1,
    ) -> None:
        super().__init__(job, on_outcome)
        pickled = pickle.dumps(job)
        self._of_main = b"__main__" in pickled
        self._job_file, memory_of_job = make_memory(len(pickled))
        memory_of_job.write(pickled)
        self._num_workers = num_workers
        self._timeout = timeout
        self._memory = memory
        self._workers: list[_Worker] = []
        self._thread: Optional[threading.Thread] = None
        self._failure: Optional[BaseException] = None
        self._closing = False
        self._wake_out, self._wake_in = pipes.Pipe(duplex=False)
        self._woken = False
        self._failed_starts = 0

    def start(self) -> None:
        """Start the workers and the thread that watches them, once."""
        if self._thread is not None:
            return
        self._workers = [self._spawn(number) for number in range(self._num_workers)]
        self._thread = threading.Thread(target=self._watch, name="glore-pool", daemon=True)
        self._thread.start()

    def pids(self) -> list[int]:
        """Return the process numbers of the workers."""
        with self.condition:
            return [worker.process.pid for worker in self._workers]

    def submit(self, task: Task) -> None:
        """Queue a task (:attr:`condition` held)."""
        super().submit(task)
        self._wake()

    def run_until(self, finished: Callable[[], Any]) -> None:
        """Wait (:attr:`condition` held) until ``finished()`` or the pool cannot go on."""
        self.condition.wait_for(lambda: finished() or self._failure or self._closing)
        if self._failure is not None:
            raise self._failure
        if self._closing and not finished():
            raise RuntimeError("the loader was closed while its batches were being read")

    def close(self) -> None:
        """End the workers and wait for them. Can be called again."""
        with self.condition:
            if self._closing:
                return
            self._closing = True
            self._tasks.clear()
            self._wake()
            self.condition.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._wake_in.close()
        self._wake_out.close()
        os.close(self._job_file)

    def _wake(self):
        if not self._woken:
            self._woken = True
            self._wake_in.send_bytes(b".")

    def _spawn(self, number):
        folder, module = _package_folder()
        ours, theirs = pipes.Pipe()
        # Where modules are found is part of what a pickle needs; the working folder of the start
        # puts the package first, and the worker then goes to ours.
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        descriptors = [theirs.fileno(), self._job_file, self._memory]
        arguments = [*map(str, descriptors), str(os.getpid()), os.getcwd()]
        # Until the worker ignores it, Ctrl-C must find no Python that answers with a trace: the
        # process inherits what this thread blocks.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output belongs to the parent's results
                cwd=folder,
                env=environment,
                pass_fds=[descriptor for descriptor in descriptors if descriptor >= 0],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        return _Worker(number, process, ours)

    def _watch(self):
        try:
            last = time.monotonic()
            while True:
                with self.condition:
                    if self._closing:
                        break
                    self._hand_out()
                    sources = {worker.connection: worker for worker in self._workers}
                ready = pipes.wait([*sources, self._wake_out], TICK)
                with self.condition:
                    now = time.monotonic()
                    if now - last > 10 * TICK:
                        # We were stopped (a suspended machine, Ctrl-Z), and so were the workers.
                        for worker in self._workers:
                            worker.since += now - last
                    last = now
                    for source in ready:
                        if source is self._wake_out:
                            self._wake_out.recv_bytes()
                            self._woken = False
                        else:
                            self._receive(sources[source])
                    for worker in list(self._workers):
                        self._check_clock(worker, now)
                    self.condition.notify_all()
        except BaseException as error:
            # Whatever ends this thread must reach those who wait for its work.
            with self.condition:
                self._failure = error
                self.condition.notify_all()
        finally:
            self._end_workers()

    def _hand_out(self):
        for worker in list(self._workers):
            if not self._tasks:
                return
            if worker.ready and worker.task is None:
                # A task that a worker was lost at goes to one that has started since: what killed
                # the first may have killed others of its age that are not known to be dead yet.
                task = next((task for task in self._tasks if task.crashed < worker.born), None)
                if task is None:
                    continue
                self._tasks.remove(task)
                worker.task = task
                worker.since = time.monotonic()
                message = pickle.dumps(worker.task.arguments)
                if len(message) > LARGEST_TASK:
                    raise WorkerError(
                        f"the request for {worker.task.what} has {len(message)} bytes, more than "
                        f"the {LARGEST_TASK} that a pipe holds in any case."
                    )
                try:
                    worker.connection.send_bytes(message)
                except OSError:
                    self._lost(worker)

    def _receive(self, worker):
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            self._lost(worker)
            return
        if not worker.ready:
            if kind != READY:
                hint = ""
                if self._of_main:
                    hint = "Classes and functions for workers must live in a module of their own."
                raise WorkerError(f"data worker {worker.number} could not start:\n{value}{hint}")
            worker.ready = True
            self._failed_starts = 0
            return
        task, worker.task = worker.task, None
        self._on_outcome(task, kind, value)

    def _check_clock(self, worker, now):
        if not worker.ready and now - worker.since > START_TIMEOUT:
            raise WorkerError(
                f"data worker {worker.number} (pid {worker.process.pid}) did not start within "
                f"{START_TIMEOUT:.0f} s."
            )
        if worker.task is None or now - worker.since <= self._timeout:
            return
        task, worker.task = worker.task, None
        LOGGER.warning(
            "data worker %d (pid %d) gave no answer for %.0f s while decoding %s; it is ended "
            "and replaced",
            worker.number,
            worker.process.pid,
            self._timeout,
            task.what,
        )
        self._replace(worker, patience=0.0)
        self._on_outcome(task, BAD, f"the decoder gave no answer within {self._timeout:g} s")

    def _lost(self, worker):
        """Deal with a worker that has gone: its task is tried once more, then its file is bad."""
        task, worker.task, crashed = worker.task, None, time.monotonic()
        self._failed_starts += not worker.ready
        hopeless = self._failed_starts >= FAILED_STARTS
        # Its end of the pipe is closed a moment before the process is over.
        returncode = self._replace(worker, patience=1.0, restart=not hopeless)
        story = f"data worker {worker.number} (pid {worker.process.pid}) {_died(returncode)}"
        if hopeless:
            raise WorkerError(
                f"{story} before it was ready, the last of {FAILED_STARTS} in a row; see the "
                "messages of the workers above."
            )
        if task is None:
            LOGGER.warning(
                "%s while %s; it is replaced", story, "idle" if worker.ready else "starting"
            )
            return
        task.crashes += 1
        task.crashed = crashed
        if task.crashes == 1:
            # The file may be innocent (the system was short of memory): the same batch comes out.
            LOGGER.warning(
                "%s while decoding %s; it is replaced and the file tried once more",
                story,
                task.what,
            )
            self._tasks.appendleft(task)
        else:
            LOGGER.warning("%s while decoding %s; it is replaced", story, task.what)
            self._on_outcome(task, BAD, f"the decoder {_died(returncode)}, twice")

    def _replace(self, worker, patience, restart=True):
        """End ``worker``, after ``patience`` seconds to do so itself; return its exit code.

        None is returned for a process that had to be killed.
        """
        worker.connection.close()
        try:
            returncode = worker.process.wait(patience)
        except subprocess.TimeoutExpired:
            returncode = None
            worker.process.kill()
            worker.process.wait()
        place = self._workers.index(worker)
        self._workers[place : place + 1] = [self._spawn(worker.number)] if restart else []
        return returncode

    def _end_workers(self):
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + 1.0
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
