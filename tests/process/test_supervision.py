"""When workers are started again, and on what they run."""

import asyncio
from pathlib import Path

import pytest

from service.engine.devices import resolve_devices, threads_per_worker, usable_cores
from service.engine.supervisor import HEALTHY_SECONDS, Backoff, Watchdog


def test_backoff_grows_to_a_limit() -> None:
    """Crash loop: pauses double from half a second to half a minute."""
    backoff = Backoff()
    assert [backoff.after(0.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_backoff_forgives_after_health() -> None:
    """A worker that was healthy for a while is restarted at once when it is lost."""
    backoff = Backoff()
    for _ in range(5):
        backoff.after(HEALTHY_SECONDS - 1)
    assert backoff.after(HEALTHY_SECONDS) == 0.5


def test_silence_adds_up_until_something_is_heard() -> None:
    """A hang is noticed at the watchdog's limit, counted from the last sign of life."""
    watchdog = Watchdog(now=100.0)
    assert [watchdog.look(100 + 0.25 * tick) for tick in (1, 2, 3)] == [0.25, 0.5, 0.75]
    watchdog.heard()
    assert watchdog.look(101.0) == 0.25


def test_a_pause_of_the_machine_is_nobodys_silence() -> None:
    """When this process itself was stopped for an hour, no worker is taken for dead."""
    watchdog = Watchdog(now=100.0)
    assert watchdog.look(3700.0) <= 0.5


@pytest.mark.parametrize("names", [("cpu",), ("cpu", "cpu"), ("cuda:1", "cpu")])
def test_named_devices_are_taken_as_they_are(names: tuple[str, ...]) -> None:
    """One worker for each device that the operator names."""
    assert asyncio.run(resolve_devices(names)) == names


def test_auto_finds_something() -> None:
    """Without a CUDA device, or a torch that can use it, the CPU is used; never nothing."""
    found = asyncio.run(resolve_devices(("auto",)))
    assert found == ("cpu",) or all(device.startswith("cuda:") for device in found)
    assert asyncio.run(resolve_devices(())) == found


def test_cpu_workers_share_the_cores() -> None:
    """Two workers on the CPU do not compete for the same cores, and each has at least one."""
    assert threads_per_worker(("cpu",)) == usable_cores()
    assert threads_per_worker(("cpu", "cpu")) == max(1, usable_cores() // 2)
    assert threads_per_worker(("cpu",) * 1000) == 1


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_container_quota_counts(tmp_path: Path, quota: str, cores: int | None) -> None:
    """In a container with a CPU limit, as many threads as the limit allows, and not as the host has cores."""
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert usable_cores(file) == (cores or usable_cores(tmp_path / "missing"))
