"""The exposition that an operator's dashboards read."""

from prometheus_client.parser import text_string_to_metric_families

from service.messages import Ready, Ticked
from service.metrics import LATENCY_BUCKETS, Metrics
from service.request import InpaintResult, Timings
from tests.fake_worker import MODEL
from tests.process.support import pixels

READY = Ready(MODEL, "cpu", "float32", max_images=8, step_seconds={2: 0.01, 4: 0.015}, load_seconds=1.0)


def samples(metrics: Metrics) -> dict[str, dict[str, float]]:
    """Value by sample name and labels, as "name=value,name=value"."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def counted(series: dict[str, float]) -> dict[str, float]:
    """Those that are not 0."""
    return {labels: value for labels, value in series.items() if value}


def busy_metrics() -> Metrics:
    """Metrics with every kind of event recorded."""
    metrics = Metrics()
    metrics.request_done("/v1/inpaint", 200, 0.3)
    metrics.observe_stage("decode", 0.01)
    metrics.rejected("overloaded")
    metrics.replayed()
    metrics.webhook("delivered")
    metrics.watch_async(num_kept=lambda: 4, num_bytes=lambda: 500)
    metrics.cancelled("disconnect")
    metrics.failed("deadline")
    metrics.worker_ready("0", READY)
    metrics.worker_restarted("0")
    metrics.watch(queue_depth=lambda: 3, in_flight=lambda: 2)
    metrics.observe_tick("0", Ticked(6, 3, 0.02, 4, 0.75, {"allocated": 5, "reserved": 7}, ()))
    timings = Timings(queue=1, prepare=2, denoise=3, vae_decode=4, safety=5, time_to_first_step=6)
    metrics.observe_result(InpaintResult(pixels(0)[0][None].repeat(3, 0), (True, False, True), timings))
    return metrics


def test_every_metric_of_the_contract_is_there() -> None:
    """Dashboards and alerts find each metric under its name and with its labels."""
    found = samples(busy_metrics())
    assert found["inpaint_requests_total"] == {"code=200,endpoint=/v1/inpaint": 1}
    assert found["inpaint_request_seconds_count"] == {"endpoint=/v1/inpaint": 1}
    assert found["inpaint_queue_seconds_sum"] == {"": 1}
    assert found["inpaint_stage_seconds_sum"] == {
        "stage=decode": 0.01,
        "stage=prepare": 2,
        "stage=denoise": 3,
        "stage=vae_decode": 4,
        "stage=safety": 5,
    }
    assert found["inpaint_time_to_first_step_seconds_sum"] == {"": 6}
    assert found["inpaint_step_seconds_sum"] == {"rows=8": 0.02}
    assert found["inpaint_batch_images_sum"] == {"": 3}
    assert found["inpaint_batch_rows_sum"] == {"": 6}
    assert found["inpaint_painted_seconds_sum"] == {"": 1 + 2 + 3 + 4 + 5}
    assert found["inpaint_stepping_seconds_total"] == {"worker=0": 0.02}
    assert found["inpaint_images_total"] == {"": 3}
    assert found["inpaint_nsfw_flagged_total"] == {"": 2}
    assert found["inpaint_replayed_total"] == {"": 1}
    assert counted(found["inpaint_webhooks_total"]) == {"outcome=delivered": 1}
    assert found["inpaint_async_kept"] == {"": 4}
    assert found["inpaint_async_kept_bytes"] == {"": 500}
    assert counted(found["inpaint_rejected_total"]) == {"reason=overloaded": 1}
    assert counted(found["inpaint_cancelled_total"]) == {"reason=disconnect": 1}
    assert counted(found["inpaint_failed_total"]) == {"reason=deadline": 1}
    assert found["inpaint_queue_depth"] == {"": 3}
    assert found["inpaint_in_flight"] == {"": 2}
    assert found["inpaint_worker_up"] == {"worker=0": 1}
    assert found["inpaint_worker_restarts_total"] == {"worker=0": 1}
    assert found["inpaint_warm_up_step_seconds"] == {"rows=2,worker=0": 0.01, "rows=4,worker=0": 0.015}
    assert found["inpaint_gpu_memory_bytes"] == {"kind=allocated,worker=0": 5, "kind=reserved,worker=0": 7}
    assert found["inpaint_gpu_busy_ratio"] == {"worker=0": 0.75}
    assert found["process_open_fds"][""] > 0


def test_the_first_event_is_a_change() -> None:
    """A counter's series is there at 0 before its first event, or alerts on an increase would miss that one."""
    found = samples(Metrics())
    assert found["inpaint_failed_total"]["reason=nan_output"] == 0
    assert found["inpaint_failed_total"]["reason=out_of_memory"] == 0
    assert found["inpaint_rejected_total"]["reason=overloaded"] == 0
    assert found["inpaint_cancelled_total"]["reason=disconnect"] == 0
    metrics = Metrics()
    metrics.worker_ready("0", READY)
    assert samples(metrics)["inpaint_worker_restarts_total"] == {"worker=0": 0}
    assert samples(metrics)["inpaint_stepping_seconds_total"] == {"worker=0": 0}


def test_cap_on_running_images_is_the_latest() -> None:
    """From warm-up at first, then what memory allows, and anew once a worker has started again."""
    metrics = Metrics()
    metrics.worker_ready("0", READY)
    assert samples(metrics)["inpaint_max_images"] == {"worker=0": 8}
    metrics.observe_tick("0", Ticked(6, 3, 0.02, 4, 0.75, {}, ()))
    assert samples(metrics)["inpaint_max_images"] == {"worker=0": 4}
    metrics.worker_ready("0", READY)
    assert samples(metrics)["inpaint_max_images"] == {"worker=0": 8}


def test_latency_buckets() -> None:
    """Latencies have the buckets that the documentation names."""
    buckets = samples(busy_metrics())["inpaint_queue_seconds_bucket"]
    assert [float(labels.removeprefix("le=")) for labels in buckets] == [*LATENCY_BUCKETS, float("inf")]


def test_gauges_are_read_at_the_scrape() -> None:
    """Queue depth is that of the moment, not of the last event."""
    metrics = Metrics()
    waiting: list[int] = []
    metrics.watch(queue_depth=lambda: len(waiting), in_flight=lambda: 0)
    waiting.append(1)
    assert samples(metrics)["inpaint_queue_depth"] == {"": 1}


def test_dead_worker_is_not_busy() -> None:
    """A worker that is down shows neither up nor busy."""
    metrics = busy_metrics()
    metrics.worker_lost("0")
    assert samples(metrics)["inpaint_worker_up"] == {"worker=0": 0}
    assert samples(metrics)["inpaint_gpu_busy_ratio"] == {"worker=0": 0}


def test_labels_have_few_values() -> None:
    """Neither the size of batches nor the words of a caller grow the number of series."""
    metrics = Metrics()
    for rows in range(1, 300):
        metrics.observe_tick("0", Ticked(rows, rows, 0.1, 64, 1.0, {}, ()))
        metrics.cancelled(f"because {rows}")
    assert len(samples(metrics)["inpaint_step_seconds_count"]) == 9
    assert counted(samples(metrics)["inpaint_cancelled_total"]) == {"reason=other": 299}


def test_two_services_share_no_numbers() -> None:
    """Each engine has a registry of its own."""
    busy_metrics()
    assert "code=200,endpoint=/v1/inpaint" not in samples(Metrics()).get("inpaint_requests_total", {})


def test_content_type() -> None:
    """Prometheus recognises the exposition by its content type."""
    assert Metrics().render()[1].startswith("text/plain; version=")
