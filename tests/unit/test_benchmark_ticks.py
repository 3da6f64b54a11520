"""A profiled worker: when the profiler runs, what is fed to it, the page's section of what came out."""

import itertools
import json
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.feeder import LEAST_STEPS, Load, feed, requests_of
from benchmarks.profiled import ProfiledPipeline
from benchmarks.ticks_section import ticks_section
from benchmarks.timeline import Interval, Tick, host_of, kernel_part, timeline_of
from benchmarks.traffic import SCHEDULERS
from tests.unit.fake_pipeline import DrivenWorker, FakePipeline

STEPS = 4
LOAD = Load(in_flight=4, size=32, steps=STEPS, seed=1)


class FakeProfiler:
    """Notes what the pipeline had been asked to do when it was started and stopped."""

    def __init__(self, pipeline: FakePipeline) -> None:
        self._pipeline = pipeline
        self.steps_before: dict[str, int] = {}
        self.threads: set[int] = set()

    def start(self) -> None:
        """Once."""
        self._note("start")

    def stop(self) -> None:
        """Once."""
        self._note("stop")

    def _note(self, what: str) -> None:
        assert what not in self.steps_before
        self.steps_before[what] = len(self._pipeline.calls_of("step"))
        self.threads.add(threading.get_ident())


# --- load --------------------------------------------------------------------------


def test_first_requests_end_at_different_steps() -> None:
    """Those that follow have all steps, and the batch is mixed from its start."""
    requests = list(itertools.islice(requests_of(LOAD), 12))
    assert [request.params.num_inference_steps for request in requests] == [LEAST_STEPS, 2, 3, *([STEPS] * 9)]
    assert {request.params.scheduler for request in itertools.islice(requests_of(LOAD), 68)} == set(SCHEDULERS)
    for request in requests:
        assert request.image.shape == (32, 32, 3)
        assert set(request.mask.flat) == {0, 255}
        assert request.params.is_guided


def test_a_worker_is_fed_until_its_window_is_over() -> None:
    """The profiler runs on the loop's thread, from the step after those let pass; then everything is answered."""
    pipeline, is_over = FakePipeline(), threading.Event()
    profiler = FakeProfiler(pipeline)
    profiled = ProfiledPipeline(pipeline, profiler, settle_ticks=2 * STEPS, seconds=0.2, on_end=is_over.set)
    worker = DrivenWorker(profiled, max_images=3)
    worker.start()
    feed(worker.connection, LOAD, is_over)  # type: ignore[arg-type]
    worker.join()
    assert worker.error is None
    assert profiled.has_ended
    assert profiler.steps_before["start"] == 2 * STEPS
    host, before = profiled.recorded(STEPS), profiled.settled(STEPS)
    assert profiler.steps_before["stop"] == 2 * STEPS + host.ticks
    assert len(profiler.threads) == 1
    assert before.ticks == STEPS
    assert host.seconds >= 0.2
    assert 1 <= host.images <= 3
    assert host.rows == pytest.approx(2 * host.images)
    assert sum(map(len, pipeline.calls_of("finish"))) == len(pipeline.generations)


def test_a_failed_request_ends_the_profile() -> None:
    """Figures of a worker that fails would be fast and wrong."""
    pipeline, is_over = FakePipeline(lambda stage, _: ValueError("no") if stage == "step" else None), threading.Event()
    profiled = ProfiledPipeline(pipeline, FakeProfiler(pipeline), settle_ticks=8, seconds=0.2, on_end=is_over.set)
    worker = DrivenWorker(profiled)
    worker.start()
    with pytest.raises(SystemExit, match="requests failed"):
        feed(worker.connection, LOAD, is_over)  # type: ignore[arg-type]
    worker.join()
    assert not profiled.has_ended


# --- page --------------------------------------------------------------------------


def made_up_ticks() -> dict[str, object]:
    """What `benchmarks.ticks` writes, of 10 ms: 8 of busy, a gap of 2."""
    intervals = [Interval("gemm<a|b>", 0, 6), Interval("fmha", 8, 10)]
    host = host_of([Tick(0.0, 0.004, 8, 4), Tick(0.005, 0.009, 8, 4)], 0.01, 1, STEPS)
    return {
        "facts": {"card": "a card", "versions": {"torch": "2"}},
        "unit": "kernels",
        "device": asdict(timeline_of(intervals, kernel_part)),
        "host": asdict(host),
        "without_profiler": asdict(host),
    }


def test_the_section_has_parts_gaps_and_the_loop() -> None:
    """Milliseconds in all and per step, shares of what they are part of."""
    text = ticks_section(json.loads(json.dumps(made_up_ticks())))
    assert text.startswith("## Where a worker's time goes\n\n- card: a card\n- versions: torch 2\n")
    assert "| matrix products | 1 | 6.0 | 3.0 | 75.0% |" in text
    assert "| attention | 1 | 2.0 | 1.0 | 25.0% |" in text
    assert "| idle, in gaps > 0.1 ms | 2.0 | 20.0% |" in text
    assert "| 1 | 1 | 2.000 | 2.000 | 2.000 |" in text
    assert "| step, median ms | 4.00 | 4.00 |" in text
    assert "| outside steps, share | 20.0% | 20.0% |" in text
    assert "| `gemm<a\\|b>` | 1 | 6.0 | 75.0% |" in text
    assert "operators" not in text


def test_the_page_takes_the_profile_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands after the runs, with a copy of its JSON beside the page."""
    monkeypatch.setattr(page, "draw", lambda *_: [])
    run = {"facts": {}, "pieces": [], "starts": [], "left_out": [], "served": {}, "bound_seconds": None}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    ticks = tmp_path / "profile.json"
    ticks.write_text(json.dumps(made_up_ticks()), encoding="utf-8")
    folder = tmp_path / "page"
    words = ["page", str(tmp_path / "run.json"), "--ticks", str(ticks), "--out", str(folder)]
    monkeypatch.setattr("sys.argv", words)
    assert page.main() == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.index("## run\n") < text.index("## Where a worker's time goes\n")
    assert json.loads((folder / "ticks.json").read_text(encoding="utf-8")) == json.loads(
        ticks.read_text(encoding="utf-8")
    )
