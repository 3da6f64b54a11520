"""The application as a replica behind Ray's proxies: Ray's cancelled tasks are hung-up clients to it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem
from service.api.ray_replica import ANSWERED, ELSEWHERE, MARK, ReplicaApp
from service.api.records import attach_record, new_record, record_of
from service.engine.engine import Engine
from service.errors import ErrorCode

DISCONNECT = {"type": "http.disconnect"}


@dataclass
class Readiness:
    """What is asked of an engine."""

    is_ready: bool = True
    is_draining: bool = False


@dataclass
class Call:
    """One request as Ray makes it."""

    app: ASGIApp
    engine: Readiness = field(default_factory=Readiness)
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-length", b"4"),)
    incoming: "asyncio.Queue[Message]" = field(default_factory=asyncio.Queue)
    sent: list[Message] = field(default_factory=list)
    method: str = "POST"

    async def run(self) -> None:
        """Until it is answered."""
        replica = ReplicaApp(self.app, cast("Engine", self.engine), max_body_bytes=100)
        scope = {"type": "http", "method": self.method, "path": "/", "headers": list(self.headers)}
        await replica(scope, self.incoming.get, self._send)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, and find nothing left of it."""

    async def checked() -> None:
        await asyncio.wait_for(main, 30)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(checked())


async def answering(scope: Scope, _receive: Receive, send: Send) -> None:
    attach_record(scope, new_record(Headers(scope=scope), problem))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"."})


@pytest.mark.parametrize(
    ("method", "code", "mark"),
    [
        ("POST", None, ANSWERED),
        ("POST", ErrorCode.OVERLOADED, ANSWERED),
        ("POST", ErrorCode.WORKER_LOST, ANSWERED),
        ("POST", ErrorCode.NOT_READY, ELSEWHERE),
        ("POST", ErrorCode.DRAINING, ELSEWHERE),
        ("GET", ErrorCode.NOT_READY, ANSWERED),
    ],
)
def test_answers_are_marked(method: str, code: ErrorCode | None, mark: bytes) -> None:
    """What a replica answers can be told from what Ray answers in its place; so can what another may yet take on."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        attach_record(scope, new_record(Headers(scope=scope), problem))
        record_of(scope).code = code
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    async def main() -> None:
        call = Call(app, method=method)
        await call.run()
        assert call.sent[0]["headers"] == [(b"a", b"b"), (MARK, mark)]

    run(main())


def test_a_cancelled_task_is_a_client_that_hung_up() -> None:
    """The application is not cancelled: it is told, ends in its own time, and what it still sends is dropped."""

    async def main() -> None:
        told: list[Message] = []
        is_waiting = asyncio.Event()

        async def app(_scope: Scope, receive: Receive, send: Send) -> None:
            told.append(await receive())
            is_waiting.set()
            told.extend([await receive(), await receive()])
            await asyncio.sleep(0)
            await send({"type": "http.response.start", "status": 200})
            told.append({"type": "end"})

        call = Call(app)
        call.incoming.put_nowait({"type": "http.request", "body": b"body"})
        task = asyncio.create_task(call.run())
        await is_waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert told == [{"type": "http.request", "body": b"body"}, DISCONNECT, DISCONNECT, {"type": "end"}]
        assert call.sent == []

    run(main())


def test_no_piece_of_a_body_is_lost_where_waiting_for_it_is_given_up() -> None:
    """Who waits for the next piece with a time limit, again and again, gets every piece in its order."""

    async def main() -> None:
        got: list[bytes] = []

        async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
            while len(got) < 500:
                try:
                    async with asyncio.timeout(0.0005):
                        got.append((await receive())["body"])
                except TimeoutError:
                    continue

        call = Call(app)
        task = asyncio.create_task(call.run())
        for number in range(500):
            call.incoming.put_nowait({"type": "http.request", "body": b"%d" % number, "more_body": True})
            await asyncio.sleep(0.0005)
        await task
        assert got == [b"%d" % number for number in range(500)]

    run(main())


def test_a_proxy_that_is_gone_is_a_client_that_hung_up() -> None:
    """When Ray cannot fetch the rest of a body, the application hears of a hung-up client, not of Ray's error."""

    async def main() -> None:
        told: list[Message] = []

        async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
            told.append(await receive())

        async def failing() -> Message:
            raise RuntimeError

        await ReplicaApp(app, cast("Engine", Readiness()), 100)(
            {"type": "http", "method": "GET", "path": "/", "headers": []}, failing, cast("Send", None)
        )
        assert told == [DISCONNECT]

    run(main())


def test_requests_wait_while_a_worker_is_replaced() -> None:
    """Refused at once they would make the broken replica look idle, and Ray would send it everything."""

    async def main() -> None:
        call = Call(answering, Readiness(is_ready=False))
        task = asyncio.create_task(call.run())
        await asyncio.sleep(0.2)
        assert call.sent == []
        call.engine.is_ready = True
        await task
        assert call.sent[0]["status"] == 200

    run(main())


@pytest.mark.parametrize("headers", [(), ((b"content-length", b"101"),), ((b"content-length", b"x"),)])
def test_what_is_to_be_refused_does_not_wait(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    """A body whose size is unknown or too large is the application's to judge at once, ready or not."""

    async def main() -> None:
        call = Call(answering, Readiness(is_ready=False), headers)
        await call.run()
        assert call.sent[0]["status"] == 200

    run(main())
