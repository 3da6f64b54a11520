"""What stands in each of Ray Serve's HTTP proxies, before a request goes to a replica. Pure ASGI, free of Ray.

A proxy's own answers are plain text, and where a replica dies there is none at all. Here they become the answers
that the API promises; and a request whose replica died before it began to answer, or lost its worker before it took
the request on, is sent to another one, once.
"""

import json
import logging
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.answers import EVENT_STREAM_MEDIA_TYPE, event_text
from service.api.problems import problem_body, problem_response
from service.api.ray_replica import ELSEWHERE, MARK
from service.api.records import RequestRecord, attach_record, new_record
from service.api.wire_formats import error_form_of
from service.errors import ErrorCode, InpaintError

logger = logging.getLogger(__name__)

MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Of one body, to send it again; of a longer one nothing is kept."""

MAX_KEPT_BYTES_IN_ALL = 512 * 1024 * 1024
"""Of all bodies in one proxy."""

# Adding and removing adapters: whether the first try did it nobody knows.
_REPEATABLE_METHODS = frozenset({"GET", "HEAD", "POST"})

# What Ray's proxies would let clients decide: time limits, whether hanging up cancels, and which replica it is.
_RAYS_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
    }
)
_REQUEST_ID = b"x-request-id"

_RAYS_PATHS = "/-/"
"""What Ray's proxies answer themselves: their health, their routes."""

_NATIVE_PATH = "/v1/inpaint"

_LOST_RETRY_SECONDS = 1.0
_UNAVAILABLE_RETRY_SECONDS = 5.0


def middlewares() -> list[Middleware]:
    """What Ray's proxies are to be wrapped in."""
    return [Middleware(Front)]


class Front:
    """Middleware around a proxy.

    Args:
        app: The proxy.
        max_kept_bytes: Of one body.
        max_kept_bytes_in_all: Of all bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_kept_bytes: int = MAX_KEPT_BYTES,
        max_kept_bytes_in_all: int = MAX_KEPT_BYTES_IN_ALL,
    ) -> None:
        self._app = app
        self._max_kept_bytes = max_kept_bytes
        self._room = _Room(max_kept_bytes_in_all)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have one request answered."""
        if scope["type"] != "http" or scope["path"].startswith(_RAYS_PATHS):
            await self._app(scope, receive, send)
            return
        record = new_record(Headers(scope=scope), error_form_of(scope["path"]))
        headers = _without_rays([(name.lower(), value) for name, value in scope["headers"]])
        headers.append((_REQUEST_ID, record.request_id.encode()))
        max_bytes = self._max_kept_bytes if scope["method"] in _REPEATABLE_METHODS else -1
        body = _Body(receive, max_bytes, self._room)
        try:
            answer = await self._try(scope, headers, body, send, record)
            if (answer.is_lost or answer.is_for_another) and body.is_kept and not body.is_client_gone:
                why = "its replica was lost" if answer.is_lost else "its replica is not ready"
                logger.warning("request %s: %s; another one runs it", record.request_id, why)
                answer = await self._try(scope, headers, body, send, record)
        finally:
            body.let_go()
        if body.is_client_gone:
            return
        if not answer.has_begun:
            own = {**scope, "state": {}}
            attach_record(own, record)
            named = {"X-Request-Id": record.request_id}
            await problem_response(_refusal(answer), Request(own), named)(own, receive, send)
        elif not answer.is_whole and answer.is_event_stream and scope["path"] == _NATIVE_PATH:
            event = event_text("failed", json.dumps(problem_body(_lost(), record.request_id)))
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})

    async def _try(
        self,
        scope: Scope,
        headers: Sequence[tuple[bytes, bytes]],
        body: "_Body",
        send: Send,
        record: RequestRecord,
    ) -> "_Answer":
        answer = _Answer(send, body, record.request_id.encode())
        # Of its own: Ray's middleware adds to the headers.
        await self._app({**scope, "headers": list(headers)}, body.from_the_start(), answer.send)
        return answer


class _Room:
    """Bytes that may still be kept."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


class _Body:
    """A request's messages, kept for a second try.

    Args:
        receive: Where they come from.
        max_bytes: How many to keep; of a longer body none.
        room: What all bodies share.
    """

    def __init__(self, receive: Receive, max_bytes: int, room: _Room) -> None:
        self.is_kept = max_bytes >= 0
        self.is_client_gone = False
        self._receive = receive
        self._max_bytes = max_bytes
        self._room = room
        self._messages: list[Message] = []
        self._num_bytes = 0

    def from_the_start(self) -> Receive:
        """A `receive` that begins with the first message; for one try."""
        position = 0

        async def receive() -> Message:
            nonlocal position
            if position < len(self._messages):
                message = self._messages[position]
            else:
                message = await self._receive()
                self._note(message)
            position += 1
            return message

        return receive

    def let_go(self) -> None:
        """There will be no second try."""
        self.is_kept = False
        self._room.num_bytes += self._num_bytes
        self._num_bytes = 0
        self._messages.clear()

    def _note(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.is_client_gone = True
            return
        if not self.is_kept:
            return
        size = len(message.get("body", b""))
        if self._num_bytes + size > self._max_bytes or size > self._room.num_bytes:
            self.let_go()
            return
        self._messages.append(message)
        self._num_bytes += size
        self._room.num_bytes -= size


class _Answer:
    """What comes back of one try: a replica's answer is passed on; Ray's own, and a refusal for now, are looked at.

    Args:
        send: To the client.
        body: The request's; let go once the answer has begun.
        request_id: The request's name.
    """

    def __init__(self, send: Send, body: _Body, request_id: bytes) -> None:
        self.has_begun = False
        self.is_whole = False
        self.is_event_stream = False
        self.is_for_another = False
        self.rays_status: int | None = None
        self.rays_retry_after = ""
        self._send = send
        self._body = body
        self._request_id = request_id

    @property
    def is_lost(self) -> bool:
        """Whether nobody answered: the replica is gone."""
        return not self.has_begun and self.rays_status in (None, 500)

    async def send(self, message: Message) -> None:
        """Called by the proxy."""
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message.get("headers", ())]
            mark = dict(headers).get(MARK)
            self.is_for_another = mark == ELSEWHERE
            if mark is None or self.is_for_another:
                self.rays_status = message["status"]
                self.rays_retry_after = Headers(raw=headers).get("Retry-After", "")
                return
            self._body.let_go()
            self.has_begun = True
            self.is_event_stream = Headers(raw=headers).get("Content-Type", "").startswith(EVENT_STREAM_MEDIA_TYPE)
            # Ray adds the request's id to those that have one.
            kept = [header for header in headers if header[0] not in (MARK, _REQUEST_ID)]
            await self._send({**message, "headers": [*kept, (_REQUEST_ID, self._request_id)]})
        elif self.has_begun:
            self.is_whole = not message.get("more_body", False)
            await self._send(message)


def _without_rays(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without those that mean something to Ray, to which underscores are hyphens, and without the id."""
    return [
        (name, value)
        for name, value in headers
        if name != _REQUEST_ID and name.replace(b"_", b"-") not in _RAYS_HEADERS
    ]


def _lost() -> InpaintError:
    return InpaintError(
        ErrorCode.WORKER_LOST,
        "The replica that had the request was lost.",
        retry_after_seconds=_LOST_RETRY_SECONDS,
    )


def _refusal(answer: _Answer) -> InpaintError:
    """What it means that no replica answered."""
    match answer.rays_status:
        case None | 500:
            return _lost()
        case 408:
            return InpaintError(ErrorCode.DEADLINE, "The request was not answered in time.")
        case 429:
            wait = answer.rays_retry_after
            return InpaintError(
                ErrorCode.OVERLOADED,
                "Too many requests are waiting.",
                retry_after_seconds=float(wait) if wait.isdecimal() else _LOST_RETRY_SECONDS,
            )
        case _:
            return InpaintError(
                ErrorCode.NOT_READY, "No replica is ready.", retry_after_seconds=_UNAVAILABLE_RETRY_SECONDS
            )
