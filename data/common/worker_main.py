"""A worker process of :class:`data.common.pool.WorkerPool`: ``python -m data.common.worker_main``.

It is a fresh interpreter, not a fork: the parent has MXNet's and OpenMP's threads, and a fork
would copy their locks in whatever state they are. Nor does it go through ``multiprocessing``,
whose spawn and forkserver import the parent's main script again, and MXNet with it (seconds).
It loads NumPy, OpenCV and what its job needs, and starts in about 0.4 s.

Whatever happens to the parent, the worker ends: a thread reads the pipe from the parent, sees its
end, and leaves the process even while the main thread hangs in a decoder.
"""

import faulthandler
import mmap
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

# Bytes of data that a worker may have; a clip of 64 frames of 1080p takes 0.4 GiB.
MEMORY_LIMIT = 4 * 2**30
# Kinds of messages to the parent.
READY, DONE, BAD, REFUSED, FAILED = "ready", "done", "bad", "refused", "failed"


def run_job(job: Any, arguments: tuple) -> tuple[str, Any]:
    """Run ``job.run(*arguments)`` and turn the outcome into (kind, value).

    ``DONE`` with the result, ``BAD`` with the reason for a file that cannot be read or transformed,
    ``REFUSED`` with the error for a user's mistake. Other errors are raised: they are bugs.
    """
    import cv2

    from glore_common import GloReError

    from .samples import UnreadableFile

    try:
        return DONE, job.run(*arguments)
    except UnreadableFile as error:
        return BAD, error.reason
    except GloReError as error:
        return REFUSED, error
    except (cv2.error, OSError, ValueError, OverflowError, EOFError, MemoryError) as error:
        # What odd content makes decoders and transforms raise, once for this file.
        text = str(getattr(error, "err", "") or error) or "no message"
        return BAD, f"{type(error).__name__}: {' '.join(text.split())}"


def _listen(connection, tasks, parent):
    """Move messages from the parent to ``tasks``; leave the process when the parent is gone."""
    while True:
        try:
            # A copy of the parent's end in some forked process would hide that the parent died:
            # look at the parent's number as well.
            while not connection.poll(1.0):
                if os.getppid() != parent:
                    os._exit(0)
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _limit_memory() -> None:
    """Keep a file that wants all memory from taking it from other processes."""
    try:
        import resource
    except ImportError:  # no Unix
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or most > MEMORY_LIMIT:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, most))


def main(arguments: list[str]) -> int:
    """Serve tasks until the parent closes the pipe.

    Arguments: descriptors of the pipe, the pickled job and the memory (-1: none), the parent's
    process number and its working folder.
    """
    pipe, pickled, memory, parent = (int(argument) for argument in arguments[:4])
    # The parent decides about Ctrl-C and SIGTERM; its workers go when it goes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    connection = Connection(pipe)
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks, parent), daemon=True).start()
    try:
        os.chdir(arguments[4])
        _limit_memory()
        import cv2

        cv2.setNumThreads(0)
        job = pickle.loads(mmap.mmap(pickled, 0, access=mmap.ACCESS_READ))
        job.prepare(mmap.mmap(memory, 0) if memory >= 0 else None)
    except Exception:
        connection.send((FAILED, traceback.format_exc()))
        return 1
    # What libpng, decord and FFmpeg write there by themselves is said by us, once for each file.
    own = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stderr = os.fdopen(own, "w", buffering=1)
    faulthandler.enable()
    connection.send((READY, None))
    while True:
        task = tasks.get()
        try:
            message = run_job(job, task)
        except Exception:
            message = (FAILED, traceback.format_exc())
        try:
            connection.send(message)
        except OSError:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
