"""Admitted requests, between the queue and the workers, until each has its one outcome."""

import asyncio
import logging
from collections.abc import Collection, Sequence

from service.engine.admission import WaitingQueue, backlog_seconds
from service.engine.clients import Client
from service.engine.dispatch import Dispatcher, Load, is_held
from service.engine.handle import Handle, Outcome
from service.engine.supervisor import Worker
from service.errors import ErrorCode, InpaintError
from service.messages import Cancel, Failed, Finished, Report, StepProgress, Submit, Ticked
from service.metrics import Metrics
from service.request import NO_MOMENTS, Moments

logger = logging.getLogger(__name__)

# A worker is lost once by accident; a request that loses a second one may be why.
MAX_LOSSES = 2


class Router:
    """Sends requests to workers and their outcomes to handles.

    Args:
        queue_size: Requests that may wait.
        metrics: Where to count.
        workers: All workers; may still grow.
    """

    def __init__(self, queue_size: int, metrics: Metrics, workers: Sequence[Worker]) -> None:
        self.queue = WaitingQueue(queue_size)
        self.all_answered = asyncio.Event()
        """Set while every admitted request has its outcome."""
        self.all_answered.set()
        self._metrics = metrics
        self._workers = workers
        self._dispatcher = Dispatcher()
        self._unanswered: dict[str, Handle] = {}
        metrics.watch(queue_depth=lambda: len(self.queue), in_flight=self._num_in_flight)

    def unanswered(self) -> list[Handle]:
        """Admitted requests without an outcome."""
        return list(self._unanswered.values())

    # --- from the queue to the workers ----------------------------------------------------

    def add(self, handle: Handle) -> None:
        """Take on an admitted request."""
        self._unanswered[handle.key] = handle
        self.all_answered.clear()
        self.queue.append(handle)
        self.dispatch()

    def dispatch(self) -> None:
        """Send what waits to workers that have room."""
        workers = self._loads()
        while workers and any(load.has_room(1) for load in workers):
            # First whoever suits a worker with room, then, so that no place stays empty, whoever is next.
            taken = self._take(workers, is_patient=True) or self._take(workers, is_patient=False)
            if taken is None:
                return
            handle, load = taken
            load.add(handle)
            handle.sent(workers[load].name)
            try:
                workers[load].send(Submit(handle.key, handle.request))
            except Exception:
                logger.exception("request %s could not be sent to worker %s", handle.key, workers[load].name)
                load.remove(handle.key)
                self._end(handle, InpaintError(ErrorCode.INTERNAL, "The request failed inside the service."))

    def _take(self, loads: Collection[Load], *, is_patient: bool) -> tuple[Handle, Load] | None:
        return self.queue.take(
            choose=lambda handle: self._dispatcher.choose(handle, loads, is_patient=is_patient),
            is_held=lambda handle: is_held(handle, loads),
        )

    def backlog_seconds(self, native_size: int, client: Client) -> float:
        """Estimated time until everything that a client has waiting now is in a batch."""
        paces = [load.seconds_per_row_call for load in self._loads()]
        return backlog_seconds(self.queue.num_row_calls(native_size, client), paces)

    def eta_seconds(self, native_size: int, handle: Handle) -> float | None:
        """Estimated time until a request that waits is painted; None if it does not wait, or nobody can tell."""
        waiting, loads = self.queue.num_row_calls_through(handle, native_size), self._loads()
        if waiting is None or not loads:
            return None
        running = sum(load.remaining_seconds / load.seconds_per_row_call for load in loads)
        return backlog_seconds(waiting + running, [load.seconds_per_row_call for load in loads])

    def _loads(self) -> dict[Load, Worker]:
        return {worker.load: worker for worker in self._workers if worker.is_ready and worker.load is not None}

    def _num_in_flight(self) -> int:
        return sum(worker.load.num_requests for worker in self._workers if worker.load is not None)

    # --- from the workers to the handles ----------------------------------------------------

    def worker_reported(self, worker: Worker, report: Report) -> None:
        """A worker says something about its requests."""
        if worker.load is None:
            return
        try:
            self._take_report(worker.name, worker.load, report)
        except Exception:
            logger.exception("a report of worker %s could not be handled", worker.name)
            if isinstance(report, Finished | Failed):
                error = InpaintError(ErrorCode.INTERNAL, "The request failed inside the service.")
                self._on_answer(worker.load, report.request_id, error)

    def _take_report(self, worker_name: str, load: Load, report: Report) -> None:
        match report:
            case Ticked():
                self._metrics.observe_tick(worker_name, report)
                load.ticked(report)
                for progress in report.progress:
                    _advance(load, progress)
                if any(progress.step >= progress.steps for progress in report.progress):
                    self.dispatch()  # Their places are free, though they have no answer yet.
            case Finished(key, result):
                self._on_answer(load, key, result, result.moments)
            case Failed(key, code, message, field, moments):
                self._on_answer(load, key, InpaintError(code, message, field=field), moments)

    def _on_answer(self, load: Load, key: str, outcome: Outcome, moments: Moments = NO_MOMENTS) -> None:
        handle = load.remove(key)
        if handle is not None:
            handle.moments = moments
            self._end(handle, outcome)
            self.dispatch()

    def worker_lost(self, worker: Worker, load: Load, *, are_suspect: bool) -> None:
        """A ready worker is gone: what it had is run again once, by whoever is first.

        Args:
            worker: Which.
            load: What it had.
            are_suspect: Whether its requests may be why; not when it was lost over something else.
        """
        waited_for = [handle for handle in load.handles() if not handle.is_ended]
        for handle in waited_for:
            handle.num_losses += are_suspect
            handle.lost()
        again = [handle for handle in waited_for if handle.num_losses < MAX_LOSSES]
        if waited_for:
            logger.warning(
                "worker %s (%s) lost with %d requests, %d of them are run again",
                worker.name,
                worker.device,
                len(waited_for),
                len(again),
            )
        for handle in waited_for:
            if handle not in again:
                message = "The worker was lost while painting this, twice."
                self._end(handle, InpaintError(ErrorCode.WORKER_LOST, message, retry_after_seconds=1))
        self.queue.put_back(again)
        self.dispatch()

    # --- outcomes: each handle gets one, here -----------------------------------------------

    def give_up(self, handle: Handle, error: InpaintError) -> None:
        """End a request that nobody should work on any more, wherever it is."""
        self._end(handle, error)
        if self.queue.remove(handle):
            self.dispatch()  # It may have been in the way.
            return
        for worker in self._workers:
            if worker.load is not None and worker.load.has(handle):
                worker.send(Cancel(handle.key))  # Its place is free when the worker says so.

    def cancel(self, handle: Handle, reason: str) -> None:
        """The caller does not want it any more."""
        self._metrics.cancelled(reason)
        self.give_up(handle, InpaintError(ErrorCode.CANCELLED, "The request was cancelled."))

    def expire(self, handle: Handle) -> None:
        """Its time is over."""
        self.give_up(handle, InpaintError(ErrorCode.DEADLINE, "The request's time was over."))

    def _end(self, handle: Handle, outcome: Outcome) -> None:
        if not handle.end(outcome):
            return
        del self._unanswered[handle.key]
        if not self._unanswered:
            self.all_answered.set()
        if not isinstance(outcome, InpaintError):
            self._metrics.observe_result(outcome)
        elif outcome.code is not ErrorCode.CANCELLED:
            self._metrics.failed(outcome.code)


def _advance(load: Load, progress: StepProgress) -> None:
    handle = load.progress(progress)
    if handle is not None:
        handle.advance(progress)
