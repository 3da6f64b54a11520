"""A real server in a thread, on the real engine and the fake worker; and a client's tools."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.api.app import create_app
from service.api.server import HttpServer, server_config
from service.api.state import ServiceState
from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import Settings, load_settings
from service.spans import NO_TRACING, Tracing

_T = TypeVar("_T")

FAKE_WORKER = "tests.fake_worker:run"
SIZE = 64
"""Side of the fake model's native square."""


# --- the server -------------------------------------------------------------------


@dataclass
class LiveServer:
    """A server that runs in a thread.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        engine: Its engine; only touched on its loop.
        loop: Its event loop.
        client: An httpx client of it.
        state: What its routes work with, where it runs in this process.
    """

    port: int
    engine: Engine
    loop: asyncio.AbstractEventLoop
    client: httpx.Client
    state: ServiceState | None = None

    def inpaint(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Post the usual picture; `fields` are added, replaced, or left out where None."""
        files, data = form(**fields)
        return self.client.post("/v1/inpaint", files=files, data=data, headers=headers)

    def post_body(self, body: bytes, **headers: str) -> httpx.Response:
        """Post a hand-made multipart body."""
        sent = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **headers}
        return self.client.post("/v1/inpaint", content=body, headers=sent)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=30)

    def metric(self, sample: str) -> float:
        """A sample's value in `/metrics`, 0 while it does not exist."""
        for line in self.client.get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return 0.0

    def raw(self, *pieces: bytes) -> socket.socket:
        """A connection over which bytes were sent as they are."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        for piece in pieces:
            connection.sendall(piece)
        return connection


@contextmanager
def serving(*, wait_ready: bool = True, tracing: Tracing = NO_TRACING, **overrides: Any) -> Iterator[LiveServer]:
    """Serve with these settings until the block ends."""
    settings = load_settings({"model": "fake", "devices": "cpu", "drain_timeout": 5.0, **overrides}, environ={})
    box: dict[str, Any] = {}
    is_up = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_serve(settings, wait_ready, tracing, box, is_up)), daemon=True
    )
    thread.start()
    assert is_up.wait(timeout=30), "the server did not start"
    if "error" in box:
        raise box["error"]
    client = httpx.Client(base_url=f"http://127.0.0.1:{box['port']}", timeout=20, trust_env=False)
    try:
        yield LiveServer(box["port"], box["engine"], box["loop"], client, box["state"])
    finally:
        client.close()
        box["loop"].call_soon_threadsafe(setattr, box["server"], "should_exit", True)
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"


async def _serve(
    settings: Settings, wait_ready: bool, tracing: Tracing, box: dict[str, Any], is_up: threading.Event
) -> None:
    metrics = Metrics()
    engine = Engine(settings, metrics, worker_target=FAKE_WORKER)
    engine.adapters.prepare()
    app = create_app(settings, engine, metrics, tracing)
    config = server_config(app)
    config.timeout_graceful_shutdown = 2
    server = HttpServer(config)
    listener = socket.create_server(("127.0.0.1", 0))
    box |= {
        "port": listener.getsockname()[1],
        "engine": engine,
        "state": app.state.service,
        "loop": asyncio.get_running_loop(),
        "server": server,
    }
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        if wait_ready:
            await asyncio.wait_for(engine.wait_ready(), 30)
        is_up.set()
        await running
    except BaseException as error:
        box["error"] = error
        raise
    finally:
        is_up.set()


# --- pictures and forms --------------------------------------------------------------


def scene(height: int = SIZE, width: int = SIZE, channels: int = 3) -> NDArray[np.uint8]:
    """(H, W, channels) noise."""
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def square_mask(height: int = SIZE, width: int = SIZE) -> NDArray[np.uint8]:
    """(H, W) mask with a white square in the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    return mask


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a file."""
    return np.asarray(Image.open(io.BytesIO(data)))


def form(**changes: Any) -> tuple[dict[str, tuple[str, bytes]], dict[str, Any]]:
    """Files and texts of a request: the usual ones, changed."""
    fields = {"image": png(scene()), "mask": png(square_mask()), "prompt": "a red house", "seed": "7", **changes}
    files = {name: (f"{name}.png", value) for name, value in fields.items() if isinstance(value, bytes)}
    data = {name: value for name, value in fields.items() if value is not None and not isinstance(value, bytes)}
    return files, data


BOUNDARY = "frontier"


def part(name: str | None, content: bytes, filename: str | None = None) -> bytes:
    """One part of a hand-made body."""
    disposition = "form-data"
    if name is not None:
        disposition += f'; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


def usual_parts() -> bytes:
    """The usual request's parts, without the closing boundary."""
    return (
        part("image", png(scene()), "a.png")
        + part("mask", png(square_mask()), "m.png")
        + part("prompt", b"a red house")
    )


CLOSING = f"--{BOUNDARY}--\r\n".encode()


def large_form() -> bytes:
    """A whole form whose answer is some megabytes, more than kernels hold for a client that does not read."""
    pixels = scene(1100, 1100, 4)
    pixels[..., 3] = 255
    pixels[:64, :64, 3] = 0  # Its alpha is the mask.
    return part("image", png(pixels), "a.png") + part("prompt", b"a red house") + CLOSING


def head(*lines: str, path: str = "/v1/inpaint", method: str = "POST") -> bytes:
    """A request's head."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


def multipart_head(*lines: str) -> bytes:
    """The head of a multipart request; the length is the caller's to state."""
    return head("Host: localhost", f"Content-Type: multipart/form-data; boundary={BOUNDARY}", *lines)


# --- answers ---------------------------------------------------------------------------


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of the next answer; the body by its length."""
    data = b""
    while b"\r\n\r\n" not in data:
        received = connection.recv(65536)
        assert received, f"closed after {data!r}"
        data += received
    top, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return int(status_line.split()[1]), headers, body


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that a response is a complete problem document; returns it."""
    assert response.status_code == status, response.text
    return check_problem(dict(response.headers), response.content, status, code)


def check_problem(headers: dict[str, str], body: bytes, status: int, code: str) -> dict[str, Any]:
    """Check a problem document."""
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert set(problem) >= {"type", "title", "status", "detail", "code", "request_id", "errors"}
    assert (problem["status"], problem["code"]) == (status, code), problem
    assert problem["request_id"] == headers["x-request-id"]
    return problem


def eventually(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait for what another process does in its own time."""
    give_up_at = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up_at, "it did not come about"
        time.sleep(0.01)
