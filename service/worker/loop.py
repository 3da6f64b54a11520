"""The worker's loop: receive, admit, step, retire, report.

It decides nothing about pixels: a `Pipeline` prepares, steps and finishes
generations, the `Batcher` says which. One request's failure is its own: a
batch that fails is halved until the culprit stands alone, and the others go on
from where they were.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

from service.errors import ErrorCode, InpaintError
from service.messages import (
    Cancel,
    Command,
    Drain,
    Failed,
    Finished,
    InspectLora,
    LoraInfo,
    LoraInspected,
    Ping,
    Pong,
    Report,
    StepProgress,
    Submit,
    Ticked,
)
from service.request import Floats, InpaintResult, Pixels, Timings
from service.worker.batcher import Batcher, Generation
from service.worker.busy import BusyClock
from service.worker.faults import BatchTooLarge, DeviceLost

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

BUSY_WINDOW_SECONDS = 10.0

MAX_PREVIEWS = 10
"""Previews of one request at most: each costs its neighbours the time of a decode and a check."""

MIN_PREVIEW_STEP = 2
"""The first step knows nothing but noise."""


@dataclass(frozen=True, slots=True)
class Finish:
    """What `Pipeline.finish` made of one generation.

    Attributes:
        images: As in `InpaintResult`.
        nsfw: One flag per image.
        vae_decode_seconds: Time of the decode that it shared.
        safety_seconds: Time of the safety check that it shared.
    """

    images: Pixels | Floats
    nsfw: tuple[bool, ...]
    vae_decode_seconds: float
    safety_seconds: float


class Pipeline(Protocol):
    """The tensor work. All three calls take generations of one batch key.

    They raise `BatchTooLarge` or `DeviceLost` for what those say, and otherwise
    leave every generation as it was before the call, so that a smaller batch
    can try again. `finish` reports the fault of one generation in its place.
    """

    def prepare(self, generations: Sequence[Generation]) -> None:
        """Encode text and pictures, draw noise; sets `latents` and `steps`."""

    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every image by one model call."""

    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """Decode, check, and give back pictures."""

    def preview(self, generations: Sequence[Generation]) -> list[Pixels | None]:
        """What each may become, where there is something to show."""

    def inspect_lora(self, path: str) -> LoraInfo:
        """What a file is as a LoRA of this model."""

    def memory_bytes(self) -> dict[str, int]:
        """Device memory by kind."""


class Worker:
    """One device's loop over its pipe.

    Args:
        connection: The pipe to the API process.
        pipeline: The loaded pipeline.
        batcher: An empty batcher.
    """

    def __init__(self, connection: Connection, pipeline: Pipeline, batcher: Batcher) -> None:
        self._connection = connection
        self._pipeline = pipeline
        self._batcher = batcher
        self._is_draining = False
        self._busy = BusyClock(BUSY_WINDOW_SECONDS)

    def run(self) -> None:
        """Work until drained or until the API process is gone."""
        while self._receive():
            with self._busy:
                self._expire()
                self._admit()
                self._step()

    # --- receive -------------------------------------------------------------

    def _receive(self) -> bool:
        """Read every message that has arrived; wait for one when there is nothing to do."""
        try:
            while True:
                if self._batcher.is_idle and self._is_draining:
                    return False
                if not self._batcher.is_idle and not self._connection.poll():
                    return True
                self._handle(self._connection.recv())
        except (EOFError, ConnectionError):
            logger.info("the service is gone; worker exits")
            return False

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
            return LoraInspected(number, None, _as_inpaint_error(error).message)

    def _expire(self) -> None:
        now = time.monotonic()
        for generation in self._batcher.all():
            if generation.request.deadline < now:
                self._fail(generation, InpaintError(ErrorCode.DEADLINE, "The request's time was over."))

    # --- admit ---------------------------------------------------------------

    def _admit(self) -> None:
        """Prepare what may join, in batches of one key, and let it join."""
        now = time.monotonic()
        by_key: dict[object, list[Generation]] = {}
        for generation in self._batcher.admit(now):
            generation.prepare_started_at = now
            by_key.setdefault(generation.key, []).append(generation)
        for generations in by_key.values():
            prepared = self._attempt(generations, self._prepare)
            for generation in prepared:
                self._batcher.start(generation)

    def _prepare(self, generations: Sequence[Generation]) -> list[Generation]:
        self._pipeline.prepare(generations)
        now = time.monotonic()
        for generation in generations:
            generation.prepared_at = now
        return list(generations)

    # --- step ----------------------------------------------------------------

    def _step(self) -> None:
        """One step of the batch whose turn it is; those that are done leave it."""
        batch = self._batcher.next_batch()
        if not batch:
            return
        self._attempt(batch, self._tick)
        self._retire([generation for generation in batch if generation.steps and generation.is_denoised])

    def _tick(self, generations: Sequence[Generation]) -> list[Generation]:
        started_at = time.monotonic()
        self._pipeline.step(generations)
        now = time.monotonic()
        num_images = sum(generation.num_images for generation in generations)
        for generation in generations:
            generation.steps_done += 1
            generation.shared_images += num_images
            if generation.steps_done == 1:
                generation.first_step_at = now
            if generation.is_denoised:
                generation.denoised_at = now
        previews = self._previews(generations)
        self._report(
            Ticked(
                rows=sum(generation.request.params.num_rows for generation in generations),
                images=num_images,
                step_seconds=now - started_at,
                max_images=self._batcher.max_images,
                busy_ratio=self._busy.ratio(),
                memory_bytes=self._pipeline.memory_bytes(),
                progress=tuple(
                    StepProgress(g.request_id, g.steps_done, g.steps, previews.get(g.request_id)) for g in generations
                ),
            )
        )
        return list(generations)

    def _previews(self, generations: Sequence[Generation]) -> dict[str, Pixels]:
        """Pictures of unfinished requests, by id. They are a courtesy: what goes wrong costs a preview, no request."""
        due = [generation for generation in generations if _is_preview_due(generation)]
        if not due:
            return {}
        try:
            pictures = self._pipeline.preview(due)
        except DeviceLost:
            raise
        except Exception as error:
            logger.warning("no previews of %d requests", len(due), exc_info=error)
            return {}
        return {
            generation.request_id: picture
            for generation, picture in zip(due, pictures, strict=True)
            if picture is not None
        }

    # --- retire --------------------------------------------------------------

    def _retire(self, generations: Sequence[Generation]) -> None:
        """Decode, check and report what has reached its last step."""
        if not generations:
            return
        for generation, finish in self._attempt(generations, self._finish):
            if isinstance(finish, InpaintError):
                self._fail(generation, finish)
                continue
            self._batcher.remove(generation)
            self._report(Finished(generation.request_id, _result(generation, finish)))

    def _finish(self, generations: Sequence[Generation]) -> list[tuple[Generation, Finish | InpaintError]]:
        return list(zip(generations, self._pipeline.finish(generations), strict=True))

    # --- one request's failure is its own --------------------------------------

    def _attempt(self, generations: Sequence[Generation], work: Callable[[Sequence[Generation]], list[_T]]) -> list[_T]:
        """Do `work` on all at once or, where that fails, on halves; what fails alone is answered so."""
        try:
            return work(generations)
        except DeviceLost:
            raise
        except Exception as error:
            if len(generations) > 1:
                if isinstance(error, BatchTooLarge):
                    self._lower_cap(generations)
                else:
                    logger.warning("a batch of %d failed and is tried in halves", len(generations), exc_info=error)
                half = len(generations) // 2
                return self._attempt(generations[:half], work) + self._attempt(generations[half:], work)
            self._fail(generations[0], _as_inpaint_error(error))
            return []

    def _lower_cap(self, generations: Sequence[Generation]) -> None:
        """Remember that this many images were too many for the device."""
        cap = max(1, sum(generation.num_images for generation in generations) // 2)
        if cap < self._batcher.max_images:
            logger.warning("out of device memory: running at most %d images from now on", cap)
            self._batcher.max_images = cap

    def _fail(self, generation: Generation, error: InpaintError) -> None:
        """The one place where a generation ends without a picture."""
        self._batcher.remove(generation)
        generation.latents = None
        self._report(Failed(generation.request_id, error.code, error.message, error.field))

    def _report(self, report: Report) -> None:
        self._connection.send(report)


def _is_preview_due(generation: Generation) -> bool:
    """Whether to show what it has become: after some steps, evenly spread; not after the first or the last."""
    if not generation.request.params.previews or generation.is_denoised or generation.steps_done < MIN_PREVIEW_STEP:
        return False
    return generation.steps_done % max(1, ceil(generation.steps / MAX_PREVIEWS)) == 0


def _as_inpaint_error(error: Exception) -> InpaintError:
    if isinstance(error, InpaintError):
        return error
    if isinstance(error, BatchTooLarge):
        return InpaintError(ErrorCode.OUT_OF_MEMORY, "The device has not enough memory for this request.")
    logger.error("a request failed", exc_info=error)
    return InpaintError(ErrorCode.INTERNAL, "The request failed inside the service.")


def _result(generation: Generation, finish: Finish) -> InpaintResult:
    admitted_at = generation.request.admitted_at
    return InpaintResult(
        images=finish.images,
        nsfw=finish.nsfw,
        timings=Timings(
            queue=generation.prepare_started_at - admitted_at,
            prepare=generation.prepared_at - generation.prepare_started_at,
            denoise=generation.denoised_at - generation.prepared_at,
            vae_decode=finish.vae_decode_seconds,
            safety=finish.safety_seconds,
            time_to_first_step=generation.first_step_at - admitted_at,
        ),
        mean_images=generation.shared_images / generation.steps_done,
    )
