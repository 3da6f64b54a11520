"""What the service counts: the only module that knows of prometheus_client.

The engine reports what happens to admitted requests and to workers; the HTTP
side reports answers and the stages that it runs itself. No label ever holds a
prompt, an id or anything else a client can choose.
"""

from collections.abc import Callable
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from service.errors import ErrorCode
from service.messages import Ready, Ticked
from service.request import InpaintResult

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
REFUSALS = (ErrorCode.OVERLOADED, ErrorCode.NOT_READY, ErrorCode.DRAINING)
FAILURES = (
    ErrorCode.INTERNAL,
    ErrorCode.NAN_OUTPUT,
    ErrorCode.SAFETY_FAILED,
    ErrorCode.OUT_OF_MEMORY,
    ErrorCode.WORKER_LOST,
    ErrorCode.DEADLINE,
    ErrorCode.DRAINING,
)
WEBHOOK_OUTCOMES = ("delivered", "failed", "refused", "dropped", "abandoned")
CANCEL_REASONS = ("disconnect", "timeout", "client", "deadline", "drain")

Stage = Literal["decode", "fit", "prepare", "denoise", "vae_decode", "safety", "render"]


class Metrics:
    """Every metric of one service, on a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        # Answers, from the HTTP side.
        self._requests = self._counter("requests", "Requests answered.", "endpoint", "code")
        self._request_seconds = self._latency("request_seconds", "Seconds from request to answer.", "endpoint")

        # Asynchronous requests.
        self._webhooks = self._counter("webhooks", "Ends of requests that were to be told.", "outcome")
        self._async_kept = self._gauge("async_kept", "Asynchronous requests that ended and can be fetched.")
        self._async_kept_bytes = self._gauge("async_kept_bytes", "Memory that they take.")

        # The life of an admitted request.
        self._queue_seconds = self._latency("queue_seconds", "Seconds of one request's waiting after admission.")
        self._stage_seconds = self._latency("stage_seconds", "Seconds of one request in a stage.", "stage")
        self._first_step_seconds = self._latency(
            "time_to_first_step_seconds", "Seconds from admission to the end of the first step."
        )
        self._painted_seconds = self._latency(
            "painted_seconds", "Seconds of one painted request from admission to its pictures."
        )
        self._images = self._counter("images", "Images painted.")
        self._nsfw_flagged = self._counter("nsfw_flagged", "Images that the safety checker flagged.")
        self._rejected = self._counter(
            "rejected", "Requests that found no place: overloaded, not_ready, draining.", "reason"
        )
        self._replayed = self._counter("replayed", "Answers given again to a repeated Idempotency-Key.")
        self._cancelled = self._counter("cancelled", "Admitted requests that were cancelled.", "reason")
        self._failed = self._counter("failed", "Admitted requests that ended in an error.", "reason")
        self._queue_depth = self._gauge("queue_depth", "Admitted requests that wait for a worker.")
        self._in_flight = self._gauge("in_flight", "Requests inside workers.")

        # The running batch.
        self._step_seconds = self._latency("step_seconds", "Seconds of one step, by UNet rows rounded up.", "rows")
        self._batch_images = self._histogram("batch_images", "Images that shared a step.", BATCH_BUCKETS)
        self._batch_rows = self._histogram("batch_rows", "UNet rows that shared a step.", BATCH_BUCKETS)

        # Workers and their devices.
        self._worker_up = self._gauge("worker_up", "Whether the worker takes requests.", "worker")
        self._worker_restarts = self._counter("worker_restarts", "Times the worker was started again.", "worker")
        self._stepping_seconds = self._counter("stepping_seconds", "Seconds that the worker spent in steps.", "worker")
        self._max_images = self._gauge("max_images", "Images that may run at once.", "worker")
        self._warm_up_step_seconds = self._gauge(
            "warm_up_step_seconds", "Seconds of one step at the native size, measured at warm-up.", "worker", "rows"
        )
        self._gpu_memory_bytes = self._gauge("gpu_memory_bytes", "Device memory.", "worker", "kind")
        self._gpu_busy_ratio = self._gauge("gpu_busy_ratio", "Share of time spent computing, 0 to 1.", "worker")

        # A series that begins with its first event hides that event from `increase()`.
        for counter, reasons in (
            (self._rejected, REFUSALS),
            (self._failed, FAILURES),
            (self._cancelled, CANCEL_REASONS),
            (self._webhooks, WEBHOOK_OUTCOMES),
        ):
            for reason in reasons:
                counter.labels(reason)

    # --- called by the HTTP side ----------------------------------------------

    def request_done(self, endpoint: str, code: int | str, seconds: float) -> None:
        """A request was answered.

        Args:
            endpoint: The route's template, never the path that was asked for.
            code: HTTP status of the answer.
            seconds: From the first byte in to the last byte out.
        """
        self._requests.labels(endpoint, str(code)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """One request spent `seconds` in a stage; the worker's stages come with `observe_result`."""
        self._stage_seconds.labels(stage).observe(seconds)

    def replayed(self) -> None:
        """A repeated request got the first one's answer."""
        self._replayed.inc()

    def webhook(self, outcome: str) -> None:
        """A webhook was delivered, or was not."""
        self._webhooks.labels(outcome).inc()

    def watch_async(self, num_kept: Callable[[], int], num_bytes: Callable[[], int]) -> None:
        """Ask these two at every scrape."""
        self._async_kept.set_function(num_kept)
        self._async_kept_bytes.set_function(num_bytes)

    def render(self) -> tuple[bytes, str]:
        """The exposition's body and content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    # --- called by the engine ---------------------------------------------------

    def rejected(self, reason: str) -> None:
        """The engine refused a request; `reason` is the error's code."""
        self._rejected.labels(reason).inc()

    def cancelled(self, reason: str) -> None:
        """An admitted request was given up before its answer."""
        self._cancelled.labels(reason if reason in CANCEL_REASONS else "other").inc()

    def failed(self, reason: str) -> None:
        """An admitted request ended in an error; `reason` is the error's code."""
        self._failed.labels(reason).inc()

    def observe_result(self, result: InpaintResult) -> None:
        """A request was painted."""
        timings = result.timings
        self._queue_seconds.observe(timings.queue)
        self._first_step_seconds.observe(timings.time_to_first_step)
        self.observe_stage("prepare", timings.prepare)
        self.observe_stage("denoise", timings.denoise)
        self.observe_stage("vae_decode", timings.vae_decode)
        self.observe_stage("safety", timings.safety)
        spent = (timings.queue, timings.prepare, timings.denoise, timings.vae_decode, timings.safety)
        self._painted_seconds.observe(sum(spent))
        self._images.inc(len(result.nsfw))
        self._nsfw_flagged.inc(sum(result.nsfw))

    def observe_tick(self, worker: str, ticked: Ticked) -> None:
        """A worker has done one step of its running batch."""
        self._step_seconds.labels(_row_bucket(ticked.rows)).observe(ticked.step_seconds)
        self._stepping_seconds.labels(worker).inc(ticked.step_seconds)
        self._batch_images.observe(ticked.images)
        self._batch_rows.observe(ticked.rows)
        self._max_images.labels(worker).set(ticked.max_images)
        self._gpu_busy_ratio.labels(worker).set(ticked.busy_ratio)
        for kind, num_bytes in ticked.memory_bytes.items():
            self._gpu_memory_bytes.labels(worker, kind).set(num_bytes)

    def worker_ready(self, worker: str, ready: Ready) -> None:
        """A worker takes requests from now on."""
        self._worker_up.labels(worker).set(1)
        for counter in (self._worker_restarts, self._stepping_seconds):
            counter.labels(worker)  # From the start a series of its own, at 0.
        self._max_images.labels(worker).set(ready.max_images)
        for rows, seconds in ready.step_seconds.items():
            self._warm_up_step_seconds.labels(worker, str(rows)).set(seconds)

    def worker_lost(self, worker: str) -> None:
        """A worker takes requests no more."""
        self._worker_up.labels(worker).set(0)
        self._gpu_busy_ratio.labels(worker).set(0)

    def worker_restarted(self, worker: str) -> None:
        """A worker's process was lost and is started again."""
        self._worker_restarts.labels(worker).inc()

    def watch(self, queue_depth: Callable[[], int], in_flight: Callable[[], int]) -> None:
        """Ask these two at every scrape."""
        self._queue_depth.set_function(queue_depth)
        self._in_flight.set_function(in_flight)

    # --- construction -------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"inpaint_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"inpaint_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"inpaint_{name}", text, labels, registry=self._registry, buckets=buckets)

    def _latency(self, name: str, text: str, *labels: str) -> Histogram:
        return self._histogram(name, text, LATENCY_BUCKETS, *labels)


def _row_bucket(rows: int) -> str:
    """The label of `rows`: the smallest power of two that holds them, so that the label has few values."""
    return str(next((bucket for bucket in ROW_BUCKETS if rows <= bucket), f"{ROW_BUCKETS[-1]}+"))
