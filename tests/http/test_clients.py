"""Clients told apart by their keys: what they may read, how they share the service, what the log calls them."""

import asyncio
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.app import create_app
from service.api.keys import hash_of
from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import load_settings
from tests.http.serving import (
    CLOSING,
    LiveServer,
    assert_problem,
    eventually,
    multipart_head,
    part,
    png,
    read_answer,
    scene,
    serving,
    usual_parts,
)

GREEDY, MODEST, URGENT, NAMELESS, ADMIN = "key-greedy", "key-modest", "key-urgent", "key-nameless", "key-admin"


def bearer(key: str | None) -> dict[str, str]:
    """The header of a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


# --- what each may read -------------------------------------------------------------


def status(path: str, headers: dict[str, str], **settings: Any) -> int:
    """What an application with these settings answers; its engine never starts."""
    loaded, metrics = load_settings(settings, environ={}), Metrics()
    app = create_app(loaded, Engine(loaded, metrics), metrics)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://paint.example:8000"
        ) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask()).status_code


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        # Nobody's key, a client's, an administrator's.
        (None, (401, 200, 200)),
        ("open", (200, 200, 200)),
        ("clients", (401, 200, 200)),
        ("admins", (401, 403, 200)),
        ("off", (401, 404, 404)),
    ],
)
@pytest.mark.parametrize(
    ("setting", "path"),
    [("docs_access", "/docs"), ("docs_access", "/openapi.json"), ("metrics_access", "/metrics")],
)
def test_documentation_and_metrics_are_for_whom_the_operator_says(
    setting: str, path: str, access: str | None, expected: tuple[int, ...]
) -> None:
    """By default what holds for all routes; or open, for administrators, or not there at all. Probes stay open."""
    settings = {"api_keys": MODEST, "admin_keys": ADMIN, **({} if access is None else {setting: access})}
    answers = tuple(status(path, bearer(key), **settings) for key in (None, MODEST, ADMIN))
    assert answers == expected
    assert status("/healthz", {}, **settings) == 200
    assert status("/readyz", {}, **settings) == 503


def test_without_keys_everything_is_open_but_what_is_for_administrators() -> None:
    """Where clients need no key, documentation and metrics need none, unless they are put behind an administrator's."""
    for path in ("/docs", "/openapi.json", "/metrics"):
        assert status(path, {}) == 200
        closed = {"docs_access": "admins", "metrics_access": "admins"}
        assert status(path, {}, **closed) == 403
        assert status(path, {}, **closed, admin_keys=ADMIN) == 401
        assert status(path, bearer(ADMIN), **closed, admin_keys=ADMIN) == 200
        assert status(path, {}, docs_access="off", metrics_access="off") == 404


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("paint.example", True),
        ("Paint.Example:8000", True),
        ("paint.example.", True),
        ("10.0.0.7:8000", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("paint.example.evil.example", False),
        ("sub.paint.example", False),
        ("localhost", False),
        ("[broken", False),
        ("", False),
    ],
)
def test_only_allowed_host_names(host: str, is_allowed: bool) -> None:
    """With `allowed_hosts`, a page that had its name pointed at us gets nothing; probes ask by any name."""
    allowed = "paint.example,10.0.0.7,[::1]"
    assert status("/docs", {"Host": host}, allowed_hosts=allowed) == (200 if is_allowed else 400)
    assert status("/healthz", {"Host": host}, allowed_hosts=allowed) == 200
    assert status("/docs", {"Host": host}) == 200


# --- how they share ------------------------------------------------------------------


def send(server: LiveServer, key: str, prompt: bytes, *lines: str) -> socket.socket:
    """A connection over which a client has sent a request."""
    body = usual_parts().replace(b"a red house", prompt) + CLOSING
    return server.raw(multipart_head(f"Content-Length: {len(body)}", f"Authorization: Bearer {key}", *lines), body)


def queued_position(connection: socket.socket) -> int:
    """The place that the first event of a stream shows."""
    data = b""
    while (shown := re.search(rb'"position": (\d+)', data)) is None:
        received = connection.recv(65536)
        assert received, f"closed after {data!r}"
        data += received
    return int(shown[1])


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[LiveServer, Path]]:
    """A server with one place in its batch, two in its queue, and several clients."""
    gate = tmp_path / "gate"
    keys = f"greedy={GREEDY},modest={hash_of(MODEST)},urgent:priority={URGENT}"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=2, api_keys=keys, metrics_access="open") as server:
        yield server, gate


def fill(server: LiveServer) -> list[socket.socket]:
    """Two requests of the greedy client in the worker, and two that fill the queue."""
    held = []
    for count in range(1, 5):
        held.append(send(server, GREEDY, b"hold"))
        eventually(
            lambda count=count: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == count
        )
    return held


def test_one_client_cannot_keep_others_out(shared: tuple[LiveServer, Path]) -> None:
    """A queue that one client has filled refuses that client, admits another, and starts the other's first."""
    server, gate = shared
    held = fill(server)

    refused = server.inpaint(bearer(GREEDY))
    assert_problem(refused, 429, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    stream = send(server, MODEST, b"hold", "Accept: text/event-stream")
    assert queued_position(stream) == 0
    assert_problem(server.inpaint(bearer(MODEST)), 429, "overloaded")
    urgent = send(server, URGENT, b"hold", "Accept: text/event-stream")
    assert queued_position(urgent) == 0

    gate.touch()
    assert [read_answer(connection)[0] for connection in held] == [200] * 4
    for connection in (stream, urgent, *held):
        connection.close()


def test_one_client_cannot_take_all_uploads() -> None:
    """Uploads that are held open keep only their own client from uploading more."""
    with serving(api_keys=f"{GREEDY},{MODEST}", queue_size=1, metrics_access="open") as server:
        opening = multipart_head("Content-Length: 100000", f"Authorization: Bearer {GREEDY}")
        with server.raw(opening, part("prompt", b"a")):
            eventually(lambda: server.inpaint(bearer(GREEDY)).status_code == 429)
            assert server.inpaint(bearer(MODEST)).status_code == 200


# --- what the log calls them ------------------------------------------------------------


def test_log_names_clients_and_never_their_keys(caplog: pytest.LogCaptureFixture) -> None:
    """A request's line has the name that the operator gave its key, where there is one; no key is ever logged."""
    keys = f"shop={NAMELESS}-1,urgent:priority={hash_of(URGENT)},{NAMELESS}"
    # A line is written once the client has its answer: all of them are there when the server has ended.
    with caplog.at_level(logging.DEBUG), serving(api_keys=keys, admin_keys=f"root={ADMIN}") as server:
        for key in (f"{NAMELESS}-1", URGENT, NAMELESS, ADMIN, "wrong-key"):
            server.inpaint({"X-API-Key": key}, image=png(scene()))

    lines = [record.fields for record in caplog.records if record.name == "service.api.access_log"]
    lines = [line for line in lines if line["route"] == "/v1/inpaint"]
    assert [line["status"] for line in lines] == [200, 200, 200, 200, 401]
    assert [line.get("client") for line in lines] == ["shop", "urgent", None, "root", None]
    everything = " ".join(record.getMessage() + repr(record.__dict__) for record in caplog.records)
    assert not [word for word in ("key-", "wrong-key", "sha256:") if word in everything]
