"""An inpainting request's progress as server-sent events: queued, progress …, then completed or failed."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from service.api.answers import event_text
from service.api.pictures import PREVIEW_FORMAT
from service.api.problems import internal_error, problem_body
from service.api.work import Work
from service.engine.engine import Handle
from service.errors import InpaintError
from service.imaging import MEDIA_TYPES
from service.messages import StepProgress
from service.request import Pixels

logger = logging.getLogger(__name__)

_Preview = Callable[[Pixels], Awaitable[bytes]]

KEEP_ALIVE_SECONDS = 15.0
"""After so long without an event a comment is sent, lest a proxy takes the connection for dead."""

KEEP_ALIVE = ": waiting\n\n"
"""The comment."""


async def inpaint_events(
    work: Work, preview: _Preview, on_failed: Callable[[InpaintError], None]
) -> AsyncIterator[str | bytes]:
    """The events of one admitted request. When the reader goes away, the work is told.

    Args:
        work: The request; its answer is the last event.
        preview: Encodes an unfinished picture.
        on_failed: Told of an error before its event is sent.
    """
    handle = work.handle
    try:
        yield event_text("queued", json.dumps({"position": handle.position or 0}))
        shown = None
        async with aclosing(with_keep_alive(handle.progress())) as steps:
            async for progress in steps:
                if progress is None:
                    yield KEEP_ALIVE
                    continue
                data: dict[str, object] = {
                    "step": progress.step,
                    "steps": progress.steps,
                    "eta": rounded(handle.eta_seconds),
                }
                if progress.preview is not None and progress.preview is not shown:
                    shown = progress.preview
                    data["preview"] = preview_json(await preview(shown))
                yield event_text("progress", json.dumps(data))
        yield (await work.answer()).body
    except InpaintError as error:
        on_failed(error)
        yield _failed(error, handle)
    except Exception:
        logger.exception("request %s failed unexpectedly", handle.request_id)
        unexpected = internal_error()
        on_failed(unexpected)
        yield _failed(unexpected, handle)
    finally:
        work.client_left()


async def with_keep_alive(progress: AsyncIterator[StepProgress]) -> AsyncGenerator[StepProgress | None]:
    """The same, and None whenever there has been nothing for a while."""
    upcoming = asyncio.ensure_future(anext(progress, _END))
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield None
                continue
            step = upcoming.result()
            if isinstance(step, _End):
                return
            yield step
            upcoming = asyncio.ensure_future(anext(progress, _END))
    finally:
        upcoming.cancel()


class _End:
    """There is no more progress."""


_END = _End()


def preview_json(data: bytes) -> dict[str, str]:
    """A preview as events have it."""
    return {"b64_json": base64.b64encode(data).decode("ascii"), "media_type": MEDIA_TYPES[PREVIEW_FORMAT]}


def rounded(seconds: float | None) -> float | None:
    """To milliseconds."""
    return None if seconds is None else round(seconds, 3)


def _failed(error: InpaintError, handle: Handle) -> str:
    return event_text("failed", json.dumps(problem_body(error, handle.request_id), ensure_ascii=False))
