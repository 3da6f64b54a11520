"""Errors as Stability's API says them: a request id, a short name, and sentences that begin with the field."""

from collections.abc import Mapping

from pydantic import BaseModel, Field
from starlette.responses import Response

from service.api.answers import JSON_MEDIA_TYPE
from service.api.problems import STATUS, Fault, faults_of
from service.errors import ErrorCode, InpaintError

PATH_PREFIX = "/v2beta/"

ITS_NAMES: Mapping[str, str] = {"mask_grow": "grow_mask"}
"""Its words for fields of the native form."""

# Whatever is wrong with a request in itself is 400 there; 422 is for one that is sound, and rejected all the same.
_WRONG = frozenset({406, 415, 422})
_SOUND = frozenset({ErrorCode.EMPTY_MASK, ErrorCode.KEY_REUSE})

ITS_STATUS: Mapping[ErrorCode, int] = {
    code: 400 if status in _WRONG and code not in _SOUND else status for code, status in STATUS.items()
}

# Names that its reference has; other statuses are named by our own code.
_NAMES: Mapping[int, str] = {
    400: "bad_request",
    401: "unauthorized",
    413: "payload_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
}

# What its sentences begin with where no field is at fault.
_PLACES: Mapping[ErrorCode, str] = {
    ErrorCode.UNAUTHORIZED: "authorization",
    ErrorCode.NOT_ACCEPTABLE: "accept",
    ErrorCode.BODY_TOO_LARGE: "body",
}


class StabilityError(BaseModel):
    """An error of `/v2beta/`, in the form of Stability's API."""

    id: str = Field(description="The request's id, as in `X-Request-Id`.")
    name: str = Field(description="What kind of error.")
    errors: list[str] = Field(description="What is wrong, one sentence each; `field: …` where it is a field.")


def stability_error(error: InpaintError, request_id: str) -> Response:
    """An error in this form; an `ErrorForm`."""
    status = ITS_STATUS[error.code]
    sentences = [_sentence(fault) for fault in faults_of(error, ITS_NAMES)] or [_placed(error)]
    body = StabilityError(id=request_id, name=its_name(error.code), errors=sentences)
    return Response(body.model_dump_json(), status, media_type=JSON_MEDIA_TYPE)


def its_name(code: ErrorCode) -> str:
    """What this form calls a kind of error."""
    return _NAMES.get(ITS_STATUS[code], code.value)


def _sentence(fault: Fault) -> str:
    """Begin with the field, and name all fields as this form does."""
    message = fault.message.removeprefix(f"{fault.field}: ")
    for native, name in ITS_NAMES.items():
        message = message.replace(native, name)
    return f"{fault.field}: {message}"


def _placed(error: InpaintError) -> str:
    place = _PLACES.get(error.code)
    return error.message if place is None else f"{place}: {error.message}"
