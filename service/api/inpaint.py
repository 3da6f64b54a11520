"""`POST /v1/inpaint`: parse, prepare, submit, wait, render."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from secrets import randbelow

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from service.api.accept import choose_media_type
from service.api.answers import (
    EVENT_STREAM_MEDIA_TYPE,
    JSON_MEDIA_TYPE,
    Painted,
    image_response,
    json_response,
    json_text,
    stage_timings,
)
from service.api.events import inpaint_events
from service.api.field_types import MAX_SEED
from service.api.fields import InpaintFields
from service.api.forms import InpaintForm, read_form
from service.api.ip_adapter import ip_adapter_use
from service.api.loras import resolve_loras
from service.api.multipart import Part, read_parts
from service.api.openapi import INPAINT_OPERATION, INPAINT_RESPONSES
from service.api.pictures import Canvas, prepare_canvas, preview_file, render
from service.api.problems import Fault, InvalidRequest
from service.api.records import record_of
from service.api.state import ServiceState, state_of
from service.api.tensors import TENSORS
from service.engine.engine import Handle
from service.errors import ErrorCode, InpaintError
from service.imaging import ARRAY_MEDIA_TYPE, MEDIA_TYPES, OutputFormat, media_type
from service.messages import ModelInfo
from service.request import InpaintParams, InpaintResult, LoraUse, Pixels

_FORMAT_OF_TYPE: dict[str, OutputFormat] = {
    **{kind: name for name, kind in MEDIA_TYPES.items()},
    ARRAY_MEDIA_TYPE: "npy",
}
_OFFERS = (*_FORMAT_OF_TYPE, JSON_MEDIA_TYPE, EVENT_STREAM_MEDIA_TYPE)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A valid request, its pictures decoded and fitted.

    Attributes:
        media_type: What the answer will be sent as.
        fields: What the client asked for, with the format that is answered.
        loras: The LoRAs that it names, as they are now.
        canvas: What is painted on.
    """

    media_type: str
    fields: InpaintFields
    loras: tuple[LoraUse, ...]
    canvas: Canvas


@dataclass(frozen=True, slots=True)
class _Admitted:
    """An admitted request and what is needed to answer it; its uploaded files are not kept."""

    request: Request
    state: ServiceState
    media_type: str
    fields: InpaintFields
    params: InpaintParams
    canvas: Canvas
    handle: Handle
    started_at: float


def add_routes(app: FastAPI) -> None:
    """The native endpoint."""
    app.add_api_route(
        "/v1/inpaint",
        inpaint,
        methods=["POST"],
        response_class=Response,
        response_model=None,
        summary="Repaint the masked part of a picture",
        openapi_extra=INPAINT_OPERATION,
        responses=INPAINT_RESPONSES,
    )


async def inpaint(request: Request) -> Response:
    """Send a picture, a mask and a prompt; get the picture back with the masked part repainted."""
    admitted = await _admit(request, state_of(request), time.monotonic())
    if admitted.media_type == EVENT_STREAM_MEDIA_TYPE:
        return StreamingResponse(
            _events(admitted),
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            media_type=EVENT_STREAM_MEDIA_TYPE,
        )
    result = await _result_unless_gone(request, admitted.handle)
    painted = await _render(admitted, result)
    if admitted.media_type == JSON_MEDIA_TYPE:
        return json_response(await admitted.state.in_thread(lambda: json_text(painted)), painted.timings)
    return image_response(painted)


async def _admit(request: Request, state: ServiceState, started_at: float) -> _Admitted:
    """Everything up to admission, in the order in which it can fail for the least cost."""
    accept = ", ".join(request.headers.getlist("Accept"))
    choose_media_type(accept, _OFFERS)  # Nobody uploads megabytes for a 406.
    client = record_of(request.scope).client
    state.engine.check_room(client)
    with state.intake.place(client):
        parts = await read_parts(request.headers.get("Content-Type", ""), request.stream())
        model = state.model
        prepared = await state.in_thread(lambda: _prepare(parts, accept, state, model))
        return _submit(request, state, model, prepared, started_at)


def _prepare(parts: Sequence[Part], accept: str, state: ServiceState, model: ModelInfo) -> _Prepared:
    """Validate, find the LoRAs, decode and fit. In a thread: files are looked for, and pictures take a while."""
    form = read_form(parts, model)
    media_type = _answer_type(form, accept)
    fields = form.fields
    if media_type in _FORMAT_OF_TYPE and not form.is_format_named:
        fields = fields.model_copy(update={"output_format": _FORMAT_OF_TYPE[media_type]})
    if media_type != EVENT_STREAM_MEDIA_TYPE:
        fields = fields.model_copy(update={"previews": False})
    loras = resolve_loras(fields.loras, state.engine.adapters)
    canvas = prepare_canvas(form, fields.output_format, model, state.settings.max_pixels, state.metrics)
    return _Prepared(media_type, fields, loras, canvas)


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


def _submit(
    request: Request, state: ServiceState, model: ModelInfo, prepared: _Prepared, started_at: float
) -> _Admitted:
    """Hand it to the engine."""
    fields, canvas = prepared.fields, prepared.canvas
    # Such that the last image's own seed can be asked for, too.
    random_seed = randbelow(MAX_SEED + 2 - fields.num_images_per_prompt)
    embeds = canvas.tensors.ip_adapter_image_embeds
    has_image = canvas.ip_adapter_image is not None
    ip_adapter = ip_adapter_use(fields.ip_adapter_scale, model.ip_adapter, embeds, has_image=has_image)
    params = fields.params(model, canvas.fitted.placement.working, random_seed, prepared.loras, ip_adapter)
    record = record_of(request.scope)
    handle = state.engine.submit(
        params,
        canvas.fitted.image,
        canvas.fitted.mask,
        tensors=canvas.tensors,
        ip_adapter_image=canvas.ip_adapter_image,
        timeout_seconds=fields.timeout,
        request_id=record.request_id,
        client=record.client,
    )
    return _Admitted(request, state, prepared.media_type, fields, params, canvas, handle, started_at)


async def _result_unless_gone(request: Request, handle: Handle) -> InpaintResult:
    """The outcome; a client that hangs up before it has its request cancelled.

    Raises:
        InpaintError: The request failed.
        ClientDisconnect: The client went away.
    """
    result = asyncio.ensure_future(handle.result())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            handle.cancel("disconnect")
            raise ClientDisconnect
        return result.result()
    except asyncio.CancelledError:
        handle.cancel("drain")  # The server is going down.
        raise
    finally:
        result.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Wait for the client to hang up; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _render(admitted: _Admitted, result: InpaintResult) -> Painted:
    """Paste back and encode; note the timings."""
    state, fields = admitted.state, admitted.fields
    started_at = time.monotonic()
    files = await state.in_thread(
        lambda: render(admitted.canvas, result, fields, fields.output_format, state.settings.nsfw_policy)
    )
    now = time.monotonic()
    sent = [name for name in TENSORS if getattr(admitted.canvas.tensors, name) is not None]
    state.metrics.observe_stage("render", now - started_at)
    timings = stage_timings(result, now - started_at, now - admitted.started_at)
    record = record_of(admitted.request.scope)
    record.stages.update(timings.model_dump(exclude={"total"}))
    record.mean_images = result.mean_images
    return Painted(record.request_id, state.model.id, fields, admitted.params, sent, result, files, timings)


def _events(admitted: _Admitted) -> AsyncIterator[str]:
    record = record_of(admitted.request.scope)

    async def finish(result: InpaintResult) -> str:
        painted = await _render(admitted, result)
        return await admitted.state.in_thread(lambda: json_text(painted))

    def on_failed(error: InpaintError) -> None:
        record.code = error.code

    async def preview(painted: Pixels) -> bytes:
        return await admitted.state.in_thread(lambda: preview_file(admitted.canvas, painted, admitted.fields))

    return inpaint_events(admitted.handle, finish, preview, on_failed)
