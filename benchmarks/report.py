"""From rounds of load to a Markdown table and a JSON document."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import median_ratio, percentile
from benchmarks.load import Round

PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "httpx", "numpy", "Pillow")


class NoGoodAnswerError(Exception):
    """A server answered nothing well, so that there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of load on both servers; round i of one was run next to round i of the other.

    Attributes:
        load: What was sent, in words.
        service: Rounds of this service.
        peer: Rounds of the peer.
        is_open: Whether the arrivals were given; the throughput of an open loop only repeats them.
    """

    load: str
    service: Sequence[Round]
    peer: Sequence[Round]
    is_open: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """What one server did under one load: medians over the rounds, percentiles over all good answers."""

    requests: int
    faults: tuple[str, ...]
    requests_per_second: float
    model_calls_per_second: float
    p50_seconds: float
    p95_seconds: float


def figures_of(rounds: Sequence[Round]) -> Figures:
    """The figures of one server's rounds.

    Raises:
        NoGoodAnswerError: There is none; the message says what came instead.
    """
    answers = [answer for one in rounds for answer in one.answers]
    latencies = [answer.latency_seconds for answer in answers if answer.fault is None]
    if not latencies:
        raise NoGoodAnswerError(f"no good answer: {next((answer.fault for answer in answers), 'nothing was sent')}")
    return Figures(
        requests=len(answers),
        faults=tuple(answer.fault for answer in answers if answer.fault is not None),
        requests_per_second=statistics.median(one.requests_per_second for one in rounds),
        model_calls_per_second=statistics.median(one.model_calls_per_second for one in rounds),
        p50_seconds=percentile(latencies, 50),
        p95_seconds=percentile(latencies, 95),
    )


def markdown(comparisons: Sequence[Comparison], facts: Mapping[str, Any]) -> str:
    """The table, and under it what one needs to know to read it."""
    lines = [
        "| load | measure | this service | stock behind a lock | service / stock |",
        "|---|---|---:|---:|---:|",
    ]
    for comparison in comparisons:
        lines += [f"| {comparison.load} | {row} |" for row in _rows(comparison)]
    lines += ["", *(f"- {name}: {words(value)}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def document(comparisons: Sequence[Comparison], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, down to the single answer, for `json.dump`."""
    return {
        "facts": dict(facts),
        "comparisons": [
            {
                "load": comparison.load,
                "service": {
                    "figures": asdict(figures_of(comparison.service)),
                    "rounds": [asdict(one) for one in comparison.service],
                },
                "peer": {
                    "figures": asdict(figures_of(comparison.peer)),
                    "rounds": [asdict(one) for one in comparison.peer],
                },
            }
            for comparison in comparisons
        ],
    }


def machine_facts() -> dict[str, Any]:
    """What was measured on: processor, cores that this process may use, load before the start, versions."""
    return {
        "machine": f"{_processor()}, {num_cores()} cores, {platform.system()} {platform.machine()}",
        "load average at the start": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def card(device: str) -> str:
    """Name, driver and memory of a torch device, as the driver's own tool gives them."""
    kind, _, number = device.partition(":")
    tool = shutil.which("nvidia-smi")
    if kind != "cuda" or tool is None:
        return "none" if kind != "cuda" else "unknown"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[int(number or 0)].strip() if visible else number or "0"
    query = [tool, f"--id={chosen}", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return ", ".join(part.strip() for part in answer.stdout.split(",")) or "unknown"


def run_facts(module: str) -> dict[str, Any]:
    """How, and when, this is measured: the command that this process was started with, and the date in UTC.

    Args:
        module: That is run, such as "benchmarks.gpu".
    """
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return {"command": command, "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def words(value: object) -> str:
    """A fact as a reader wants it: lists and mappings without their brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def _rows(comparison: Comparison) -> list[str]:
    service, peer = figures_of(comparison.service), figures_of(comparison.peer)
    rows = []
    if not comparison.is_open:
        requests = [[one.requests_per_second for one in rounds] for rounds in (comparison.service, comparison.peer)]
        calls = [[one.model_calls_per_second for one in rounds] for rounds in (comparison.service, comparison.peer)]
        rows += [
            _row("requests/s", service.requests_per_second, peer.requests_per_second, median_ratio(*requests)),
            _row("model calls/s", service.model_calls_per_second, peer.model_calls_per_second, median_ratio(*calls)),
        ]
    p50_ratio, p95_ratio = service.p50_seconds / peer.p50_seconds, service.p95_seconds / peer.p95_seconds
    counts = f"{_counts(service, comparison.service)} | {_counts(peer, comparison.peer)}"
    return [
        *rows,
        _row("latency p50, s", service.p50_seconds, peer.p50_seconds, p50_ratio),
        _row("latency p95, s", service.p95_seconds, peer.p95_seconds, p95_ratio),
        f"requests (rounds), not answered well | {counts} |",
    ]


def _row(measure: str, service: float, peer: float, ratio: float) -> str:
    return f"{measure} | {service:.2f} | {peer:.2f} | {ratio:.2f}"


def _counts(figures: Figures, rounds: Sequence[Round]) -> str:
    cut_short = " cut short" if any(one.is_cut_short for one in rounds) else ""
    return f"{figures.requests} ({len(rounds)}){cut_short}, {len(figures.faults)}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
