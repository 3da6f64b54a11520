"""When to send a request again: what may pass is tried again, when the service says, so often and no more."""

import asyncio
import random
from dataclasses import dataclass

from service.client.answers import Answer
from service.client.connection import Connection, Order
from service.client.failures import IN_PROGRESS, PaintFailed, Refused, Unreachable
from service.client.progress import Watcher

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 8.0
_JITTER = 0.2

_MAX_CONNECTION_RETRIES = 3

# A service that wants to be left alone for longer is not waited for.
_LONGEST_RETRY_AFTER_SECONDS = 300.0

# A request that still runs after its connection broke ends at the service's deadline, 300 s by default.
_LONGEST_IN_PROGRESS_SECONDS = 900.0


@dataclass
class _Budget:
    """What is left to spend on one request."""

    retries: int
    connection_retries: int
    in_progress_seconds: float = _LONGEST_IN_PROGRESS_SECONDS

    def spend(self, failure: PaintFailed, pause_seconds: float) -> bool:
        """Whether there was enough left."""
        if isinstance(failure, Refused) and failure.code == IN_PROGRESS:
            self.in_progress_seconds -= pause_seconds
            return self.in_progress_seconds >= 0
        if isinstance(failure, Unreachable):
            self.connection_retries -= 1
            return self.connection_retries >= 0
        self.retries -= 1
        return self.retries >= 0


async def paint(
    connection: Connection, order: Order, watcher: Watcher, max_retries: int, idempotency_key: str | None = None
) -> Answer:
    """Paint, with retries.

    Args:
        connection: To the service.
        order: What to paint.
        watcher: Told of progress, and of each pause.
        max_retries: After refusals that may pass; broken connections are tried again three times at most.
        idempotency_key: With it a request whose connection broke is painted once; without it, hanging up cancels.

    Raises:
        PaintFailed: The last attempt's failure.
    """
    budget = _Budget(max_retries, min(max_retries, _MAX_CONNECTION_RETRIES))
    attempt = 0
    while True:
        try:
            return await connection.paint(order, watcher.on_event, idempotency_key)
        except PaintFailed as failure:
            pause_seconds = pause_after(failure, attempt)
            can_wait = failure.may_pass and pause_seconds <= _LONGEST_RETRY_AFTER_SECONDS
            if not can_wait or not budget.spend(failure, pause_seconds):
                raise
            watcher.on_pause(failure, pause_seconds)
        attempt += 1
        await asyncio.sleep(pause_seconds)


def pause_after(failure: PaintFailed, attempt: int) -> float:
    """Seconds to wait: what the service says, else twice as long each time; a little apart from what others wait.

    Args:
        failure: What came of the attempt.
        attempt: Its number, from 0.
    """
    seconds = failure.retry_after_seconds
    if seconds is None:
        seconds = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
    return seconds * (1 + random.uniform(0, _JITTER))  # noqa: S311 - no secret
