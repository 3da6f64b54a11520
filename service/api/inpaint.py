"""`POST /v1/inpaint`: parse, prepare, submit, wait, render."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from secrets import randbelow

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
    stage_timings,
)
from service.api.events import inpaint_events
from service.api.field_types import MAX_SEED
from service.api.fields import InpaintFields
from service.api.forms import InpaintForm, read_form
from service.api.idempotency import form_digest, request_name
from service.api.ip_adapter import ip_adapter_use
from service.api.kept_answers import Answer, Claim
from service.api.loras import resolve_loras
from service.api.multipart import Part, read_parts
from service.api.openapi import INPAINT_OPERATION, INPAINT_RESPONSES, Tag
from service.api.pictures import Canvas, prepare_canvas, preview_file, render
from service.api.problems import Fault, InvalidRequest
from service.api.records import RequestRecord, record_of
from service.api.state import ServiceState, state_of
from service.api.tensors import TENSORS
from service.api.work import Work
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

    record: RequestRecord
    state: ServiceState
    media_type: str
    fields: InpaintFields
    params: InpaintParams
    canvas: Canvas
    handle: Handle
    claim: Claim | None
    started_at: float


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
    admitted = await _admit(request, state_of(request), accept, time.monotonic())
    if isinstance(admitted, Answer):
        return _replay(request, admitted, accept)
    work = Work(admitted.handle, lambda result: _finish(admitted, result), admitted.claim, admitted.state.unfinished)
    if admitted.media_type == EVENT_STREAM_MEDIA_TYPE:
        return StreamingResponse(_events(admitted, work), headers=EVENT_STREAM_HEADERS, media_type=admitted.media_type)
    return response_of(await work.answer_unless_gone(request))


async def _admit(request: Request, state: ServiceState, accept: str, started_at: float) -> _Admitted | Answer:
    """Everything up to admission, in the order in which it can fail for the least cost.

    Returns:
        The admitted request; or the answer of the one that it repeats.
    """
    choose_media_type(accept, _OFFERS)  # Nobody uploads megabytes for a 406.
    client = record_of(request.scope).client
    name = request_name(request)
    if name is None or not state.kept_answers.is_known(name):  # A repeated request needs no place in the queue.
        state.engine.check_room(client)
    with state.intake.place(client):
        parts = await read_parts(request.headers.get("Content-Type", ""), request.stream())
        claim = None
        if name is not None:
            digest = await state.in_thread(lambda: form_digest(parts))
            found = state.kept_answers.begin(name, digest)
            if isinstance(found, Answer):
                return found
            claim = found
        try:
            model = state.model
            prepared = await state.in_thread(lambda: _prepare(parts, accept, state, model))
            return _submit(request, state, prepared, claim, started_at)
        except BaseException:
            if claim is not None:
                claim.release()
            raise


def _replay(request: Request, answer: Answer, accept: str) -> Response:
    """The first answer as it was; a client that now takes only another shape does not repeat its request.

    Raises:
        InpaintError: `NOT_ACCEPTABLE`.
    """
    choose_media_type(accept, (answer.media_type,))
    record_of(request.scope).replay_of = answer.request_id
    state_of(request).metrics.replayed()
    return response_of(answer, {"Idempotent-Replayed": "true", "Original-Request": answer.request_id})


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
    request: Request, state: ServiceState, prepared: _Prepared, claim: Claim | None, started_at: float
) -> _Admitted:
    """Hand it to the engine."""
    model, fields, canvas = state.model, prepared.fields, prepared.canvas
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
    return _Admitted(record, state, prepared.media_type, fields, params, canvas, handle, claim, started_at)


async def _finish(admitted: _Admitted, result: InpaintResult) -> Answer:
    """The answer, in the shape that was asked for."""
    painted = await _render(admitted, result)
    if admitted.media_type == JSON_MEDIA_TYPE:
        return await admitted.state.in_thread(lambda: json_answer(painted))
    if admitted.media_type == EVENT_STREAM_MEDIA_TYPE:
        return await admitted.state.in_thread(lambda: events_answer(painted))
    return image_answer(painted)


async def _render(admitted: _Admitted, result: InpaintResult) -> Painted:
    """Paste back and encode; note the timings."""
    state, fields, record = admitted.state, admitted.fields, admitted.record
    started_at = time.monotonic()
    files = await state.in_thread(
        lambda: render(admitted.canvas, result, fields, fields.output_format, state.settings.nsfw_policy)
    )
    now = time.monotonic()
    sent = [name for name in TENSORS if getattr(admitted.canvas.tensors, name) is not None]
    state.metrics.observe_stage("render", now - started_at)
    timings = stage_timings(result, now - started_at, now - admitted.started_at)
    record.stages.update(timings.model_dump(exclude={"total"}))
    record.mean_images = result.mean_images
    return Painted(record.request_id, state.model.id, fields, admitted.params, sent, result, files, timings)


def _events(admitted: _Admitted, work: Work) -> AsyncIterator[str | bytes]:
    def on_failed(error: InpaintError) -> None:
        admitted.record.code = error.code

    async def preview(painted: Pixels) -> bytes:
        return await admitted.state.in_thread(lambda: preview_file(admitted.canvas, painted, admitted.fields))

    return inpaint_events(work, preview, on_failed)
