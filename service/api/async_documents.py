"""What an asynchronous request looks like to those who ask for it."""

import json
from math import ceil
from typing import Any

from service.api.async_request import AsyncRequest
from service.api.events import rounded
from service.api.kept_result import KeptResult, result_document
from service.api.problems import problem_body
from service.errors import InpaintError

_MIN_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 30.0


def state_text(one: AsyncRequest, *, with_base64: bool = False) -> str:
    """All that there is to say of it, as JSON; see `service.api.async_schemas.RequestState`.

    Args:
        one: The request.
        with_base64: Whether its images are in it. Takes a while: not for the event loop.
    """
    ended, progress = one.ended, one.progress
    document = {
        "id": one.id,
        "status": one.status,
        "created": one.created,
        "position": one.position,
        "eta": rounded(one.eta_seconds),
        "progress": {"step": progress.step, "steps": progress.steps},
        "expires": None if ended is None else ended.expires,
        "result": None,
        "error": None,
        "links": {"self": one.path, "events": f"{one.path}/events"},
    }
    if ended is not None and ended.result is not None:
        document["result"] = answer_document(one, ended.result, with_base64=with_base64)
    if ended is not None and ended.error is not None:
        document["error"] = error_document(one, ended.error)
    return json.dumps(document, ensure_ascii=False)


def answer_document(one: AsyncRequest, result: KeptResult, *, with_base64: bool = False) -> dict[str, Any]:
    """The JSON answer with links to its images."""
    return result_document(result, lambda index: f"{one.path}/images/{index}", with_base64=with_base64)


def error_document(one: AsyncRequest, error: InpaintError) -> dict[str, Any]:
    """Why it has no result."""
    return problem_body(error, one.post_id)


def retry_seconds(one: AsyncRequest) -> float:
    """When to ask again: when it is done, as far as one can tell; and not too often, nor too late to matter."""
    return min(max(one.eta_seconds or 0.0, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)


def retry_headers(one: AsyncRequest) -> dict[str, str]:
    """The header that says so, as long as there is something to wait for."""
    return {} if one.ended is not None else {"Retry-After": str(ceil(retry_seconds(one)))}
