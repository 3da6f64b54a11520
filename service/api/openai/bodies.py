"""A body of either kind as parts: form data is made of them, and JSON says the same in other ways."""

import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from service.api.forms import FILES
from service.api.json_body import JSON_MEDIA_TYPE, decode_file, parse_json_object, read_json_body
from service.api.multipart import Part, read_parts
from service.api.painting import Body
from service.errors import ErrorCode, InpaintError

_TEXTS = frozenset({"prompt", "negative_prompt", "model", "user", "safety_identifier"})
_IMAGE_NAMES = ("image", "image[]")


async def read_body(request: Request) -> Body:
    """The body to its end: parts of form data, or the bytes of JSON.

    Raises:
        InpaintError: `UNSUPPORTED_MEDIA`, `MALFORMED_MULTIPART`.
    """
    content_type = request.headers.get("Content-Type", "")
    if content_type.partition(";")[0].strip().lower() == JSON_MEDIA_TYPE:
        return await read_json_body(content_type, request.stream())
    return await read_parts(content_type, request.stream())


def parts_of(body: Body) -> list[Part]:
    """The fields as parts in OpenAI's words, with one picture called `image`. Megabytes take a while.

    Raises:
        InpaintError: `BAD_REQUEST` for what is no JSON, `INVALID_FIELD` for what cannot be a field's value.
    """
    parts = _json_parts(parse_json_object(body)) if isinstance(body, bytes) else body
    if sum(part.name in _IMAGE_NAMES for part in parts) > 1:
        raise _fault("image", "Send one image: several cannot be combined.")
    return [Part("image", part.data, part.is_file) if part.name in _IMAGE_NAMES else part for part in parts]


def _json_parts(value: dict[str, Any]) -> Sequence[Part]:
    """Null is a field that is left out, as in OpenAI's own types."""
    parts: list[Part] = []
    for name, content in value.items():
        if content is None:
            continue
        if name == "images":
            if not isinstance(content, list):
                raise _fault("images", "Input should be a list with one image.")
            parts += [Part.of_file("image", _picture(item, "images")) for item in content[:2]]
        elif name in ("image", "mask"):
            parts.append(Part.of_file(name, _picture(content, name)))
        elif name in FILES:
            parts.append(Part.of_file(name, decode_file(content, name)))
        else:
            parts.append(Part.of_text(name, _text(content, name)))
    return parts


def _picture(value: object, name: str) -> bytes:
    """A picture in Base64, a data URL of it, or an object with one; nothing is fetched or looked up."""
    if isinstance(value, dict):
        if "file_id" in value:
            raise _fault(name, f"{name}: No files are stored that a file_id could name; send image_url as a data URL.")
        if list(value) != ["image_url"]:
            raise _fault(name, f"{name}: Input should be an object with image_url, a data URL.")
        value = value["image_url"]
    if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
        raise _fault(name, f"{name}: Input should be a data URL: the service fetches nothing.")
    return decode_file(value, name)


def _text(value: object, name: str) -> str:
    """What a form field would say; a list or an object as JSON. Whether there is such a field is looked at later."""
    if isinstance(value, str):
        return value
    if name in _TEXTS:
        raise _fault(name, f"{name}: Input should be a string.")
    try:
        return json.dumps(value)
    except RecursionError:
        raise InpaintError(ErrorCode.BAD_REQUEST, "The body is nested too deeply.") from None


def _fault(name: str, message: str) -> InpaintError:
    return InpaintError(ErrorCode.INVALID_FIELD, message, field=name)
