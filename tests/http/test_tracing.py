"""Traces of requests, as the SDK has them when it is about to send them: over the fake worker, in this process."""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.tracing import OpenTelemetry
from tests.http.openai_pictures import scene_with_hole
from tests.http.serving import CLOSING, LiveServer, eventually, form, multipart_head, serving, usual_parts

STAGES = ["receive", "decode", "fit", "queue", "prepare", "denoise", "vae_decode", "safety", "render", "send"]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Traced:
    """A server and what it has recorded."""

    server: LiveServer
    exporter: InMemorySpanExporter

    def spans(self) -> list[ReadableSpan]:
        """All that have ended, in the order in which they began; of equal starts the shorter first."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))

    def exchange(self, number: int = 0) -> ReadableSpan:
        """The span of an HTTP exchange, once it has ended."""
        eventually(lambda: len(self.exchanges()) > number)
        return self.exchanges()[number]

    def exchanges(self) -> list[ReadableSpan]:
        """Those of HTTP exchanges."""
        return [span for span in self.spans() if span.kind is SpanKind.SERVER]

    def stages(self, exchange: ReadableSpan) -> list[ReadableSpan]:
        """What is directly below an exchange."""
        return [span for span in self.spans() if span.parent is not None and span.parent == exchange.context]


@contextmanager
def traced(**settings: Any) -> Iterator[Traced]:
    """Serve, and keep the spans."""
    exporter = InMemorySpanExporter()
    with serving(tracing=OpenTelemetry(SimpleSpanProcessor(exporter)), **settings) as server:
        yield Traced(server, exporter)


def names(spans: Sequence[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def seconds(span: ReadableSpan) -> float:
    return (span.end_time - span.start_time) / 1e9


def only(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    (span,) = (span for span in spans if span.name == name)
    return span


# --- what a trace holds ---------------------------------------------------------------


def test_every_stage_is_a_span_below_the_exchange() -> None:
    """Stages come in order, within their exchange, none before the one before it has begun, and no other spans."""
    with traced() as service:
        before = time.time_ns()
        assert service.server.inpaint().status_code == 200
        exchange = service.exchange()
        after = time.time_ns()
        stages = service.stages(exchange)
        assert sorted(names(stages), key=STAGES.index) == STAGES
        by_end = sorted(stages, key=lambda span: (span.end_time, STAGES.index(span.name)))
        assert names(by_end) == STAGES
        assert len(service.spans()) == len(STAGES) + 1
        assert before <= exchange.start_time
        assert max(span.end_time for span in stages) <= after
        assert all(exchange.start_time <= span.start_time <= span.end_time <= exchange.end_time for span in stages)
        for earlier, later in itertools.pairwise(by_end):
            assert earlier.end_time <= later.start_time, (earlier.name, later.name)
        assert all(span.status.status_code is StatusCode.UNSET for span in service.spans())


def test_durations_are_those_of_the_answer() -> None:
    """The trace and `Server-Timing` say the same, to the header's tenth of a millisecond."""
    with traced(model="fake?step_seconds=0.01") as service:
        response = service.server.inpaint()
        said = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"])}
        stages = service.stages(service.exchange())
        for name, stage in {
            "queue": "queue",
            "prepare": "prepare",
            "denoise": "denoise",
            "decode": "vae_decode",
        }.items():
            assert seconds(only(stages, stage)) * 1000 == pytest.approx(said[name], abs=0.06), name
        for name in ("safety", "render"):
            assert seconds(only(stages, name)) * 1000 == pytest.approx(said[name], abs=0.06), name
        assert said["denoise"] >= 40


def test_attributes_are_the_conventions_and_numbers_of_ours() -> None:
    """The exchange has HTTP's attributes and the request's; nothing is there that is not listed here."""
    with traced() as service:
        service.server.inpaint(
            headers={"X-Request-Id": "mine"}, num_images_per_prompt="2", num_inference_steps="5", output_format=None
        )
        refused = service.exchange()  # Two images take JSON.
        assert refused.attributes["http.response.status_code"] == 422
        response = service.server.inpaint(
            headers={"X-Request-Id": "mine", "Accept": "application/json"},
            num_images_per_prompt="2",
            num_inference_steps="5",
        )
        exchange = service.exchange(1)
        assert exchange.name == "POST /v1/inpaint"
        assert dict(exchange.attributes) == {
            "http.request.method": "POST",
            "http.route": "/v1/inpaint",
            "url.path": "/v1/inpaint",
            "url.scheme": "http",
            "network.protocol.version": "1.1",
            "http.response.status_code": 200,
            "inpaint.request_id": "mine",
            "inpaint.steps": 5,
            "inpaint.images": 2,
            "inpaint.rows": 4,
            "inpaint.width": 64,
            "inpaint.height": 64,
            "inpaint.scheduler": "ddim",
            "inpaint.seed": 7,
            "inpaint.worker": "0",
            "inpaint.attempts": 1,
            "inpaint.mean_images": response.json()["batch"]["mean_images"],
        }
        denoise = only(service.stages(exchange), "denoise")
        assert dict(denoise.attributes) == {
            "inpaint.worker": "0",
            "inpaint.steps_done": 5,
            "inpaint.rows": 4,
            "inpaint.images": 2,
            "inpaint.mean_images": 2.0,
        }
        (first_step,) = denoise.events
        assert first_step.name == "first_step"
        assert denoise.start_time < first_step.timestamp < denoise.end_time


def test_requests_that_share_a_batch_have_a_trace_each(tmp_path: Path) -> None:
    """A mixed batch: each trace has its own stages and steps, and says how many images shared them."""
    gate = tmp_path / "gate"
    with traced(model=f"fake?gate={gate}&step_seconds=0.005") as service, ThreadPoolExecutor(3) as pool:
        posts = [
            pool.submit(service.server.inpaint, prompt=f"hold {steps}", num_inference_steps=str(steps))
            for steps in (3, 5, 8)
        ]
        eventually(
            lambda: (
                service.server.metric('inpaint_batch_images_bucket{le="2.0"}')
                < service.server.metric("inpaint_batch_images_count")
            )
        )
        gate.touch()
        assert all(post.result().status_code == 200 for post in posts)
        eventually(lambda: len(service.exchanges()) == 3)
        exchanges = service.exchanges()
        assert len({span.context.trace_id for span in exchanges}) == 3
        assert {span.attributes["inpaint.steps"] for span in exchanges} == {3, 5, 8}
        for exchange in exchanges:
            stages = service.stages(exchange)
            assert sorted(names(stages), key=STAGES.index) == STAGES
            assert only(stages, "denoise").attributes["inpaint.steps_done"] == exchange.attributes["inpaint.steps"]
        assert max(span.attributes["inpaint.mean_images"] for span in exchanges) > 1


def test_other_wire_formats_are_traced_alike() -> None:
    """A request in OpenAI's words has the same stages, below its own route."""
    with traced() as service:
        files = {"image": ("a.png", scene_with_hole(), "image/png")}
        response = service.server.client.post("/v1/images/edits", files=files, data={"prompt": "a red house"})
        assert response.status_code == 200, response.text
        exchange = service.exchange()
        assert exchange.name == "POST /v1/images/edits"
        assert sorted(names(service.stages(exchange)), key=STAGES.index) == STAGES


def test_event_streams_are_traced_to_their_last_event() -> None:
    """Of a stream, sending begins before painting ends, and the trace is complete."""
    with traced(model="fake?step_seconds=0.05") as service:
        response = service.server.inpaint(headers={"Accept": "text/event-stream"})
        assert "event: completed" in response.text
        stages = service.stages(service.exchange())
        assert sorted(names(stages), key=STAGES.index) == STAGES
        assert only(stages, "send").start_time < only(stages, "denoise").end_time
        assert only(stages, "send").end_time >= only(stages, "render").end_time


def test_probes_leave_no_trace() -> None:
    """What machines ask every few seconds is not traced; a page of the service is, and so is what nothing serves."""
    with traced() as service:
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/no/such/secret-name"):
            service.server.client.get(path)
        assert names([service.exchange(0), service.exchange(1)]) == ["GET /v1/models", "GET"]
        assert len(service.exchanges()) == 2
        assert "secret-name" not in str(dict(service.exchange(1).attributes))


# --- the caller's trace ------------------------------------------------------------------


def test_the_callers_trace_goes_on() -> None:
    """A caller's trace and span become the exchange's parent, its state is kept, and the answer names our span."""
    with traced() as service:
        sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=opaque,other=1"}
        response = service.server.inpaint(headers=sent)
        exchange = service.exchange()
        assert f"{exchange.context.trace_id:032x}" == TRACE
        assert f"{exchange.parent.span_id:016x}" == PARENT
        assert exchange.parent.is_remote
        assert exchange.context.trace_state.to_header() == sent["tracestate"]
        assert response.headers["traceparent"] == f"00-{TRACE}-{exchange.context.span_id:016x}-01"
        assert {span.context.trace_id for span in service.spans()} == {exchange.context.trace_id}


def test_a_broken_context_begins_a_new_trace() -> None:
    """What is no trace context is as none: the request is answered, and begins a trace of its own."""
    broken = [
        "",
        "00",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01" * 100,
    ]
    with traced() as service:
        for number, traceparent in enumerate(broken):
            headers = {"traceparent": traceparent, "tracestate": "=,,=" * 200}
            assert service.server.client.get("/v1/models", headers=headers).status_code == 200
            exchange = service.exchange(number)
            assert exchange.parent is None, traceparent
            assert f"{exchange.context.trace_id:032x}" != TRACE, traceparent


def test_two_contexts_are_none() -> None:
    """A repeated `traceparent` says nothing, by the specification."""
    with traced() as service:
        headers = [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("traceparent", f"00-{TRACE}-{PARENT[::-1]}-01")]
        assert service.server.client.get("/v1/models", headers=headers).status_code == 200
        assert service.exchange().parent is None


def test_a_caller_that_does_not_sample_is_heeded() -> None:
    """Nothing is recorded for a caller that records nothing; the answer says so."""
    with traced() as service:
        response = service.server.inpaint(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        assert response.status_code == 200
        assert re.fullmatch(rf"00-{TRACE}-(?!{PARENT})[0-9a-f]{{16}}-00", response.headers["traceparent"])
        assert service.server.client.get("/v1/models").status_code == 200
        assert service.exchange().name == "GET /v1/models"  # The only one.
        assert len(service.spans()) == 2  # And its `send`.


def test_the_standard_sampler_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`OTEL_TRACES_SAMPLER` decides for requests without a caller's trace."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with traced() as service:
        assert service.server.inpaint().status_code == 200
        sampled = service.server.inpaint(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert sampled.headers["traceparent"].endswith("-01")
        assert f"{service.exchange().context.trace_id:032x}" == TRACE
        assert len(service.exchanges()) == 1


def test_pages_of_other_origins_may_send_and_read_contexts() -> None:
    """A page of an allowed origin may take its trace through the service."""
    with traced(cors_origins="https://page.example") as service:
        origin = {"Origin": "https://page.example"}
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "traceparent,tracestate"}
        preflight = service.server.client.options("/v1/inpaint", headers=origin | asked)
        allowed = {name.strip().lower() for name in preflight.headers["Access-Control-Allow-Headers"].split(",")}
        assert {"traceparent", "tracestate"} <= allowed
        response = service.server.client.get("/v1/models", headers=origin)
        assert "traceparent" in response.headers["Access-Control-Expose-Headers"]
        assert "traceparent" in response.headers


def test_without_tracing_no_answer_names_a_trace() -> None:
    """Off, a caller's context is ignored and no header is added."""
    with serving() as server:
        response = server.inpaint(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert response.status_code == 200
        assert "traceparent" not in response.headers


# --- requests that fail ----------------------------------------------------------------


def test_refused_requests_end_in_the_stage_that_refused_them() -> None:
    """A picture that cannot be decoded: `decode` failed by our code; a 4xx is no error of the server's span."""
    with traced() as service:
        assert service.server.inpaint(image=b"no picture").status_code == 422
        exchange = service.exchange()
        assert exchange.attributes["inpaint.code"] == "invalid_image"
        assert exchange.status.status_code is StatusCode.UNSET
        assert "error.type" not in exchange.attributes
        stages = service.stages(exchange)
        assert names(stages) == ["receive", "decode", "send"]
        decode = only(stages, "decode")
        assert decode.status.status_code is StatusCode.ERROR
        assert decode.attributes["error.type"] == "invalid_image"


def test_bodies_that_are_refused_fail_their_reception() -> None:
    """A body that is too large, however it is sent, fails in `receive` or before it."""
    with traced(max_body_mib=0.01) as service:
        assert service.server.inpaint().status_code == 413  # Declared: nothing is received.
        files, data = form()
        body = httpx.Request("POST", "http://x", files=files, data=data)
        chunks = iter([body.read()])
        headers = {"Content-Type": body.headers["Content-Type"]}
        assert service.server.client.post("/v1/inpaint", content=chunks, headers=headers).status_code == 413
        assert names(service.stages(service.exchange(0))) == ["send"]
        receive = only(service.stages(service.exchange(1)), "receive")
        assert receive.attributes["error.type"] == "body_too_large"


@pytest.mark.parametrize(("accept", "status"), [("image/png", 500), ("text/event-stream", 200)])
def test_failures_of_the_service_are_errors(accept: str, status: int) -> None:
    """A request that fails in the worker: error and code on the exchange and on `denoise`, in a stream, too."""
    with traced() as service:
        response = service.server.inpaint(headers={"Accept": accept}, prompt="fail please")
        assert response.status_code == status
        exchange = service.exchange()
        assert exchange.attributes["http.response.status_code"] == status
        assert exchange.attributes["inpaint.code"] == exchange.attributes["error.type"] == "internal"
        assert exchange.status.status_code is StatusCode.ERROR
        denoise = only(service.stages(exchange), "denoise")
        assert denoise.attributes["error.type"] == "internal"
        assert denoise.attributes["inpaint.steps_done"] == 1
        assert not {"vae_decode", "safety", "render"} & set(names(service.stages(exchange)))


def test_deadlines_in_the_queue_and_in_a_worker(tmp_path: Path) -> None:
    """What comes too late says where it was: in a worker, or still waiting for one."""
    gate = tmp_path / "gate"
    with traced(model=f"fake?gate={gate}", max_images=1) as service, ThreadPoolExecutor(2) as pool:
        first = pool.submit(service.server.inpaint, prompt="hold")
        eventually(lambda: service.server.metric("inpaint_in_flight") == 1)
        second = pool.submit(service.server.inpaint, prompt="second", timeout="3")  # Prepared ahead in the worker.
        eventually(lambda: service.server.metric("inpaint_in_flight") == 2)
        assert service.server.inpaint(prompt="third", timeout="0.1").status_code == 504
        assert second.result().status_code == 504
        gate.touch()
        assert first.result().status_code == 200
        eventually(lambda: len(service.exchanges()) == 3)
        of_first, of_second, of_third = service.exchanges()
        assert of_first.status.status_code is StatusCode.UNSET
        for exchange, stage in ((of_second, "attempt"), (of_third, "queue")):
            assert exchange.attributes["error.type"] == "deadline"
            assert exchange.status.status_code is StatusCode.ERROR
            assert only(service.stages(exchange), stage).attributes["error.type"] == "deadline"
        assert "inpaint.worker" in of_second.attributes
        assert "inpaint.worker" not in of_third.attributes


def test_clients_that_hang_up_are_cancelled(tmp_path: Path) -> None:
    """A hang-up mid-batch: no status was sent, the exchange is cancelled, and the steps done are told."""
    with traced(model=f"fake?gate={tmp_path / 'gate'}") as service:
        body = usual_parts().replace(b"a red house", b"hold") + CLOSING
        connection = service.server.raw(multipart_head(f"Content-Length: {len(body)}"), body)
        eventually(lambda: service.server.metric("inpaint_batch_images_count") >= 3)
        connection.close()
        exchange = service.exchange()
        assert "http.response.status_code" not in exchange.attributes
        assert exchange.attributes["error.type"] == exchange.attributes["inpaint.code"] == "cancelled"
        assert exchange.status.status_code is StatusCode.ERROR
        attempt = only(service.stages(exchange), "attempt")
        assert attempt.attributes["error.type"] == "cancelled"
        assert attempt.end_time <= exchange.end_time
        assert exchange.attributes["inpaint.worker"] == "0"
        assert attempt.attributes["inpaint.steps_done"] >= 1


def test_hanging_up_during_the_upload() -> None:
    """A client that goes away while it sends leaves a cancelled `receive`."""
    with traced() as service:
        connection = service.server.raw(multipart_head("Content-Length: 100000"), usual_parts()[:500])
        connection.close()
        exchange = service.exchange()
        assert only(service.stages(exchange), "receive").attributes["error.type"] == "cancelled"
        assert exchange.attributes["error.type"] == "cancelled"


def test_lost_workers_are_told_with_the_attempt_that_they_cost() -> None:
    """A request that kills its worker twice: two failed attempts, each with its event, then 503."""
    with traced() as service:
        assert service.server.inpaint(prompt="crash").status_code == 503
        exchange = service.exchange()
        assert exchange.attributes["error.type"] == "worker_lost"
        assert exchange.attributes["inpaint.attempts"] == 2
        stages = service.stages(exchange)
        assert names(sorted(stages, key=lambda span: span.end_time)) == [
            "receive",
            "decode",
            "fit",
            *["queue", "attempt"] * 2,
            "send",
        ]
        for attempt in (span for span in stages if span.name == "attempt"):
            assert attempt.attributes["error.type"] == "worker_lost"
            (event,) = attempt.events
            assert (event.name, dict(event.attributes)) == ("worker_lost", {"inpaint.worker": "0"})
            assert event.timestamp == attempt.end_time


def test_the_second_attempt_has_its_stages() -> None:
    """Who shares a batch with a request that kills its worker is run again, and both attempts are in the trace."""
    with traced(model="fake?step_seconds=0.02") as service, ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(service.server.inpaint, prompt="slow neighbour")
        eventually(lambda: service.server.metric("inpaint_batch_images_count") >= 1)
        assert service.server.inpaint(prompt="crash").status_code == 503
        assert neighbour.result().status_code == 200
        eventually(lambda: len(service.exchanges()) == 2)
        (painted,) = (one for one in service.exchanges() if one.attributes["http.response.status_code"] == 200)
        stages = sorted(
            service.stages(painted),
            key=lambda span: (span.end_time, STAGES.index(span.name) if span.name in STAGES else 0),
        )
        assert names(stages) == [*STAGES[:4], "attempt", *STAGES[3:]]
        assert stages[4].events[0].name == "worker_lost"
        assert painted.status.status_code is StatusCode.UNSET
        assert stages[5].start_time == stages[4].end_time  # It waits again from the moment of the loss.


def test_a_request_outlasts_its_connection(tmp_path: Path) -> None:
    """With an idempotency key the work goes on after the exchange, and its later stages are in the same trace."""
    gate = tmp_path / "gate"
    with traced(model=f"fake?gate={gate}") as service:
        body = usual_parts().replace(b"a red house", b"hold") + CLOSING
        head = multipart_head(f"Content-Length: {len(body)}", "Idempotency-Key: once")
        connection = service.server.raw(head, body)
        eventually(lambda: service.server.metric("inpaint_in_flight") == 1)
        connection.close()
        exchange = service.exchange()
        gate.touch()
        eventually(lambda: "render" in names(service.stages(exchange)))
        assert only(service.stages(exchange), "denoise").end_time > exchange.end_time


def test_answers_given_again_name_the_first_request() -> None:
    """A repeated request has a trace of its own without any painting, and says whose answer it is."""
    with traced() as service:
        headers = {"Idempotency-Key": "once"}
        first, second = service.server.inpaint(headers=headers), service.server.inpaint(headers=headers)
        assert second.headers["Idempotent-Replayed"] == "true"
        again = service.exchange(1)
        assert again.attributes["inpaint.replay_of"] == first.headers["X-Request-Id"]
        assert names(service.stages(again)) == ["receive", "send"]
