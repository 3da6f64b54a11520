"""Traces of a `serve` process with real workers and a real (tiny) model, as a collector gets them."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import Settings
from tests.http.collector import Collector, attributes_of, collecting
from tests.http.serving import eventually
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests
from tests.process.real_service import form_of, post_all, serving

pytestmark = pytest.mark.timeout(300)

STAGES = ["receive", "decode", "fit", "queue", "prepare", "denoise", "vae_decode", "safety", "render", "send"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tracing"))


def seconds(spans: list[Span], name: str) -> float:
    return sum(span.end_time_unix_nano - span.start_time_unix_nano for span in spans if span.name == name) / 1e9


def by_request_id(collector: Collector) -> dict[str, tuple[Span, list[Span]]]:
    """The span of each inpainting request's exchange, and those below it."""
    found = {}
    for spans in collector.traces().values():
        for exchange in spans:
            if exchange.name == "POST /v1/inpaint":
                below = [span for span in spans if span.parent_span_id == exchange.span_id]
                found[str(attributes_of(exchange.attributes)["inpaint.request_id"])] = (exchange, below)
    return found


def test_stages_of_real_workers_though_one_is_killed(checkpoint: Path) -> None:
    """A mixed batch over two workers, one killed on the way: whole traces that agree with each answer's timings.

    What lay in the killed worker has an attempt with the event `worker_lost`, and the second attempt's stages.
    """
    requests = mixed_requests(("ddim", "euler_a", "dpmpp_2m", "lms"), 12, NATIVE_SIZE, seed=3)
    with collecting() as collector:
        with serving(checkpoint, "--max-images", "4", "--otlp-endpoint", collector.endpoint) as service:
            victim = service.worker_pids()[0]
            killer = threading.Thread(
                target=lambda: (
                    service.wait_for_metric("inpaint_batch_images_count", 5),
                    os.kill(victim, signal.SIGKILL),
                )
            )
            killer.start()
            responses = asyncio.run(post_all(service, [form_of(request) for request in requests]))
            killer.join()
            assert service.end() == 0  # The last spans are sent before it.
        traces = by_request_id(collector)

    assert len(traces) == len(requests)
    num_lost = 0
    for request, response in zip(requests, responses, strict=True):
        assert response.status_code == 200, response.text
        timings, (exchange, stages) = response.json()["timings"], traces[response.headers["X-Request-Id"]]
        assert exchange.status.code == Status.STATUS_CODE_UNSET
        attempts = [span for span in stages if span.name == "attempt"]
        for attempt in attempts:
            assert [event.name for event in attempt.events] == ["worker_lost"]
            assert attempt.status.code == Status.STATUS_CODE_ERROR
        num_lost += len(attempts)
        for name in set(STAGES) - {"queue"}:
            assert sum(span.name == name for span in stages) == 1, name
        painted_at = [span.start_time_unix_nano for span in stages for name in STAGES[4:8] if span.name == name]
        assert sorted(span.start_time_unix_nano for span in stages if span.name in STAGES[4:8]) == painted_at
        for name, stage in (
            ("prepare", "prepare"),
            ("denoise", "denoise"),
            ("decode", "vae_decode"),
            ("safety", "safety"),
        ):
            assert seconds(stages, stage) == pytest.approx(timings[name], abs=1e-5), name
        # All of its waiting, but for what is shorter than a span is worth; a lost attempt counts as waiting, too.
        assert seconds(stages, "queue") + seconds(attempts, "attempt") == pytest.approx(timings["queue"], abs=0.003)
        denoise = attributes_of(next(span for span in stages if span.name == "denoise").attributes)
        assert denoise["inpaint.rows"] == request.params.num_rows
        assert denoise["inpaint.mean_images"] == pytest.approx(response.json()["batch"]["mean_images"])
        assert attributes_of(exchange.attributes)["inpaint.attempts"] == len(attempts) + 1
    assert num_lost > 0
    workers = {attributes_of(exchange.attributes)["inpaint.worker"] for exchange, _ in traces.values()}
    assert workers <= {"0", "1"}


def test_workers_never_import_opentelemetry(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing on or off, the process that denoises knows nothing of it."""
    told = tmp_path / "modules"
    monkeypatch.setenv("TEST_MODULES_FILE", str(told))

    async def main() -> None:
        settings = Settings(
            model=str(checkpoint), devices=("cpu",), cpu_threads=1, otlp_endpoint="http://127.0.0.1:4318"
        )
        engine = Engine(settings, Metrics(), worker_target="tests.process.modules_worker:run")
        await engine.start()
        try:
            await engine.wait_ready()
            request = mixed_requests(("ddim",), 1, NATIVE_SIZE)[0]
            handle = engine.submit(request.params, request.image, request.mask, request_id="one")
            await handle.result()
            assert await engine.drain(30)
        finally:
            await engine.stop()

    asyncio.run(main())
    eventually(told.exists)
    modules = told.read_text().split()
    assert "torch" in modules
    assert not [name for name in modules if name.startswith("opentelemetry")]
