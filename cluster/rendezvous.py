"""How the processes that Slurm or MPI started agree on the scheduler's address: through a file."""

import contextlib
import json
import os
import time
from collections.abc import Iterator

from glore_common import GloReError, write_text

# Seconds that members wait for the address.
PATIENCE = 120.0


def _path(folder: str) -> str:
    return os.path.join(folder, "address.json")


@contextlib.contextmanager
def published(folder: str, run: str, root: str, port: int) -> Iterator[None]:
    """Tell the members of a run where its scheduler is, for as long as the block lasts.

    Parameters
    ----------
    folder
        Where the file is; all members share it.
    run
        A name that all members have in common, and no other run has.
    root, port
        Address and port of the scheduler.
    """
    write_text(_path(folder), json.dumps({"root": root, "port": port, "run": run}))
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(_path(folder))


def look_up(folder: str, run: str) -> tuple[str, int]:
    """Wait for the address and port of a run's scheduler; another run's are none.

    Raises
    ------
    GloReError
        If they do not come: the folder is not shared, or member 0 has not started.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            with open(_path(folder), encoding="utf-8") as stream:
                content = json.load(stream)
            if content.get("run") == run:
                return content["root"], content["port"]
        time.sleep(0.1)
    raise GloReError(
        f"{_path(folder)} did not come from this run within {PATIENCE:g} s: the log folder must be "
        "on a file system that all machines share (--log-dir), and member 0 must run"
    )
