"""Runs one process of a job on its machine, and sees to it that nothing of it stays behind.

``launch.py`` starts this file once per process, here or through ssh, with nothing but the
standard library, and talks to it through its standard input:

* first one line of JSON, see :class:`Task`;
* then lines: an empty one says that the launcher is alive, ``signal N`` passes a signal on to the
  process, ``kill`` ends it. So does the end of the input: however the launcher dies, the pipe or
  the ssh connection closes.

Standard output is the process's own output (its standard error included); standard error carries
lines of JSON for the launcher: ``{"port": N}``, ``{"sees": bool}``, ``{"pid": N}``, ``{"exit": N}``
(negative: the signal that killed it), ``{"warning": text}`` and ``{"error": text}``.

What the process leaves running is found as well: this process becomes the parent of orphans
(``PR_SET_CHILD_SUBREAPER``), and the process is told by the kernel to die with its parent
(``PR_SET_PDEATHSIG``). Both are Linux's; elsewhere the process group alone is ended.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any, Callable, NamedTuple, Optional

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# Seconds after SIGKILL until what is still there (in the kernel's hands) is reported.
KILL_PATIENCE = 10.0


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of what descendants leave behind when they end."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def say(**content: Any) -> None:
    """Tell the launcher something; it may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, (json.dumps(content) + "\n").encode())


def own_address(peer: str) -> str:
    """Return this machine's address on the way to ``peer``; no packet is sent for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return probe.getsockname()[0]


def free_port(address: str, port: int = 0) -> int:
    """Return a TCP port that nobody has at ``address``: ``port`` if given, else any.

    Raises OSError if it is taken, or the address is not this machine's.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the parameter server binds: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        probe.listen(1)
        return probe.getsockname()[1]


def stat_fields(pid: str) -> Optional[tuple[str, int, int]]:
    """Return (state, parent, session) of a process, or None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            # The name, in brackets, may hold anything.
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[1]), int(fields[3])


def processes(fits: Callable[[tuple[str, int, int]], bool]) -> list[int]:
    """Return the processes whose (state, parent, session) make ``fits`` true, but no zombies."""
    if not os.path.isdir("/proc/self"):
        return []
    found = []
    for entry in os.listdir("/proc"):
        fields = stat_fields(entry) if entry.isdigit() else None
        if fields and fields[0] not in ("Z", "X") and int(entry) != os.getpid() and fits(fields):
            found.append(int(entry))
    return found


def kill(pid: int, number: int = signal.SIGKILL, group: bool = False) -> None:
    """Send a signal; the process may have gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, number)


def visible_gpus(env: dict[str, str], count: Callable[[], int]) -> list[str]:
    """Return the GPUs that CUDA would show a process: names as ``CUDA_VISIBLE_DEVICES`` has them.

    ``count`` returns how many the machine has; it is asked where the variable is not set.
    """
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return [str(number) for number in range(count())]
    names = [name.strip() for name in text.split(",")]
    # CUDA ignores what follows an invalid name, such as -1 or nothing.
    valid = (number for number, name in enumerate(names) if not re.match(r"\d|GPU-|MIG-", name))
    return names[: next(valid, len(names))]


def count_gpus() -> int:
    """Return the number of this machine's Nvidia GPUs."""
    with contextlib.suppress(OSError):
        return sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    return 0


def gpus_of(gpus: list[str], worker: int, workers: int) -> list[str]:
    """Return the GPUs of one of the workers of a machine: equal shares, or else one for several."""
    each = len(gpus) // workers
    return gpus[worker * each : (worker + 1) * each] if each else [gpus[worker % len(gpus)]]


class Task(NamedTuple):
    """What to run: the line of JSON with which the launcher begins.

    Attributes
    ----------
    command
        Program and arguments.
    env
        Environment variables to set besides those here.
    root_port
        For the scheduler: port to use, 0 for any that is free. Others: None.
    workers_here
        Workers of this machine, which share its cores.
    gpu_share
        Which of them this is, if they share its GPUs as well; None: it sees those that there are.
    marker
        A file of the launcher; whether it is seen here, ``sees`` says.
    folder
        Where to run it.
    silence
        Seconds without a word from the launcher after which it is taken for dead; None: never.
    """

    command: list[str]
    env: dict[str, str]
    root_port: Optional[int] = None
    workers_here: int = 1
    gpu_share: Optional[int] = None
    marker: Optional[str] = None
    folder: str = "."
    silence: Optional[float] = None

    def environment(self) -> dict[str, str]:
        """Return the process's environment; raises OSError if there is no port or address."""
        env = {**os.environ, **self.env}
        root = env.get("DMLC_PS_ROOT_URI")
        if self.root_port is not None and root is not None:
            env["DMLC_PS_ROOT_PORT"] = str(free_port(root, self.root_port))
            say(port=int(env["DMLC_PS_ROOT_PORT"]))
        if root is not None and not env.get("DMLC_INTERFACE"):
            # Without it ps-lite listens on the first interface that it finds.
            env.setdefault("DMLC_NODE_HOST", own_address(root))
        if self.workers_here > 1 and hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.workers_here)))
        if self.gpu_share is not None:
            gpus = visible_gpus(env, count_gpus)
            if gpus:
                own = gpus_of(gpus, self.gpu_share, self.workers_here)
                env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
            if 0 < len(gpus) < self.workers_here and not self.gpu_share:
                say(warning=f"{self.workers_here} workers share {len(gpus)} GPUs")
        return env


def _before_exec() -> None:
    os.setpgid(0, 0)
    # The signals' dispositions of this process are not the child's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    parent = os.getppid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def start(task: Task) -> "subprocess.Popen[bytes]":
    """Start the task's process; raises OSError if that fails."""
    os.chdir(task.folder)
    return subprocess.Popen(
        task.command,
        env=task.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        preexec_fn=_before_exec,
    )


def end_all(process: "subprocess.Popen[bytes]") -> list[int]:
    """Kill the process and all that it started; return the ones that do not go."""
    process.poll()
    kill(process.pid, group=True)
    deadline = time.monotonic() + KILL_PATIENCE
    while True:
        process.poll()
        with contextlib.suppress(ChildProcessError):
            # Orphans that became ours.
            while process.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = processes(lambda fields: fields[1] == os.getpid())
        gone = process.returncode is not None and not left
        if gone or time.monotonic() > deadline:
            return left
        for pid in left:
            kill(pid)
        time.sleep(0.01)


def obey(line: bytes, process: "subprocess.Popen[bytes]") -> bool:
    """Do what a line of the launcher says; return whether to end the process."""
    words = line.split()
    if words[:1] == [b"signal"]:
        kill(process.pid, int(words[1]), group=True)
    return words[:1] == [b"kill"]


def watch(process: "subprocess.Popen[bytes]", silence: Optional[float], wake: int) -> None:
    """Wait for the process, obeying the launcher; kill it when the launcher is gone."""
    buffer, heard = b"", time.monotonic()
    while process.poll() is None:
        left = 1.0 if silence is None else min(1.0, max(0.0, heard + silence - time.monotonic()))
        ready = select.select([0, wake], [], [], left)[0]
        if wake in ready:
            os.read(wake, 1024)
        if 0 in ready:
            heard = time.monotonic()
            data = os.read(0, 4096)
            *lines, buffer = (buffer + data).split(b"\n")
            ends = not data
            for line in lines:
                ends = obey(line, process) or ends
            if ends:
                return
        elif silence is not None and time.monotonic() - heard > silence:
            say(error=f"nothing was heard of the launcher for {silence:g} s")
            return


def first_line() -> Optional[bytes]:
    """Read the first line of the launcher, and no more."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            return None
        line += part
    return line


def main() -> int:
    """Run the task that standard input names."""
    # The launcher decides about Ctrl-C and the like.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    line = first_line()
    if line is None:
        return 1
    adopt_orphans()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    task = Task(**json.loads(line))
    if task.marker is not None:
        say(sees=os.path.exists(task.marker))
    try:
        process = start(task)
    except (OSError, subprocess.SubprocessError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES) and task.root_port:
            where = f"{task.env.get('DMLC_PS_ROOT_URI')}:{task.root_port}"
            say(error=f"the scheduler cannot have {where}: {os.strerror(number)}")
        else:
            say(error=f"cannot start {task.command[0]}: {error}")
        return 1
    say(pid=process.pid)
    watch(process, task.silence, wake)
    if process.returncode is not None:
        # At once: of several that fail, the first one is to blame.
        say(exit=process.returncode)
    left = end_all(process)
    if left:
        say(error=f"processes {left} do not end, not even by SIGKILL")
    say(exit=process.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
