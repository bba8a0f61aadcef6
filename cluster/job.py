"""Starts the processes of a job, watches them, and ends them all when one of them fails.

Each process runs under an agent (``cluster/agent.py``) on its machine. What a process prints goes
to its own log file; that of worker 0 to the terminal too.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import IO, Any, Callable, NamedTuple, Optional

from . import agent

LOGGER = logging.getLogger("glore.cluster")
AGENT = os.path.abspath(agent.__file__)
# Seconds between words to an agent, and its patience without one: a dead network is noticed.
WORD_EVERY = 3.0
SILENCE = 18.0
# Seconds that processes have to end by themselves: after the last worker, or after a failure that
# the others may have met as well and want to tell of.
END_PATIENCE = 15.0
FAILURE_PATIENCE = 2.0
# Seconds in which the first of several failures is found: a process that is killed can make others
# fail at once.
SETTLING = 0.5
# Seconds for an agent to report an end that was forced on it.
KILL_PATIENCE = agent.KILL_PATIENCE + 5.0
# Seconds in which the last words of an agent that ended are read.
READ_PATIENCE = 2.0
TAIL = 12
# ssh's own exit code when there is no connection.
SSH_FAILED = 255
SCHEDULER, SERVER, WORKER = "scheduler", "server", "worker"
# What a starter of other processes (mpirun, srun) is called.
STARTER = "starter"


@dataclasses.dataclass(frozen=True)
class Role:
    """One process of a job.

    Attributes
    ----------
    kind
        ``scheduler``, ``server``, ``worker`` or ``starter``.
    index
        Among those of its kind.
    task
        What to run; :class:`Job` says in which folder.
    host
        ssh's name of its machine; None for this one.
    """

    kind: str
    index: int
    task: agent.Task
    host: Optional[str] = None

    @property
    def name(self) -> str:
        """Name for messages and log files."""
        return self.kind if self.kind in (SCHEDULER, STARTER) else f"{self.kind} {self.index}"


class Failure(NamedTuple):
    """Why an attempt failed.

    Attributes
    ----------
    message
        Names the process and says what became of it.
    code
        Exit code for the launcher.
    again
        Whether starting again could help.
    """

    message: str
    code: int
    again: bool = True


class Child:
    """An agent and the process that it runs.

    Parameters
    ----------
    role
    starter
        What runs the agent: an interpreter here, or ssh.
    log
        Where its output goes.
    echo
        Whether the terminal gets it as well.

    Attributes
    ----------
    port, pid, exit, sees, errors
        What the agent said: the scheduler's port, the process and how it ended, whether the role's
        marker is seen there, and what went wrong; None, or empty, until then.
    died_at : float or None
        When the process ended, as far as is known, on the monotonic clock.
    """

    def __init__(self, role: Role, starter: list[str], log: IO[bytes], echo: bool) -> None:
        self.role = role
        self.log = log
        self.echo = echo
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        # What the agent, or ssh, said that was no news: reasons of failures.
        self.said: list[str] = []
        self.port: Optional[int] = None
        self.pid: Optional[int] = None
        self.exit: Optional[int] = None
        self.sees: Optional[bool] = None
        self.died_at: Optional[float] = None
        self.errors: list[str] = []
        self._partial: dict[str, bytes] = {}
        self._spoke = time.monotonic()
        self._ended: Optional[float] = None
        self.open = 2
        self.popen = subprocess.Popen(
            starter,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A session of its own: Ctrl-C is for the launcher, which tells the agents.
            start_new_session=True,
        )

    @property
    def done(self) -> bool:
        """Whether the agent has ended and everything it said has been read."""
        if self.popen.poll() is None:
            return False
        self._ended = self._ended or time.monotonic()
        self.died_at = self.died_at or self._ended
        # If the agent was killed, what it left running may hold the pipes open.
        return not self.open or time.monotonic() - self._ended > READ_PATIENCE

    def send(self, line: bytes) -> None:
        """Say something to the agent; it may have gone."""
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.popen.stdin.write(line + b"\n")
            self.popen.stdin.flush()
            self._spoke = time.monotonic()

    def keep_alive(self) -> None:
        """Tell the agent that the launcher lives, if it is time."""
        if time.monotonic() - self._spoke > WORD_EVERY:
            self.send(b"")

    def begin(self, task: agent.Task) -> None:
        """Tell the agent what to run."""
        self.send(json.dumps(task._asdict()).encode())

    def _lines(self, stream: str, data: bytes) -> list[str]:
        *lines, rest = (self._partial.get(stream, b"") + data).split(b"\n")
        if not data and rest:
            lines, rest = [rest], b""
        self._partial[stream] = rest
        return [line.decode("utf-8", "replace") for line in lines]

    def take_output(self, data: bytes) -> None:
        """Write the process's output to the log, and to the terminal for worker 0."""
        self.log.write(data)
        self.log.flush()
        if self.echo and data:
            # The terminal may have gone: the log is what counts.
            with contextlib.suppress(OSError):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        self.tail.extend(line for line in self._lines("output", data) if line.strip())

    def take_news(self, data: bytes) -> None:
        """Read what the agent reports; other text (of ssh) is kept for messages."""
        for line in self._lines("news", data):
            try:
                news = json.loads(line)
            except ValueError:
                news = None
            if not isinstance(news, dict):
                if line.strip():
                    self.said.append(line.strip())
                continue
            self.port = news.get("port", self.port)
            self.pid = news.get("pid", self.pid)
            self.exit = news.get("exit", self.exit)
            self.sees = news.get("sees", self.sees)
            if self.exit is not None and self.died_at is None:
                self.died_at = time.monotonic()
            if "error" in news:
                self.errors.append(news["error"])
            if "warning" in news:
                LOGGER.warning("%s%s: %s", self.role.name, self.where(), news["warning"])

    def where(self) -> str:
        """Return where it ran, for messages."""
        parts = [f"on {self.role.host}"] if self.role.host else []
        parts += [f"process {self.pid}"] if self.pid else []
        return f" ({', '.join(parts)})" if parts else ""

    @property
    def crashed(self) -> bool:
        """Whether the process, or its agent, went without an exit code of its own."""
        return self.exit is None or self.exit < 0

    def problem(self) -> Optional[str]:
        """Return what went wrong once it is done, or None after an exit with code 0."""
        name = f"{self.role.name}{self.where()}"
        if self.exit == 0 and not self.errors:
            return None
        if self.exit is not None and self.exit < 0:
            number = -self.exit
            return f"{name} was killed by signal {number} ({_signal_name(number)})"
        if self.exit is not None and not self.errors:
            return f"{name} failed with exit code {self.exit}"
        if self.errors:
            return f"{name}: {'; '.join(self.errors)}"
        reason = f": {'; '.join(self.said[-3:])}" if self.said else ""
        code = self.popen.returncode
        if self.role.host and self.pid is None and code == SSH_FAILED:
            return f"the host {self.role.host} cannot be reached for {self.role.name}{reason}"
        if self.role.host and self.pid is None:
            return f"{self.role.name} does not start on {self.role.host}{reason}"
        if self.role.host:
            return f"the connection to {name} was lost{reason}"
        how = f"by signal {-code} ({_signal_name(-code)})" if code < 0 else f"with exit code {code}"
        return f"{name} is gone: its agent ended {how}{reason}"

    def failure(self) -> Failure:
        """Return :class:`Failure` for a problem."""
        message = str(self.problem())
        shown = [line for line in self.tail if line.strip()]
        # Worker 0's last lines are on the terminal already.
        if shown and not self.echo:
            lines = "\n  ".join(shown)
            message += f". The end of its log, {self.log.name}:\n  {lines}"
        else:
            message += f". Its log is {self.log.name}"
        code = self.exit if self.exit is not None and self.exit > 0 else 1
        # Wrong usage stays wrong.
        return Failure(message, code, again=code != 2)

    def close(self) -> None:
        """Let go of the agent's pipes."""
        for stream in filter(None, (self.popen.stdin, self.popen.stdout, self.popen.stderr)):
            with contextlib.suppress(OSError):
                stream.close()
        self.log.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


class Stop:
    """The signals that end the launcher, remembered while in a ``with`` block.

    Attributes
    ----------
    number : int or None
        The first signal.
    count : int
        How many came.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number: Optional[int] = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in self.NUMBERS:
            # nohup ignores SIGHUP, and means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        # mpirun and srun pass SIGUSR1 on and give time; it stands for SIGTERM.
        number = signal.SIGTERM if number == signal.SIGUSR1 else number
        self.number = self.number or number
        self.count += 1


class Job:
    """One attempt at a job: from the start of its processes to the end of the last one.

    Parameters
    ----------
    roles
        The scheduler, if there is one, first: the others are told its port.
    log_dir
        Folder of the log files, which exists; they are appended to.
    agent_command
        Role -> command that runs the agent.
    folder
        Where the processes run.
    stop
        Who may end it.
    grace
        Seconds that workers have to save after a signal.
    watch
        Called about once a second with the worker processes that still run; may return a
        :class:`Failure` to end the job.
    """

    def __init__(
        self,
        roles: list[Role],
        log_dir: str,
        agent_command: Callable[[Role], list[str]],
        folder: str,
        stop: Stop,
        grace: float,
        watch: Optional[Callable[[list[Child]], Optional[Failure]]] = None,
    ) -> None:
        self.roles = roles
        self.log_dir = log_dir
        self.agent_command = agent_command
        self.folder = folder
        self.stop = stop
        self.grace = grace
        self.watch = watch
        self.children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._told = 0
        self._saved_by: Optional[float] = None
        self._early_since: Optional[float] = None

    def run(self) -> Optional[Failure]:
        """Run to the end; return None on success."""
        agent.adopt_orphans()
        try:
            return self._start() or self._supervise()
        finally:
            self._kill_all()
            for child in self.children:
                child.close()
            self._selector.close()

    def _start(self):
        extra = {}
        for role in self.roles:
            child = self._launch(role, extra)
            if role.kind != SCHEDULER:
                continue
            while child.port is None and not child.done and not self.stop.count:
                self._listen(0.2)
            if child.port is None:
                return child.failure() if child.done else self._interrupted()
            extra = {"DMLC_PS_ROOT_PORT": str(child.port)}
        return None

    def _launch(self, role, extra):
        path = os.path.join(self.log_dir, role.name.replace(" ", "-") + ".log")
        log = open(path, "ab")  # noqa: SIM115  (closed with the child)
        echo = role.kind == STARTER or (role.kind, role.index) == (WORKER, 0)
        child = Child(role, self.agent_command(role), log, echo)
        self.children.append(child)
        for stream, take in (
            (child.popen.stdout, child.take_output),
            (child.popen.stderr, child.take_news),
        ):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, (child, take))
        child.begin(
            role.task._replace(
                env={**role.task.env, **extra},
                folder=self.folder,
                silence=SILENCE if role.host else None,
            )
        )
        return child

    def _listen(self, seconds):
        for key, _ in self._selector.select(seconds):
            child, take = key.data
            try:
                data = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            take(data)
            if not data:
                self._selector.unregister(key.fileobj)
                child.open -= 1
        for child in self.children:
            if child.role.host:
                child.keep_alive()

    def _running(self, *kinds):
        return [c for c in self.children if not c.done and (not kinds or c.role.kind in kinds)]

    def _interrupted(self):
        name = _signal_name(self.stop.number)
        return Failure(f"ended by {name}", 128 + self.stop.number, again=False)

    def _pass_signal_on(self):
        """Tell the workers of a signal to the launcher; return whether to wait no longer."""
        if self.stop.count > self._told:
            if self._told:
                LOGGER.warning("Once more: ending the job at once")
                return True
            self._told = self.stop.count
            LOGGER.warning(
                "%s: the workers have %g s to save and end (once more ends them at once)",
                _signal_name(self.stop.number),
                self.grace,
            )
            for child in self._running(WORKER, STARTER):
                # mpirun and srun keep SIGINT and SIGTERM for themselves and end all at once.
                starter = child.role.kind == STARTER
                number = signal.SIGUSR1 if starter else self.stop.number
                number = signal.SIGTERM if number == signal.SIGHUP else number
                child.send(b"signal %d" % number)
            self._saved_by = time.monotonic() + self.grace
        return self._saved_by is not None and time.monotonic() > self._saved_by

    def _supervise(self):
        """Watch the processes until all have ended, or have to be ended."""
        failure, deadline, workers_gone, watched = None, None, None, time.monotonic()
        # With a deadline the failure is looked for again at the end: the first one counts.
        while self._running():
            self._listen(0.2)
            now = time.monotonic()
            if self._pass_signal_on() or (deadline is not None and now > deadline):
                break
            if failure is None and not self.stop.count:
                failure = self._first_failure()
                if failure is not None:
                    crashed = any(c.done and c.crashed for c in self.children)
                    deadline = now + (SETTLING if crashed else FAILURE_PATIENCE)
            if not self._running(WORKER, STARTER):
                workers_gone = workers_gone or now
                if failure or self.stop.count or now - workers_gone > END_PATIENCE:
                    break
            if self.watch is not None and failure is None and now - watched > 1.0:
                watched = now
                failure = self.watch(self._running(WORKER))
                if failure is not None:
                    break
        if self.stop.count:
            return self._interrupted()
        if failure is None or deadline is not None:
            failure = self._first_failure()
        if failure is None and self._running():
            names = ", ".join(child.role.name for child in self._running())
            LOGGER.warning("All workers have ended, but not %s: ending it", names)
        return failure

    def _first_failure(self):
        """Return the :class:`Failure` of a process that should not have ended so, or None."""
        ended = [child for child in self.children if child.done]
        failed = [child for child in ended if child.problem() is not None]
        if failed:
            # Nobody but the launcher, which has not done so yet, kills for another's failure.
            return min(
                failed, key=lambda child: (child.exit != -signal.SIGKILL, child.died_at)
            ).failure()
        early = [child for child in ended if child.role.kind in (SCHEDULER, SERVER)]
        workers = self._running(WORKER)
        if not early or not workers:
            return None
        # At the end of a job a server may be a little faster than the workers.
        self._early_since = self._early_since or time.monotonic()
        if time.monotonic() - self._early_since < END_PATIENCE:
            return None
        name = f"{early[0].role.name}{early[0].where()}"
        return Failure(f"{name} ended before {workers[0].role.name}", 1)

    def _kill_all(self):
        """End what still runs, and see that it has ended."""
        for child in self._running():
            child.send(b"kill")
            with contextlib.suppress(OSError):
                child.popen.stdin.close()
        deadline = time.monotonic() + KILL_PATIENCE
        while self._running() and time.monotonic() < deadline:
            self._listen(0.1)
        for child in self._running():
            LOGGER.error("%s%s did not end", child.role.name, child.where())
            agent.kill(child.popen.pid, group=True)
            child.popen.wait()
        self._kill_orphans()

    def _kill_orphans(self):
        """End what an agent that was itself killed left running."""
        agents = {child.popen.pid for child in self.children}

        def orphaned(fields):
            return fields[1] == os.getpid() or fields[2] in agents

        deadline = time.monotonic() + agent.KILL_PATIENCE
        left = agent.processes(orphaned)
        while left and time.monotonic() < deadline:
            for pid in left:
                agent.kill(pid)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)
            left = agent.processes(orphaned)
        if left:
            LOGGER.error("Processes %s do not end, not even by SIGKILL", left)
