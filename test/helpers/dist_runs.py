"""Running launch.py in tests, and looking for what it left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from cluster import agent

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LAUNCH = os.path.join(ROOT, "launch.py")
MARK = "GLORE_TEST_MARK"


def environment_of(pid):
    """Return the environment of a process as the kernel has it; empty when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as stream:
        return stream.read()
    return b""


def marked(mark):
    """Return the processes whose environment has the mark, the launcher's own included."""
    text = f"{MARK}={mark}\0".encode()
    return [pid for pid in agent.processes(lambda fields: True) if text in environment_of(pid)]


def command_of(pid):
    """Return the command line of a process as one text."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as stream:
        return stream.read().replace(b"\0", b" ").decode()
    return ""


def wait_for(condition, seconds, what):
    """Wait until ``condition()`` is true; return what it returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Launched:
    """launch.py at work in a folder; its processes are known by a mark in their environment."""

    def __init__(self, folder, *words, env=None):
        self.folder = folder
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.log_dir = folder / "logs"
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", **(env or {})}
        at = words.index("--")
        own = ["--log-dir", self.log_dir, "--env", MARK, *words[:at]]
        self.process = subprocess.Popen(
            [sys.executable, LAUNCH, *map(str, [*own, *words[at:]])],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def log(self, name):
        path = self.log_dir / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_log(self, name, text, seconds=30):
        return wait_for(lambda: text in self.log(name), seconds, f"{text!r} in {name}.log")

    def signal(self, number):
        os.kill(self.process.pid, number)

    def finish(self, code, seconds=60):
        """Wait for the end; check the exit code, and that no process is left."""
        try:
            self.out, self.err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.out, self.err = self.process.communicate()
            raise AssertionError(f"still running after {seconds} s: {self.err}") from None
        assert self.process.returncode == code, (self.process.returncode, self.err, self.out)
        assert code == 0 or "Traceback" not in self.err
        left = marked(self.mark)
        try:
            assert not left, [command_of(pid) for pid in left]
        finally:
            for pid in left:
                agent.kill(pid, signal.SIGKILL)
        return self
