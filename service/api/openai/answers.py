"""What OpenAI's clients read: the answer as JSON, and the events of a stream."""

import base64
import json
import time
from typing import Literal

from pydantic import BaseModel, Field

from service.api.answers import (
    EVENT_STREAM_HEADERS,
    EVENT_STREAM_MEDIA_TYPE,
    JSON_MEDIA_TYPE,
    Painted,
    event_text,
)
from service.api.kept_answers import Answer
from service.api.openai.errors import error_members
from service.api.openai.fields import Quality
from service.api.openai.orders import EditOrder
from service.api.pictures import ImageFile
from service.errors import InpaintError
from service.imaging import ImageFormat

Background = Literal["transparent", "opaque"]


class TokenDetails(BaseModel):
    """Nothing is counted in tokens."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Clients expect it; nothing is counted in tokens, so all of it is zero."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    output_tokens_details: TokenDetails = TokenDetails()
    total_tokens: int = 0


class EditedImage(BaseModel):
    """One painted image: OpenAI's field, and ours."""

    b64_json: str = Field(description="The file, base64.", json_schema_extra={"contentEncoding": "base64"})
    seed: int = Field(description="What its noise was drawn with: the request's seed plus its index.")
    nsfw_content_detected: bool


class EditAnswer(BaseModel):
    """The answer to an edit."""

    created: int = Field(description="Unix time.")
    background: Background = Field(description="`transparent` where the picture came with transparency of its own.")
    data: list[EditedImage]
    output_format: ImageFormat
    quality: Quality | None = Field(description="What the steps come from; null where the client chose them itself.")
    size: str = Field(description="Width x height of the images.")
    usage: Usage


class EditError(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class EditErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: EditError


def edit_answer(order: EditOrder, painted: Painted) -> Answer:
    """The answer as JSON. Encoding megabytes takes a while: not for the event loop."""
    first = painted.files[0]
    answer = EditAnswer(
        created=int(time.time()),
        background=_background(first),
        data=[
            EditedImage(b64_json=_base64(file), seed=painted.params.seed + index, nsfw_content_detected=file.is_flagged)
            for index, file in enumerate(painted.files)
        ],
        output_format=order.image_format,
        quality=order.quality,
        size=_size(first),
        usage=Usage(),
    )
    return Answer(painted.request_id, JSON_MEDIA_TYPE, {}, answer.model_dump_json().encode())


def completed_events(order: EditOrder, painted: Painted) -> Answer:
    """The events that end a stream, one for each image. Not for the event loop, either."""
    events = [
        _event(
            "image_edit.completed",
            order,
            file,
            usage=Usage().model_dump(),
            seed=painted.params.seed + index,
            nsfw_content_detected=file.is_flagged,
        )
        for index, file in enumerate(painted.files)
    ]
    return Answer(painted.request_id, EVENT_STREAM_MEDIA_TYPE, EVENT_STREAM_HEADERS, "".join(events).encode())


def partial_image_event(order: EditOrder, file: ImageFile, index: int) -> str:
    """The event of an unfinished picture.

    Args:
        order: What was asked for.
        file: The picture.
        index: How many came before.
    """
    return _event("image_edit.partial_image", order, file, partial_image_index=index)


def error_event(error: InpaintError) -> str:
    """The event that ends a stream without a picture."""
    return event_text("error", json.dumps({"type": "error", "error": error_members(error)}, ensure_ascii=False))


def _event(kind: str, order: EditOrder, file: ImageFile, **members: object) -> str:
    common = {
        "type": kind,
        "b64_json": _base64(file),
        "created_at": int(time.time()),
        "size": _size(file),
        "quality": order.quality or "auto",
        "background": _background(file),
        "output_format": order.image_format,
    }
    return event_text(kind, json.dumps({**common, **members}))


def _base64(file: ImageFile) -> str:
    return base64.b64encode(file.data).decode("ascii")


def _size(file: ImageFile) -> str:
    return f"{file.width}x{file.height}"


def _background(file: ImageFile) -> Background:
    return "transparent" if file.has_alpha else "opaque"
