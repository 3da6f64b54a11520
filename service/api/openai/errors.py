"""Errors as OpenAI's clients expect them: one object with a message, and always all four keys."""

import json
from collections.abc import Mapping

from starlette.responses import Response

from service.api.json_body import JSON_MEDIA_TYPE
from service.api.problems import STATUS, faults_of
from service.errors import ErrorCode, InpaintError

BAD_REQUEST = 400
_SERVER_ERROR = 500

# Clients tell kinds of errors apart by the status; what is wrong with a request is always this one.
_BAD_REQUEST_STATUSES = frozenset({406, 415, 422})

# Where OpenAI has a word of its own; else the code is the native one.
_CODES: Mapping[ErrorCode, str] = {
    ErrorCode.UNAUTHORIZED: "invalid_api_key",
    ErrorCode.UNKNOWN_MODEL: "model_not_found",
    ErrorCode.INVALID_FIELD: "invalid_value",
    ErrorCode.OVERLOADED: "rate_limit_exceeded",
}
_TYPES: Mapping[ErrorCode, str] = {ErrorCode.OVERLOADED: "requests"}

# The native form's masks are black and white.
_MESSAGES: Mapping[ErrorCode, str] = {
    ErrorCode.EMPTY_MASK: "Nothing is to be repainted: no pixel of the mask, or of the image where no mask is sent, is "
    "transparent, mask_invert, mask_grow and mask_blur considered.",
}


def openai_status(code: ErrorCode) -> int:
    """The status of an error."""
    status = STATUS[code]
    return BAD_REQUEST if status in _BAD_REQUEST_STATUSES else status


def openai_error(error: InpaintError, request_id: str) -> Response:
    """An error in OpenAI's form; an `ErrorForm`. The id is in a header, as with OpenAI."""
    del request_id
    body = json.dumps({"error": error_members(error)}, ensure_ascii=False)
    return Response(body, openai_status(error.code), media_type=JSON_MEDIA_TYPE)


def error_members(error: InpaintError) -> dict[str, str | None]:
    """`message`, `type`, `param` and `code`; of several faults the first."""
    fault = next(iter(faults_of(error)), None)
    message = error.message if fault is None else fault.message
    default = "server_error" if openai_status(error.code) >= _SERVER_ERROR else "invalid_request_error"
    return {
        "message": _MESSAGES.get(error.code, message),
        "type": _TYPES.get(error.code, default),
        "param": None if fault is None else fault.field,
        "code": _CODES.get(error.code, error.code.value),
    }
