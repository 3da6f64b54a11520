"""What came of a measurement of several devices, and its table."""

from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Summary
from benchmarks.load import GOOD
from benchmarks.report import words


@dataclass(frozen=True, slots=True)
class Load:
    """What a closed loop on some devices came to.

    Attributes:
        devices: How many.
        clients: How many, over all devices.
        summary: All of its requests.
        images_per_second: Without its start and end.
        busy_ratio: Share of time with a kernel running by device, as NVML has it; empty without NVML.
        api_cpu_seconds: Of the API process, for each request.
    """

    devices: int
    clients: int
    summary: Summary
    images_per_second: float
    busy_ratio: tuple[float, ...]
    api_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Loss:
    """What killing a worker came to.

    Attributes:
        load: Of the whole stretch.
        killed_at_seconds: From its start.
        after_per_second: Good answers a second from then to the end of sending.
        ready_again_seconds: From the kill until all workers were ready again.
    """

    load: Load
    killed_at_seconds: float
    after_per_second: float
    ready_again_seconds: float


@dataclass(frozen=True, slots=True)
class Copies:
    """What came of the same request, sent several times at once.

    Attributes:
        requests: How many.
        failed: Those without a picture.
        different: Different pictures.
        largest_difference: Of any two of them, at any pixel and channel, in levels of 255.
    """

    requests: int
    failed: int
    different: int
    largest_difference: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured.

    Attributes:
        facts: What it was measured on.
        start_seconds: Until all workers were ready.
        copies: The same request, painted by all workers at once.
        together: All devices.
        loss: All devices, one worker killed.
        alone: The first device.
    """

    facts: dict[str, Any]
    start_seconds: float
    copies: Copies
    together: Load
    loss: Loss
    alone: Load

    @property
    def has_failed(self) -> bool:
        """Whether a request got no good answer."""
        loads = (self.together, self.loss.load, self.alone)
        return self.copies.failed > 0 or any(set(load.summary.outcomes) != {GOOD} for load in loads)

    def markdown(self) -> str:
        """The table, and under it what one needs to know to read it."""
        rows = {
            f"{self.alone.devices} device": self.alone,
            f"{self.together.devices} devices": self.together,
            f"{self.together.devices} devices, one worker killed": self.loss.load,
        }
        lines = [
            "| | clients | answers | images/s | p50, s | p95, s | longest, s | devices busy | API, ms/request |",
            "|---|---:|---|---:|---:|---:|---:|---|---:|",
            *(f"| {name} | {_cells(load)} |" for name, load in rows.items()),
            "",
            f"- together / alone: {self.together.images_per_second / self.alone.images_per_second:.2f}",
            f"- killed after {self.loss.killed_at_seconds:.1f} s, then {self.loss.after_per_second:.2f} images/s",
            f"- all workers ready again {self.loss.ready_again_seconds:.0f} s after the kill, beside another start",
            f"- ready after {self.start_seconds:.0f} s",
            f"- {self.copies.requests} times the same request at once: {self.copies.failed} failed",
            f"- different pictures: {self.copies.different}, by up to {self.copies.largest_difference} levels of 255",
            *(f"- {name}: {words(value)}" for name, value in self.facts.items()),
        ]
        return "\n".join(lines) + "\n"


def _cells(load: Load) -> str:
    spread = load.summary.latency
    latencies = ("-",) * 3 if spread is None else (spread.p50_seconds, spread.p95_seconds, spread.max_seconds)
    cells = [
        str(load.clients),
        words(load.summary.outcomes),
        f"{load.images_per_second:.2f}",
        *(each if isinstance(each, str) else f"{each:.2f}" for each in latencies),
        ", ".join(f"{ratio:.1%}" for ratio in load.busy_ratio) or "-",
        f"{1000 * load.api_cpu_seconds:.0f}",
    ]
    return " | ".join(cells)
