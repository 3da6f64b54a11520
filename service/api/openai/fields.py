"""OpenAI's own words for an edit: their spelling, bounds and defaults."""

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, field_validator

from service.api.field_types import Boolean, Integer
from service.api.json_text import fault
from service.errors import ErrorCode
from service.fitting import Size
from service.imaging import ImageFormat

MAX_PARTIAL_IMAGES = 3

Quality = Literal["low", "medium", "high", "xhigh", "max"]
"""What an answer may name."""

STEPS_SHARE: dict[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
"""Denoising steps of each quality, in those that the server takes by default."""

_QUALITIES: dict[str, Quality] = {
    **{name: name for name in get_args(Quality)},
    "auto": "medium",
    # DALL-E's words.
    "standard": "medium",
    "hd": "high",
}

IGNORED = ("user", "safety_identifier", "moderation", "input_fidelity")
"""Fields that are taken and make no difference. Who the end user is is not noted anywhere; the safety checker is the
operator's and looks at every picture alike; what is kept of the input is kept bit for bit."""

_SIZE_PATTERN = "[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"


def _size(value: object) -> Size | None:
    """Read "auto", or width x height."""
    if value == "auto":
        return None
    if not isinstance(value, str) or not re.fullmatch(_SIZE_PATTERN, value):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be auto, or width x height such as 1024x768")
    width, _, height = value.partition("x")
    return Size(int(height), int(width))


ResultSize = Annotated[
    Size | None,
    PlainValidator(_size),
    WithJsonSchema({"type": "string", "pattern": f"^(auto|{_SIZE_PATTERN})$", "default": "auto"}),
]


class EditFields(BaseModel):
    """OpenAI's words beside those that are native; read from the text of form fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        None,
        description="The served model's id. OpenAI's own names are taken for it, because existing clients send them.",
    )
    size: ResultSize = Field(
        None,
        description="`auto`, the picture's own size; or width x height of the picture's shape, to which the result is "
        "scaled.",
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto",
        description="Denoising steps, as a share of the server's default: "
        + ", ".join(f"`{name}` {share:g}" for name, share in STEPS_SHARE.items())
        + "; `auto` and `standard` are `medium`, `hd` is `high`.",
    )
    output_format: ImageFormat = Field("png", description="Encoding of the images.")
    output_compression: Annotated[Integer, Field(ge=0, le=100)] | None = Field(
        None,
        description="Quality of JPEG and WebP, by default 100; WebP of 100 is lossless. PNG takes 100 alone.",
    )
    background: Literal["auto", "opaque"] = Field(
        "auto", description="`auto` keeps the picture's own transparency, `opaque` drops it."
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="Nothing is stored that a URL could name.")
    stream: Boolean = Field(False, description="Answer with server-sent events.")
    partial_images: Integer = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="Of streams: unfinished pictures at most, of the first image."
    )
    user: str = Field("", description="Ignored.")
    safety_identifier: str = Field("", description="Ignored.")
    moderation: Literal["auto", "low"] = Field("auto", description="Ignored: the safety checker is the operator's.")
    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Ignored: what the mask keeps is kept bit for bit."
    )

    @field_validator("background", mode="before")
    @classmethod
    def _paint_opaquely(cls, value: object) -> object:
        if value == "transparent":
            raise fault(ErrorCode.INVALID_FIELD, "Input should be auto or opaque: nothing transparent can be painted")
        return value

    @field_validator("response_format", mode="before")
    @classmethod
    def _store_nothing(cls, value: object) -> object:
        if value == "url":
            raise fault(ErrorCode.INVALID_FIELD, "Input should be b64_json: nothing is stored that a URL could name")
        return value

    @property
    def rung(self) -> Quality:
        """The quality by one of the names that answers may have."""
        return _QUALITIES[self.quality]
