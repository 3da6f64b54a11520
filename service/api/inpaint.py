"""`POST /v1/inpaint`: the native wire format."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus

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
from service.api.async_inpaint import ACCEPTED, PARAMETERS, respond_async
from service.api.events import inpaint_events
from service.api.forms import InpaintForm, read_form
from service.api.kept_answers import Answer
from service.api.multipart import read_parts
from service.api.openapi import INPAINT_OPERATION, INPAINT_RESPONSES, Tag
from service.api.painting import Admitted, Body, Order, admit, preview, replay, start
from service.api.prefer import Preference, preference_of
from service.api.problems import Fault, InvalidRequest
from service.api.state import state_of
from service.api.work import Work
from service.errors import ErrorCode, InpaintError
from service.imaging import ARRAY_MEDIA_TYPE, MEDIA_TYPES, OutputFormat, media_type
from service.messages import ModelInfo
from service.request import Pixels

_FORMAT_OF_TYPE: dict[str, OutputFormat] = {
    **{kind: name for name, kind in MEDIA_TYPES.items()},
    ARRAY_MEDIA_TYPE: "npy",
}
_SHAPES = (JSON_MEDIA_TYPE, EVENT_STREAM_MEDIA_TYPE)
_OFFERS = (*MEDIA_TYPES.values(), *_SHAPES, ARRAY_MEDIA_TYPE)
"""In the order in which a wildcard takes them: `application/*` is JSON."""

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
        openapi_extra={**INPAINT_OPERATION, "parameters": [*INPAINT_OPERATION["parameters"], *PARAMETERS]},
        responses=INPAINT_RESPONSES | ACCEPTED,
    )


async def inpaint(request: Request) -> Response:
    """Send a picture, a mask and a prompt; get the picture back with the masked part repainted."""
    accept = ", ".join(request.headers.getlist("Accept"))
    preference, state = preference_of(request), state_of(request)
    is_async = preference.respond_async and state.settings.async_max > 0
    webhook = state.async_requests.policy.webhook_of(request, is_async=is_async)
    if not is_async:
        choose_media_type(accept, _OFFERS)  # Nobody uploads megabytes for a 406.
    admitted = await admit(
        request,
        lambda: read_parts(request.headers.get("Content-Type", ""), request.stream()),
        lambda body, model: _async_order(body, model, accept, preference) if is_async else _order(body, model, accept),
    )
    if isinstance(admitted, Answer):
        if admitted.status == HTTPStatus.OK:
            choose_media_type(accept, (admitted.media_type,))  # Who now takes only another shape does not repeat.
        return replay(request, admitted)
    if is_async:
        return await respond_async(request, admitted, preference, webhook)
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
    form = _with_format(form, answer_type)
    if answer_type != EVENT_STREAM_MEDIA_TYPE:
        form = replace(form, fields=form.fields.model_copy(update={"previews": False}))
    return Order(form, answer_type)


def _async_order(body: Body, model: ModelInfo, accept: str, preference: Preference) -> Order:
    """The same where the result is fetched later, whatever shapes the client now takes.

    Where it would wait a while, these are the shapes in which it may be answered meanwhile.
    """
    assert not isinstance(body, bytes)  # noqa: S101 - for the type checker: see `inpaint`
    form = read_form(body, model)
    answer_type = JSON_MEDIA_TYPE
    if preference.wait_seconds and form.fields.num_images_per_prompt == 1:
        with suppress(InpaintError):  # `NOT_ACCEPTABLE`
            answer_type = choose_media_type(accept, _offers(form, (JSON_MEDIA_TYPE,)))
    return Order(_with_format(form, answer_type), answer_type)


def _offers(form: InpaintForm, shapes: Sequence[str]) -> tuple[str, ...]:
    """What the image may be encoded as, and the shapes that have it within them."""
    if form.is_format_named:
        return (media_type(form.fields.output_format), *shapes)
    return tuple(offer for offer in _OFFERS if offer not in _SHAPES or offer in shapes)


def _with_format(form: InpaintForm, answer_type: str) -> InpaintForm:
    """The form, with the format that is answered."""
    if answer_type not in _FORMAT_OF_TYPE or form.is_format_named:
        return form
    return replace(form, fields=form.fields.model_copy(update={"output_format": _FORMAT_OF_TYPE[answer_type]}))


def _answer_type(form: InpaintForm, accept: str) -> str:
    """The media type of the answer.

    Raises:
        InpaintError: `NOT_ACCEPTABLE`, or `INVALID_FIELD` for several images where one is to be answered.
    """
    chosen = choose_media_type(accept, _offers(form, _SHAPES))
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
