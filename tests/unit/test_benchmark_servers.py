"""The peers' form, queue and processes, without a model behind them."""

import asyncio
import io
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from starlette.datastructures import FormData, UploadFile

from benchmarks import servers
from benchmarks.peers import wire
from benchmarks.peers.front import Inbox, create_app
from benchmarks.peers.wire import FormError, PeerRequest
from benchmarks.servers import Server, ServerFailedError, Where, wait_for_all_workers
from service.request import Pixels
from tests.unit.benchmark_server import Reply, Request, serving

SIZE = 16
FIELDS = {
    "prompt": "a red house",
    "num_inference_steps": "7",
    "guidance_scale": "4.0",
    "scheduler": "euler",
    "seed": "3",
    "height": str(SIZE),
    "width": str(SIZE),
}


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
MASK = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def form(image: bytes | str, **changes: str) -> FormData:
    """A form as the HTTP server parses it; empty texts are left out."""
    texts = {name: text for name, text in (FIELDS | changes).items() if text}
    picture = image if isinstance(image, str) else UploadFile(io.BytesIO(image))
    return FormData({**texts, "image": picture, "mask": UploadFile(io.BytesIO(png(MASK)))})


# --- form and answer -----------------------------------------------------------------


def test_a_form_is_read_whole() -> None:
    """Every field and both pictures arrive as they were sent; what may be left out has stock's default."""
    request = wire.read_form(form(png(IMAGE), strength="0.5"))
    assert (request.image == IMAGE).all()
    assert (request.mask == MASK).all()
    assert (request.prompt, request.num_inference_steps, request.guidance_scale) == ("a red house", 7, 4.0)
    assert (request.scheduler, request.seed, request.height, request.width) == ("euler", 3, SIZE, SIZE)
    assert (request.strength, request.negative_prompt) == (0.5, "")
    assert wire.read_form(form(png(IMAGE))).strength == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loras": "pixel-art"}, "unknown fields: .'loras'"),
        ({"seed": ""}, "missing fields: .'seed'"),
        ({"num_inference_steps": "many"}, "many"),
        ({"height": "32"}, "do not resize"),
    ],
)
def test_what_a_peer_does_not_do_is_refused(changes: dict[str, str], message: str) -> None:
    """A peer never answers a form that asks for other work than it does: that answer would come too cheaply."""
    with pytest.raises(FormError, match=message):
        wire.read_form(form(png(IMAGE), **changes))


@pytest.mark.parametrize("image", [b"GIF89a", "a text"])
def test_pictures_have_to_decode(image: bytes | str) -> None:
    """A file that is no picture, and a text in its place, are faults of the form."""
    with pytest.raises(FormError):
        wire.read_form(form(image))


def test_answers_keep_every_pixel() -> None:
    """The PNG decodes to what the model painted."""
    with Image.open(io.BytesIO(wire.encode(IMAGE))) as picture:
        assert picture.format == "PNG"
        assert (np.asarray(picture) == IMAGE).all()


# --- queue and HTTP ------------------------------------------------------------------


def post(inbox: Inbox, fields: dict[str, str]) -> httpx.Response:
    """One request to a peer's app."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(inbox))
        async with httpx.AsyncClient(transport=transport, base_url="http://peer") as client:
            return await client.post(wire.PATH, data=fields, files={"image": png(IMAGE), "mask": png(MASK)})

    return asyncio.run(send())


def test_a_request_goes_to_the_model_and_comes_back_as_png() -> None:
    """The thread that takes a request from the inbox gives its picture; the client gets that."""
    inbox = Inbox()

    def paint() -> None:
        (waiting,) = inbox.take()
        waiting.picture.set_result(255 - waiting.request.image)

    threading.Thread(target=paint, daemon=True).start()
    response = post(inbox, FIELDS)
    assert response.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as picture:
        assert (np.asarray(picture) == 255 - IMAGE).all()


def test_a_bad_form_is_answered_without_the_model() -> None:
    """A client's fault costs no model's time, and says what it is."""
    response = post(Inbox(), FIELDS | {"eta": "0.5"})
    assert response.status_code == 422
    assert "eta" in response.text


def test_a_batch_is_closed_when_it_is_full_or_its_window_is_over() -> None:
    """Batches take what waits, oldest first, up to their size; a window that is over is not waited for again."""

    async def run() -> list[list[int]]:
        inbox = Inbox()
        asking = [asyncio.ensure_future(inbox.ask(request_of(seed))) for seed in range(5)]
        await asyncio.sleep(0)  # Lets them all queue up.
        batches = [inbox.take(3, window_seconds=30.0), inbox.take(3, window_seconds=0.0)]
        for waiting in [one for batch in batches for one in batch]:
            waiting.picture.set_result(IMAGE)
        await asyncio.gather(*asking)
        return [[waiting.request.seed for waiting in batch] for batch in batches]

    assert asyncio.run(run()) == [[0, 1, 2], [3, 4]]


def request_of(seed: int) -> PeerRequest:
    return wire.read_form(form(png(IMAGE), seed=str(seed)))


# --- processes -----------------------------------------------------------------------

FAKE_PEER = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_nothing_is_left_of_a_server(tmp_path: Path) -> None:
    """A server is ready when it says so, and in the end its children are gone with it."""
    (tmp_path / "fake_peer.py").write_text(FAKE_PEER, encoding="utf-8")
    port = servers.free_port()
    with servers._running("fake", ["fake_peer", str(port)], port, {"PYTHONPATH": str(tmp_path)}) as server:
        assert server.base_url == f"http://127.0.0.1:{port}"
        assert server.url == f"{server.base_url}/v1/inpaint"
        child = psutil.Process(int(httpx.get(server.base_url, trust_env=False).text))
        assert child.ppid() == server.pid
    assert not psutil.pid_exists(server.pid)
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The error ends with what the process printed last."""
    (tmp_path / "broken_peer.py").write_text("raise SystemExit('no such device')", encoding="utf-8")
    with (
        pytest.raises(ServerFailedError, match="fake did not start:\nno such device"),
        servers._running("fake", ["broken_peer"], servers.free_port(), {"PYTHONPATH": str(tmp_path)}),
    ):
        pass


def test_without_litserve_its_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is an error of that peer alone, and names the extra that has it."""
    monkeypatch.setitem(sys.modules, "litserve", None)
    with pytest.raises(ServerFailedError, match="extra: bench"):
        servers.litserve_stock("model", Where("cpu", None, 1), max_batch=4)


def test_servers_that_start_at_once_get_different_ports() -> None:
    """No port is given out twice, though nobody listens on it yet."""
    with ThreadPoolExecutor(8) as threads:
        ports = list(threads.map(lambda _: servers.free_port(), range(64)))
    assert len(set(ports)) == len(ports)


def test_peers_wait_for_their_threads_as_the_service_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU every peer gets the service's own spin count from its start, on a GPU none; what is asked for wins."""
    started: list[Mapping[str, str]] = []
    monkeypatch.setattr(servers, "_running", lambda _name, _module, _port, changes: started.append(changes))
    cpu = Where("cpu", None, 1)
    servers.stock_lock("model", cpu)
    servers.static_batching("model", cpu, {"INPAINT_MAX_IMAGES": "4"})
    servers.stock_lock("model", cpu, environment={"GOMP_SPINCOUNT": "7"})
    servers.stock_lock("model", Where("cuda:0", None, 1))
    assert [changes.get("GOMP_SPINCOUNT") for changes in started] == ["1000", "1000", "7", None]
    assert started[1]["INPAINT_MAX_IMAGES"] == "4"


def readiness(*states: str) -> Reply:
    return 200, json.dumps({"workers": [{"state": state} for state in states]}).encode()


def server_of(url: str) -> Server:
    return Server("this service", f"{url}{wire.PATH}", 1.0, 1)


def test_all_workers_are_waited_for() -> None:
    """The service calls itself ready with its first one."""
    replies: Iterator[Reply] = iter([readiness("ready", "loading: starting"), readiness("ready", "ready")])
    with serving(lambda _: next(replies)) as url:
        wait_for_all_workers(server_of(url), time.monotonic() + 60)
    assert next(replies, None) is None


def test_waiting_for_workers_has_an_end() -> None:
    """And says what they were doing."""

    def never(_: Request) -> Reply:
        return readiness("ready", "restarting")

    with serving(never) as url, pytest.raises(ServerFailedError, match="ready, restarting"):
        wait_for_all_workers(server_of(url), time.monotonic() + 0.5)
