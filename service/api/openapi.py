"""The OpenAPI document: what FastAPI cannot find out by itself, because the form is read by hand.

How a route gets into it, and so into `/docs` and `openapi.yaml`, by arguments of `add_api_route`:

- `tags=[Tag.…]` and `summary=`, without a full stop. The function's docstring is the description, its name the
  operation's id, and models in its signature become schemas.
- `responses=`: `problems(…)` for what it refuses, and beside it each status that it answers otherwise, with every
  content type as it is sent, the default one first: `/docs` asks for that one, and offers the others.
- `openapi_extra=`: what is read by hand, `parameters` and `requestBody`. In forms, files are
  `{"type": "string", "format": "binary"}`; fields that hold JSON have the schema of what they hold and an `encoding` of
  `application/json`. Nothing is sent for a field that is left empty on the page. The first of a schema's `examples`
  is filled in there, so give one only where a request should begin with it. A body of JSON begins as the `example` of
  its media type; without one, as every field with something made up.
- Schemas that no signature names: by `models_json_schema` in `openapi_document`.

`X-Request-Id` is added to every answer. After a change: `inpaint-service openapi > openapi.yaml`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from service import __version__
from service.api.field_types import FreeUFactors
from service.api.fields import InpaintFields
from service.api.forms import JSON_FIELDS
from service.api.idempotency import HEADER, MAX_CHARACTERS, PATTERN
from service.api.problems import MAY_PASS, PROBLEM_MEDIA_TYPE, STATUS
from service.api.schemas import InpaintAnswer, Problem
from service.errors import ErrorCode
from service.imaging import ARRAY_MEDIA_TYPE, MEDIA_TYPES

TITLE = "inpaint-service"
DESCRIPTION = """\
Stable Diffusion inpainting over HTTP. Send a picture, a mask and a prompt; get the picture back with the masked part
repainted. Pixels outside the mask are the upload's own, bit for bit.

Errors are `application/problem+json` (RFC 9457) with a `code` to branch on, but for the routes in other wire formats,
which have their own. Every answer has `X-Request-Id`; failures
that would only repeat themselves have `X-Should-Retry: false`.
"""


class Tag(StrEnum):
    """Under which heading an operation stands, in this order."""

    INPAINTING = "Inpainting"
    OTHER_FORMATS = "Inpainting, in other wire formats"
    MODELS = "Models and adapters"
    OPERATION = "Operation"


_TAG_TEXTS = {
    Tag.INPAINTING: "Paint, and get pictures back.",
    Tag.OTHER_FORMATS: "For clients of other services, with another base URL. Errors are in the form of each.",
    Tag.MODELS: "What is served, and what requests can name.",
    Tag.OPERATION: "For load balancers, process managers and Prometheus.",
}

# Keys that YAML reads as strings without quotes.
_PLAIN_KEY = re.compile(r"[A-Za-z$][A-Za-z0-9_-]*")
_YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})

_REFS = "#/components/schemas/{model}"

_HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {"description": "Names the request in logs.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds after which to send it again.", "schema": {"type": "integer"}},
    "X-Should-Retry": {
        "description": "`false`: the same request would fail again.",
        "schema": {"type": "string", "enum": ["false"]},
    },
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string", "enum": ["Bearer"]}},
}
_WITH_RETRY_AFTER = frozenset(
    {
        ErrorCode.IN_PROGRESS,
        ErrorCode.OVERLOADED,
        ErrorCode.NOT_READY,
        ErrorCode.DRAINING,
        ErrorCode.WORKER_LOST,
    }
)

# In any answer; the gate refuses before a route is known.
GATE_CODES = (
    ErrorCode.BAD_REQUEST,
    ErrorCode.UNAUTHORIZED,
    ErrorCode.HEADERS_TOO_LARGE,
    ErrorCode.INTERNAL,
)
_NOT_OF_INPAINT = frozenset(
    {
        ErrorCode.NOT_FOUND,
        ErrorCode.UNKNOWN_MODEL,
        ErrorCode.GONE,
        ErrorCode.METHOD_NOT_ALLOWED,
        ErrorCode.CANCELLED,
    }
)


def problems(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """The documented error answers of a route.

    Args:
        codes: What the route itself may answer; what the gate answers is added.
    """
    by_status: dict[int, list[ErrorCode]] = defaultdict(list)
    for code in dict.fromkeys((*codes, *GATE_CODES)):
        by_status[STATUS[code]].append(code)
    return {status: _problem(by_status[status]) for status in sorted(by_status)}


def _problem(codes: Iterable[ErrorCode]) -> dict[str, Any]:
    headers = {
        "Retry-After": not _WITH_RETRY_AFTER.isdisjoint(codes),
        "X-Should-Retry": not MAY_PASS.issuperset(codes),
        "WWW-Authenticate": ErrorCode.UNAUTHORIZED in codes,
    }
    return {
        "description": ", ".join(f"`{code}`" for code in codes),
        "headers": {name: _header(name) for name, is_sent in headers.items() if is_sent},
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": _REFS.format(model="Problem")}}},
    }


def _header(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/headers/{name}"}


_TENSOR_TEXT = "An `.npy` file, or a `.safetensors` file with one tensor or one of the field's name; floating-point."
_TENSOR_TEXTS = {
    "prompt_embeds": "(T, D) embeddings in the place of `prompt`; see `embeds_width` and `max_tokens` in `/v1/models`.",
    "negative_prompt_embeds": "(T, D) embeddings in the place of `negative_prompt`, as long as the prompt's.",
    "latents": "(n, C, h, w) initial noise, n being `num_images_per_prompt`. All latents set the working size, where "
    "none is named.",
    "masked_image_latents": "(1 or n, C, h, w) scaled latents of the picture without what is repainted.",
    "image_latents": "(1 or n, C, h, w) scaled latents of the picture; with those of the masked one and a mask, the "
    "picture itself can be left out.",
    "ip_adapter_image_embeds": "(2, n, D) embeddings of n pictures in the place of `ip_adapter_image`, those of no "
    "picture first; (1, n, D) without guidance. With T of each picture, (2 or 1, n, T, D): see `ip_adapter` in "
    "`/v1/models`.",
}


def _form_schema() -> dict[str, Any]:
    """The form's fields: the files, then the scalars with their bounds."""
    schema = InpaintFields.model_json_schema(ref_template=_REFS)
    properties = {
        "image": _file("PNG, JPEG or WebP. EXIF orientation is applied. Required unless `image_latents` is sent."),
        "mask": _file(
            "White (at least half) is repainted, black is kept; same size as the image. "
            "Left out: the image's alpha is the mask, fully transparent is repainted."
        ),
        "ip_adapter_image": _file(
            "A picture to paint by, PNG, JPEG or WebP of any size; for models with an IP-Adapter, see `/v1/models`."
        ),
        **{name: _file(f"{text} {_TENSOR_TEXT}") for name, text in _TENSOR_TEXTS.items()},
        **{name: without_null(field) for name, field in schema["properties"].items()},
    }
    return {
        "type": "object",
        "properties": properties,
        "allOf": [
            {"anyOf": [{"required": ["prompt"]}, {"required": ["prompt_embeds"]}]},
            {"anyOf": [{"required": ["image"]}, {"required": ["image_latents", "masked_image_latents", "mask"]}]},
        ],
        "additionalProperties": False,
    }


def _file(description: str) -> dict[str, Any]:
    return {
        "type": "string",
        "format": "binary",
        "contentMediaType": "application/octet-stream",
        "description": description,
    }


def without_null(field: Mapping[str, Any]) -> dict[str, Any]:
    """A form field is sent or left out; it cannot be null."""
    flat = {name: value for name, value in field.items() if name not in ("anyOf", "title")}
    for alternative in field.get("anyOf", ()):
        if alternative != {"type": "null"}:
            flat.update(alternative)
    if flat.get("default", ...) is None:
        del flat["default"]
    return flat


_PICTURE_TYPES = ", ".join(MEDIA_TYPES.values())

INPAINT_OPERATION: dict[str, Any] = {
    "parameters": [
        {
            "name": HEADER,
            "in": "header",
            "description": "Makes a repetition safe: the same key and form get the first answer again, even where its "
            "client had hung up. Another form is `key_reuse`; while the first request runs, `in_progress`.",
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS, "pattern": f"^{PATTERN}$"},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _form_schema(),
                "encoding": {
                    "image": {"contentType": _PICTURE_TYPES},
                    "mask": {"contentType": _PICTURE_TYPES},
                    "ip_adapter_image": {"contentType": _PICTURE_TYPES},
                    **{name: {"contentType": "application/json"} for name in JSON_FIELDS},
                },
            }
        },
    },
}

_TEXT = {"type": "string"}

INPAINT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The repainted picture, in the shape that `Accept` asks for: the image itself by default.",
        "headers": {
            "X-Seed": {"description": "Repeats the image; of image answers.", "schema": {"type": "integer"}},
            "X-NSFW-Content-Detected": {
                "description": "Whether the safety checker flagged the image; of image answers.",
                "schema": {"type": "string", "enum": ["true", "false"]},
            },
            "Server-Timing": {"description": "Milliseconds by stage.", "schema": _TEXT},
            "Idempotent-Replayed": {
                "description": "The answer was given before, to a request with the same `Idempotency-Key`.",
                "schema": {"type": "string", "enum": ["true"]},
            },
            "Original-Request": {"description": "Of such an answer: the first request's id.", "schema": _TEXT},
        },
        "content": {
            **{
                media_type: {"schema": {"type": "string", "format": "binary", "contentMediaType": media_type}}
                for media_type in (*MEDIA_TYPES.values(), ARRAY_MEDIA_TYPE)
            },
            "application/json": {"schema": {"$ref": _REFS.format(model="InpaintAnswer")}},
            "text/event-stream": {
                "schema": {
                    "type": "string",
                    "description": "Events `queued` {position}, `progress` {step, steps, eta in seconds or null; with "
                    "`previews`, now and then a preview {b64_json, media_type}}, "
                    "then `completed` (the JSON answer) or `failed` (a problem).",
                }
            },
        },
    },
    **problems(*(code for code in ErrorCode if code not in _NOT_OF_INPAINT)),
}


def openapi_document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The document of an application's routes."""
    document = get_openapi(title=TITLE, version=__version__, description=DESCRIPTION, routes=list(routes))
    _, definitions = models_json_schema(
        [(Problem, "serialization"), (InpaintAnswer, "serialization"), (FreeUFactors, "validation")], ref_template=_REFS
    )
    components = document.setdefault("components", {})
    components["schemas"] = dict(sorted({**components.get("schemas", {}), **definitions["$defs"]}.items()))
    components["headers"] = _HEADERS
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    # The empty one: without configured keys none is asked for.
    document["security"] = [{}, {"bearer": []}, {"apiKey": []}]
    document["tags"] = [{"name": tag.value, "description": text} for tag, text in _TAG_TEXTS.items()]
    for response in _responses(document):
        response["headers"] = {"X-Request-Id": _header("X-Request-Id"), **response.get("headers", {})}
    return {name: _with_whole_numbers(value) for name, value in document.items()}


def _responses(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        for operation in operations.values():
            yield from operation["responses"].values()


def _with_whole_numbers(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """150 for 150.0, which is what bounds of integers become on their way here."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_yaml(value: object, indent: int = 0) -> str:
    """A JSON value as YAML in block style; strings are quoted as in JSON, which YAML reads alike."""
    margin = "  " * indent
    if isinstance(value, dict) and value:
        return "".join(f"{margin}{_key(str(name))}:{_nested(item, indent)}" for name, item in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{margin}-{_nested(item, indent)}" for item in value)
    return f"{margin}{_scalar(value)}\n"


def _nested(value: object, indent: int) -> str:
    if isinstance(value, dict | list) and value:
        return "\n" + to_yaml(value, indent + 1)
    return f" {_scalar(value)}\n"


def _key(name: str) -> str:
    return name if _PLAIN_KEY.fullmatch(name) and name.lower() not in _YAML_WORDS else _scalar(name)


def _scalar(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
