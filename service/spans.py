"""The spans of one request, as the service sees them.

OpenTelemetry's SDK is not loaded here, nor anywhere unless traces are asked for: `service.tracing` makes what is
recorded here into spans and sends them.

All times are `time.monotonic()`. On Linux that is one clock for all processes of a machine, so a worker's times and
the API process's go together in one trace. Attributes hold numbers and words of ours: no prompt, picture, key, name
of a file, or anything else that a client is free to choose, but its request id and `tracestate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Attributes = Mapping[str, str | int | float]

_NONE: Attributes = {}


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the head of an HTTP request says that a span may say, too.

    Attributes:
        method: Upper case; None for a word that HTTP does not know.
        route: The route's template; None where no route is meant.
        scheme: "http" or "https".
        http_version: Such as "1.1".
        trace_context: The headers `traceparent` and `tracestate`, where they came.
        started_at: When the request came.
    """

    method: str | None
    route: str | None
    scheme: str
    http_version: str
    trace_context: Mapping[str, str]
    started_at: float


@dataclass(frozen=True, slots=True)
class Event:
    """A moment within a stage."""

    name: str
    at: float
    attributes: Attributes = field(default_factory=dict)


class RequestSpans(Protocol):
    """One span for the HTTP exchange, and below it one for each stage. May be called from any thread.

    Stages may also come after the exchange has ended: a request with an `Idempotency-Key` outlasts its connection.
    """

    @property
    def is_recording(self) -> bool:
        """Whether anything is kept: tracing is on, and this request is in the sample."""

    @property
    def started_at(self) -> float:
        """When the request came."""

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context of the exchange's span, for the answer's header; None where tracing is off."""

    def stage(
        self,
        name: str,
        started_at: float,
        ended_at: float,
        attributes: Attributes = _NONE,
        *,
        code: str | None = None,
        events: Sequence[Event] = (),
    ) -> None:
        """A stage is over.

        Args:
            name: Its name.
            started_at: When it began.
            ended_at: When it ended.
            attributes: What is known of it.
            code: Why it failed, if it did.
            events: What happened meanwhile.
        """

    def note(self, attributes: Attributes) -> None:
        """Say more about the exchange; of no effect once it has ended."""

    def end(self, status: int | None, code: str | None, *, is_fault: bool) -> None:
        """The exchange is over.

        Args:
            status: HTTP status of the answer; None if there was none.
            code: Why it failed, if it did.
            is_fault: Whether the failure is the service's, or the connection's, and not a refusal of what was sent.
        """


class Tracing(Protocol):
    """Where spans come from."""

    def begin(self, exchange: Exchange) -> RequestSpans:
        """A request has come."""

    async def close(self, timeout_seconds: float) -> None:
        """Send what has not been sent, for so long at most."""


class _NoSpans:
    """Keeps nothing."""

    is_recording = False
    started_at = 0.0
    traceparent = None

    def stage(self, *_: object, **__: object) -> None:
        """Nothing."""

    def note(self, attributes: Attributes) -> None:
        """Nothing."""

    def end(self, status: int | None, code: str | None, *, is_fault: bool) -> None:
        """Nothing."""


NO_SPANS: RequestSpans = _NoSpans()


class _NoTracing:
    """Tracing is off."""

    def begin(self, exchange: Exchange) -> RequestSpans:
        """Nothing is kept."""
        del exchange
        return NO_SPANS

    async def close(self, timeout_seconds: float) -> None:
        """There is nothing to send."""


NO_TRACING: Tracing = _NoTracing()
