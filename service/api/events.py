"""An inpainting request's progress as server-sent events: queued, progress …, then completed or failed."""

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from service.api.problems import internal_error, problem_body
from service.engine.engine import Handle
from service.errors import InpaintError
from service.messages import StepProgress
from service.request import InpaintResult

logger = logging.getLogger(__name__)

_Finish = Callable[[InpaintResult], Awaitable[str]]


async def inpaint_events(
    handle: Handle, finish: _Finish, on_failed: Callable[[InpaintError], None]
) -> AsyncIterator[str]:
    """The events of one admitted request. When the reader goes away, the request is cancelled.

    Args:
        handle: The request.
        finish: Makes the JSON of the answer from the result.
        on_failed: Told of an error before its event is sent.
    """
    try:
        yield _event("queued", json.dumps({"position": handle.position or 0}))
        pace = _Pace()
        async for progress in handle.progress():
            eta = pace.eta_seconds(progress)
            yield _event("progress", json.dumps({"step": progress.step, "steps": progress.steps, "eta": eta}))
        yield _event("completed", await finish(await handle.result()))
    except InpaintError as error:
        on_failed(error)
        yield _failed(error, handle)
    except Exception:
        logger.exception("request %s failed unexpectedly", handle.request_id)
        unexpected = internal_error()
        on_failed(unexpected)
        yield _failed(unexpected, handle)
    finally:
        handle.cancel("disconnect")  # Of no effect once there is an outcome.


class _Pace:
    """How long the rest will take, judged by the steps seen so far."""

    def __init__(self) -> None:
        self._first_step = 0
        self._first_at: float | None = None

    def eta_seconds(self, progress: StepProgress) -> float | None:
        """Seconds to the last step; None before there are two steps to judge by."""
        remaining = progress.steps - progress.step
        now = time.monotonic()
        if self._first_at is None or progress.step <= self._first_step:  # The start, also after a lost worker.
            self._first_step, self._first_at = progress.step, now
            return None if remaining else 0.0
        return round((now - self._first_at) / (progress.step - self._first_step) * remaining, 3)


def _failed(error: InpaintError, handle: Handle) -> str:
    return _event("failed", json.dumps(problem_body(error, handle.request_id), ensure_ascii=False))


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
