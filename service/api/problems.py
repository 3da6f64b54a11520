"""Errors on the wire: which status each code has, and the `application/problem+json` body (RFC 9457)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.api.records import record_of
from service.errors import ErrorCode, InpaintError

PROBLEM_MEDIA_TYPE = "application/problem+json"

# nginx's number for a client that closed its connection; it is counted and logged, and never sent.
CLIENT_CLOSED_REQUEST = 499

STATUS: Mapping[ErrorCode, int] = {
    ErrorCode.MALFORMED_MULTIPART: 400,
    ErrorCode.BAD_REQUEST: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.CROSS_ORIGIN: 403,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.UNKNOWN_MODEL: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.NOT_ACCEPTABLE: 406,
    ErrorCode.REQUEST_TIMEOUT: 408,
    ErrorCode.IN_PROGRESS: 409,
    ErrorCode.GONE: 410,
    ErrorCode.BODY_TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA: 415,
    ErrorCode.INVALID_FIELD: 422,
    ErrorCode.OUT_OF_RANGE: 422,
    ErrorCode.INVALID_PROMPT: 422,
    ErrorCode.INVALID_IMAGE: 422,
    ErrorCode.TOO_MANY_PIXELS: 422,
    ErrorCode.ANIMATED: 422,
    ErrorCode.MASK_MISMATCH: 422,
    ErrorCode.EMPTY_MASK: 422,
    ErrorCode.UNKNOWN_SCHEDULER: 422,
    ErrorCode.UNKNOWN_LORA: 422,
    ErrorCode.INVALID_LORA: 422,
    ErrorCode.KEY_REUSE: 422,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.HEADERS_TOO_LARGE: 431,
    ErrorCode.CANCELLED: CLIENT_CLOSED_REQUEST,
    ErrorCode.NAN_OUTPUT: 500,
    ErrorCode.SAFETY_FAILED: 500,
    ErrorCode.INTERNAL: 500,
    ErrorCode.NOT_READY: 503,
    ErrorCode.DRAINING: 503,
    ErrorCode.WORKER_LOST: 503,
    ErrorCode.DEADLINE: 504,
    ErrorCode.OUT_OF_MEMORY: 507,
}

# The same request may succeed later. All other failures say so with `x-should-retry: false`,
# because client libraries repeat some statuses on their own.
MAY_PASS = frozenset(
    {
        ErrorCode.REQUEST_TIMEOUT,
        ErrorCode.IN_PROGRESS,
        ErrorCode.OVERLOADED,
        ErrorCode.NOT_READY,
        ErrorCode.DRAINING,
        ErrorCode.WORKER_LOST,
        ErrorCode.DEADLINE,
        ErrorCode.INTERNAL,
    }
)

# The codes of what the framework itself refuses.
_CODE_OF_STATUS = {
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    406: ErrorCode.NOT_ACCEPTABLE,
    408: ErrorCode.REQUEST_TIMEOUT,
    413: ErrorCode.BODY_TOO_LARGE,
    415: ErrorCode.UNSUPPORTED_MEDIA,
    422: ErrorCode.INVALID_FIELD,
    431: ErrorCode.HEADERS_TOO_LARGE,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one field.

    Attributes:
        field: The form field.
        code: What kind of fault.
        message: One sentence for the client.
    """

    field: str
    code: ErrorCode
    message: str


class InvalidRequest(InpaintError):  # noqa: N818 - a kind of InpaintError, named for what it says
    """Fields are wrong. The first fault gives code and message; all are listed.

    Args:
        faults: At least one, in the order of the documented fields.
    """

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        first = faults[0]
        super().__init__(first.code, first.message, field=first.field)
        self.faults = faults


class BodyRefused(HTTPException):
    """Reading the body failed.

    An `HTTPException`, because frameworks turn any other exception that
    reading a body raises into a 400 of their own.

    Args:
        error: What to answer.
    """

    def __init__(self, error: InpaintError) -> None:
        super().__init__(STATUS[error.code], error.message)
        self.error = error


def problem_body(error: InpaintError, request_id: str) -> dict[str, object]:
    """The members of a problem document."""
    errors = [{"field": fault.field, "message": fault.message} for fault in faults_of(error)]
    return {
        "type": "about:blank",
        "title": _title(STATUS[error.code]),
        "status": STATUS[error.code],
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
        "errors": errors,
    }


def problem_headers(error: InpaintError) -> dict[str, str]:
    """What an error says in headers."""
    headers = {}
    if error.code is ErrorCode.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, ceil(error.retry_after_seconds)))
    if error.code not in MAY_PASS:
        headers["X-Should-Retry"] = "false"
    return headers


def problem_response(error: InpaintError, request: Request, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that failed; notes the code for the log.

    Args:
        error: Why it failed.
        request: The request.
        headers: Further headers, e.g. `Allow`.
    """
    record = record_of(request.scope)
    record.code = error.code
    response = record.error_form(error, record.request_id)
    response.headers.update({**problem_headers(error), **(headers or {})})
    return response


def problem(error: InpaintError, request_id: str) -> Response:
    """An error in the native form; an `ErrorForm`."""
    body = json.dumps(problem_body(error, request_id), ensure_ascii=False)
    return Response(body, STATUS[error.code], media_type=PROBLEM_MEDIA_TYPE)


def faults_of(error: InpaintError, names: Mapping[str, str] | None = None) -> tuple[Fault, ...]:
    """What is wrong with which fields; none where no field is at fault.

    Args:
        error: Why a request failed.
        names: What a wire format calls fields of the native form, where it has another word; messages begin with it.
    """
    if isinstance(error, InvalidRequest):
        faults = error.faults
    elif error.field is not None:
        faults = (Fault(error.field, error.code, error.message),)
    else:
        faults = ()
    return tuple(_renamed(fault, (names or {}).get(fault.field)) for fault in faults)


def _renamed(fault: Fault, name: str | None) -> Fault:
    if name is None:
        return fault
    prefix = f"{fault.field}: "
    message = f"{name}: {fault.message.removeprefix(prefix)}" if fault.message.startswith(prefix) else fault.message
    return Fault(name, fault.code, message)


def internal_error() -> InpaintError:
    """What a client learns of a fault of ours."""
    return InpaintError(ErrorCode.INTERNAL, "The service failed to handle the request.")


# --- exception handlers of the application -------------------------------------


async def on_inpaint_error(request: Request, error: Exception) -> Response:
    """An `InpaintError` that a route raised."""
    assert isinstance(error, InpaintError)  # noqa: S101 - for the type checker: registered for this class
    return problem_response(error, request)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What the framework refuses (unknown routes and methods), and bodies that could not be read."""
    assert isinstance(error, HTTPException)  # noqa: S101 - for the type checker: registered for this class
    if isinstance(error, BodyRefused):
        return problem_response(error.error, request)
    if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return problem_response(internal_error(), request)
    code = _CODE_OF_STATUS.get(error.status_code, ErrorCode.BAD_REQUEST)
    return problem_response(InpaintError(code, f"{_title(STATUS[code])}."), request, error.headers)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Path, query and JSON arguments that the framework validates."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - for the type checker: registered for this class
    faults = tuple(
        Fault(".".join(str(part) for part in fault["loc"][1:]), ErrorCode.INVALID_FIELD, fault["msg"])
        for fault in error.errors()
    )
    return problem_response(InvalidRequest(faults), request)


def _title(status: int) -> str:
    return "Client Closed Request" if status == CLIENT_CLOSED_REQUEST else HTTPStatus(status).phrase
