"""What was done meanwhile: differences of scrapes, processes and their roles, devices."""

import math
import os
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks.scrape import Histogram, parse, use_between
from benchmarks.watch import SAMPLE_SECONDS, GpuUse, Watch, roles_of, visible_device
from service.messages import Ticked
from service.metrics import Metrics
from tests.unit.benchmark_server import serving


def ticked(images: int) -> Ticked:
    """A step that took 10 ms, of images with guidance."""
    return Ticked(
        rows=2 * images,
        images=images,
        step_seconds=0.01,
        max_images=8,
        busy_ratio=0.5,
        memory_bytes={"allocated": 5},
        progress=(),
    )


def text_of(metrics: Metrics) -> str:
    """What `/metrics` would answer."""
    return metrics.render()[0].decode()


def test_histograms_are_differences() -> None:
    """Only what was observed between two scrapes counts, bucket by bucket."""
    bounds = (1.0, 2.0, math.inf)
    late, early = Histogram(bounds, (5.0, 3.0, 1.0), 20.0), Histogram(bounds, (4.0, 0.0, 1.0), 8.0)
    assert late.since(early) == Histogram(bounds, (1.0, 3.0, 0.0), 12.0)
    assert late.since(early).mean == 3.0
    assert late.since(None) == late
    assert late.since(late).mean is None


def test_a_later_state_is_no_earlier_one() -> None:
    """Counts that fell mean another process, whose difference would be nonsense."""
    bounds = (1.0, math.inf)
    with pytest.raises(ValueError, match="earlier"):
        Histogram(bounds, (1.0, 0.0), 1.0).since(Histogram(bounds, (2.0, 0.0), 2.0))
    with pytest.raises(ValueError, match="earlier"):
        Histogram(bounds, (1.0, 0.0), 1.0).since(Histogram((2.0, math.inf), (0.0, 0.0), 0.0))


def test_the_service_use_is_read_from_its_own_metrics() -> None:
    """The names asked for are those that the service exports, and what was before the load does not count."""
    metrics = Metrics()
    metrics.observe_tick("w", ticked(1))
    metrics.rejected("queue_full")
    before = parse(text_of(metrics))
    for images in (2, 2, 5):
        metrics.observe_tick("w", ticked(images))
    metrics.rejected("queue_full")
    metrics.observe_stage("decode", 0.25)
    use = use_between(before, parse(text_of(metrics)))
    assert use.batch_images == {"1": 0, "2": 2, "3": 0, "4": 0, "6": 1}
    assert use.steps == 3
    assert use.mean_images == 3.0
    assert use.mean_rows == 6.0
    assert use.step_seconds == {"4": pytest.approx(0.01), "16": pytest.approx(0.01)}
    assert use.stage_seconds == {"decode": 0.25}
    assert use.stepping_seconds == pytest.approx(0.03)
    assert use.rejected == {"queue_full": 1}


def test_a_service_that_did_nothing_has_no_means() -> None:
    """No step between two scrapes is none, not a division by zero."""
    idle = parse(text_of(Metrics()))
    use = use_between(idle, idle)
    assert (use.steps, use.mean_images, use.batch_images, use.stage_seconds) == (0, None, {}, {})


def test_workers_are_the_children_with_the_most_memory() -> None:
    """A small helper of the started process, and what a worker started itself, are no workers."""
    roles = roles_of(1, {2, 3, 4}, {1: 100, 2: 900, 3: 800, 4: 12, 5: 700})
    assert roles == {1: "api", 2: "worker", 3: "worker", 4: "other", 5: "other"}
    assert roles_of(1, set(), {1: 100}) == {1: "api"}


@pytest.mark.parametrize(
    ("number", "visible", "chosen"),
    [(1, None, 1), (1, "", 1), (0, "3,5", 3), (1, "3, 5", 5), (0, "GPU-ab12", "GPU-ab12")],
)
def test_devices_are_counted_as_cuda_counts_them(number: int, visible: str | None, chosen: int | str) -> None:
    """`cuda:0` is the first visible device, whichever that is to the driver."""
    assert visible_device(number, visible) == chosen


def test_a_watch_sees_processor_time_and_metrics() -> None:
    """Around a load it gives this process as the one started, and the difference of the metrics."""
    metrics = Metrics()
    metrics.observe_tick("w", ticked(1))
    with serving(lambda _: (200, text_of(metrics).encode())) as url:
        with Watch(os.getpid(), "cpu", url, 1.0) as watch:
            metrics.observe_tick("w", ticked(4))
            sum(number * number for number in range(1_000_000))
        seen = watch.seen
    assert seen.processes[0].role == "api"
    assert seen.cpu_seconds("api") > 0
    assert seen.service is not None
    assert seen.service.mean_images == 4.0
    assert seen.memory_bytes == {"allocated": 5}
    assert seen.gpu is None


def test_a_watch_of_a_server_without_metrics_goes_without() -> None:
    """Peers have none; a service that is lost meanwhile costs its figures, not the measurement."""
    for url in (None, "http://127.0.0.1:9"):
        with Watch(os.getpid(), "cpu", url, 1.0) as watch:
            pass
        assert watch.seen.service is None


class Nvml:
    """As `pynvml`; notes when it was asked."""

    NVMLError = OSError

    def __init__(self) -> None:
        self.asked_at: list[float] = []
        self.was_asked = threading.Event()

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        """Nothing to do."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        """The index itself."""
        return index

    def nvmlDeviceGetUtilizationRates(self, _: object) -> SimpleNamespace:  # noqa: N802
        """Half busy."""
        self.asked_at.append(time.perf_counter())
        self.was_asked.set()
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetMemoryInfo(self, _: object) -> SimpleNamespace:  # noqa: N802
        """A few bytes."""
        return SimpleNamespace(used=7)


def test_a_device_is_looked_at_while_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it has settled, and not when nothing is sent any more."""
    nvml = Nvml()
    monkeypatch.setattr("benchmarks.watch.pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    began_at = time.perf_counter()
    with Watch(os.getpid(), "cuda:0", None, 60.0, settle_seconds=0.5) as watch:
        assert nvml.was_asked.wait(30.0)
    assert watch.seen.gpu == GpuUse(busy_ratio=0.5, max_memory_bytes=7, num_samples=len(nvml.asked_at))
    assert nvml.asked_at[0] >= began_at + 0.5

    with Watch(os.getpid(), "cuda:0", None, 0.0) as watch:
        time.sleep(3 * SAMPLE_SECONDS)
    assert watch.seen.gpu is None
