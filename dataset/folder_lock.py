"""One writer at a time in a data set's folder."""

import contextlib
import os

from glore_common import LOGGER, GloReError

try:
    import fcntl
except ImportError:  # not a Unix: no lock there
    fcntl = None

LOCK_NAME = ".lock"


@contextlib.contextmanager
def folder_lock(folder, wait=True):
    """Hold a lock on ``folder`` (made when missing) against other processes.

    The system releases it when the process ends, however it ends.

    Parameters
    ----------
    folder : str
    wait : bool
        Wait for another holder; else raise.

    Yields
    ------
    bool
        False where the file system has no locks: the writer is then not known to be alone.

    Raises
    ------
    GloReError
        Another process holds the lock and ``wait`` is False, or the folder cannot be written.
    """
    path = os.path.join(folder, LOCK_NAME)
    try:
        os.makedirs(folder, exist_ok=True)
        stream = open(path, "a")  # noqa: SIM115  (closed below; held while locked)
    except OSError as error:
        raise GloReError(f"cannot write to the data folder {folder}: {error}") from error
    with stream:
        yield _lock(stream, folder, wait)


def _lock(stream, folder, wait):
    if fcntl is None:
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if not wait:
            raise GloReError(f"another process is preparing {folder}; wait for it") from None
    except OSError as error:
        LOGGER.warning("%s cannot be locked (%s)", folder, error)
        return False
    LOGGER.info("Another process is preparing %s; waiting for it", folder)
    fcntl.flock(stream, fcntl.LOCK_EX)
    return True
