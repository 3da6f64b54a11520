"""A request's body as JSON, and files that lie in it as Base64."""

import json
from base64 import b64decode
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.multipart import parse_options_header

from service.api.json_text import whole_number, without_repetition
from service.errors import ErrorCode, InpaintError

JSON_MEDIA_TYPE = "application/json"

_DATA_URL = "data:"
_BASE64_MARK = ";base64,"


async def read_json_body(content_type: str, chunks: AsyncIterator[bytes]) -> bytes:
    """The bytes of a body that says it is JSON; its size is bounded before it gets here.

    Raises:
        InpaintError: `UNSUPPORTED_MEDIA` for any other content type.
    """
    media_type, _ = parse_options_header(content_type)
    if media_type != JSON_MEDIA_TYPE.encode():
        raise InpaintError(ErrorCode.UNSUPPORTED_MEDIA, "Send the request as application/json.")
    return b"".join([chunk async for chunk in chunks])


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; no name is there twice, and no number is NaN or infinite.

    Megabytes take a while: not for the event loop.

    Raises:
        InpaintError: `BAD_REQUEST`, it is none.
    """
    try:
        value = json.loads(
            body, parse_int=whole_number, parse_constant=_refuse_constant, object_pairs_hook=without_repetition
        )
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors.
        raise InpaintError(ErrorCode.BAD_REQUEST, "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InpaintError(ErrorCode.BAD_REQUEST, "The body is not a JSON object.")
    return value


def decode_file(text: object, field: str) -> bytes:
    """The bytes of a file in Base64, bare or as a data URL. Other URLs are refused: the service fetches nothing.

    Args:
        text: What the client sent.
        field: Where.

    Raises:
        InpaintError: `INVALID_FIELD`, it is neither.
    """
    message = f"{field}: Input should be a file in Base64, or a data URL of one."
    if not isinstance(text, str):
        raise InpaintError(ErrorCode.INVALID_FIELD, message, field=field)
    if text[: len(_DATA_URL)].lower() == _DATA_URL:
        _, mark, text = text.partition(_BASE64_MARK)
        if not mark:
            raise InpaintError(ErrorCode.INVALID_FIELD, message, field=field)
    try:
        return b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise InpaintError(ErrorCode.INVALID_FIELD, message, field=field) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(name)
