"""What every wire format shares: from an order to an admitted request, and from its result to pictures.

A wire format reads a body, translates it into an `Order` in the native form's words, and makes an answer of what was
painted; queue, limits, deadlines, flags and metrics are the same for all of them:

    body ──read──▶ parts, bytes ──translate──▶ Order ──admit──▶ Admitted ──start──▶ Work ──▶ Painted ──▶ Answer
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from secrets import randbelow

from starlette.requests import Request
from starlette.responses import Response

from service.api.answers import Painted, response_of, stage_timings
from service.api.field_types import MAX_SEED
from service.api.forms import InpaintForm
from service.api.idempotency import body_digest, request_name
from service.api.ip_adapter import ip_adapter_use
from service.api.kept_answers import Answer, Claim
from service.api.loras import resolve_loras
from service.api.multipart import Part
from service.api.pictures import (
    DEFAULT_ENCODING,
    DEFAULT_SHAPING,
    Canvas,
    Encoding,
    ImageFile,
    Shaping,
    prepare_canvas,
    preview_file,
    render,
    unfinished_file,
)
from service.api.records import RequestRecord, record_of
from service.api.state import ServiceState, state_of
from service.api.tensors import TENSORS
from service.api.traces import StageClock, order_attributes, spanning, trace_painting
from service.api.work import Work
from service.engine.engine import Handle
from service.imaging import ImageFormat, MaskChannel
from service.messages import ModelInfo
from service.request import InpaintParams, InpaintResult, LoraUse, Pixels
from service.spans import RequestSpans

Body = Sequence[Part] | bytes
"""A body that was read to its end: the parts of a form, or what else it is."""


@dataclass(frozen=True, slots=True)
class Order:
    """One request in the native form's words.

    Attributes:
        form: The form, with the format that is answered in its fields.
        media_type: What the answer will be sent as.
        mask_channel: What of the mask's file says where to repaint.
        shaping: What is done to the picture before it is painted on, beyond what the form says.
        encoding: How pictures are encoded, beyond what the form says.
    """

    form: InpaintForm
    media_type: str
    mask_channel: MaskChannel = "luminance"
    shaping: Shaping = DEFAULT_SHAPING
    encoding: Encoding = DEFAULT_ENCODING


@dataclass(frozen=True, slots=True)
class Admitted:
    """An admitted request and what is needed to answer it; its uploaded files are not kept.

    Attributes:
        record: What is noted of the request.
        state: The service.
        order: What was asked for, without the uploaded files.
        params: What it is painted with.
        canvas: What is painted on.
        handle: The engine's hold on it.
        claim: Its hold on its name, where the client gave it one.
        started_at: `time.monotonic()` when it came.
    """

    record: RequestRecord
    state: ServiceState
    order: Order
    params: InpaintParams
    canvas: Canvas
    handle: Handle
    claim: Claim | None
    started_at: float


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An order, its LoRAs found, its pictures decoded and fitted."""

    order: Order
    loras: tuple[LoraUse, ...]
    canvas: Canvas


async def admit(
    request: Request, read: Callable[[], Awaitable[Body]], translate: Callable[[Body, ModelInfo], Order]
) -> Admitted | Answer:
    """Everything up to admission, in the order in which it can fail for the least cost.

    Args:
        request: The request; of its body nothing has been read.
        read: Reads the body to its end.
        translate: Makes an order of it. Runs in a thread.

    Returns:
        The admitted request; or the answer of the one that it repeats, to be given with `replay`.

    Raises:
        InpaintError: It is refused.
    """
    started_at = time.monotonic()
    state, client, spans = state_of(request), record_of(request.scope).client, record_of(request.scope).spans
    name = request_name(request)
    if name is None or not state.kept_answers.is_known(name):  # A repeated request needs no place in the queue.
        state.engine.check_room(client)
    with state.intake.place(client):
        with spanning(spans, "receive", spans.started_at):
            body = await read()
        claim = None
        if name is not None:
            digest = await state.in_thread(lambda: body_digest(request.url.path, body))
            found = state.kept_answers.begin(name, digest)
            if isinstance(found, Answer):
                return found
            claim = found
        try:
            model = state.model
            prepared = await state.in_thread(lambda: _prepare(translate(body, model), state, model, spans))
            return _submit(request, state, prepared, claim, started_at)
        except BaseException:
            if claim is not None:
                claim.release()
            raise


def _prepare(order: Order, state: ServiceState, model: ModelInfo, spans: RequestSpans) -> _Prepared:
    """Find the LoRAs, decode and fit. In a thread: files are looked for, and pictures take a while."""
    loras = resolve_loras(order.form.fields.loras, state.engine.adapters)
    canvas = prepare_canvas(
        order.form,
        model,
        state.settings.max_pixels,
        StageClock(state.metrics, spans),
        mask_channel=order.mask_channel,
        shaping=order.shaping,
    )
    return _Prepared(order, loras, canvas)


def _submit(
    request: Request, state: ServiceState, prepared: _Prepared, claim: Claim | None, started_at: float
) -> Admitted:
    """Hand it to the engine."""
    model, fields, canvas = state.model, prepared.order.form.fields, prepared.canvas
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
    record.spans.note(order_attributes(params))
    handle.when_ended(lambda outcome: trace_painting(record.spans, handle, outcome))
    order = replace(prepared.order, form=prepared.order.form.without_files())
    return Admitted(record, state, order, params, canvas, handle, claim, started_at)


def start(admitted: Admitted, answer_of: Callable[[Painted], Answer]) -> Work:
    """Have an admitted request answered.

    Args:
        admitted: The request.
        answer_of: Makes the answer. Runs in a thread, because encoding megabytes takes a while.
    """

    async def finish(result: InpaintResult) -> Answer:
        painted = await rendered(admitted, result)
        return await admitted.state.in_thread(lambda: answer_of(painted))

    return Work(admitted.handle, finish, admitted.claim, admitted.state.unfinished)


def replay(request: Request, answer: Answer) -> Response:
    """The first answer as it was, to a request that repeats the first."""
    record = record_of(request.scope)
    record.replay_of = answer.request_id
    record.spans.note({"inpaint.replay_of": answer.request_id})
    state_of(request).metrics.replayed()
    return response_of(answer, {"Idempotent-Replayed": "true", "Original-Request": answer.request_id})


async def preview(admitted: Admitted, painted: Pixels) -> bytes:
    """A picture of an unfinished step as a file, see `service.api.pictures.PREVIEW_FORMAT`.

    Args:
        admitted: The request.
        painted: (h, w, 3) uint8 RGB.
    """
    fields = admitted.order.form.fields
    return await admitted.state.in_thread(lambda: preview_file(admitted.canvas, painted, fields))


async def unfinished(admitted: Admitted, painted: Pixels, image_format: ImageFormat) -> ImageFile:
    """A picture of an unfinished step in the form of the finished one.

    Args:
        admitted: The request.
        painted: (h, w, 3) uint8 RGB.
        image_format: What to encode as.
    """
    order = admitted.order
    return await admitted.state.in_thread(
        lambda: unfinished_file(admitted.canvas, painted, order.form.fields, image_format, order.encoding)
    )


async def rendered(admitted: Admitted, result: InpaintResult) -> Painted:
    """Paste back and encode what was painted; note the timings."""
    state, fields, record = admitted.state, admitted.order.form.fields, admitted.record
    started_at = time.monotonic()
    policy, encoding = state.settings.nsfw_policy, admitted.order.encoding
    files = await state.in_thread(lambda: render(admitted.canvas, result, fields, policy, encoding))
    now = time.monotonic()
    sent = [name for name in TENSORS if getattr(admitted.canvas.tensors, name) is not None]
    state.metrics.observe_stage("render", now - started_at)
    record.spans.stage("render", started_at, now)
    timings = stage_timings(result, now - started_at, now - admitted.started_at)
    record.stages.update(timings.model_dump(exclude={"total"}))
    record.mean_images = result.mean_images
    return Painted(record.request_id, state.model.id, fields, admitted.params, sent, result, files, timings)
