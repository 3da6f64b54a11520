"""The application as one of several replicas behind Ray Serve's proxies. Pure ASGI; nothing here knows of Ray itself.

uvicorn tells an application that the client is gone; Ray cancels the task that the application runs in. Here the one
becomes the other, so that everything behind works as it does without Ray: a request with an Idempotency-Key, for
one, goes on when its client hangs up.
"""

import asyncio
import logging
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.records import record_of
from service.engine.engine import Engine
from service.errors import ErrorCode

logger = logging.getLogger(__name__)

MARK = b"x-inpaint-replica"
"""A header of every answer that a replica gave, so that those which Ray gave in its place can be told apart."""

ANSWERED = b"answered"
"""Its usual value."""

ELSEWHERE = b"elsewhere"
"""Its value where the replica could not take the request on, and another one may."""

READY_WAIT_SECONDS = 30.0
"""How long a request waits for a worker that is being replaced."""

_POLL_SECONDS = 0.05

_NOT_NOW = frozenset({ErrorCode.NOT_READY, ErrorCode.DRAINING})

_DISCONNECT: Message = {"type": "http.disconnect"}


class ReplicaApp:
    """Middleware around the whole application.

    While a worker is being replaced, requests with a body wait for it here. Refused at once, they would make the
    replica the least busy of all, and Ray would send it all the others.

    Args:
        app: What to wrap.
        engine: Asked whether it is ready.
        max_body_bytes: Requests that declare more are the application's to refuse, at once.
    """

    def __init__(self, app: ASGIApp, engine: Engine, max_body_bytes: int) -> None:
        self._app = app
        self._engine = engine
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = _Connection(scope, receive, send)
        answering = asyncio.create_task(self._answer(scope, connection))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            connection.hang_up()
            await answering  # Soon over: as for any client that has hung up.
            raise
        finally:
            await connection.close()

    async def _answer(self, scope: Scope, connection: "_Connection") -> None:
        if scope["method"] == "POST" and self._may_wait(Headers(scope=scope)):
            await self._until_ready(connection)
        await self._app(scope, connection.receive, connection.send)

    def _may_wait(self, headers: Headers) -> bool:
        declared = headers.get("Content-Length", "")
        return declared.isdecimal() and int(declared[:20]) <= self._max_body_bytes

    async def _until_ready(self, connection: "_Connection") -> None:
        give_up_at = time.monotonic() + READY_WAIT_SECONDS
        while not (self._engine.is_ready or self._engine.is_draining or connection.is_gone):
            if time.monotonic() >= give_up_at:
                return
            await asyncio.sleep(_POLL_SECONDS)  # Workers are processes: their state sends no event.


class _Connection:
    """What the application sees of its client.

    Args:
        scope: The request's.
        receive: Ray's; what it raises means that the proxy is gone.
        send: Ray's.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.is_gone = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._pump = asyncio.create_task(self._pump_messages())

    def hang_up(self) -> None:
        """Nobody is there any more."""
        self.is_gone = True
        self._messages.put_nowait(_DISCONNECT)

    async def close(self) -> None:
        """Stop listening."""
        self._pump.cancel()
        with suppress(asyncio.CancelledError):
            await self._pump

    async def receive(self) -> Message:
        """The next message; once the client is gone that it is, again and again."""
        message = await self._messages.get()
        if message["type"] == _DISCONNECT["type"]:
            self._messages.put_nowait(message)
        return message

    async def send(self, message: Message) -> None:
        """Pass a message on, as long as somebody is there."""
        if self.is_gone:
            return
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (MARK, self._mark())]}
        await self._send(message)

    def _mark(self) -> bytes:
        # Readiness that was asked for is no refusal.
        is_refused = self._scope["method"] == "POST" and record_of(self._scope).code in _NOT_NOW
        return ELSEWHERE if is_refused else ANSWERED

    async def _pump_messages(self) -> None:
        # A task of its own, because a message may not get lost where one who waits for it gives up.
        try:
            while not self.is_gone:
                message = await self._receive()
                if message["type"] == _DISCONNECT["type"]:
                    break
                self._messages.put_nowait(message)
        except Exception as error:  # noqa: BLE001 - of any kind: the proxy cannot be reached
            logger.warning("a request's proxy is gone: %s", type(error).__name__)
        self.hang_up()
