"""What is noted about one request while it is answered, for headers, log and metrics."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from service.engine.clients import ANONYMOUS, Client
from service.errors import InpaintError
from service.spans import NO_SPANS, RequestSpans

ErrorForm = Callable[[InpaintError, str], Response]
"""Says an error in one wire format's own way; called with the request's id."""

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """One request.

    Attributes:
        request_id: The client's own where it is harmless in a header and a log, else a random one.
        error_form: How its client is told of errors.
        client: Whose key came with it.
        code: Why it failed, if it did.
        stages: Seconds by stage.
        mean_images: Mean number of images in the batch that it ran in; None if it ran in none.
        replay_of: The id of the request whose answer was given again.
        spans: Its trace.
    """

    request_id: str
    error_form: ErrorForm
    client: Client = ANONYMOUS
    code: str | None = None
    stages: dict[str, float] = field(default_factory=dict)
    mean_images: float | None = None
    replay_of: str | None = None
    spans: RequestSpans = NO_SPANS


def new_record(headers: Headers, error_form: ErrorForm) -> RequestRecord:
    """The record of a request that has just arrived."""
    sent = headers.get("X-Request-Id", "")
    is_harmless = _CLIENT_REQUEST_ID.fullmatch(sent) is not None
    return RequestRecord(sent if is_harmless else new_request_id(), error_form)


def new_request_id() -> str:
    """A random id."""
    return f"req_{token_hex(12)}"


def attach_record(scope: Scope, record: RequestRecord) -> None:
    """Make a record known to everything that handles the request."""
    scope.setdefault("state", {})["record"] = record


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request."""
    record = scope["state"]["record"]
    assert isinstance(record, RequestRecord)  # noqa: S101 - for the type checker
    return record
