"""What stands in Ray's proxies, over a real socket, with an application in the proxy's place that misbehaves as one."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.ray_front import Front
from service.api.ray_replica import ANSWERED, ELSEWHERE, MARK
from service.api.server import HttpServer, server_config
from tests.http.serving import assert_problem, eventually, read_answer

BODY = b"picture" * 100_000


@dataclass
class Proxy:
    """In the place of Ray's proxy: each request meets the next behaviour, the last one again and again.

    Attributes:
        behaviours: "answer" echoes the body; "lost" reads it and says nothing, as when the replica died; a number is
            Ray's own plain answer; "begin" and "stream" are lost in the middle of an answer;
            "elsewhere" is a replica's refusal for now.
        seen: Headers of each request that came this far.
    """

    behaviours: list[str | int]
    seen: list[list[tuple[bytes, bytes]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Behave."""
        behaviour = self.behaviours[min(len(self.seen), len(self.behaviours) - 1)]
        self.seen.append(list(scope["headers"]))
        scope["headers"].append((b"x-rays", b"1"))  # As Ray's middleware does with the request's id.
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = dict(await receive())
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
        if behaviour == "lost":
            return
        if isinstance(behaviour, int):
            headers = [(b"content-type", b"text/plain"), (b"retry-after", b"7")]
            await send({"type": "http.response.start", "status": behaviour, "headers": headers})
            await send({"type": "http.response.body", "body": b"Request dropped"})
            return
        kind = b"text/event-stream; charset=utf-8" if behaviour == "stream" else b"image/png"
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        headers = [(b"content-type", kind), *((b"X-Request-ID", value) for value in given * 2)]
        headers.append((MARK, ELSEWHERE if behaviour == "elsewhere" else ANSWERED))
        status = 503 if behaviour == "elsewhere" else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if behaviour in ("begin", "stream"):
            await send({"type": "http.response.body", "body": b"event: queued\ndata: {}\n\n", "more_body": True})
            return
        await send({"type": "http.response.body", "body": body})


@contextmanager
def fronted(*behaviours: str | int, **limits: int) -> Iterator[tuple[httpx.Client, Proxy]]:
    """A client of a proxy."""
    proxy = Proxy(list(behaviours))
    with (
        listening(Front(proxy, **limits)) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client,
    ):
        yield client, proxy


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """Serve an application; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server: Any = HttpServer(server_config(app, has_lifespan=False))
    stop: Callable[[], None] = lambda: setattr(server, "should_exit", True)  # noqa: E731 - shorter than a function
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_lost_replica_s_request_is_run_once_more() -> None:
    """The second replica gets the same head, id and body as the first; the client sees one whole answer."""
    with fronted("lost", "answer") as (client, proxy):
        answer = client.post("/v1/inpaint", content=BODY, headers={"X-Request-Id": "mine"})
        assert (answer.status_code, answer.content) == (200, BODY)
        assert answer.headers.get_list("X-Request-Id") == ["mine"]
        assert MARK.decode() not in answer.headers
        assert len(proxy.seen) == 2
        assert proxy.seen[0] == proxy.seen[1]


def test_a_request_that_loses_two_replicas_is_answered() -> None:
    """A request is not run a third time, since it may be what kills: 503 with a code, in its client's wire format."""
    with fronted("lost") as (client, proxy):
        answer = client.post("/v1/inpaint", content=BODY)
        assert_problem(answer, 503, "worker_lost")
        assert int(answer.headers["Retry-After"]) >= 1
        assert len(proxy.seen) == 2
        assert client.post("/v1/images/edits", content=BODY).json()["error"]["code"] == "worker_lost"


def test_a_replica_that_cannot_take_a_request_is_not_the_last_word() -> None:
    """Where a replica has just lost its worker another one is asked, once; then it is 503 `not_ready`."""
    with fronted("elsewhere", "answer") as (client, proxy):
        assert client.post("/v1/inpaint", content=BODY).content == BODY
        assert len(proxy.seen) == 2
    with fronted("elsewhere") as (client, proxy):
        assert_problem(client.post("/v1/inpaint", content=BODY), 503, "not_ready")
        assert len(proxy.seen) == 2


@pytest.mark.parametrize(
    ("status", "answered", "code", "retry_after"),
    [
        (429, 429, "overloaded", "7"),
        (503, 503, "not_ready", "5"),
        (404, 503, "not_ready", "5"),
        (408, 504, "deadline", None),
    ],
)
def test_ray_s_own_answers_become_the_api_s(status: int, answered: int, code: str, retry_after: str | None) -> None:
    """Ray's plain text is never seen; it is not run again, since no replica was lost."""
    with fronted(status) as (client, proxy):
        answer = client.post("/v1/inpaint", content=BODY)
        assert_problem(answer, answered, code)
        assert answer.headers.get("Retry-After") == retry_after
        assert len(proxy.seen) == 1


def test_ray_s_own_paths_are_ray_s() -> None:
    """Load balancers ask proxies for their health, in Ray's words."""
    with fronted(503) as (client, _):
        assert client.get("/-/healthz").text == "Request dropped"


def test_changes_are_not_run_twice() -> None:
    """Whether a lost replica added the adapter nobody knows, and it is for the client to look."""
    with fronted("lost", "answer") as (client, proxy):
        assert_problem(client.put("/v1/adapters/a", content=BODY), 503, "worker_lost")
        assert len(proxy.seen) == 1


@pytest.mark.parametrize("limits", [{"max_kept_bytes": 1000}, {"max_kept_bytes_in_all": 1000}])
def test_bodies_are_kept_within_bounds(limits: dict[str, int]) -> None:
    """What is too long to keep is passed on, but not run again; room comes back, so that shorter ones still are."""
    with fronted("answer", "lost", "lost", "answer", **limits) as (client, proxy):
        assert client.post("/v1/inpaint", content=BODY).content == BODY
        assert_problem(client.post("/v1/inpaint", content=BODY), 503, "worker_lost")
        assert len(proxy.seen) == 2
        assert client.post("/v1/inpaint", content=b"short").content == b"short"
        assert len(proxy.seen) == 4


def test_a_stream_that_breaks_ends_with_an_event() -> None:
    """An event stream that has begun ends with `failed` and the code, and is complete as HTTP."""
    with fronted("stream") as (client, proxy):
        answer = client.post("/v1/inpaint", content=BODY)
        assert answer.text.startswith("event: queued")
        assert answer.text.rstrip().rpartition("\n\n")[2].startswith("event: failed\n")
        assert '"worker_lost"' in answer.text
        assert len(proxy.seen) == 1


def test_a_picture_that_breaks_is_not_taken_for_a_whole_one() -> None:
    """Half a picture ends the connection, which every client notices."""
    with fronted("begin") as (client, proxy):
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/v1/inpaint", content=BODY)
        assert len(proxy.seen) == 1


def test_clients_have_no_say_in_ray_s_matters() -> None:
    """Headers by which Ray lets clients set time limits, choose replicas or outlive their connection are dropped."""
    names = ("X-Request-Timeout-Seconds", "x_request_disconnect_disabled", "Serve-Multiplexed-Model-Id", "x-session-id")
    with fronted("answer") as (client, proxy):
        client.get("/v1/models", headers={**dict.fromkeys(names, "1"), "X-Other": "1"})
        seen = {name.decode().replace("_", "-") for name, _ in proxy.seen[0]}
        assert "x-other" in seen
        assert not seen & {name.lower().replace("_", "-") for name in names}


def test_a_client_that_left_is_not_worked_for() -> None:
    """Nothing is run again for a client that hung up."""
    with fronted("lost") as (client, proxy):
        address = (client.base_url.host, client.base_url.port or 0)
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /v1/inpaint HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")
            eventually(lambda: len(proxy.seen) == 1)
        with socket.create_connection(address) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
            assert read_answer(connection)[0] == 503
        assert len(proxy.seen) == 3  # The second client's own two tries.
