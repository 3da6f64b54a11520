"""Asking a worker whether a file would serve as a LoRA: only who holds the model can tell."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from service.engine.supervisor import Worker
from service.errors import ErrorCode, InpaintError
from service.messages import InspectLora, LoraInfo, LoraInspected

# As for a request: a file that loses a second worker may be why.
_MAX_TRIES = 2


@dataclass(frozen=True, slots=True)
class _Pending:
    worker: Worker
    answer: "asyncio.Future[LoraInspected | None]"  # None once the worker is lost.


class Inspections:
    """What workers were asked and have not answered yet.

    Args:
        workers: All workers; may still grow.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._numbers = count(1)
        self._pending: dict[int, _Pending] = {}

    async def inspect(self, path: Path, timeout_seconds: float) -> LoraInfo:
        """Ask one ready worker, and another one if that is lost over it.

        Args:
            path: The file.
            timeout_seconds: How long to wait in all.

        Raises:
            InpaintError: `INVALID_LORA`, `NOT_READY`, `WORKER_LOST` or `DEADLINE`.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                inspected = await self._ask_until_answered(path)
        except TimeoutError:
            raise InpaintError(ErrorCode.DEADLINE, "The adapter was not inspected in time.") from None
        if inspected.info is None:
            message = inspected.refusal or "The model cannot use the adapter."
            raise InpaintError(ErrorCode.INVALID_LORA, message, field="adapter")
        return inspected.info

    async def _ask_until_answered(self, path: Path) -> LoraInspected:
        for num_tries in range(_MAX_TRIES):
            worker = self._least_busy()
            if worker is None and num_tries == 0:
                raise InpaintError(ErrorCode.NOT_READY, "No worker is ready.", retry_after_seconds=1)
            inspected = None if worker is None else await self._ask(worker, path)
            if inspected is not None:
                return inspected
        raise InpaintError(
            ErrorCode.WORKER_LOST, "The worker was lost while inspecting the adapter.", retry_after_seconds=1
        )

    async def _ask(self, worker: Worker, path: Path) -> LoraInspected | None:
        number = next(self._numbers)
        pending = _Pending(worker, asyncio.get_running_loop().create_future())
        self._pending[number] = pending
        try:
            worker.send(InspectLora(number, str(path)))
            return await pending.answer
        finally:
            del self._pending[number]

    def _least_busy(self) -> Worker | None:
        loads = [
            (worker.load.remaining_seconds, worker)
            for worker in self._workers
            if worker.is_ready and worker.load is not None
        ]
        return min(loads, key=lambda candidate: candidate[0])[1] if loads else None

    # --- what becomes of workers --------------------------------------------------------

    def answered(self, worker: Worker, inspected: LoraInspected) -> None:
        """A worker has answered; maybe too late."""
        pending = self._pending.get(inspected.number)
        if pending is not None and pending.worker is worker and not pending.answer.done():
            pending.answer.set_result(inspected)

    def worker_lost(self, worker: Worker) -> bool:
        """A worker will not answer any more; returns whether it had anything to answer."""
        unanswered = [
            pending.answer
            for pending in self._pending.values()
            if pending.worker is worker and not pending.answer.done()
        ]
        for answer in unanswered:
            answer.set_result(None)
        return bool(unanswered)
