"""What can go wrong, named once.

Every failure that a client may learn about is an `InpaintError`: a code from
`ErrorCode` and a message that is safe to show (no paths, no addresses, no
echoed input). The HTTP status of each code stands in `service.api.problems`;
nothing here knows of HTTP.

    Exception
    ├── InpaintError          one request failed, and the client is told why
    └── StartupError          the service cannot start; one line for the operator
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """The machine-readable codes of the wire contract."""

    # What the client sent.
    MALFORMED_MULTIPART = "malformed_multipart"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    CROSS_ORIGIN = "cross_origin"
    NOT_FOUND = "not_found"
    GONE = "gone"
    UNKNOWN_MODEL = "unknown_model"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTABLE = "not_acceptable"
    REQUEST_TIMEOUT = "request_timeout"
    IN_PROGRESS = "in_progress"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA = "unsupported_media"
    HEADERS_TOO_LARGE = "headers_too_large"
    INVALID_FIELD = "invalid_field"
    OUT_OF_RANGE = "out_of_range"
    INVALID_PROMPT = "invalid_prompt"
    INVALID_IMAGE = "invalid_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    ANIMATED = "animated"
    MASK_MISMATCH = "mask_mismatch"
    EMPTY_MASK = "empty_mask"
    UNKNOWN_SCHEDULER = "unknown_scheduler"
    UNKNOWN_LORA = "unknown_lora"
    INVALID_LORA = "invalid_lora"
    KEY_REUSE = "key_reuse"
    # What the service could not do, now or at all.
    OVERLOADED = "overloaded"
    NOT_READY = "not_ready"
    DRAINING = "draining"
    WORKER_LOST = "worker_lost"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    NAN_OUTPUT = "nan_output"
    SAFETY_FAILED = "safety_failed"
    INTERNAL = "internal"
    # The client went away: counted, never sent.
    CANCELLED = "cancelled"


class InpaintError(Exception):
    """One request failed.

    Args:
        code: What kind of failure, from the wire contract.
        message: One sentence for the client. Never internals or echoed input.
        field: The form field at fault, where there is one.
        retry_after_seconds: When to come back, for codes that pass with time.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        field: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_seconds = retry_after_seconds


class StartupError(Exception):
    """The service cannot start. The message is one line that names what and where."""


def first_line(error: BaseException) -> str:
    """What a library says of a failure, in one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
