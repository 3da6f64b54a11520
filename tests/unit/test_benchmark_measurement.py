"""A whole comparison in a second: made-up servers, the true plan of pieces, the page of what came out."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks import gpu, page, servers
from benchmarks.measurement import Measurement
from benchmarks.pieces import LITSERVE, SERVICE, STATIC, STOCK, TINY, Budget, Plan
from benchmarks.plots import bucket_labels
from service.metrics import Metrics
from tests.unit.benchmark_server import Reply, Request, png, serving

INSTANT = replace(
    TINY,
    alone_seconds=0.02,
    saturated_seconds=0.05,
    same_rate_seconds=0.05,
    open_seconds=0.02,
    burst_interval_seconds=0.02,
    bursts_seconds=0.02,
    tail_seconds=0.0,
    timeout_seconds=5.0,
)
MODELS = {
    "data": [
        {
            "attention_backend": "math",
            "native_size": 64,
            "workers": [{"name": "cpu", "max_images": 8, "step_seconds": {"2": 0.01, "4": 0.015}}],
        }
    ]
}


@contextmanager
def made_up(name: str, reply: Callable[[Request], Reply]) -> Iterator[Any]:
    """A server of this process, with what `benchmarks.servers` yields."""
    with serving(reply) as url:
        yield SimpleNamespace(name=name, url=f"{url}/v1/inpaint", base_url=url, start_seconds=1.5, pid=os.getpid())


def painting(request: Request) -> Reply:
    """A server that answers everything well, and what this service answers besides."""
    if request.line.startswith("GET /v1/models"):
        return 200, json.dumps(MODELS).encode()
    if request.line.startswith("GET /metrics"):
        return 200, Metrics().render()[0]
    return 200, png(INSTANT.size)


def measured(folder: Path, running: dict[str, Any], plan: Plan = INSTANT, max_seconds: float = 60.0) -> dict[str, Any]:
    """What a measurement of running servers leaves on the disk."""
    measurement = Measurement(folder, {"card": "none"}, plan, Budget(max_seconds), "cpu", seed=1)
    for key, server in running.items():
        measurement.note_start(key, None, server)
    measurement.take_all(running)
    document: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a measurement of three servers, one of which only refuses."""
    folder = tmp_path_factory.mktemp("run")
    with (
        made_up("a", painting) as service,
        made_up("b", painting) as static,
        made_up("c", lambda _: (503, b"no")) as broken,
    ):
        measured(folder, {SERVICE: service, STATIC: static, STOCK: broken})
    return folder


def loads(document: dict[str, Any], server: str) -> set[tuple[str, float]]:
    """Kinds and shares of what was sent to a server."""
    return {(piece["kind"], piece["share"]) for piece in document["pieces"] if piece["server"] == server}


def test_everything_is_measured_of_every_server_that_answers(results: Path) -> None:
    """Each gets every kind of load; one that gives no good answer is left out with the reason."""
    document = json.loads((results / "results.json").read_text(encoding="utf-8"))
    shares = {("open", share) for share in (0.2, 0.4, 0.6, 0.8, 0.95)}
    for server in (SERVICE, STATIC):
        assert loads(document, server) >= {("alone", 0.0), ("saturated", 0.0), ("bursts", 0.2)} | shares
    assert loads(document, STOCK) == set()
    assert {"server": STOCK, "what": "everything", "why": "no good answer: status 503: no"} in document["left_out"]


def test_the_same_load_is_not_measured_twice(results: Path) -> None:
    """The static server's 80 % is its own and the common rate at once."""
    document = json.loads((results / "results.json").read_text(encoding="utf-8"))
    keys = ("server", "kind", "steps", "clients", "rate", "share")
    measured_loads = [tuple(str(piece[key]) for key in keys) for piece in document["pieces"]]
    assert len(measured_loads) == len(set(measured_loads))


def test_the_bound_is_the_stock_servers_or_else_our_own(results: Path) -> None:
    """Goodput asks for twice a lone request's latency, and says whose."""
    document = json.loads((results / "results.json").read_text(encoding="utf-8"))
    alone = next(
        piece
        for piece in document["pieces"]
        if piece["server"] == SERVICE and piece["kind"] == "alone" and piece["steps"][0] == INSTANT.steps
    )
    assert document["bound_seconds"] == 2 * alone["figures"]["latency"]["p50_seconds"]
    assert document["bound"].endswith("of this service")


def test_single_answers_are_kept_apart(results: Path) -> None:
    """The results are figures alone and small; every answer is in the file beside them."""
    document = json.loads((results / "results.json").read_text(encoding="utf-8"))
    assert (results / "results.json").stat().st_size < page.MAX_JSON_BYTES
    assert "answers" not in json.dumps(document)
    lines = (results / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [len(json.loads(line)["round"]["answers"]) for line in lines] == [
        piece["figures"]["requests"] for piece in document["pieces"]
    ]


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    """Without time nothing is begun, and the results say what was not."""
    with made_up("a", painting) as service:
        document = measured(tmp_path, {SERVICE: service}, max_seconds=0.0)
    assert document["pieces"] == []
    assert {"server": SERVICE, "what": "one client, 4 steps", "why": "no time left"} in document["left_out"]


def test_a_peer_that_does_not_start_is_left_out() -> None:
    """The others are measured without it; its reason is handed on."""

    @contextmanager
    def failing() -> Iterator[Any]:
        raise servers.ServerFailedError("litserve is not installed")
        yield

    failures: dict[str, str] = {}
    with ExitStack() as stack:
        starters = {STATIC: lambda: made_up("b", painting), LITSERVE: failing}
        running = gpu.start_all(stack, starters, failures.__setitem__)
        assert list(running) == [STATIC]
    assert failures == {LITSERVE: "litserve is not installed"}


def test_the_service_starts_without_and_with_its_cache(tmp_path: Path) -> None:
    """The first start ends before the second begins, and both are written down."""
    measurement = Measurement(tmp_path, {}, INSTANT, Budget(0.0), "cpu", seed=1)
    alive: list[int] = []
    most: list[int] = []

    @contextmanager
    def start() -> Iterator[Any]:
        with made_up("a", painting) as server:
            alive.append(1)
            most.append(len(alive))
            yield server
            alive.pop()

    gpu.run(measurement, {SERVICE: start})
    assert most == [1, 1]
    assert [(start["cache"], start["seconds"]) for start in measurement.document()["starts"]] == [
        ("cold", 1.5),
        ("cached", 1.5),
    ]


def test_filled_cache_spares_the_cold_start(tmp_path: Path) -> None:
    """There is none to be measured."""
    measurement = Measurement(tmp_path, {}, INSTANT, Budget(0.0), "cpu", seed=1)
    gpu.run(measurement, {SERVICE: lambda: made_up("a", painting)}, is_cache_filled=True)
    assert [start["cache"] for start in measurement.document()["starts"]] == ["cached"]


# --- page --------------------------------------------------------------------------


def write_page(monkeypatch: pytest.MonkeyPatch, folder: Path, *results: Path) -> str:
    """The page's text."""
    words: Sequence[str] = ["page", *map(str, results), "--out", str(folder)]
    monkeypatch.setattr("sys.argv", words)
    assert page.main() == 0
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_page_is_made_of_the_json_alone(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run has a section with facts, tables and what was left out; the commentary is there as it was written."""
    monkeypatch.setattr(page, "draw", lambda *_: ["latency"])
    other = tmp_path / "second.json"
    other.write_text((results / "results.json").read_text(encoding="utf-8"), encoding="utf-8")
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "commentary.md").write_text("What it | means.\n", encoding="utf-8")
    text = write_page(monkeypatch, folder, results / "results.json", other)
    assert "What it | means.\n" in text
    assert text.index(f"## {results.name}\n") < text.index("## second\n")
    assert "- card: none" in text
    assert "|  | this service | static micro-batching |\n" in text
    assert "(second-latency.png)" in text
    assert "| 2 | 10.0 |" in text
    assert "- stock behind a lock, everything: no good answer: status 503: no" in text
    assert json.loads((folder / "second.json").read_text(encoding="utf-8"))["facts"] == {"card": "none"}


def test_a_run_that_was_cut_off_has_a_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not measured is missing from the page and keeps nothing else from it."""
    monkeypatch.setattr(page, "draw", lambda *_: [])
    with made_up("a", painting) as service:
        measured(tmp_path, {SERVICE: service}, max_seconds=0.0)
    assert "### Start" in write_page(monkeypatch, tmp_path, tmp_path / "results.json")


def test_files_with_more_than_figures_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's folder is kept in the repository: what is too large for it is not copied there."""
    large = tmp_path / "large.json"
    large.write_text(" " * (page.MAX_JSON_BYTES + 1), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["page", str(large), "--out", str(tmp_path / "page")])
    assert page.main() == 1
    assert "bytes" in capsys.readouterr().err


def test_plots_are_drawn_of_what_there_is(results: Path, tmp_path: Path) -> None:
    """Each plot is a PNG wide enough for 900 pixels."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    document = json.loads((results / "results.json").read_text(encoding="utf-8"))
    for piece in document["pieces"]:
        if piece["server"] == SERVICE:
            piece["service"]["batch_images"] = {"1": 3, "2": 4, "4": 0, "inf": 1}
    drawn = page.draw("run", document, tmp_path)
    assert drawn == ["latency", "throughput", "goodput", "batch"]
    for name in drawn:
        with Image.open(tmp_path / f"run-{name}.png") as picture:
            assert picture.width >= 900


def test_buckets_are_labelled_with_the_numbers_in_them() -> None:
    """Bounds are readers' riddles: 8 after 6 means 7 and 8."""
    assert bucket_labels([1.0, 2.0, 4.0, 8.0, float("inf")]) == ["1", "2", "3-4", "5-8", "> 8"]
