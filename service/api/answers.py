"""The shapes of an answer: one image's bytes with headers, or JSON."""

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from service.api.fields import InpaintFields
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


def image_response(painted: Painted) -> Response:
    """The bytes of the only image; what else there is to say, in headers."""
    file = painted.files[0]
    headers = {
        "X-Seed": str(painted.params.seed),
        "X-NSFW-Content-Detected": "true" if file.is_flagged else "false",
        "Server-Timing": _server_timing(painted.timings.model_dump()),
    }
    return Response(file.data, headers=headers, media_type=file.media_type)


def json_text(painted: Painted) -> str:
    """The answer as JSON. Encoding megabytes takes a while: not for the event loop."""
    answer = InpaintAnswer(
        id=painted.request_id,
        created=int(time.time()),
        model=painted.model_id,
        parameters=EffectiveParameters.of(painted.fields, painted.params, painted.tensors),
        images=[
            InpaintedImage(
                b64_json=base64.b64encode(file.data).decode("ascii"),
                media_type=file.media_type,
                seed=painted.params.seed + index,
                nsfw_content_detected=file.is_flagged,
                width=file.width,
                height=file.height,
            )
            for index, file in enumerate(painted.files)
        ],
        timings=painted.timings,
        batch=BatchShare(mean_images=painted.result.mean_images),
    )
    return answer.model_dump_json()


def json_response(text: str, timings: StageTimings) -> Response:
    """The answer as JSON, already encoded."""
    headers = {"Server-Timing": _server_timing(timings.model_dump())}
    return Response(text, headers=headers, media_type=JSON_MEDIA_TYPE)


def _server_timing(seconds: Mapping[str, float]) -> str:
    """The header's value: milliseconds by stage."""
    return ", ".join(f"{stage};dur={spent * 1000:.1f}" for stage, spent in seconds.items())
