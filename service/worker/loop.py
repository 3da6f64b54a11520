"""The worker's loop: receive, collect, admit, step, retire, report.

It decides nothing about pixels: a `Pipeline` prepares, steps and finishes
generations, the `Batcher` says which. The loop steps the running batch itself;
preparing and finishing are jobs, collected between steps. Whatever changes the
batcher or speaks to the service happens on the loop's thread.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from service.errors import ErrorCode, InpaintError
from service.messages import (
    Cancel,
    Command,
    Drain,
    Failed,
    Finished,
    InspectLora,
    LoraInspected,
    Ping,
    Pong,
    Report,
    StepProgress,
    Submit,
    Ticked,
)
from service.request import Pixels
from service.worker.attempts import Attempt, as_inpaint_error, attempt
from service.worker.background import InlineJobs, Jobs, Lane
from service.worker.batcher import Batcher, Generation
from service.worker.busy import BusyClock
from service.worker.faults import DeviceLost
from service.worker.intake import Intake
from service.worker.outcome import moments_of, result_of
from service.worker.previews import Previews
from service.worker.stages import Finish, Pipeline

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

BUSY_WINDOW_SECONDS = 10.0

GATHER_SECONDS = 0.002
"""What an idle worker waits for the next message of a burst, so that its first requests are prepared together."""


@dataclass(frozen=True, slots=True)
class _Tick:
    """One step that these generations shared."""

    generations: Sequence[Generation]
    started_at: float
    ended_at: float


class Worker:
    """One device's loop over its pipe.

    Args:
        connection: The pipe to the API process.
        pipeline: The loaded pipeline.
        batcher: An empty batcher.
        jobs: Where preparing and finishing run; by default on the loop's thread, between steps.
    """

    def __init__(self, connection: Connection, pipeline: Pipeline, batcher: Batcher, jobs: Jobs | None = None) -> None:
        self._connection = connection
        self._pipeline = pipeline
        self._batcher = batcher
        self._jobs = jobs or InlineJobs()
        self._intake = Intake()
        self._previews = Previews()
        self._num_images_beside = 0  # Those that the jobs to be collected shared the device's memory with.
        self._is_draining = False
        self._busy = BusyClock(BUSY_WINDOW_SECONDS)

    def run(self) -> None:
        """Work until drained or until the API process is gone.

        Raises:
            DeviceLost: The device needs a new process.
        """
        with self._jobs:
            try:
                while self.turn():
                    pass
            except (EOFError, ConnectionError):
                logger.info("the service is gone; worker exits")

    def turn(self) -> bool:
        """Once around: wait for something to do, and do one step; False once drained.

        Raises:
            EOFError: The API process is gone; or another `ConnectionError`.
            DeviceLost: The device needs a new process.
        """
        if not self._receive():
            return False
        with self._busy:
            self._jobs.collect()
            self._expire()
            self._admit()
            self._step()
        return True

    # --- receive -------------------------------------------------------------

    def _receive(self) -> bool:
        """Read every message that has arrived; while nothing can be stepped, wait for one or for a job's end."""
        is_idle = self._batcher.is_idle and self._jobs.is_idle
        if is_idle and self._is_draining:
            return False
        if self._batcher.is_stuck:
            wait([self._connection, *self._jobs.wake_ups], self._seconds_to_deadline())
        while self._connection.poll(GATHER_SECONDS if is_idle else 0):
            self._handle(self._connection.recv())
        return True

    def _seconds_to_deadline(self) -> float | None:
        """Until the first request expires; None where none ever does."""
        deadline = min((generation.request.deadline for generation in self._batcher.all()), default=math.inf)
        return None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())

    def _handle(self, command: Command) -> None:
        match command:
            case Submit(request_id, request):
                self._batcher.add(Generation(request_id, request))
            case Cancel(request_id):
                generation = self._batcher.find(request_id)
                if generation is not None:
                    self._fail(generation, InpaintError(ErrorCode.CANCELLED, "The request was cancelled."))
            case Ping(number):
                self._report(Pong(number))
            case InspectLora(number, path):
                self._report(self._inspected(number, path))
            case Drain():
                self._is_draining = True

    def _inspected(self, number: int, path: str) -> LoraInspected:
        try:
            return LoraInspected(number, self._pipeline.inspect_lora(path), None)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - the running batch must not suffer from a file
            return LoraInspected(number, None, as_inpaint_error(error).message)

    def _expire(self) -> None:
        now = time.monotonic()
        for generation in self._batcher.all():
            if generation.request.deadline < now:
                self._fail(generation, InpaintError(ErrorCode.DEADLINE, "The request's time was over."))

    # --- admit ---------------------------------------------------------------

    def _admit(self) -> None:
        """Have prepared what may be, and let join what is prepared and has room."""
        admitted = self._batcher.admit(time.monotonic(), is_ahead=self._jobs.are_background)
        self._intake.add(admitted)
        for _key in {generation.key for generation in admitted}:
            self._jobs.submit(Lane.PREPARE, self._prepare, self._prepared)
        now = time.monotonic()
        for generation in self._batcher.join(now):
            generation.joined_at = now

    def _prepare(self) -> tuple[float, Attempt[float]]:
        """When it began, and of each generation when it was prepared."""
        started_at = time.monotonic()

        def work(generations: Sequence[Generation]) -> list[float]:
            self._pipeline.prepare(generations)
            return [time.monotonic()] * len(generations)

        return started_at, attempt(self._intake.take(), work)

    def _prepared(self, outcome: tuple[float, Attempt[float]]) -> None:
        started_at, attempted = outcome
        for generation, prepared_at in self._succeeded(attempted, self._num_images_beside):
            generation.prepare_started_at = started_at
            generation.prepared_at = prepared_at
            self._batcher.keep(generation)

    # --- step ----------------------------------------------------------------

    def _step(self) -> None:
        """One step of the batch whose turn it is; those that are done leave it."""
        self._num_images_beside = self._batcher.num_running_images if self._jobs.are_background else 0
        batch = self._batcher.next_batch()
        for generation, tick in self._succeeded(attempt(batch, self._tick)):
            if generation is tick.generations[0]:
                self._ticked(tick)
        self._retire([generation for generation in batch if generation.is_denoised])

    def _tick(self, generations: Sequence[Generation]) -> list[_Tick]:
        started_at = time.monotonic()
        self._pipeline.step(generations)
        return [_Tick(generations, started_at, time.monotonic())] * len(generations)

    def _ticked(self, tick: _Tick) -> None:
        num_images = sum(generation.num_images for generation in tick.generations)
        for generation in tick.generations:
            generation.steps_done += 1
            generation.shared_images += num_images
            if generation.steps_done == 1:
                generation.first_step_at = tick.ended_at
            if generation.is_denoised:
                generation.denoised_at = tick.ended_at
        self._preview(tick.generations)
        self._report(
            Ticked(
                rows=sum(generation.request.params.num_rows for generation in tick.generations),
                images=num_images,
                step_seconds=tick.ended_at - tick.started_at,
                max_images=self._batcher.max_images,
                busy_ratio=self._busy.ratio(),
                memory_bytes=self._pipeline.memory_bytes(),
                progress=tuple(
                    StepProgress(one.request_id, one.steps_done, one.steps, self._previews.take(one))
                    for one in tick.generations
                ),
            )
        )

    def _preview(self, generations: Sequence[Generation]) -> None:
        """Have pictures made of those that are due one; they are shown with the next step's report."""
        due = self._previews.begin(generations)
        if due:
            self._submit_reader(due, self._made_previews, self._previewed, is_courtesy=True)

    def _made_previews(self, generations: Sequence[Generation]) -> list[tuple[Generation, Pixels | None]]:
        """A picture of each, where there is one to show; what goes wrong costs previews, no request."""
        try:
            return list(zip(generations, self._pipeline.preview(generations), strict=True))
        except DeviceLost:
            raise
        except Exception as error:
            logger.warning("no previews of %d requests", len(generations), exc_info=error)
            return [(generation, None) for generation in generations]

    def _previewed(self, pictures: list[tuple[Generation, Pixels | None]]) -> None:
        for generation, picture in pictures:
            self._previews.end(generation, picture if self._batcher.has(generation) else None)
            self._let_go(generation)

    # --- retire --------------------------------------------------------------

    def _retire(self, generations: Sequence[Generation]) -> None:
        """Have decoded and checked what has reached its last step."""
        for generation in generations:
            self._batcher.retire(generation)
        if generations:
            self._submit_reader(generations, self._finish, self._finished)

    def _finish(self, generations: Sequence[Generation]) -> tuple[float, Attempt[Finish]]:
        """When it began, and the pictures of each generation."""
        return time.monotonic(), attempt(generations, self._pipeline.finish)

    def _finished(self, outcome: tuple[float, Attempt[Finish]]) -> None:
        started_at, attempted = outcome
        for generation, finish in self._succeeded(attempted, self._num_images_beside):
            self._end(generation, Finished(generation.request_id, result_of(generation, finish, started_at)))

    # --- what becomes of a generation ------------------------------------------

    def _submit_reader(
        self,
        generations: Sequence[Generation],
        work: Callable[[Sequence[Generation]], _T],
        then: Callable[[_T], None],
        *,
        is_courtesy: bool = False,
    ) -> None:
        """A job of the finishing thread; while it reads `latents`, they stay."""
        for generation in generations:
            generation.num_readers += 1

        def ended(outcome: _T) -> None:
            for generation in generations:
                generation.num_readers -= 1
            then(outcome)

        self._jobs.submit(Lane.FINISH, partial(work, generations), ended, is_courtesy=is_courtesy)

    def _succeeded(self, attempted: Attempt[_T], num_images_beside: int = 0) -> Iterator[tuple[Generation, _T]]:
        """What went well. The others are answered; what was answered meanwhile is let go."""
        if attempted.too_many_images is not None:
            self._lower_cap(attempted.too_many_images + num_images_beside)
        for generation, outcome in attempted.outcomes:
            if not self._batcher.has(generation):
                self._let_go(generation)
            elif isinstance(outcome, InpaintError):
                self._fail(generation, outcome)
            else:
                yield generation, outcome

    def _lower_cap(self, num_images: int) -> None:
        """Remember that this many images were too many for the device."""
        cap = max(1, num_images // 2)
        if cap < self._batcher.max_images:
            logger.warning("out of device memory: running at most %d images from now on", cap)
            self._batcher.max_images = cap

    def _fail(self, generation: Generation, error: InpaintError) -> None:
        """It ends without a picture."""
        self._end(
            generation, Failed(generation.request_id, error.code, error.message, error.field, moments_of(generation))
        )

    def _end(self, generation: Generation, answer: Finished | Failed) -> None:
        """The one place where a generation ends; whatever a job makes of it later is dropped."""
        self._batcher.remove(generation)
        self._intake.discard(generation)
        self._previews.forget(generation)
        self._let_go(generation)
        self._report(answer)

    def _let_go(self, generation: Generation) -> None:
        """Free what the pipeline keeps of one that has been answered, once no job reads it."""
        if generation.num_readers == 0 and not self._batcher.has(generation):
            generation.latents = None

    def _report(self, report: Report) -> None:
        self._connection.send(report)
