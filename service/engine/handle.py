"""A caller's hold on one admitted request."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from math import ceil

from service.engine.clients import ANONYMOUS, Client
from service.errors import InpaintError
from service.messages import StepProgress
from service.request import InpaintParams, InpaintRequest, InpaintResult

Outcome = InpaintResult | InpaintError


class Handle:
    """One admitted request, until its one outcome and after.

    Callers use `request_id`, `position`, `latest`, `eta_seconds`, `result`, `progress`, `changed` and `cancel`; the
    rest is the engine's. Everything happens on the event loop.

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
        self.deadline_timer: asyncio.TimerHandle | None = None
        self._position_of = position_of
        self._on_cancel = on_cancel
        # An error is the future's result and not its exception: a caller that
        # went away never asks for it, and asyncio would complain.
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
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

    def advance(self, progress: StepProgress) -> None:
        """The worker has done another step; a preview stays until there is a newer one."""
        if self.is_ended:
            return
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
        self._outcome.set_result(outcome)
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
