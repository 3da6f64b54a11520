"""What the OpenAPI document says of OpenAI's wire format."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from service.api.fields import InpaintFields
from service.api.forms import FILES
from service.api.openai.answers import EditAnswer, EditErrorAnswer
from service.api.openai.errors import openai_status
from service.api.openai.fields import EditFields
from service.api.openapi import GATE_CODES, INPAINT_OPERATION, INPAINT_RESPONSES, without_null
from service.errors import ErrorCode

_NOT_OF_EDITS = frozenset(
    {ErrorCode.NOT_FOUND, ErrorCode.NOT_ACCEPTABLE, ErrorCode.METHOD_NOT_ALLOWED, ErrorCode.CANCELLED}
)
_NOT_HERE = frozenset({"prompt", "num_images_per_prompt", "previews", "output_format"})
_HEADERS = ("Idempotent-Replayed", "Original-Request")


def openai_problems(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """The documented error answers of a route.

    Args:
        codes: What the route itself may answer; what the gate answers is added.
    """
    by_status: dict[int, list[str]] = defaultdict(list)
    for code in dict.fromkeys((*codes, *GATE_CODES)):
        by_status[openai_status(code)].append(code.value)
    return {
        status: {"model": EditErrorAnswer, "description": ", ".join(f"`{code}`" for code in by_status[status])}
        for status in sorted(by_status)
    }


def _scalars() -> dict[str, Any]:
    """Scalar fields: OpenAI's, then the native ones."""
    own = EditFields.model_json_schema()["properties"]
    return {
        "prompt": _NATIVE["prompt"],
        "n": {**_NATIVE["num_images_per_prompt"], "description": "Images to paint; image i uses seed + i."},
        **{name: without_null(field) for name, field in own.items()},
        **{name: _NATIVE[name] for name in InpaintFields.model_fields if name not in _NOT_HERE},
    }


_PICTURE_TEXT = "PNG, JPEG or WebP. Without a mask, what is transparent in it is repainted."
_MASK_TEXT = "What is transparent in it (at least half) is repainted; of the image's size, with an alpha channel."
_JSON_PICTURE = {
    "anyOf": [
        {"type": "string", "description": "Base64, or a data URL. Nothing is fetched."},
        {
            "type": "object",
            "properties": {"image_url": {"type": "string", "description": "A data URL. Nothing is fetched."}},
            "required": ["image_url"],
            "additionalProperties": False,
        },
    ]
}


def _form_schema() -> dict[str, Any]:
    image = {**_NATIVE["image"], "description": _PICTURE_TEXT}
    return {
        "type": "object",
        "properties": {
            "image": image,
            "image[]": {
                "type": "array",
                "items": image,
                "maxItems": 1,
                "description": "The same: OpenAI takes several.",
            },
            "mask": {**_NATIVE["mask"], "description": _MASK_TEXT},
            **{name: _NATIVE[name] for name in FILES if name not in ("image", "mask")},
            **_SCALARS,
        },
        "required": ["prompt"],
        "anyOf": [{"required": ["image"]}, {"required": ["image[]"]}],
        "additionalProperties": False,
    }


def _json_schema() -> dict[str, Any]:
    """The same as JSON; null is a field that is left out."""
    return {
        "type": "object",
        "properties": {
            "images": {"type": "array", "items": _JSON_PICTURE, "maxItems": 1, "description": _PICTURE_TEXT},
            "image": {**_JSON_PICTURE, "description": "The same, on its own."},
            "mask": {**_JSON_PICTURE, "description": _MASK_TEXT},
            **{
                name: {"type": "string", "contentEncoding": "base64", "description": _NATIVE[name]["description"]}
                for name in FILES
                if name not in ("image", "mask")
            },
            **_SCALARS,
        },
        "required": ["prompt"],
        "anyOf": [{"required": ["images"]}, {"required": ["image"]}],
        "additionalProperties": False,
    }


_NATIVE_BODY: Mapping[str, Any] = INPAINT_OPERATION["requestBody"]["content"]["multipart/form-data"]
_NATIVE: Mapping[str, Any] = _NATIVE_BODY["schema"]["properties"]
_SCALARS = _scalars()

EDIT_OPERATION: dict[str, Any] = {
    "parameters": INPAINT_OPERATION["parameters"],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _form_schema(),
                "encoding": {**_NATIVE_BODY["encoding"], "image[]": _NATIVE_BODY["encoding"]["image"]},
            },
            "application/json": {"schema": _json_schema()},
        },
    },
}

EDIT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": EditAnswer,
        "description": "The repainted pictures; with `stream`, as events.",
        "headers": {name: header for name, header in INPAINT_RESPONSES[200]["headers"].items() if name in _HEADERS},
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "string",
                    "description": "`image_edit.partial_image` up to `partial_images` times, then "
                    "`image_edit.completed` for each image; or `error`.",
                }
            }
        },
    },
    **openai_problems(*(code for code in ErrorCode if code not in _NOT_OF_EDITS)),
}
