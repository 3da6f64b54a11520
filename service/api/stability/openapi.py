"""What the OpenAPI document says of Stability's form: its own fields first, then the native ones that go with them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from service.api.fields import InpaintFields
from service.api.ip_adapter import IMAGE
from service.api.openapi import INPAINT_OPERATION, INPAINT_RESPONSES
from service.api.stability.errors import ITS_STATUS, StabilityError, its_name
from service.api.stability.form import GROW_MASK, MAX_SEED, REFUSED
from service.errors import ErrorCode
from service.imaging import MEDIA_TYPES

FinishReason = Literal["SUCCESS", "CONTENT_FILTERED"]

_FINISH_TEXT = "`CONTENT_FILTERED` when the safety checker flagged the image, which is then black or blurred."
_SEED_TEXT = "What the noise was drawn with; never 0."


class StabilityAnswer(BaseModel):
    """The image as JSON, in the form of Stability's API."""

    image: str = Field(description="The file, base64.", json_schema_extra={"contentEncoding": "base64"})
    finish_reason: FinishReason = Field(description=_FINISH_TEXT)
    seed: int = Field(description=_SEED_TEXT)


def _form_schema(native: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "image": {**native["image"], "description": "PNG, JPEG or WebP. EXIF orientation is applied."},
        "prompt": {**native["prompt"], "description": "What to paint."},
        "mask": native["mask"],
        "negative_prompt": native["negative_prompt"],
        "grow_mask": {**native["mask_grow"], "default": GROW_MASK},
        "seed": {**native["seed"], "maximum": MAX_SEED, "default": 0, "description": "0 or left out: a random one."},
        "output_format": {
            "type": "string",
            "enum": list(MEDIA_TYPES),
            "default": "png",
            "description": "Encoding of the image.",
        },
    }
    beside = {name: native[name] for name in (IMAGE, *InpaintFields.model_fields)}
    return {
        "type": "object",
        "properties": {**fields, **{name: beside[name] for name in beside if name not in {*fields, *REFUSED}}},
        "required": ["image", "prompt"],
        "additionalProperties": False,
    }


def _operation() -> dict[str, Any]:
    native = INPAINT_OPERATION["requestBody"]["content"]["multipart/form-data"]
    clients = [
        {
            "name": f"stability-client-{what}",
            "in": "header",
            "description": "Taken, and not used.",
            "schema": {"type": "string", "maxLength": 256},
        }
        for what in ("id", "user-id", "version")
    ]
    schema = _form_schema(native["schema"]["properties"])
    encoding = {name: kind for name, kind in native["encoding"].items() if name in schema["properties"]}
    form = {"schema": schema, "encoding": encoding}
    return {
        "parameters": [*INPAINT_OPERATION["parameters"], *clients],
        "requestBody": {"required": True, "content": {"multipart/form-data": form}},
    }


_NOT_OF_THE_ROUTE = frozenset({ErrorCode.NOT_FOUND, ErrorCode.METHOD_NOT_ALLOWED, ErrorCode.CANCELLED})


def _errors() -> dict[int | str, dict[str, Any]]:
    names: defaultdict[int, dict[str, None]] = defaultdict(dict)
    for code in ErrorCode:
        if code not in _NOT_OF_THE_ROUTE:
            names[ITS_STATUS[code]][its_name(code)] = None
    return {
        status: {"model": StabilityError, "description": ", ".join(f"`{name}`" for name in names[status])}
        for status in sorted(names)
    }


def _responses() -> dict[int | str, dict[str, Any]]:
    native = INPAINT_RESPONSES[200]
    headers = {
        "Finish-Reason": {
            "description": f"{_FINISH_TEXT} Of image answers.",
            "schema": {"type": "string", "enum": ["SUCCESS", "CONTENT_FILTERED"]},
        },
        "Seed": {"description": f"{_SEED_TEXT} Of image answers.", "schema": {"type": "integer"}},
        **{name: native["headers"][name] for name in ("Idempotent-Replayed", "Original-Request")},
    }
    answer = {
        "model": StabilityAnswer,
        "description": "The repainted picture: its bytes by default, JSON for `Accept: application/json`, whose "
        "content type then names the image's, as in `application/json; type=image/png`.",
        "headers": headers,
        "content": {kind: native["content"][kind] for kind in MEDIA_TYPES.values()},
    }
    return {200: answer, **_errors()}


OPERATION: dict[str, Any] = _operation()
RESPONSES: dict[int | str, dict[str, Any]] = _responses()
