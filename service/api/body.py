"""How a request's body may arrive: not too large, not too slow, and not at all once the service drains."""

import asyncio
import time
from collections.abc import Callable

from starlette.types import Message, Receive

from service.api.problems import BodyRefused
from service.errors import ErrorCode, InpaintError

STALL_SECONDS = 30.0
"""How long a body may make no progress."""

MAX_BODY_SECONDS = 300.0
"""How long a body may take in all, or one byte every now and then would hold its place for ever."""

_DRAIN_POLL_SECONDS = 0.5


class BodyGuard:
    """Wraps an ASGI `receive` while the body arrives; once it is there, everything passes.

    Args:
        receive: What to wrap.
        max_bytes: Largest body, also where its length was not declared.
        is_draining: Whether nobody will admit the request any more.
    """

    def __init__(self, receive: Receive, max_bytes: int, is_draining: Callable[[], bool]) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._is_draining = is_draining
        self._num_bytes = 0
        self._is_complete = False
        self._give_up_at: float | None = None

    async def receive(self) -> Message:
        """The next message.

        Raises:
            BodyRefused: `BODY_TOO_LARGE`, `REQUEST_TIMEOUT` or `DRAINING`.
        """
        if self._is_complete:
            return await self._receive()
        message = await self._next_chunk()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise _refused(ErrorCode.BODY_TOO_LARGE, f"The body may have at most {self._max_bytes} bytes.")
        self._is_complete = not message.get("more_body", False)
        return message

    async def _next_chunk(self) -> Message:
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + MAX_BODY_SECONDS
        give_up_at = min(now + STALL_SECONDS, self._give_up_at)
        while True:
            wait_until = min(give_up_at, time.monotonic() + _DRAIN_POLL_SECONDS)
            try:
                async with asyncio.timeout(max(0.0, wait_until - time.monotonic())):
                    return await self._receive()
            except TimeoutError:
                if time.monotonic() >= give_up_at:
                    raise _refused(ErrorCode.REQUEST_TIMEOUT, "The body did not arrive in time.") from None
            if self._is_draining():
                raise _refused(ErrorCode.DRAINING, "The service is shutting down.", retry_after_seconds=1)


def _refused(code: ErrorCode, message: str, *, retry_after_seconds: float | None = None) -> BodyRefused:
    return BodyRefused(InpaintError(code, message, retry_after_seconds=retry_after_seconds))
