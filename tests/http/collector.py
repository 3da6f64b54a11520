"""An OpenTelemetry collector for tests: takes OTLP over HTTP and keeps the spans, or misbehaves."""

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.http.serving import eventually


class Collector(ThreadingHTTPServer):
    """What arrived.

    Args:
        status: What it answers.
        hangs: It never answers.
    """

    daemon_threads = True

    def __init__(self, status: int, *, hangs: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.hangs = hangs
        self.paths: list[str] = []
        self.headers: list[Message] = []
        self.bodies: list[bytes] = []

    @property
    def endpoint(self) -> str:
        """Its URL, as operators name it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests(self) -> list[ExportTraceServiceRequest]:
        """All that came, decoded."""
        return [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]

    def spans(self) -> list[Span]:
        """All spans that came."""
        return [
            span
            for request in self.requests()
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def traces(self) -> dict[bytes, list[Span]]:
        """Those of each trace, in the order in which they began."""
        found: dict[bytes, list[Span]] = {}
        for span in sorted(self.spans(), key=lambda span: span.start_time_unix_nano):
            found.setdefault(span.trace_id, []).append(span)
        return found

    def wait_for(self, name: str, count: int = 1) -> None:
        """Until so many spans of a name have come."""
        eventually(lambda: sum(span.name == name for span in self.spans()) >= count)


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        """Take some spans."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.append(self.path)
        self.server.headers.append(self.headers)
        self.server.bodies.append(body)
        if self.server.hangs:
            time.sleep(60)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on the tests' standard error."""


@contextmanager
def collecting(status: int = 200, *, hangs: bool = False) -> Iterator[Collector]:
    """A collector in a thread."""
    collector = Collector(status, hangs=hangs)
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        thread.join(timeout=10)
        collector.server_close()


def attributes_of(attributes: "list[KeyValue]") -> dict[str, object]:
    """Plain values by name."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
