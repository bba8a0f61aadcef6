"""A small checkpoint with all its facts, and a server of it in a thread of the test."""

import contextlib
import http.client
import json
import socket
import threading
import time

from golden_weights import seeded

from checkpoint.params import param_shapes
from checkpoint.safetensors_file import write_safetensors
from checkpoint.torch_names import to_torch_name
from glore_options import parse
from jobs import serve
from jobs.model import FACTS, ModelFacts
from network.builder import get_symbol, logits

CLASSES = ("up", "down", "left", "right", "nearer", "farther", "clockwise", "counterclockwise")


def write_checkpoint(path, network="TINY_GLORE", classes=CLASSES, interval=2, size=None):
    """Write a network of seeded weights as .safetensors; return its path."""
    symbol, conf = get_symbol(network, len(classes), **({"crop_size": size} if size else {}))
    args, auxs = param_shapes(logits(symbol), {"data": (1, *conf.data_shape)})
    video = len(conf.data_shape) == 4
    # Scores are then spread: neither equal nor 0 and 1.
    gain = {"classifier_weight": 20 if video else 0.3}
    arrays = {to_torch_name(n): seeded(n, s) * gain.get(n, 1) for n, s in {**args, **auxs}.items()}
    facts = ModelFacts(
        "video" if video else "image", network, {}, len(classes), list(classes),
        conf.data_shape, conf.mean, conf.std, None, interval if video else None,
    )  # fmt: skip
    arrays = {name: value.astype("float32") for name, value in arrays.items()}
    write_safetensors(str(path), arrays, {FACTS: json.dumps(facts.as_dict())})
    return str(path)


class Served:
    """A server that runs; its port, its folder for uploads, its engine."""

    def __init__(self, port, folder=None, engine=None):
        self.port, self.folder, self.engine = port, folder, engine

    def post(self, content, query="", headers=None, timeout=30):
        """Send a file; return (status, JSON)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", f"/predict?{query}", content, headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path, timeout=10):
        """Return (status, text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def raw(self, *parts, pause=0.0, timeout=20.0, read=True):
        """Send bytes as they are, ``pause`` seconds between the parts; return all that comes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock:
            answer = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in parts:
                    sock.sendall(part)
                    time.sleep(pause)
            while read:
                try:
                    more = sock.recv(1 << 16)
                except (ConnectionResetError, socket.timeout):
                    break
                if not more:
                    break
                answer += more
        return answer


@contextlib.contextmanager
def serving(checkpoint, *words):
    """Serve a checkpoint with the options ``words``; yield a :class:`Served`."""
    options = parse(serve.ServeOptions(), [checkpoint, "--gpus", "", *words], "Tests.")
    engine, names = serve.engine_of(options)
    app = serve.make_app(engine, names, options.server)
    server = serve.make_server(app, options.server)
    sock = serve.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    try:
        yield Served(sock.getsockname()[1], app.state.folder, engine)
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
        assert not thread.is_alive(), "the server did not end"
