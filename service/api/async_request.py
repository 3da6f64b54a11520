"""One asynchronous request: what it takes while it runs, and what is left of it once it has ended."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from starlette.requests import ClientDisconnect, Request

from service.api.kept_answers import Answer, Claim
from service.api.kept_result import KeptResult
from service.api.records import RequestRecord
from service.api.webhook import Webhook
from service.api.work import disconnected
from service.engine.clients import Client
from service.engine.handle import Handle, expected_model_calls
from service.errors import ErrorCode, InpaintError
from service.request import InpaintResult, Pixels

logger = logging.getLogger(__name__)

REQUESTS_PATH = "/v1/requests"

EndStatus = Literal["completed", "failed", "cancelled"]
Status = Literal["queued", "running"] | EndStatus


Outcome = KeptResult | InpaintError


@dataclass(frozen=True, slots=True)
class Job:
    """What a request takes as long as it runs, pictures among it.

    Attributes:
        handle: The engine's hold on it.
        record: What is noted of it.
        claim: Its hold on its name, where the client gave it one.
        webhook: Where its end is to be told.
        finish: Makes its result of what was painted.
        preview: Encodes an unfinished picture.
        eta_seconds: When it will be painted.
    """

    handle: Handle
    record: RequestRecord
    claim: Claim | None
    webhook: Webhook | None
    finish: Callable[[InpaintResult], Awaitable[KeptResult]]
    preview: Callable[[Pixels], Awaitable[bytes]]
    eta_seconds: Callable[[], float | None]


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps that are done, and all that there are."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended.

    Attributes:
        status: How.
        progress: How far it came.
        expires: Unix time at which it is forgotten.
        result: What was painted, where something was.
        error: Why nothing was, else.
    """

    status: EndStatus
    progress: Progress
    expires: int
    result: KeptResult | None
    error: InpaintError | None


class AsyncRequest:
    """One request, for those who ask for it.

    Args:
        request_id: Its id, under `/v1/requests`.
        client: Whose it is.
        job: What it takes.
    """

    def __init__(self, request_id: str, client: Client, job: Job) -> None:
        self.id = request_id
        self.client = client
        self.created = int(time.time())
        self.post_id = job.record.request_id
        """The id of the HTTP request that it came with, by which the log knows it."""
        self.job: Job | None = job
        """None once it has ended."""
        self.outcome: Outcome | None = None
        """What came out, from when it is there."""
        self.told: Answer | None = None
        """The answer of 202, where its client was told to come back."""
        self.is_given_up = False
        """Whether its client has deleted it."""
        self._ended: Ended | None = None
        self._end = asyncio.Event()
        self._preview: tuple[Pixels, asyncio.Future[bytes]] | None = None

    @property
    def path(self) -> str:
        """Where it is asked for."""
        return f"{REQUESTS_PATH}/{self.id}"

    @property
    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        return self._ended

    @property
    def status(self) -> Status:
        """What it is doing."""
        if self._ended is not None:
            return self._ended.status
        return "running" if self.position is None else "queued"

    @property
    def position(self) -> int | None:
        """Its place in the queue, 0 for the next; None where it does not wait."""
        return None if self.job is None else self.job.handle.position

    @property
    def progress(self) -> Progress:
        """How far it is; nowhere while it waits, though a worker was lost with it."""
        if self._ended is not None:
            return self._ended.progress
        return Progress(0, 1) if self.job is None else _progress(self.job.handle)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until it is painted, estimated; None where nobody can tell, or it has ended."""
        return None if self.job is None else self.job.eta_seconds()

    @property
    def mark(self) -> str:
        """Names what there is to see of it: another one where something else is."""
        if self._ended is not None:
            return self._ended.status
        position = self.position
        if position is not None:
            return f"queued-{position}"
        num_losses = 0 if self.job is None else self.job.handle.num_losses
        return f"progress-{num_losses}-{self.progress.step}"

    def end(self, outcome: Outcome, expires: int) -> None:
        """It has ended, and lets go of what it took; once.

        Args:
            outcome: What came out.
            expires: Unix time at which it is forgotten.
        """
        if isinstance(outcome, KeptResult):
            self._ended = Ended("completed", self.progress, expires, outcome, None)
        else:
            status: EndStatus = "cancelled" if outcome.code is ErrorCode.CANCELLED else "failed"
            self._ended = Ended(status, self.progress, expires, None, outcome)
        self.job = self.outcome = self._preview = None
        self._end.set()

    async def changed(self, seconds: float) -> None:
        """Wait for the next step or the end, but not for long. Places in the queue have to be looked at."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if self.job is not None and not self.job.handle.is_ended:
                    await self.job.handle.changed()
                else:
                    await self._end.wait()

    async def wait_ended(self, seconds: float, request: Request) -> None:
        """Wait for the end, as long as the client who asks does.

        Raises:
            ClientDisconnect: It went away.
        """
        await wait_unless_gone(self._end.wait(), seconds, request)

    async def preview(self) -> tuple[Pixels, bytes] | None:
        """The latest unfinished picture, and as a file, which is made once for all who look; None where there is none.

        The picture itself tells one from the next.
        """
        latest = None if self.job is None else self.job.handle.latest
        if self.job is None or latest is None or latest.preview is None:
            return None
        painted = latest.preview
        if self._preview is None or self._preview[0] is not painted:
            self._preview = painted, asyncio.ensure_future(self.job.preview(painted))
        try:
            return painted, await asyncio.shield(self._preview[1])
        except Exception:
            logger.exception("a preview of request %s could not be encoded", self.post_id)
            return None


def without_traceback(error: InpaintError) -> InpaintError:
    """The same error: one that was raised holds on to all that was in use where it was."""
    return InpaintError(error.code, error.message, field=error.field, retry_after_seconds=error.retry_after_seconds)


async def wait_unless_gone(awaited: Awaitable[object], seconds: float, request: Request) -> None:
    """Wait for something for so long at most.

    Raises:
        ClientDisconnect: The client went away before.
    """
    done = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait((done, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not done.done():
            raise ClientDisconnect
    finally:
        gone.cancel()
        done.cancel()


def _progress(handle: Handle) -> Progress:
    latest = handle.latest
    if latest is None or handle.position is not None:
        return Progress(0, expected_model_calls(handle.request.params))
    return Progress(latest.step, latest.steps)
