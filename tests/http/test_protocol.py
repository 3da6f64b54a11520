"""Connections: how they are set up, how long answers wait to be taken, and how many there may be."""

import asyncio
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.api import protocol, server
from service.api.protocol import HttpProtocol
from tests.http.serving import (
    LiveServer,
    check_problem,
    eventually,
    head,
    large_form,
    multipart_head,
    read_answer,
    serving,
)

PROBE = head("Host: localhost", method="GET", path="/healthz")


def test_no_answer_waits_for_an_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm is off, or every small answer on a connection that is kept would take 40 ms more."""
    options: list[int] = []

    class Noting(HttpProtocol):
        """Notes the option once a connection is set up."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            accepted = transport.get_extra_info("socket")
            options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(server, "HttpProtocol", Noting)
    with serving() as live:
        assert live.client.get("/healthz").status_code == 200
    assert options
    assert all(options)


# --- answers that nobody takes ----------------------------------------------------------------


def large_request(*lines: str) -> bytes:
    """A request whose answer is some megabytes."""
    body = large_form()
    return multipart_head(f"Content-Length: {len(body)}", *lines) + body


def slow_client(live: LiveServer, buffer_bytes: int = 4096) -> socket.socket:
    """A connection whose kernel takes little of what the client does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    client.settimeout(20)
    client.connect(("127.0.0.1", live.port))
    return client


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HttpProtocol]]:
    """The connections that are open at the moment."""
    connections: list[HttpProtocol] = []

    class Counting(HttpProtocol):
        """Keeps a list of its kind."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            connections.append(self)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            connections.remove(self)

    with monkeypatch.context() as context:
        context.setattr(server, "HttpProtocol", Counting)
        yield connections


@pytest.mark.parametrize("accept", ["image/png", "application/json", "text/event-stream"])
def test_answer_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch, accept: str) -> None:
    """A client that asks and never reads is cut off, in any shape of answer; neither memory nor descriptor stays."""
    monkeypatch.setattr(protocol, "WRITE_STALL_SECONDS", 0.3)
    with counted(monkeypatch) as connections, serving() as live, slow_client(live) as client:
        client.sendall(large_request(f"Accept: {accept}"))
        eventually(lambda: live.metric("inpaint_images_total") == 1)
        live.client.close()
        eventually(lambda: connections == [])
        received = 0
        try:
            while data := client.recv(2**20):
                received += len(data)
        except ConnectionResetError:
            pass
        assert 0 < received < 4_000_000  # The picture alone has more.


def test_answer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is taken byte by byte has an end, too."""
    monkeypatch.setattr(protocol, "MAX_WRITE_SECONDS", 1.0)
    with serving() as live, slow_client(live) as client:
        client.sendall(large_request())
        client.settimeout(0.02)
        num_received = 0
        live.client.close()
        is_reset = False
        while not is_reset:
            try:
                num_received += len(client.recv(1))
            except TimeoutError:
                continue
            except ConnectionResetError:
                is_reset = True
        assert num_received < 4_000_000


def test_slow_client_gets_all_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes little at a time, but goes on taking, is not cut off, however long it takes in all."""
    stall_seconds, num_pauses = 2.0, 6
    monkeypatch.setattr(protocol, "WRITE_STALL_SECONDS", stall_seconds)
    with serving() as live, slow_client(live, 65536) as client:
        client.sendall(large_request())
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(1000)
        top, _, body = data.partition(b"\r\n\r\n")
        length = int(top.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        num_received = len(body)
        for pause in range(1, num_pauses + 1):
            threading.Event().wait(
                0.25 * stall_seconds
            )  # The client's slowness, one and a half times the limit in all.
            while num_received < pause * length / num_pauses:
                received = client.recv(2**16)
                assert received
                num_received += len(received)
    assert num_received == length


# --- more connections than descriptors -----------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    """A server that may have eight connections."""
    monkeypatch.setattr(protocol, "max_connections", lambda: 8)
    with serving() as live:
        live.client.close()
        yield live


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed it."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        connection.settimeout(20)


def test_idle_connections_make_room(few: LiveServer) -> None:
    """However many connections say nothing, new ones are served; the oldest of the idle ones ends for each."""
    idle = []
    for count in range(1, 30):
        idle.append(few.raw())
        eventually(lambda count=count: sum(map(is_open, idle)) == min(8, count))
        if count > 8:
            assert [is_open(one) for one in idle] == [False] * (count - 8) + [True] * 8
    with few.raw(PROBE) as probe:
        assert read_answer(probe)[0] == 200
    for one in idle:
        one.close()


def test_requests_are_not_ended_for_others(few: LiveServer) -> None:
    """Where all connections have a request under way, a further one is told to come back; those go on."""
    stalled = [few.raw(multipart_head("Content-Length: 100"), b"--frontier\r\n") for _ in range(8)]
    eventually(lambda: few.run(_num_reading(few)) == 8)
    with few.raw(PROBE) as further:
        status, headers, body = read_answer(further)
        check_problem(headers, body, 429, "overloaded")
        assert (status, headers["retry-after"], headers["connection"]) == (429, "1", "close")
        assert further.recv(1) == b""
    with few.raw() as silent:
        assert read_answer(silent)[0] == 429
    assert all(map(is_open, stalled))
    stalled.pop().close()
    eventually(lambda: few.run(_num_reading(few)) == 7)
    with few.raw(PROBE) as probe:
        assert read_answer(probe)[0] == 200
    for one in stalled:
        one.close()


async def _num_reading(_live: LiveServer) -> int:
    """Requests that the application has begun to answer."""
    return sum("run_asgi" in str(task.get_coro()) for task in asyncio.all_tasks())


@pytest.mark.parametrize(
    ("limit", "expected"), [(64, 32), (1024, 992), (32, 1), (8, 1), (resource.RLIM_INFINITY, None)]
)
def test_connections_leave_descriptors(monkeypatch: pytest.MonkeyPatch, limit: int, expected: int | None) -> None:
    """Connections leave the process enough descriptors for its own needs, and there is always one of them."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    found = protocol.max_connections()
    assert found == expected or (expected is None and found > 10**9)
