"""Telling receivers that requests have ended: signed, a few times at most, and never in the way of anything else."""

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal

import httpx

from service import __version__
from service.api.webhook import Receiver, Webhook, signed_headers
from service.engine.clients import Client
from service.engine.places import Places
from service.metrics import Metrics

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0

ATTEMPT_SECONDS = 15.0
"""For one try in all: a receiver that answers one byte every now and then is no better than one that is silent."""

PAUSES_SECONDS = (1.0, 5.0)
"""Before the second try and before the third, which is the last."""

MAX_AT_ONCE = 4
MAX_PENDING = 128
"""Of one receiver: how many it is told at the same time, and how many in all are not told yet."""

Outcome = Literal["delivered", "failed", "refused", "dropped"]


@dataclass(frozen=True, slots=True)
class _Line:
    """What waits for one receiver: a slow one keeps nobody else waiting."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_AT_ONCE))
    places: Places = field(default_factory=lambda: Places(MAX_PENDING))


class Deliveries:
    """Messages on their way.

    Args:
        secret: What they are signed with.
        metrics: Where to count.
    """

    def __init__(self, secret: bytes, metrics: Metrics) -> None:
        self._secret = secret
        self._metrics = metrics
        self._lines: dict[Receiver, _Line] = {}  # As many as the operator allows.
        self._tasks: set[asyncio.Task[None]] = set()
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"User-Agent": f"inpaint-service/{__version__}"},
        )

    @property
    def num_pending(self) -> int:
        """Messages that are neither delivered nor given up."""
        return len(self._tasks)

    def deliver(self, webhook: Webhook, client: Client, message_id: str, body: bytes) -> None:
        """Send a message in the background; of a client that has too many waiting it is dropped.

        Args:
            webhook: Where to.
            client: Whose request it is about.
            message_id: By which the receiver knows it when it comes twice.
            body: JSON.
        """
        line = self._lines.setdefault(webhook.receiver, _Line())
        if not line.places.has_room(client):
            self._note(message_id, "dropped", None)
            return
        line.places.take(client)
        task = asyncio.create_task(self._deliver(line, webhook.url, message_id, body))

        def on_done(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            line.places.give_back(client)

        self._tasks.add(task)
        task.add_done_callback(on_done)

    async def close(self, grace_seconds: float) -> None:
        """Give what is on its way a little time, and then up."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_seconds)
        pending = list(self._tasks)
        for task in pending:
            task.cancel()
            self._metrics.webhook("abandoned")
        if pending:
            logger.warning("%d webhooks were not delivered before the end", len(pending))
        await asyncio.gather(*pending, return_exceptions=True)
        await self._client.aclose()

    async def _deliver(self, line: _Line, url: httpx.URL, message_id: str, body: bytes) -> None:
        status = None
        try:
            for pause in (0.0, *PAUSES_SECONDS):
                await asyncio.sleep(pause)
                async with line.turns:
                    status = await self._attempt(url, message_id, body)
                if status is not None and HTTPStatus(200) <= status < HTTPStatus(300):
                    self._note(message_id, "delivered", status)
                    return
                if status == HTTPStatus.GONE:  # The receiver's way to say that it wants no more of them.
                    self._note(message_id, "refused", status)
                    return
        except Exception:
            logger.exception("webhook %s failed unexpectedly", message_id)
        self._note(message_id, "failed", status)

    async def _attempt(self, url: httpx.URL, message_id: str, body: bytes) -> int | None:
        """The status of the receiver's answer, whose body is not read; None where there is none."""
        signed = signed_headers(self._secret, message_id, int(time.time()), body)
        headers = {"Content-Type": "application/json", **signed}
        try:
            async with (
                asyncio.timeout(ATTEMPT_SECONDS),
                self._client.stream("POST", url, content=body, headers=headers) as response,
            ):
                return response.status_code
        except (httpx.TransportError, OSError):  # TimeoutError is one of the latter.
            return None

    def _note(self, message_id: str, outcome: Outcome, status: int | None) -> None:
        """Count and log; never the address, which is the client's."""
        self._metrics.webhook(outcome)
        fields: dict[str, object] = {"webhook_id": message_id, "outcome": outcome}
        if status is not None:
            fields["status"] = status
        logger.log(logging.INFO if outcome == "delivered" else logging.WARNING, "webhook", extra={"fields": fields})
