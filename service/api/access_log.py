"""The outermost middleware: names each request, answers for what nobody else caught, logs and counts it."""

import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import CLIENT_CLOSED_REQUEST, STATUS, internal_error, problem_response
from service.api.records import ErrorForm, RequestRecord, attach_record, new_record
from service.errors import ErrorCode
from service.metrics import Metrics
from service.spans import NO_TRACING, Exchange, Tracing

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"

# Any other word is a client's own.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

# Asked every few seconds by machines: logged only when someone is debugging.
_QUIET_ENDPOINTS = frozenset({"/healthz", "/readyz", "/metrics"})


class AccessLog:
    """Pure ASGI middleware.

    Args:
        app: What to wrap.
        metrics: Where to count.
        error_form_of: How clients are told of errors, by the path that they ask for.
        tracing: Where each request's trace begins.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, error_form_of: Callable[[str], ErrorForm], tracing: Tracing = NO_TRACING
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._error_form_of = error_form_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        record = new_record(Headers(scope=scope), self._error_form_of(scope["path"]))
        attach_record(scope, record)
        endpoint = _endpoint(scope)
        if endpoint not in _QUIET_ENDPOINTS:
            record.spans = self._tracing.begin(_exchange(scope, endpoint, started_at))
            record.spans.note({"inpaint.request_id": record.request_id})
        status: int | None = None
        sending_since = started_at

        async def send_named(message: Message) -> None:
            nonlocal status, sending_since
            if message["type"] == "http.response.start":
                status, sending_since = message["status"], time.monotonic()
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                traceparent = record.spans.traceparent
                if traceparent is not None:
                    headers["traceparent"] = traceparent
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                record.spans.stage("send", sending_since, time.monotonic())

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            pass  # Nobody is there to be answered.
        except Exception:
            logger.exception("request %s failed unexpectedly", record.request_id)
            if status is None:
                response = problem_response(internal_error(), Request(scope))
                await response(scope, receive, send_named)
        finally:
            self._note(scope, endpoint, record, status or CLIENT_CLOSED_REQUEST, time.monotonic() - started_at)
            _end_spans(record, status)

    def _note(self, scope: Scope, endpoint: str, record: RequestRecord, status: int, seconds: float) -> None:
        self._metrics.request_done(endpoint, status, seconds)
        fields: dict[str, object] = {
            "request_id": record.request_id,
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": endpoint,
            "status": status,
            "seconds": round(seconds, 4),
        }
        if record.client.name is not None:
            fields["client"] = record.client.name
        if record.code is not None:
            fields["code"] = record.code
        if record.replay_of is not None:
            fields["replay_of"] = record.replay_of
        fields.update({f"{stage}_seconds": round(spent, 4) for stage, spent in record.stages.items()})
        if record.mean_images is not None:
            fields["mean_images"] = round(record.mean_images, 2)
        level = logging.DEBUG if endpoint in _QUIET_ENDPOINTS else logging.INFO
        logger.log(level, "request", extra={"fields": fields})


def _exchange(scope: Scope, endpoint: str, started_at: float) -> Exchange:
    headers = Headers(scope=scope)
    return Exchange(
        method=scope["method"] if scope["method"] in _METHODS else None,
        route=None if endpoint == UNMATCHED else endpoint,
        scheme=scope["scheme"],
        http_version=scope["http_version"],
        # Two of them say nothing, by the specification; of states there may be several.
        trace_context={
            "traceparent": traceparents[0],
            "tracestate": ",".join(headers.getlist("tracestate")),
        }
        if len(traceparents := headers.getlist("traceparent")) == 1
        else {},
        started_at=started_at,
    )


def _end_spans(record: RequestRecord, status: int | None) -> None:
    """What fails after an event stream has begun fails with the status that it would have had."""
    code = record.code if status is not None else ErrorCode.CANCELLED
    failed_with = STATUS[ErrorCode(code)] if code is not None else status
    is_fault = failed_with is not None and failed_with >= CLIENT_CLOSED_REQUEST
    record.spans.end(status, code, is_fault=is_fault)


def _endpoint(scope: Scope) -> str:
    """The template of the route that the request is for, also of one that was refused before routing."""
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match is not Match.NONE:
            return str(getattr(route, "path", UNMATCHED))
    return UNMATCHED
