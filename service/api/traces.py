"""What the stages of a request leave in its trace, and in the metrics.

    receive  decode  fit  queue  prepare  denoise  vae_decode  safety  render  send

Those from `prepare` to `safety` happen in a worker, which tells of them with its answer. A worker that did not come
to answer, because it was lost or nobody waits any more, leaves an `attempt` in their place.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.requests import ClientDisconnect

from service.api.problems import BodyRefused
from service.engine.handle import Attempt, Handle
from service.errors import ErrorCode, InpaintError
from service.metrics import Metrics, Stage
from service.request import InpaintParams, InpaintResult, Moments
from service.spans import Attributes, Event, RequestSpans

MIN_WAIT_SECONDS = 0.001
"""Waiting between two stages of a worker is shown from here on; what is shorter is the worker's loop itself."""

WORKER, WORKER_LOST = "inpaint.worker", "worker_lost"


class StageClock:
    """Times the stages that run in this process.

    Args:
        metrics: Where to count those that succeed.
        spans: The request's.
    """

    def __init__(self, metrics: Metrics, spans: RequestSpans) -> None:
        self._metrics = metrics
        self._spans = spans

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Around one stage."""
        started_at = time.monotonic()
        with spanning(self._spans, stage, started_at):
            yield
        self._metrics.observe_stage(stage, time.monotonic() - started_at)


@contextmanager
def spanning(spans: RequestSpans, name: str, started_at: float) -> Iterator[None]:
    """Record a stage at the end of the block, with what made it fail."""
    try:
        yield
    except BaseException as error:
        spans.stage(name, started_at, time.monotonic(), code=_code(error))
        raise
    spans.stage(name, started_at, time.monotonic())


def _code(error: BaseException) -> ErrorCode:
    if isinstance(error, BodyRefused):
        return error.error.code
    if isinstance(error, InpaintError):
        return error.code
    is_over = isinstance(error, ClientDisconnect | asyncio.CancelledError)
    return ErrorCode.CANCELLED if is_over else ErrorCode.INTERNAL


def order_attributes(params: InpaintParams) -> Attributes:
    """What a trace says of what was asked for: numbers and names of ours."""
    return {
        "inpaint.steps": params.num_inference_steps,
        "inpaint.images": params.num_images_per_prompt,
        "inpaint.rows": params.num_rows,
        "inpaint.width": params.width,
        "inpaint.height": params.height,
        "inpaint.scheduler": params.scheduler,
        "inpaint.seed": params.seed,
    }


def trace_painting(spans: RequestSpans, handle: Handle, outcome: InpaintResult | InpaintError) -> None:
    """Record what became of a request between its admission and its outcome.

    Args:
        spans: The request's.
        handle: It; it has its outcome.
        outcome: That.
    """
    if not spans.is_recording:
        return
    ended_at = handle.ended_at or time.monotonic()
    code = outcome.code if isinstance(outcome, InpaintError) else None
    painting = _Painting(spans, handle.request.params, ended_at, code)
    if handle.attempts:
        spans.note({WORKER: handle.attempts[-1].worker, "inpaint.attempts": len(handle.attempts)})
    for attempt in handle.attempts:
        if attempt is handle.attempts[-1] and handle.moments.prepare_started_at is not None:
            mean_images = outcome.mean_images if isinstance(outcome, InpaintResult) else None
            painting.told(attempt, handle.moments, mean_images)
        else:
            painting.untold(attempt)
    if not handle.attempts or (handle.attempts[-1].lost_at is not None and code is not ErrorCode.WORKER_LOST):
        spans.stage("queue", handle.queued_at, ended_at, code=code)  # It was over before a worker had it.
    if isinstance(outcome, InpaintResult):
        spans.note({"inpaint.mean_images": outcome.mean_images})


class _Painting:
    """The spans of one request's stays in workers.

    Args:
        spans: Where they go.
        params: What is painted.
        ended_at: When the request had its outcome.
        code: Why it has no picture; None if it has.
    """

    def __init__(self, spans: RequestSpans, params: InpaintParams, ended_at: float, code: ErrorCode | None) -> None:
        self._spans = spans
        self._params = params
        self._ended_at = ended_at
        self._code = code

    def untold(self, attempt: Attempt) -> None:
        """A stay that the worker did not come to tell of."""
        attributes: Attributes = {WORKER: attempt.worker, "inpaint.steps_done": attempt.steps_done}
        self._spans.stage("queue", attempt.queued_at, attempt.sent_at, {WORKER: attempt.worker})
        if attempt.lost_at is None:
            self._spans.stage("attempt", attempt.sent_at, self._ended_at, attributes, code=self._code)
            return
        lost = Event(WORKER_LOST, attempt.lost_at, {WORKER: attempt.worker})
        self._spans.stage(
            "attempt", attempt.sent_at, attempt.lost_at, attributes, code=ErrorCode.WORKER_LOST, events=[lost]
        )

    def told(self, attempt: Attempt, moments: Moments, mean_images: float | None) -> None:
        """A stay by the worker's own times, as far as it came."""
        worker = {WORKER: attempt.worker}
        self._stage("queue", attempt.queued_at, moments.prepare_started_at, worker, [Event("sent", attempt.sent_at)])
        self._stage("prepare", moments.prepare_started_at, moments.prepared_at, worker)
        self._wait("batch", moments.prepared_at, moments.joined_at)
        self._stage(
            "denoise",
            moments.joined_at,
            moments.denoised_at,
            {
                **worker,
                "inpaint.steps_done": attempt.steps_done,
                "inpaint.rows": self._params.num_rows,
                "inpaint.images": self._params.num_images_per_prompt,
                **({} if mean_images is None else {"inpaint.mean_images": mean_images}),
            },
            [] if moments.first_step_at is None else [Event("first_step", moments.first_step_at)],
        )
        if moments.finish_started_at is not None:
            self._wait("decoder", moments.denoised_at, moments.finish_started_at)
        self._stage("vae_decode", moments.decode_started_at, moments.decoded_at, worker)
        self._stage("safety", moments.decoded_at, moments.checked_at, worker)

    def _wait(self, for_what: str, started_at: float | None, ended_at: float | None) -> None:
        if started_at is not None and (ended_at or self._ended_at) - started_at >= MIN_WAIT_SECONDS:
            self._stage("queue", started_at, ended_at, {"inpaint.queue.for": for_what})

    def _stage(
        self,
        name: str,
        started_at: float | None,
        ended_at: float | None,
        attributes: Attributes,
        events: Sequence[Event] = (),
    ) -> None:
        """A stage that began; if it did not end, the request ended in it."""
        if started_at is None:
            return
        code = self._code if ended_at is None else None
        end = self._ended_at if ended_at is None else ended_at
        self._spans.stage(name, started_at, end, attributes, code=code, events=events)
