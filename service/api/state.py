"""What the routes work with; one object on `app.state`."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from service.api.async_requests import AsyncRequests
from service.api.kept_answers import KeptAnswers
from service.api.work import Work
from service.engine.clients import ANONYMOUS, Client
from service.engine.engine import Engine
from service.engine.places import Places
from service.errors import ErrorCode, InpaintError
from service.messages import ModelInfo
from service.metrics import Metrics
from service.settings import Settings

_T = TypeVar("_T")


class Intake:
    """Bounds the requests whose bodies are held in memory but that are not admitted yet.

    The engine bounds those that it has admitted; without this one, any number
    of uploads could be read and decoded at once for a single free place.

    Args:
        max_requests: How many may be between the first check for room and admission.
        metrics: Where to count refusals.
    """

    def __init__(self, max_requests: int, metrics: Metrics) -> None:
        self._places = Places(max_requests)
        self._metrics = metrics

    @contextmanager
    def place(self, client: Client = ANONYMOUS) -> Iterator[None]:
        """Take one of the places.

        Args:
            client: Who uploads; none can keep the others out.

        Raises:
            InpaintError: `OVERLOADED`, all are taken.
        """
        if not self._places.has_room(client):
            self._metrics.rejected(ErrorCode.OVERLOADED)
            raise InpaintError(ErrorCode.OVERLOADED, "Too many requests are being uploaded.", retry_after_seconds=1)
        self._places.take(client)
        try:
            yield
        finally:
            self._places.give_back(client)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The service behind the routes.

    Attributes:
        settings: The operator's settings.
        engine: Where requests go.
        metrics: Where to count.
        executor: Threads for decoding, fitting and encoding, which would stall the event loop.
        intake: Bounds requests whose bodies are in memory.
        uploads: Bounds adapters whose uploads are on the disk.
        kept_answers: Answers for clients that repeat their request.
        async_requests: Requests whose results are fetched later.
        created: Unix time at which the service started.
        unfinished: Admitted requests that have no answer yet, whether or not their clients still wait.
    """

    settings: Settings
    engine: Engine
    metrics: Metrics
    executor: ThreadPoolExecutor
    intake: Intake
    uploads: Intake
    kept_answers: KeptAnswers
    async_requests: AsyncRequests
    created: int
    unfinished: set[Work] = field(default_factory=set)

    @property
    def model(self) -> ModelInfo:
        """The served model.

        Raises:
            InpaintError: `NOT_READY`, none has loaded yet.
        """
        if self.engine.model is None:
            raise InpaintError(ErrorCode.NOT_READY, "No worker is ready.", retry_after_seconds=1)
        return self.engine.model

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Run `work` in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)


def state_of(request: Request) -> ServiceState:
    """The service that a request is for."""
    state = request.app.state.service
    assert isinstance(state, ServiceState)  # noqa: S101 - for the type checker
    return state
