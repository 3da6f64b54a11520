"""The progress of an asynchronous request as server-sent events, for any number of readers, who come and go."""

import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from service.api.answers import event_text
from service.api.async_documents import answer_document, error_document
from service.api.async_request import AsyncRequest, Ended
from service.api.events import KEEP_ALIVE, KEEP_ALIVE_SECONDS, preview_json, rounded
from service.api.state import ServiceState

_LOOK_SECONDS = 1.0
"""How often a place in the queue is looked at."""


async def request_events(
    state: ServiceState, one: AsyncRequest, last_id: str | None, *, with_base64: bool
) -> AsyncIterator[str]:
    """What there is to see now, and then whatever changes, up to the end. Nothing of it depends on who else reads.

    An event's id says what was seen, so a reader that comes back is not shown that again.

    Args:
        state: The service.
        one: The request.
        last_id: Of the last event that the reader has seen.
        with_base64: Whether images are in the last event.
    """
    seen, shown, heard_at = last_id, None, time.monotonic()
    while True:
        mark = one.mark
        if mark == seen:
            if one.ended is not None:
                return
            await one.changed(_LOOK_SECONDS)
            if time.monotonic() - heard_at >= KEEP_ALIVE_SECONDS:
                heard_at = time.monotonic()
                yield KEEP_ALIVE
            continue
        ended = one.ended
        if ended is not None:
            yield await state.in_thread(partial(_last_event, one, ended, with_base64=with_base64))
            return
        name, data = _current(one)
        preview = await one.preview() if name == "progress" else None
        if preview is not None and preview[0] is not shown:
            shown, file = preview
            data["preview"] = preview_json(file)
        yield _event(mark, name, data)
        seen, heard_at = mark, time.monotonic()


def _current(one: AsyncRequest) -> tuple[str, dict[str, Any]]:
    position, eta = one.position, rounded(one.eta_seconds)
    if position is not None:
        return "queued", {"position": position, "eta": eta}
    return "progress", {"step": one.progress.step, "steps": one.progress.steps, "eta": eta}


def _last_event(one: AsyncRequest, ended: Ended, *, with_base64: bool) -> str:
    if ended.result is not None:
        return _event(one.mark, "completed", answer_document(one, ended.result, with_base64=with_base64))
    assert ended.error is not None  # noqa: S101 - for the type checker: there is one of both
    return _event(one.mark, ended.status, error_document(one, ended.error))


def _event(event_id: str, name: str, data: dict[str, Any]) -> str:
    return f"id: {event_id}\n{event_text(name, json.dumps(data, ensure_ascii=False))}"
