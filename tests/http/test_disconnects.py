"""Clients that go away at every stage, and what is left of them: nothing."""

import asyncio
import gc
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service.api import painting
from tests.http.async_clients import begin, ended
from tests.http.serving import (
    CLOSING,
    LiveServer,
    eventually,
    head,
    large_form,
    multipart_head,
    serving,
    usual_parts,
)

NUM_CLIENTS = 12

Stage = Callable[[LiveServer, Path, pytest.MonkeyPatch], None]


def census(server: LiveServer) -> tuple[int, int, list[str], int]:
    """Descriptors, tasks and threads of the service, and children; of itself it counts nothing."""
    gc.collect()
    tasks = server.run(_num_tasks())
    threads = sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("pictures"))
    return psutil.Process().num_fds(), tasks, threads, len(psutil.Process().children())


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


def hang_up(connection: socket.socket, *, is_reset: bool) -> None:
    """Close in order, or as a machine that has crashed and come up again does."""
    if is_reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def post(server: LiveServer, prompt: bytes, *lines: str) -> socket.socket:
    """A connection over which a whole request was sent."""
    body = usual_parts().replace(b"a red house", prompt) + CLOSING
    return server.raw(multipart_head(f"Content-Length: {len(body)}", *lines), body)


def in_worker(server: LiveServer) -> float:
    return server.metric("inpaint_in_flight")


def gone(server: LiveServer) -> float:
    """Requests whose clients went away before they had an answer."""
    return server.metric('inpaint_requests_total{code="499",endpoint="/v1/inpaint"}')


# --- the stages -----------------------------------------------------------------------------


def before_the_head(server: LiveServer, _gate: Path, _patch: pytest.MonkeyPatch) -> None:
    for index in range(NUM_CLIENTS):
        hang_up(server.raw(b"POST /v1/inpaint HTTP/1.1\r\nHost: lo"[: 10 * (index % 4)]), is_reset=index % 2 == 0)


def in_the_upload(server: LiveServer, _gate: Path, _patch: pytest.MonkeyPatch) -> None:
    for index in range(NUM_CLIENTS):
        connection = server.raw(multipart_head("Content-Length: 100000"), usual_parts()[: 100 * index])
        hang_up(connection, is_reset=index % 2 == 0)
    eventually(lambda: gone(server) == NUM_CLIENTS)


def in_the_queue(server: LiveServer, gate: Path, _patch: pytest.MonkeyPatch) -> None:
    """Two of them are in the worker, which takes one at a time, and hold the others up."""
    connections = []
    for count in range(1, NUM_CLIENTS + 1):
        connections.append(post(server, b"hold"))
        eventually(lambda count=count: in_worker(server) + server.metric("inpaint_queue_depth") == count)
    for index, connection in enumerate(connections[2:]):
        hang_up(connection, is_reset=index % 2 == 0)
    eventually(lambda: server.metric("inpaint_queue_depth") == 0)
    assert in_worker(server) == 2
    gate.touch()
    for connection in connections[:2]:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.close()
    # Those that never started were in no step.
    assert server.metric("inpaint_images_total") == 2


def in_the_denoising(server: LiveServer, _gate: Path, _patch: pytest.MonkeyPatch) -> None:
    """Out of the batch at the next step, in every shape of answer."""
    accepts = ("image/png", "application/json", "text/event-stream")
    for index in range(NUM_CLIENTS):
        connection = post(server, b"hold", f"Accept: {accepts[index % 3]}")
        eventually(lambda: in_worker(server) == 1)
        hang_up(connection, is_reset=index % 2 == 0)
        eventually(lambda: in_worker(server) == 0)
    assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == NUM_CLIENTS
    assert server.metric("inpaint_images_total") == 0


def in_the_rendering(server: LiveServer, _gate: Path, patch: pytest.MonkeyPatch) -> None:
    """The picture is painted, and being encoded in a thread."""
    num_rendering, may_go_on = threading.Semaphore(0), threading.Event()
    render = painting.render

    def held(*arguments: object) -> object:
        num_rendering.release()
        assert may_go_on.wait(20)
        return render(*arguments)  # type: ignore[arg-type]

    with patch.context() as context:
        context.setattr(painting, "render", held)
        connections = [post(server, b"a", f"Accept: {kind}") for kind in ("image/png", "text/event-stream")]
        for _ in connections:
            assert num_rendering.acquire(timeout=20)
        for index, connection in enumerate(connections):
            hang_up(connection, is_reset=index % 2 == 0)
        may_go_on.set()


def in_the_answer(server: LiveServer, _gate: Path, _patch: pytest.MonkeyPatch) -> None:
    """Most of an answer of megabytes is still to be sent."""
    body = large_form()
    for index in range(4):
        connection = server.raw(multipart_head(f"Content-Length: {len(body)}"), body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        hang_up(connection, is_reset=index % 2 == 0)


def beside_an_asynchronous_request(server: LiveServer, gate: Path, _patch: pytest.MonkeyPatch) -> None:
    """Readers of its events, and clients that wait for its end; it is painted all the same, and forgotten."""
    url = begin(server, prompt="hold")
    eventually(lambda: in_worker(server) == 1)
    connections = []
    for index in range(NUM_CLIENTS):
        path = f"{url}/events" if index % 3 else f"{url}?wait=60"
        connections.append(server.raw(head("Host: localhost", method="GET", path=path)))
        if index % 3:
            assert connections[-1].recv(15) == b"HTTP/1.1 200 OK"
    for index, connection in enumerate(connections):
        hang_up(connection, is_reset=index % 2 == 0)
    gate.touch()
    assert ended(server, url)["status"] == "completed"
    assert server.client.delete(url).status_code == 204


@pytest.mark.parametrize(
    "stage",
    [
        before_the_head,
        in_the_upload,
        in_the_queue,
        in_the_denoising,
        in_the_rendering,
        in_the_answer,
        beside_an_asynchronous_request,
    ],
    ids=lambda stage: stage.__name__,
)
def test_nothing_is_left_of_clients_that_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    """At whatever stage they hang up: descriptors, tasks and threads are what they were, and nothing was a fault."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=NUM_CLIENTS) as server:
        assert server.inpaint().status_code == 200  # Whatever is made at a first request is made by then.
        with baseline(server):
            painted = server.metric("inpaint_images_total")
            with _without(server, painted):
                stage(server, gate, monkeypatch)
        assert server.inpaint().status_code == 200
        assert 'code="500"' not in server.client.get("/metrics").text


@contextmanager
def baseline(server: LiveServer) -> Iterator[None]:
    """What the service holds afterwards is what it held before."""
    before = census(server)
    yield
    eventually(lambda: census(server) == before)


@contextmanager
def _without(server: LiveServer, painted: float) -> Iterator[None]:
    """Inside, pictures are counted from here on."""
    metric = server.metric
    server.metric = lambda sample: metric(sample) - (painted if sample == "inpaint_images_total" else 0)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del server.metric


def test_descriptors_are_counted(tmp_path: Path) -> None:
    """The check above sees what is left open: a client that stays is not nothing."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as server:
        assert server.inpaint().status_code == 200
        before = census(server)
        with server.raw():
            eventually(lambda: census(server) != before)
        eventually(lambda: census(server) == before)
        leaked = os.open("/dev/null", os.O_RDONLY)
        assert census(server) != before
        os.close(leaked)
