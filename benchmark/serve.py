"""Load on a server of one's own: throughput, times, memory, and what happens when it is too much.

``python -m benchmark.serve CHECKPOINT FILE`` starts ``serve.py`` on a free port of this machine,
sends the file ``--requests`` times from ``--clients`` threads, then more at a time than the queue
holds, and writes a Markdown table. Nothing may be lost: every request has an answer, 200 or, in the
second part, 503.
"""

import argparse
import collections
import concurrent.futures
import http.client
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from typing import NamedTuple, Optional

from glore_common import GloReError, run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Seconds until the server must listen, and until an answer must have come.
START, ANSWER = 60.0, 120.0


class Load(NamedTuple):
    """Answers by status, the seconds of those that were 200, and of all of it."""

    statuses: collections.Counter
    seconds: list[float]
    whole: float


def start(checkpoint: str, words: list[str]) -> tuple[subprocess.Popen, int]:
    """Start a server; return it and its port."""
    command = [sys.executable, os.path.join(ROOT, "serve.py"), checkpoint, "--port", "0", *words]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        found = re.search(r"Serving +http://\S+:(\d+)/", line)
        if found:
            # What it says later must not fill the pipe.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(found[1])
    raise GloReError("the server did not start:\n" + "".join(lines))


def post(port: int, content: bytes) -> int:
    """Send a file; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER)
    try:
        connection.request("POST", "/predict", content)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def wait(port: int) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + START
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise GloReError("the server does not answer")
        time.sleep(0.1)


def load(port: int, content: bytes, requests: int, clients: int) -> Load:
    """Send a file many times, by so many clients at once."""
    statuses: collections.Counter = collections.Counter()
    seconds: list[float] = []

    def one(_: int) -> None:
        started = time.perf_counter()
        try:
            status = post(port, content)
        except (OSError, http.client.HTTPException) as error:
            statuses[type(error).__name__] += 1
            return
        statuses[status] += 1
        if status == 200:
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return Load(statuses, seconds, time.perf_counter() - started)


def resident(pid: int) -> float:
    """Return the megabytes that a process and its children have in memory."""
    with open(f"/proc/{pid}/statm") as stream:
        total = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as stream:
            children = stream.read().split()
    except OSError:  # a kernel without this list
        children = []
    return total + sum(resident(int(child)) for child in children)


def row(name: str, found: Load, before: float, after: float) -> str:
    """Return a row of the table."""
    cuts = statistics.quantiles(found.seconds, n=100) if len(found.seconds) > 1 else [0.0] * 99
    answers = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
    times = " | ".join(f"{1000 * cuts[at]:.0f}" for at in (49, 94, 98))
    good = len(found.seconds) / found.whole
    return f"| {name} | {answers} | {good:.1f} | {times} | {before:.0f} | {after:.0f} |"


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command; exit code 1 if an answer was lost or was neither 200 nor 503."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.serve", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--requests", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--queue", type=int, default=8, help="of the server; default: %(default)s")
    parser.add_argument("--backend", default="mxnet", choices=("mxnet", "onnx"))
    options = parser.parse_args(argv)
    with open(options.file, "rb") as stream:
        content = stream.read()
    words = ["--queue", str(options.queue), "--backend", options.backend]
    server, port = start(options.checkpoint, words)
    try:
        wait(port)
        load(port, content, 100, options.clients)  # memory is taken, and kept, by the first ones
        print("| load | answers | files/s | p50, ms | p95 | p99 | MB before | MB after |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        lost = 0
        for name, requests, clients in (
            (f"{options.clients} clients", options.requests, options.clients),
            (f"{6 * options.queue} clients", options.requests // 4, 6 * options.queue),
        ):
            before = resident(server.pid)
            found = load(port, content, requests, clients)
            print(row(name, found, before, resident(server.pid)), flush=True)
            lost += requests - found.statuses[200] - found.statuses[503]
        if post(port, content) != 200:
            lost += 1
    finally:
        server.terminate()
        server.wait(60)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
