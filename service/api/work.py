"""The making of one answer, in a task of its own: it can outlast the connection over which it was asked for."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from service.api.kept_answers import Answer, Claim
from service.api.problems import internal_error
from service.engine.engine import Handle
from service.errors import InpaintError
from service.request import InpaintResult

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Finish = Callable[[InpaintResult], Awaitable[Answer]]


class Work:
    """One admitted request on its way to its answer.

    Without a claim nobody could ever fetch the answer once the client has hung
    up, and the request is cancelled. With one the client may come back for it,
    and the work goes on.

    Args:
        handle: The request.
        finish: Makes the answer of what was painted.
        claim: The request's hold on its name, where the client gave it one.
        unfinished: Where the work is noted until it is done; else nothing might refer to it, and it would vanish.
    """

    def __init__(self, handle: Handle, finish: _Finish, claim: Claim | None, unfinished: set["Work"]) -> None:
        self.handle = handle
        self._finish = finish
        self._claim = claim
        self._unfinished = unfinished
        unfinished.add(self)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._on_done)

    async def answer(self) -> Answer:
        """Wait for the answer; may be called again.

        Raises:
            InpaintError: There is none.
        """
        return await asyncio.shield(self._task)

    async def answer_unless_gone(self, request: Request) -> Answer:
        """Wait for the answer, as long as the client does.

        Raises:
            InpaintError: There is none.
            ClientDisconnect: The client went away.
        """
        gone = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait((self._task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not self._task.done():
                self.client_left()
                raise ClientDisconnect
            return self._task.result()
        except asyncio.CancelledError:
            self.handle.cancel("drain")  # The server is going down.
            raise
        finally:
            gone.cancel()

    def client_left(self) -> None:
        """Nobody waits any more. Of no effect once there is an outcome."""
        if self._claim is None:
            self.handle.cancel("disconnect")

    async def _run(self) -> Answer:
        answer = await outcome_of(self.handle, self._finish)
        if self._claim is not None:
            self._claim.keep(answer)
        return answer

    def _on_done(self, task: asyncio.Task[Answer]) -> None:
        self._unfinished.discard(self)
        if self._claim is not None:
            self._claim.release()
        if not task.cancelled():
            task.exception()  # Looked at, or asyncio complains where nobody waits any more.


async def outcome_of(handle: Handle, finish: Callable[[InpaintResult], Awaitable[_T]]) -> _T:
    """What is made of what was painted.

    Raises:
        InpaintError: Nothing. Of a fault of ours the log has the reason.
    """
    try:
        return await finish(await handle.result())
    except InpaintError:
        raise
    except Exception:
        logger.exception("request %s failed unexpectedly", handle.request_id)
        raise internal_error() from None


async def disconnected(request: Request) -> None:
    """Wait for the client to hang up; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
