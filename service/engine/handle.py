"""A caller's hold on one admitted request."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from math import ceil

from service.engine.clients import ANONYMOUS, Client
from service.errors import InpaintError
from service.messages import StepProgress
from service.request import NO_MOMENTS, InpaintParams, InpaintRequest, InpaintResult

logger = logging.getLogger(__name__)

Outcome = InpaintResult | InpaintError


@dataclass(slots=True)
class Attempt:
    """One stay of a request in a worker.

    Attributes:
        worker: The worker's name.
        queued_at: `time.monotonic()` when the request began to wait for it.
        sent_at: When it was sent there.
        steps_done: Steps that the worker has told of.
        lost_at: When the worker was lost with it; None if it was not.
    """

    worker: str
    queued_at: float
    sent_at: float
    steps_done: int = 0
    lost_at: float | None = None


class Handle:
    """One admitted request, until its one outcome and after.

    Callers use `request_id`, `position`, `latest`, `eta_seconds`, `result`, `progress`, `changed`, `cancel` and
    `when_ended`, and may look at `attempts`, `moments` and `ended_at`; the rest is the engine's. Everything happens on
    the event loop.

    Args:
        request_id: The caller's name for it; need not be unique.
        key: The engine's name for it, under which workers know it; unique.
        request: What to paint.
        position_of: Its place in the queue.
        on_cancel: Told when the caller gives up.
        client: Whose it is.
    """

    def __init__(
        self,
        request_id: str,
        key: str,
        request: InpaintRequest,
        position_of: Callable[["Handle"], int | None],
        on_cancel: Callable[["Handle", str], None],
        *,
        client: Client = ANONYMOUS,
    ) -> None:
        self.request_id = request_id
        self.key = key
        self.request = request
        self.client = client
        self.num_losses = 0
        """How often a worker died with it; after the first time it is a *suspect*."""
        self.attempts: list[Attempt] = []
        """Its stays in workers, in order."""
        self.moments = NO_MOMENTS
        """How far it came in the last of them, as far as that worker has told."""
        self.ended_at: float | None = None
        """`time.monotonic()` of its outcome; None before."""
        self.deadline_timer: asyncio.TimerHandle | None = None
        self._position_of = position_of
        self._on_cancel = on_cancel
        # An error is the future's result and not its exception: a caller that
        # went away never asks for it, and asyncio would complain.
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._callbacks: list[Callable[[Outcome], None]] = []
        self._latest: StepProgress | None = None
        self._latest_at = 0.0
        self._first: tuple[int, float] | None = None  # Step and time; the start again after a lost worker.
        self._changed = asyncio.Event()

    # --- for callers ----------------------------------------------------------

    @property
    def position(self) -> int | None:
        """Place in the queue, 0 for the next; None once in a worker or ended."""
        return self._position_of(self)

    @property
    def latest(self) -> StepProgress | None:
        """The latest step; None before the first."""
        return self._latest

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step, by the pace of the steps so far; None before there are two to judge by."""
        if self._latest is None or self._first is None:
            return None
        remaining = self._latest.steps - self._latest.step
        if remaining <= 0:
            return 0.0
        first_step, first_at = self._first
        if self._latest.step == first_step:
            return None
        pace = (self._latest_at - first_at) / (self._latest.step - first_step)
        return max(0.0, pace * remaining - (time.monotonic() - self._latest_at))

    async def changed(self) -> None:
        """Wait for the next step or the outcome; at once where there is an outcome."""
        if not self.is_ended:
            await self._changed.wait()

    async def result(self) -> InpaintResult:
        """Wait for the outcome; may be called again.

        Raises:
            InpaintError: The request failed, was cancelled or came too late.
        """
        outcome = await asyncio.shield(self._outcome)  # Cancelling one waiter leaves the outcome to others.
        if isinstance(outcome, InpaintError):
            raise outcome
        return outcome

    async def progress(self) -> AsyncIterator[StepProgress]:
        """Steps as they are done, up to the outcome, which `result` then has at once.

        A slow reader skips to the latest, but misses no preview for it: each has the
        latest one so far. The count starts again where a worker was lost and another
        takes over.
        """
        seen: StepProgress | None = None
        while True:
            if self._latest is not None and self._latest is not seen:
                seen = self._latest
                yield seen
            elif self.is_ended:
                return
            else:
                await self._changed.wait()

    def cancel(self, reason: str) -> None:
        """Give up: never started when still queued, else out of the batch at the next step. Idempotent.

        Args:
            reason: For the metrics: "disconnect", "timeout" or "client".
        """
        if not self.is_ended:
            self._on_cancel(self, reason)

    def when_ended(self, callback: Callable[[Outcome], None]) -> None:
        """Have something done as soon as there is an outcome, before anybody else learns of it."""
        self._callbacks.append(callback)

    # --- for the engine ---------------------------------------------------------

    @property
    def is_ended(self) -> bool:
        """Whether there is an outcome."""
        return self._outcome.done()

    @property
    def is_suspect(self) -> bool:
        """Whether a worker died with it, perhaps of it."""
        return self.num_losses > 0

    @property
    def num_images(self) -> int:
        """Images that it takes up in a batch."""
        return self.request.params.num_images_per_prompt

    @property
    def age_seconds(self) -> float:
        """Seconds since its admission."""
        return time.monotonic() - self.request.admitted_at

    @property
    def queued_at(self) -> float:
        """When it began to wait for a worker: at its admission, or when one was lost."""
        lost_at = self.attempts[-1].lost_at if self.attempts else None
        return self.request.admitted_at if lost_at is None else lost_at

    def sent(self, worker_name: str) -> None:
        """It goes to a worker."""
        self.attempts.append(Attempt(worker_name, self.queued_at, time.monotonic()))

    def lost(self) -> None:
        """Its worker is gone."""
        self.attempts[-1].lost_at = time.monotonic()

    def advance(self, progress: StepProgress) -> None:
        """The worker has done another step; a preview stays until there is a newer one."""
        if self.is_ended:
            return
        self.attempts[-1].steps_done = progress.step
        preview = progress.preview
        if preview is None and self._latest is not None and self._latest.step < progress.step:
            preview = self._latest.preview
        self._latest_at = time.monotonic()
        if self._first is None or progress.step <= self._first[0]:
            self._first = (progress.step, self._latest_at)
        self._latest = StepProgress(self.request_id, progress.step, progress.steps, preview)
        self._wake()

    def end(self, outcome: Outcome) -> bool:
        """Set the one outcome; False if there is one already."""
        if self.is_ended:
            return False
        self.ended_at = time.monotonic()
        self._outcome.set_result(outcome)
        for callback in self._callbacks:
            try:
                callback(outcome)
            except Exception:
                logger.exception("request %s: what was to be done at its end failed", self.request_id)
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
        self._wake()
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def expected_model_calls(params: InpaintParams) -> int:
    """Model calls before the worker tells: the steps that `strength` leaves; some schedulers make more."""
    return max(1, ceil(params.num_inference_steps * params.strength))
