"""Device memory as workers report it."""

import sys

import numpy as np
import pytest
import torch

from service.worker.memory import LOOK_SECONDS, MemoryGauge, memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a process's memory in /proc")
def test_a_cpu_worker_reports_what_its_process_has() -> None:
    """All that has been touched, and what is let go no longer."""
    size = 256 * 1024 * 1024
    (kind, before), *others = memory_bytes(torch.device("cpu")).items()
    assert kind == "resident"
    assert not others
    held = np.ones(size, np.uint8)
    with_it = memory_bytes(torch.device("cpu"))["resident"]
    assert 0.9 * size < with_it - before < 1.1 * size
    del held
    assert memory_bytes(torch.device("cpu"))["resident"] < with_it - 0.9 * size


def test_a_gauge_looks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time, and again when what it has seen is old."""
    looks: list[torch.device] = []

    def look(device: torch.device) -> dict[str, int]:
        looks.append(device)
        return {"resident": len(looks)}

    now = 100.0
    monkeypatch.setattr("service.worker.memory.memory_bytes", look)
    monkeypatch.setattr("service.worker.memory.time.monotonic", lambda: now)
    gauge = MemoryGauge(torch.device("cpu"))
    assert [gauge.bytes_by_kind() for _ in range(3)] == [{"resident": 1}] * 3
    now += LOOK_SECONDS
    assert gauge.bytes_by_kind() == {"resident": 2}
    assert looks == [torch.device("cpu")] * 2
