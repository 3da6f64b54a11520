"""The shapes of an answer: one image's bytes with headers, JSON, or the last of some events."""

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from service.api.fields import InpaintFields
from service.api.kept_answers import Answer
from service.api.pictures import ImageFile
from service.api.schemas import (
    BatchShare,
    EffectiveParameters,
    InpaintAnswer,
    InpaintedImage,
    StageTimings,
)
from service.request import InpaintParams, InpaintResult

JSON_MEDIA_TYPE = "application/json"
EVENT_STREAM_MEDIA_TYPE = "text/event-stream"
EVENT_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Painted:
    """Everything that an answer is made of.

    Attributes:
        request_id: The request's id.
        model_id: The model that painted.
        fields: What was asked for, with the format that is answered.
        params: What it was painted with.
        tensors: Names of the tensors that were sent.
        result: What the worker says.
        files: The images.
        timings: Seconds by stage.
    """

    request_id: str
    model_id: str
    fields: InpaintFields
    params: InpaintParams
    tensors: Sequence[str]
    result: InpaintResult
    files: Sequence[ImageFile]
    timings: StageTimings


def stage_timings(result: InpaintResult, render_seconds: float, total_seconds: float) -> StageTimings:
    """Seconds by stage; one vocabulary for headers, JSON and log."""
    timings = result.timings
    return StageTimings(
        queue=timings.queue,
        prepare=timings.prepare,
        denoise=timings.denoise,
        decode=timings.vae_decode,
        safety=timings.safety,
        render=render_seconds,
        total=total_seconds,
    )


def image_answer(painted: Painted) -> Answer:
    """The bytes of the only image; what else there is to say, in headers."""
    file = painted.files[0]
    headers = image_headers(file, painted.params.seed) | server_timing(painted.timings.model_dump())
    return Answer(painted.request_id, file.media_type, headers, file.data)


def json_answer(painted: Painted) -> Answer:
    """The answer as JSON. Encoding megabytes takes a while: not for the event loop."""
    headers = server_timing(painted.timings.model_dump())
    return Answer(painted.request_id, JSON_MEDIA_TYPE, headers, _json(painted).encode())


def events_answer(painted: Painted) -> Answer:
    """The JSON as the event that ends a stream. Not for the event loop, either."""
    event = event_text("completed", _json(painted)).encode()
    return Answer(painted.request_id, EVENT_STREAM_MEDIA_TYPE, EVENT_STREAM_HEADERS, event)


def event_text(name: str, data: str) -> str:
    """A server-sent event; its data is one line."""
    return f"event: {name}\ndata: {data}\n\n"


def response_of(answer: Answer, headers: Mapping[str, str] | None = None) -> Response:
    """The answer, to be sent whole.

    Args:
        answer: What to send.
        headers: Further headers.
    """
    said = {**answer.headers, **(headers or {})}
    return Response(answer.body, answer.status, headers=said, media_type=answer.media_type)


def inpaint_answer(painted: Painted, images: list[InpaintedImage]) -> InpaintAnswer:
    """All that the JSON says; of the images what is given."""
    return InpaintAnswer(
        id=painted.request_id,
        created=int(time.time()),
        model=painted.model_id,
        parameters=EffectiveParameters.of(painted.fields, painted.params, painted.tensors),
        images=images,
        timings=painted.timings,
        batch=BatchShare(mean_images=painted.result.mean_images),
    )


def _json(painted: Painted) -> str:
    images = [
        InpaintedImage(
            b64_json=base64.b64encode(file.data).decode("ascii"),
            media_type=file.media_type,
            seed=painted.params.seed + index,
            nsfw_content_detected=file.is_flagged,
            width=file.width,
            height=file.height,
        )
        for index, file in enumerate(painted.files)
    ]
    return inpaint_answer(painted, images).model_dump_json()


def image_headers(file: ImageFile, seed: int) -> dict[str, str]:
    """What there is to say beside an image's bytes."""
    return {"X-Seed": str(seed), "X-NSFW-Content-Detected": "true" if file.is_flagged else "false"}


def server_timing(seconds: Mapping[str, float]) -> dict[str, str]:
    """The header: milliseconds by stage."""
    return {"Server-Timing": ", ".join(f"{stage};dur={spent * 1000:.1f}" for stage, spent in seconds.items())}
