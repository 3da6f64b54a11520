"""Spans of requests, sent to an OpenTelemetry collector: the only module that knows of OpenTelemetry.

Everything happens in the API process. A worker's stages travel as times with its result (`service.request.Moments`)
and become spans here: an SDK in the process that denoises would add a thread, a queue and a connection beside the
running batch, its last spans would be lost with the process, which is when they are wanted, and it would have to be
told each request's context. Times on one clock cost a hundred bytes an answer instead.

The provider is our own and not the process's global one: nothing else in the process is traced by our settings.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.semconv.attributes import error_attributes, http_attributes, network_attributes, url_attributes
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service import __version__
from service.errors import StartupError, first_line
from service.spans import Attributes, Event, Exchange, RequestSpans

logger = logging.getLogger(__name__)

DEFAULT_SERVICE_NAME = "inpaint-service"

CODE = "inpaint.code"

COMPLAIN_SECONDS = 60.0
"""A collector that is down is spoken of no more often than this."""

_CLOSE_POLL_SECONDS = 0.02

_PROPAGATOR = TraceContextTextMapPropagator()


def open_tracing(url: str) -> "OpenTelemetry":
    """Tracing to a collector. Queue, batches, sampler and headers are the SDK's, with its standard variables.

    Args:
        url: Where traces are posted to, the path included.

    Raises:
        StartupError: A standard variable does not fit.
    """
    try:
        return OpenTelemetry(BatchSpanProcessor(_Exporter(url)))
    except Exception as error:  # noqa: BLE001 - whatever the SDK makes of its variables
        raise StartupError(f"tracing cannot start, look at the variables OTEL_…: {first_line(error)}") from None


class OpenTelemetry:
    """Tracing by the OpenTelemetry SDK.

    Args:
        processor: What becomes of spans that have ended.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        self._processor = processor
        # At the interpreter's exit the SDK would wait half a minute for a collector that is down.
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("service", __version__, schema_url=Schemas.V1_25_0.value)

    def begin(self, exchange: Exchange) -> RequestSpans:
        """A request has come. Its caller's trace goes on here, sampled or not as the caller decided."""
        return _RequestSpans(self._tracer, exchange)

    async def close(self, timeout_seconds: float) -> None:
        """Send what has not been sent, for so long at most; what is left then is lost."""
        # A daemon: a collector that takes everything and says nothing must not keep the process alive.
        sender = threading.Thread(target=self._processor.shutdown, name="last-spans", daemon=True)
        sender.start()
        give_up_at = time.monotonic() + timeout_seconds
        while sender.is_alive() and time.monotonic() < give_up_at:  # noqa: ASYNC110 - a thread tells no event
            await asyncio.sleep(_CLOSE_POLL_SECONDS)
        if sender.is_alive():
            logger.warning("the last spans could not be sent in time")


def _resource() -> Resource:
    """What the standard variables say of this service; its name is ours where they have none."""
    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: DEFAULT_SERVICE_NAME}))
    return resource


# --- the spans of one request ------------------------------------------------------


class _RequestSpans:
    """The span of one HTTP exchange, by OpenTelemetry's conventions for servers, and its stages below it.

    Of what those conventions ask for, some is left out because clients choose it freely: `url.path` where it is not
    the route itself (a path can hold names), `url.query`, the user agent, the host, and addresses.
    """

    def __init__(self, tracer: Tracer, exchange: Exchange) -> None:
        self.started_at = exchange.started_at
        # One offset for all: a clock that is set meanwhile tears nothing apart.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._tracer = tracer
        self._is_open = True
        method = exchange.method or "HTTP"
        self._span = tracer.start_span(
            method if exchange.route is None else f"{method} {exchange.route}",
            context=_PROPAGATOR.extract(exchange.trace_context),
            kind=SpanKind.SERVER,
            attributes=_attributes(exchange),
            start_time=self._ns(exchange.started_at),
        )
        self.is_recording = self._span.is_recording()  # Now: a span that has ended says no.
        self._context = set_span_in_context(self._span)

    @property
    def traceparent(self) -> str | None:
        """The trace context of the exchange's span."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        return carrier.get("traceparent")

    def stage(
        self,
        name: str,
        started_at: float,
        ended_at: float,
        attributes: Attributes = {},  # noqa: B006 - never changed
        *,
        code: str | None = None,
        events: Sequence[Event] = (),
    ) -> None:
        """A stage is over."""
        if not self.is_recording:
            return
        span = self._tracer.start_span(
            name, context=self._context, attributes=dict(attributes), start_time=self._ns(started_at)
        )
        for event in events:
            span.add_event(event.name, dict(event.attributes), self._ns(event.at))
        if code is not None:
            _fail(span, code)
        span.end(self._ns(max(started_at, ended_at)))

    def note(self, attributes: Attributes) -> None:
        """Say more about the exchange."""
        if self.is_recording and self._is_open:
            self._span.set_attributes(dict(attributes))

    def end(self, status: int | None, code: str | None, *, is_fault: bool) -> None:
        """The exchange is over; 4xx are errors of the client, and by the conventions none of the server's span."""
        if status is not None:
            self.note({http_attributes.HTTP_RESPONSE_STATUS_CODE: status})
        if code is not None:
            self.note({CODE: code})
        if is_fault:
            _fail(self._span, code or str(status))
        self._is_open = False
        self._span.end(self._ns(time.monotonic()))

    def _ns(self, at: float) -> int:
        """Nanoseconds since the epoch."""
        return self._epoch_ns + int(at * 1e9)


def _attributes(exchange: Exchange) -> dict[str, str]:
    attributes = {
        http_attributes.HTTP_REQUEST_METHOD: exchange.method or "_OTHER",
        url_attributes.URL_SCHEME: exchange.scheme,
        network_attributes.NETWORK_PROTOCOL_VERSION: exchange.http_version,
    }
    if exchange.route is not None:
        attributes[http_attributes.HTTP_ROUTE] = exchange.route
        attributes[url_attributes.URL_PATH] = exchange.route
    return attributes


def _fail(span: Span, code: str) -> None:
    span.set_attribute(error_attributes.ERROR_TYPE, code)
    span.set_status(StatusCode.ERROR)


# --- to the collector --------------------------------------------------------------


class _Exporter(SpanExporter):
    """OTLP over HTTP, in the SDK's thread; says now and then how much could not be sent.

    The SDK's own lines are not logged (`service.logs`): they quote URLs, which may hold passwords.

    Args:
        url: Where traces are posted to.
    """

    def __init__(self, url: str) -> None:
        session = requests.Session()
        session.hooks["response"].append(self._answered)
        self._exporter = OTLPSpanExporter(url, session=session)
        self._host = urlsplit(url).hostname
        self._status: int | None = None
        self._num_lost = 0
        self._quiet_until = 0.0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; tries again within the exporter's time, as its documentation says."""
        self._status = None
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._num_lost += len(spans)
            self._complain()
        return result

    def shutdown(self) -> None:
        """No further tries."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK's own

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is kept here."""
        return self._exporter.force_flush(timeout_millis)

    def _answered(self, response: requests.Response, *_: object, **__: object) -> None:
        self._status = response.status_code

    def _complain(self) -> None:
        now = time.monotonic()
        if now < self._quiet_until:
            return
        said = "did not answer" if self._status is None else f"answered {self._status}"
        logger.warning("%d spans were lost: the collector at %s %s", self._num_lost, self._host, said)
        self._num_lost, self._quiet_until = 0, now + COMPLAIN_SECONDS
