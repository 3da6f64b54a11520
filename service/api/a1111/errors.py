"""Errors as the web UI says them: its own shape, and FastAPI's for fields and for routes that there are not."""

import json
from typing import Any

from starlette.responses import Response

from service.api.a1111.samplers import SAMPLER_NOT_FOUND
from service.api.a1111.schemas import A1111Error, A1111FieldErrors
from service.api.a1111.translate import NAMES
from service.api.answers import JSON_MEDIA_TYPE
from service.api.idempotency import HEADER
from service.api.problems import STATUS, faults_of
from service.errors import ErrorCode, InpaintError

PREFIX = "/sdapi/"

_BAD_CREDENTIALS = "Incorrect username or password"
_NO_ROUTE = {ErrorCode.NOT_FOUND: "Not Found", ErrorCode.METHOD_NOT_ALLOWED: "Method Not Allowed"}

_GATE_CODES = (
    ErrorCode.BAD_REQUEST,
    ErrorCode.UNAUTHORIZED,
    ErrorCode.HEADERS_TOO_LARGE,
    ErrorCode.INTERNAL,
)


def a1111_error(error: InpaintError, request_id: str) -> Response:  # noqa: ARG001 - the form of an `ErrorForm`
    """An error in the web UI's form; an `ErrorForm`. The request's id stands in the header alone."""
    status, body = STATUS[error.code], _whole(error.code, error.message)
    faults = faults_of(error, NAMES)
    if error.code in _NO_ROUTE:
        body = {"detail": _NO_ROUTE[error.code]}
    elif error.code is ErrorCode.UNAUTHORIZED:
        body = _whole("HTTPException", _BAD_CREDENTIALS)
    elif error.code is ErrorCode.UNKNOWN_SCHEDULER and error.field == "sampler_name":
        status, body = STATUS[ErrorCode.NOT_FOUND], _whole("HTTPException", SAMPLER_NOT_FOUND)
    elif faults:
        body = {"detail": [{"loc": _place(one.field), "msg": one.message, "type": one.code} for one in faults]}
    return Response(json.dumps(body), status, media_type=JSON_MEDIA_TYPE)


def documented(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route.

    Args:
        codes: What the route itself may answer; what the gate answers is added.
    """
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys((*codes, *_GATE_CODES)):
        by_status.setdefault(STATUS[code], []).append(code.value)
    return {
        status: {
            "description": ", ".join(f"`{code}`" for code in by_status[status]),
            "model": A1111Error | A1111FieldErrors,
        }
        for status in sorted(by_status)
    }


def _whole(error: str, detail: str) -> dict[str, Any]:
    return {"error": error, "detail": detail, "body": "", "errors": "" if error == "HTTPException" else detail}


def _place(field: str) -> list[str]:
    return ["header", field] if field == HEADER else ["body", *field.split(".")]
