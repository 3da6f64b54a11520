"""`POST /v1/inpaint` with `Prefer: respond-async`: 202 and where to ask for the result."""

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.api import prefer
from service.api import webhook as webhooks
from service.api.answers import JSON_MEDIA_TYPE, response_of
from service.api.async_documents import retry_headers, state_text
from service.api.async_request import AsyncRequest, Job
from service.api.kept_answers import Answer
from service.api.kept_result import KeptResult, answer_of, kept_result
from service.api.painting import Admitted, preview, rendered
from service.api.prefer import APPLIED_HEADER, Preference
from service.request import InpaintResult, Pixels


async def respond_async(
    request: Request, admitted: Admitted, preference: Preference, webhook: webhooks.Webhook | None
) -> Response:
    """Have an admitted request run; answer it as usual if it is done within the time that its client would wait.

    Hanging up cancels nothing: who repeats the request with the same `Idempotency-Key` is told where it is.

    Args:
        request: The request.
        admitted: The same, admitted.
        preference: What its client prefers.
        webhook: Where its end is told.

    Raises:
        InpaintError: It failed within that time.
        ClientDisconnect: The client hung up within that time.
    """
    requests = admitted.state.async_requests
    one = requests.begin(admitted.record.client, _job(admitted, webhook))
    try:
        if preference.wait_seconds:
            waited = time.monotonic() - admitted.started_at
            await requests.wait_outcome(one, max(0.0, preference.wait_seconds - waited), request)
    except BaseException:
        requests.tell(one, _come_back(one, preference))
        raise
    if one.outcome is None:
        answer = _come_back(one, preference)
        requests.tell(one, answer)
        return response_of(answer)
    try:
        result = requests.take(one)
        answer = await admitted.state.in_thread(lambda: answer_of(result, admitted.order.media_type))
        if admitted.claim is not None:
            admitted.claim.keep(answer)
        return response_of(answer, {APPLIED_HEADER: f"wait={preference.wait_seconds}"})
    finally:
        if admitted.claim is not None:
            admitted.claim.release()


def _come_back(one: AsyncRequest, preference: Preference) -> Answer:
    headers = {
        "Location": one.path,
        APPLIED_HEADER: preference.applied,
        "Cache-Control": "no-store",
        **retry_headers(one),
    }
    return Answer(one.post_id, JSON_MEDIA_TYPE, headers, state_text(one).encode(), HTTPStatus.ACCEPTED)


def _job(admitted: Admitted, webhook: webhooks.Webhook | None) -> Job:
    state = admitted.state

    async def finish(result: InpaintResult) -> KeptResult:
        painted = await rendered(admitted, result)
        return await state.in_thread(lambda: kept_result(painted))

    async def preview_of(painted: Pixels) -> bytes:
        return await preview(admitted, painted)

    return Job(
        handle=admitted.handle,
        record=admitted.record,
        claim=admitted.claim,
        webhook=webhook,
        finish=finish,
        preview=preview_of,
        eta_seconds=lambda: state.engine.eta_seconds(admitted.handle),
    )


# --- documentation ----------------------------------------------------------------

PARAMETERS: Sequence[dict[str, Any]] = (
    {
        "name": prefer.HEADER,
        "in": "header",
        "description": "`respond-async` (RFC 7240): 202 as soon as the request is admitted; it is asked for at "
        "`/v1/requests/{request_id}`. `respond-async, wait=10`: the answer itself, if it is there within 10 "
        "seconds.",
        "schema": {"type": "string"},
    },
    {
        "name": webhooks.HEADER,
        "in": "header",
        "description": "With `respond-async`: where its end is to be told, at a host that the operator allows. The "
        "state is sent there, signed as Standard Webhooks has it.",
        "schema": {"type": "string", "format": "uri", "minLength": 1, "maxLength": webhooks.MAX_CHARACTERS},
    },
)

ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "With `Prefer: respond-async`: the request is admitted.",
        "headers": {
            "Location": {"description": "Where to ask for it.", "schema": {"type": "string"}},
            APPLIED_HEADER: {"description": "`respond-async`.", "schema": {"type": "string"}},
            "Retry-After": {"description": "Seconds after which to ask.", "schema": {"type": "integer"}},
        },
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RequestState"}}},
    },
}
