"""`POST /v1/images/edits`: OpenAI's wire format."""

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.answers import EVENT_STREAM_HEADERS, EVENT_STREAM_MEDIA_TYPE, response_of
from service.api.kept_answers import Answer
from service.api.openai.answers import completed_events, edit_answer
from service.api.openai.bodies import read_body
from service.api.openai.document import EDIT_OPERATION, EDIT_RESPONSES
from service.api.openai.events import edit_events
from service.api.openai.orders import EditOrder, order_of
from service.api.openapi import Tag
from service.api.painting import admit, replay, start
from service.api.state import state_of

EDITS_PATH = "/v1/images/edits"


def add_routes(app: FastAPI) -> None:
    """The endpoint."""
    app.add_api_route(
        EDITS_PATH,
        edit,
        methods=["POST"],
        response_class=Response,
        response_model=None,
        tags=[Tag.OTHER_FORMATS],
        summary="OpenAI's wire format: repaint what is transparent in the mask",
        openapi_extra=EDIT_OPERATION,
        responses=EDIT_RESPONSES,
    )


async def edit(request: Request) -> Response:
    """As `client.images.edit` of OpenAI's libraries sends it; native fields can be sent beside."""
    max_pixels = state_of(request).settings.max_pixels
    admitted = await admit(request, lambda: read_body(request), lambda body, model: order_of(body, model, max_pixels))
    if isinstance(admitted, Answer):
        return replay(request, admitted)
    order = admitted.order
    assert isinstance(order, EditOrder)  # noqa: S101 - for the type checker: see above
    if order.media_type == EVENT_STREAM_MEDIA_TYPE:
        work = start(admitted, lambda painted: completed_events(order, painted))
        events = edit_events(admitted, order, work)
        return StreamingResponse(events, headers=EVENT_STREAM_HEADERS, media_type=EVENT_STREAM_MEDIA_TYPE)
    work = start(admitted, lambda painted: edit_answer(order, painted))
    return response_of(await work.answer_unless_gone(request))
