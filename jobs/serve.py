"""Serve a checkpoint over HTTP: a file in, its classes out, and a page to try it with.

``POST /predict`` takes a video or an image as the raw body of the request. One thread owns the
network; files are decoded by worker processes. See docs/serving.md.
"""

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import ipaddress
import logging
import os
import queue
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Optional

import numpy as np

from data.common.options import PixelOptions
from data.common.pool import Task, WorkerPool, make_memory
from data.common.worker_main import BAD, DONE, REFUSED
from glore_common import GloReError, UsageError, command
from glore_options import (
    JobOptions,
    Options,
    group,
    number,
    option,
    parse,
    positive_float,
    positive_int,
)
from mxnet_compat import mx
from train.devices import contexts_of
from train.report import log_to

from .evaluate import log_input, read_model
from .media import View, names_of, scorer, view_of
from .options import InferenceOptions, ViewOptions, WeightsOptions
from .predict import best
from .upload_job import Asked, Found, UploadJob, display_name

LOGGER = logging.getLogger("glore.serve")
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serve_page.html")
# What a GloRe unit's projection is called, the maps of its nodes.
PROJECTION = re.compile(r"_extra_conv-proj_conv$")
STRONGEST = 4
# Requests whose times /metrics looks back on.
REMEMBERED = 1000
# Nothing that the page shows comes from elsewhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
    "'self'; img-src 'self' data:; form-action 'none'; frame-ancestors 'none'"
)
ICON = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<circle cx="8" cy="8" r="7" fill="#0072b2"/><circle cx="5" cy="6" r="1.6" fill="#fff"/>
<circle cx="11" cy="6" r="1.6" fill="#fff"/><circle cx="8" cy="11" r="1.6" fill="#fff"/></svg>"""


@dataclasses.dataclass
class ServeNetworkOptions(Options):
    """Where it listens, and what it bears."""

    title = "server"

    host: str = option(
        "127.0.0.1", "address to listen on; others than this machine's own let everyone in"
    )
    port: int = option(8000, "0: any that is free", kind=number(int, 0, 65535))
    class_names: str = option(
        "", "names of the classes, one a line (default: the checkpoint's)", metavar="FILE"
    )
    queue: int = option(
        8, "files that are read or wait; more are answered with 503", kind=positive_int
    )
    max_uploads: int = option(32, "files that are received at a time", kind=positive_int)
    max_mb: float = option(100.0, "largest file in megabytes", kind=positive_float)
    max_seconds: float = option(600.0, "longest video", kind=positive_float)
    max_megapixels: float = option(40.0, "largest frame or image", kind=positive_float)
    max_windows: int = option(8, "windows of a video, evenly spread", kind=positive_int)
    header_timeout: float = option(
        10.0, "seconds for the head of a request, and of silence between two", kind=positive_float
    )
    upload_timeout: float = option(60.0, "seconds for all of a file", kind=positive_float)
    decode_timeout: float = option(30.0, "seconds for reading a received file", kind=positive_float)
    answer_timeout: float = option(
        60.0, "seconds for the answer once a file was received", kind=positive_float
    )
    max_batch: int = option(16, "views that the network computes at a time", kind=positive_int)
    log_file: str = option("", "log file (default: none)")


@dataclasses.dataclass
class ServeOptions(JobOptions):
    """Options of ``serve.py``."""

    network: WeightsOptions = group(WeightsOptions)
    server: ServeNetworkOptions = group(ServeNetworkOptions)
    data: ViewOptions = group(ViewOptions, num_workers=2)
    pixels: PixelOptions = group(PixelOptions)
    devices: InferenceOptions = group(InferenceOptions)


# --- the network ----------------------------------------------------------------------------------


class Refused(GloReError):
    """A file that is not answered; ``status`` is that of the response."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Answer(NamedTuple):
    """What was found in a file, its scores (views + windows, classes), maps, and seconds taken."""

    found: Found
    scores: np.ndarray
    maps: Optional[dict[str, Any]]
    seconds: float


@dataclasses.dataclass
class _Job:
    slot: int
    asked: Asked
    future: "concurrent.futures.Future[Answer]"
    found: Optional[Found] = None


class Engine:
    """A network with the processes that read files for it, and the thread that computes.

    Parameters
    ----------
    view
        The network and how files are shown to it.
    run
        Of :func:`jobs.media.scorer`; called in one thread only, that of the engine, as MXNet's
        engine is not to be used by several.
    contexts
        That the maps are computed on.
    options
    """

    def __init__(
        self, view: View, run: Callable, contexts: list[mx.Context], options: ServeOptions
    ) -> None:
        self.view, self.run, self.contexts = view, run, contexts
        limits, facts = options.server, view.model.facts
        self.max_batch = limits.max_batch
        if facts.task == "image":
            view.dataset.max_pixels = int(1e6 * limits.max_megapixels)
        self.job = UploadJob(
            view.dataset,
            facts.frame_interval if facts.task == "video" else None,
            (facts.mean, facts.std),
            (
                limits.queue,
                limits.max_windows,
                limits.max_seconds,
                int(1e6 * limits.max_megapixels),
            ),
        )
        self._descriptor, memory = make_memory(self.job.memory_size)
        self.pool = WorkerPool(
            self.job,
            max(1, options.data.num_workers or 1),
            self._outcome,
            limits.decode_timeout,
            self._descriptor,
        )
        self.job.attach(memory)
        self._free = list(range(limits.queue))
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[Optional[_Job]] = queue.SimpleQueue()
        self.batches: collections.Counter[int] = collections.Counter()
        self.projection = next(
            (
                name[: -len("_output")]
                for name in reversed(view.model.symbol.get_internals().list_outputs())
                if PROJECTION.search(name[: -len("_output")])
            ),
            None,
        )
        self._block: Any = None
        self._thread = threading.Thread(target=self._work, name="glore-network", daemon=True)

    def start(self) -> None:
        """Start the processes and the thread."""
        self.pool.start()
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """Files that are read or wait."""
        return self.job.slots - len(self._free)

    @property
    def alive(self) -> bool:
        """Whether files can be answered."""
        return self._thread.is_alive()

    def submit(self, path: str, asked: Asked) -> "concurrent.futures.Future[Answer]":
        """Have a file read and computed.

        Raises
        ------
        Refused
            If there are too many already.
        """
        with self._lock:
            if not self._free:
                raise Refused(503, "too many files are waiting; try again in a moment")
            slot = self._free.pop()
        job = _Job(slot, asked, concurrent.futures.Future())
        with self.pool.condition:
            self.pool.submit(Task((slot, path, asked), "an uploaded file", job))
        return job.future

    def _give_back(self, job: _Job) -> None:
        with self._lock:
            self._free.append(job.slot)

    def _fail(self, job: _Job, status: int, reason: str) -> None:
        self._give_back(job)
        if not job.future.cancelled():
            job.future.set_exception(Refused(status, reason))

    def _outcome(self, task: Task, kind: str, value: Any) -> None:
        """Take what a process made of a file (in the pool's thread)."""
        job = task.context
        if kind == DONE:
            job.found = value
            self._ready.put(job)
        elif kind == BAD:
            self._fail(job, 422, f"the file cannot be read: {value}")
        elif kind == REFUSED:
            self._fail(job, 422, str(value))
        else:
            LOGGER.error("a bug met with an uploaded file:\n%s", value)
            self._fail(job, 500, "the server failed at this file")

    def _work(self) -> None:
        """Compute what was read, as much of it at a time as there is."""
        # The first time takes longest: before anyone waits for it.
        self.run(mx.nd.zeros((1, *self.view.model.facts.data_shape)))
        while True:
            jobs = [self._ready.get()]
            rows = 0
            while jobs[-1] is not None:
                rows += self._rows(jobs[-1])
                if rows >= self.max_batch or self._ready.empty():
                    break
                jobs.append(self._ready.get())
            self._compute([job for job in jobs if job is not None])
            if jobs[-1] is None:
                return

    @staticmethod
    def _rows(job: _Job) -> int:
        """Return how many views of the memory a file fills."""
        assert job.found is not None
        return job.found.rows

    def _compute(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if not self._is_unwanted(job)]
        if not jobs:
            return
        started = time.perf_counter()
        counts = [self._rows(job) for job in jobs]
        try:
            data = np.concatenate(
                [self.job.rows_of(job.slot, count) for job, count in zip(jobs, counts)]
            )
            parts = range(0, len(data), self.max_batch)
            scores = np.concatenate(
                [self.run(mx.nd.array(data[at : at + self.max_batch])) for at in parts]
            )
            places = np.cumsum([0, *counts])
            maps = [
                self._maps(data[place]) if job.asked.clip else None
                for job, place in zip(jobs, places)
            ]
        except Exception:
            LOGGER.exception("a batch of %d files failed", len(jobs))
            for job in jobs:
                self._fail(job, 500, "the server failed at this file")
            return
        self.batches[len(jobs)] += 1
        seconds = time.perf_counter() - started
        for job, place, count, found in zip(jobs, places, counts, maps):
            self._give_back(job)
            assert job.found is not None
            if not job.future.cancelled():
                rows = scores[place : place + count]
                job.future.set_result(Answer(job.found, rows, found, seconds))

    def _is_unwanted(self, job: _Job) -> bool:
        if job.future.cancelled():
            self._give_back(job)
            return True
        return False

    def _maps(self, view: np.ndarray) -> Optional[dict[str, Any]]:
        """Return the maps of the strongest nodes of the last GloRe unit for one view."""
        if self.projection is None:
            return None
        if self._block is None:
            self._block = self.view.model.block(self.contexts[:1], self.projection)
        data = mx.nd.array(view[None], ctx=self.contexts[0])
        # (1, N, [T,] h, w) -> (N, T, h, w): signed, not normalised.
        found = self._block(data).asnumpy()[0]
        found = found.reshape(len(found), -1, *found.shape[-2:])
        energy = (found.astype(np.float64) ** 2).sum(axis=(1, 2, 3))
        strongest = np.argsort(-energy, kind="stable")[:STRONGEST]
        return {
            "unit": PROJECTION.sub("", self.projection),
            "nodes": len(found),
            "scale": float(np.abs(found[strongest]).max()),
            "strongest": [
                {
                    "node": int(node),
                    "energy_share": round(float(energy[node] / max(energy.sum(), 1e-30)), 4),
                    "map": np.round(found[node].astype(np.float64), 4).tolist(),
                }
                for node in strongest
            ],
        }

    def close(self) -> None:
        """End thread and processes."""
        self.pool.close()
        self._ready.put(None)
        if self._thread.is_alive():
            self._thread.join(30)
        self.job.detach()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


# --- HTTP -----------------------------------------------------------------------------------------


class Metrics:
    """Counts of what was answered, and how long it took."""

    def __init__(self) -> None:
        self.answers: collections.Counter[int] = collections.Counter()
        self.bytes = 0
        self.seconds: collections.deque[float] = collections.deque(maxlen=REMEMBERED)

    def text(self, engine: Engine, uploads: int) -> str:
        """Return them as Prometheus reads them."""
        lines = ["# TYPE glore_responses_total counter"]
        for status, count in sorted(self.answers.items()):
            lines.append(f'glore_responses_total{{status="{status}"}} {count}')
        lines += ["# TYPE glore_bytes_total counter", f"glore_bytes_total {self.bytes}"]
        lines += ["# TYPE glore_files_in_flight gauge", f"glore_files_in_flight {engine.in_flight}"]
        lines += ["# TYPE glore_uploads gauge", f"glore_uploads {uploads}"]
        lines.append("# TYPE glore_batches_total counter")
        batches = dict(engine.batches)
        lines += [
            f'glore_batches_total{{files="{files}"}} {count}'
            for files, count in sorted(batches.items())
        ]
        lines.append("# TYPE glore_seconds summary")
        if self.seconds:
            for share in (0.5, 0.95, 0.99):
                value = float(np.quantile(list(self.seconds), share))
                lines.append(f'glore_seconds{{quantile="{share}"}} {value:.4f}')
        return "\n".join(lines) + "\n"


async def receive(request: Any, path: str, limits: ServeNetworkOptions) -> int:
    """Write the body of a request to a file; return its size.

    Bytes are counted as they come, whatever the head of the request says; so is the time.

    Raises
    ------
    Refused
        If it is too large (413), too slow (408), or empty (400).
    """
    most = int(1e6 * limits.max_mb)
    too_large = Refused(413, f"the file has more than {limits.max_mb:g} MB")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise too_large
    deadline = time.monotonic() + limits.upload_timeout
    total = 0
    chunks = request.stream().__aiter__()
    with open(path, "wb") as stream:
        while True:
            try:
                chunk = await asyncio.wait_for(chunks.__anext__(), deadline - time.monotonic())
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                raise Refused(
                    408, f"the file did not come within {limits.upload_timeout:g} s"
                ) from None
            total += len(chunk)
            if total > most:
                raise too_large
            stream.write(chunk)
    if not total:
        raise Refused(400, "the request has no body: send the file's bytes")
    return total


def described(answer: Answer, top: int, names: Optional[list[str]], asked: Asked) -> dict[str, Any]:
    """Return an answer as JSON can hold it."""
    found, scores = answer.found, answer.scores
    content: dict[str, Any] = {"kind": "image", "views": found.views}
    if found.length is not None:
        frames, rate = found.length
        content.update(
            kind="video", frames=frames, rate=round(rate, 4), seconds=round(frames / rate, 3)
        )
    content["top"] = best(scores[: found.views].mean(axis=0), top, names)
    if asked.windows and found.length is not None:
        rest = scores[found.views :].reshape(len(found.windows), -1, scores.shape[-1])
        content["windows"] = [
            {
                "start": round(first / found.length.rate, 3),
                "end": round(last / found.length.rate, 3),
                "top": best(row.mean(axis=0), top, names),
            }
            for (first, last), row in zip(found.windows, rest)
        ]
    if asked.strip:
        content["strip"] = [
            {"seconds": round(seconds, 3), "jpeg": base64.b64encode(frame).decode()}
            for seconds, frame in found.strip
        ]
    if asked.clip:
        content["clip"] = [base64.b64encode(frame).decode() for frame in found.clip]
        content["maps"] = answer.maps
    content["compute_seconds"] = round(answer.seconds, 4)
    return content


def make_app(engine: Engine, names: Optional[list[str]], limits: ServeNetworkOptions) -> Any:
    """Return the application (FastAPI).

    Parameters
    ----------
    engine
        Is started and closed with the application.
    names
        Of the classes.
    limits
    """
    from fastapi import FastAPI, Query, Request
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.requests import ClientDisconnect

    metrics, uploads = Metrics(), 0
    folder = tempfile.mkdtemp(prefix="glore-serve-")

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.close()
            shutil.rmtree(folder, ignore_errors=True)

    app = FastAPI(title="GloRe", lifespan=lifespan, openapi_url=None)
    app.state.folder, app.state.metrics = folder, metrics
    with open(PAGE, encoding="utf-8") as stream:
        page = stream.read()

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> Any:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/favicon.ico")
    async def icon() -> Any:
        return Response(ICON, media_type="image/svg+xml")

    @app.get("/health")
    async def health() -> Any:
        fine = engine.alive
        status = {"status": "ok" if fine else "failed", "in_flight": engine.in_flight}
        return JSONResponse(status, 200 if fine else 500)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Any:
        return PlainTextResponse(metrics.text(engine, uploads))

    @app.get("/model")
    async def model() -> Any:
        return {**engine.view.model.facts.as_dict(), "class_names": names}

    async def answer(request: Any, asked: Asked, top: int) -> dict[str, Any]:
        nonlocal uploads
        origin, host = request.headers.get("origin"), request.headers.get("host")
        if origin and origin.split("://")[-1] != host:
            raise Refused(403, "the request comes from the page of another site")
        if uploads >= limits.max_uploads or engine.in_flight >= limits.queue:
            raise Refused(503, "too many files are waiting; try again in a moment")
        descriptor, path = tempfile.mkstemp(dir=folder)
        os.close(descriptor)
        future = None
        try:
            uploads += 1
            try:
                metrics.bytes += await receive(request, path, limits)
            finally:
                uploads -= 1
            future = engine.submit(path, asked)
            try:
                found = await asyncio.wait_for(asyncio.wrap_future(future), limits.answer_timeout)
            except asyncio.TimeoutError:
                raise Refused(504, f"no answer within {limits.answer_timeout:g} s") from None
            return described(found, top, names, asked)
        finally:
            if future is not None:
                future.cancel()
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    @app.post("/predict")
    async def predict(
        request: Request,
        top: int = Query(5, ge=1, le=1000),
        windows: bool = False,
        strip: bool = False,
        maps: bool = False,
        name: str = "",
    ) -> Any:
        started = time.perf_counter()
        headers = {}
        try:
            content = await answer(request, Asked(windows, strip, maps), top)
            content["file"] = display_name(name)
            status = 200
        except Refused as error:
            content, status = {"error": str(error)}, error.status
            # What of the body has not come yet is not waited for.
            headers["Connection"] = "close"
            if status == 503:
                headers["Retry-After"] = "1"
        except ClientDisconnect:
            # Nobody reads this; the number is nginx's for it.
            content, status = {"error": "the client has gone"}, 499
        except Exception:
            LOGGER.exception("a request failed")
            content, status = {"error": "the server failed"}, 500
        metrics.answers[status] += 1
        metrics.seconds.append(time.perf_counter() - started)
        return JSONResponse(content, status, headers)

    return app


def protocol_with_deadline(seconds: float) -> Any:
    """Return uvicorn's protocol with a limit on the time for the head of a request.

    uvicorn has none: a client that sends a byte now and then holds a connection for ever
    (https://github.com/encode/uvicorn/issues/157).
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.deadline: Any = None
            self._wait()

        def _wait(self) -> None:
            if self.deadline is None:
                self.deadline = self.loop.call_later(seconds, self._expire)

        def _expire(self) -> None:
            self.deadline = None
            if not self._is_busy() and not self.transport.is_closing():
                self.transport.close()

        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._is_busy() and self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def connection_lost(self, exc: Optional[Exception]) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None
            super().connection_lost(exc)

    return Protocol


def make_server(app: Any, limits: ServeNetworkOptions) -> Any:
    """Return uvicorn's server of an application; ``run(sockets=[…])`` serves."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http=protocol_with_deadline(limits.header_timeout),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(limits.header_timeout) or 1,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises
    ------
    UsageError
        If the address is not to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    sock.listen(128)
    return sock


def is_own(host: str) -> bool:
    """Tell whether an address is one that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def engine_of(options: ServeOptions) -> tuple[Engine, Optional[list[str]]]:
    """Return the engine that the options ask for, not started, and the names of the classes."""
    if options.network.weights is None:
        raise UsageError(f"name a checkpoint: {command('serve')} CHECKPOINT")
    if options.data.crops == "full":
        raise UsageError("--crops full is not served: files then have all sizes")
    model = read_model(options)
    names = names_of(model.facts, options.server.class_names)
    view = view_of(model, options.data)
    contexts = contexts_of(options.devices)
    run = scorer(view.model, contexts, options.devices.engine(model.facts.task))
    log_input(view.model, f"uploaded {model.facts.task}s")
    return Engine(view, run, contexts, options), names


def main(argv: Optional[list[str]] = None) -> None:
    """Serve until interrupted."""
    options = parse(ServeOptions(), argv, (__doc__ or "").split("\n\n")[0])
    limits = options.server
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise GloReError(
            f"serving needs FastAPI and uvicorn ({error}): pip install 'glore-mxnet[serve]', or "
            "the lines of requirements.txt under `serve`"
        ) from error
    with log_to(limits.log_file or None):
        engine, names = engine_of(options)
        sock = listen(limits.host, limits.port)
        host, port = sock.getsockname()[:2]
        if not is_own(host):
            LOGGER.warning(
                "listening on %s: whoever reaches this machine can send files. There is neither a "
                "password nor encryption; put a proxy that has both before it.",
                host,
            )
        shown = f"[{host}]" if ":" in host else host
        LOGGER.info("Serving    http://%s:%d/ (Ctrl-C ends it)", shown, port)
        make_server(make_app(engine, names, limits), limits).run(sockets=[sock])
