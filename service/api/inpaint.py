"""`POST /v1/inpaint`: the native wire format."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.accept import choose_media_type
from service.api.answers import (
    EVENT_STREAM_HEADERS,
    EVENT_STREAM_MEDIA_TYPE,
    JSON_MEDIA_TYPE,
    Painted,
    events_answer,
    image_answer,
    json_answer,
    response_of,
)
from service.api.events import inpaint_events
from service.api.forms import InpaintForm, read_form
from service.api.kept_answers import Answer
from service.api.multipart import read_parts
from service.api.openapi import INPAINT_OPERATION, INPAINT_RESPONSES, Tag
from service.api.painting import Admitted, Body, Order, admit, preview, replay, start
from service.api.problems import Fault, InvalidRequest
from service.api.work import Work
from service.errors import ErrorCode, InpaintError
from service.imaging import ARRAY_MEDIA_TYPE, MEDIA_TYPES, OutputFormat, media_type
from service.messages import ModelInfo
from service.request import Pixels

_FORMAT_OF_TYPE: dict[str, OutputFormat] = {
    **{kind: name for name, kind in MEDIA_TYPES.items()},
    ARRAY_MEDIA_TYPE: "npy",
}
_OFFERS = (*_FORMAT_OF_TYPE, JSON_MEDIA_TYPE, EVENT_STREAM_MEDIA_TYPE)

_ANSWERS: Mapping[str, Callable[[Painted], Answer]] = {
    JSON_MEDIA_TYPE: json_answer,
    EVENT_STREAM_MEDIA_TYPE: events_answer,
}


def add_routes(app: FastAPI) -> None:
    """The native endpoint."""
    app.add_api_route(
        "/v1/inpaint",
        inpaint,
        methods=["POST"],
        response_class=Response,
        response_model=None,
        tags=[Tag.INPAINTING],
        summary="Repaint the masked part of a picture",
        openapi_extra=INPAINT_OPERATION,
        responses=INPAINT_RESPONSES,
    )


async def inpaint(request: Request) -> Response:
    """Send a picture, a mask and a prompt; get the picture back with the masked part repainted."""
    accept = ", ".join(request.headers.getlist("Accept"))
    choose_media_type(accept, _OFFERS)  # Nobody uploads megabytes for a 406.
    admitted = await admit(
        request,
        lambda: read_parts(request.headers.get("Content-Type", ""), request.stream()),
        lambda body, model: _order(body, model, accept),
    )
    if isinstance(admitted, Answer):
        choose_media_type(accept, (admitted.media_type,))  # Who now takes only another shape does not repeat.
        return replay(request, admitted)
    work = start(admitted, _ANSWERS.get(admitted.order.media_type, image_answer))
    if admitted.order.media_type == EVENT_STREAM_MEDIA_TYPE:
        return StreamingResponse(
            _events(admitted, work), headers=EVENT_STREAM_HEADERS, media_type=EVENT_STREAM_MEDIA_TYPE
        )
    return response_of(await work.answer_unless_gone(request))


def _order(body: Body, model: ModelInfo, accept: str) -> Order:
    """Validate the form, and choose what to answer."""
    assert not isinstance(body, bytes)  # noqa: S101 - for the type checker: see `inpaint`
    form = read_form(body, model)
    answer_type = _answer_type(form, accept)
    fields = form.fields
    if answer_type in _FORMAT_OF_TYPE and not form.is_format_named:
        fields = fields.model_copy(update={"output_format": _FORMAT_OF_TYPE[answer_type]})
    if answer_type != EVENT_STREAM_MEDIA_TYPE:
        fields = fields.model_copy(update={"previews": False})
    return Order(replace(form, fields=fields), answer_type)


def _answer_type(form: InpaintForm, accept: str) -> str:
    """The media type of the answer.

    Raises:
        InpaintError: `NOT_ACCEPTABLE`, or `INVALID_FIELD` for several images where one is to be answered.
    """
    images = (media_type(form.fields.output_format),) if form.is_format_named else tuple(_FORMAT_OF_TYPE)
    chosen = choose_media_type(accept, (*images, JSON_MEDIA_TYPE, EVENT_STREAM_MEDIA_TYPE))
    if chosen in _FORMAT_OF_TYPE and form.fields.num_images_per_prompt > 1:
        message = "More than one image is answered as JSON: send 'Accept: application/json'."
        raise InvalidRequest((Fault("num_images_per_prompt", ErrorCode.INVALID_FIELD, message),))
    return chosen


def _events(admitted: Admitted, work: Work) -> AsyncIterator[str | bytes]:
    def on_failed(error: InpaintError) -> None:
        admitted.record.code = error.code

    async def preview_of(painted: Pixels) -> bytes:
        return await preview(admitted, painted)

    return inpaint_events(work, preview_of, on_failed)
