"""Which devices get a worker, and how many threads each has. Free of torch: this process must stay light."""

import asyncio
import os
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path

CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")

# Asked in a process of its own: a CUDA driver, once initialised, stays in a
# process, with its descriptors, and a broken one may crash or hang it. A torch
# built without CUDA cannot use what the driver finds.
_COUNT_CUDA_DEVICES = """
import ctypes
from importlib.metadata import version
driver = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int(0)
if not version("torch").endswith("+cpu") and driver.cuInit(0) == 0:
    driver.cuDeviceGetCount(ctypes.byref(count))
print(count.value)
"""
_PROBE_TIMEOUT_SECONDS = 30.0


async def resolve_devices(names: Sequence[str]) -> tuple[str, ...]:
    """The devices to start a worker on, one each: "auto" is every visible CUDA device, or else the CPU."""
    if not names:
        names = ("auto",)
    if "auto" not in names:
        return tuple(names)
    found = tuple(f"cuda:{index}" for index in range(await _count_cuda_devices())) or ("cpu",)
    return tuple(device for name in names for device in (found if name == "auto" else (name,)))


def threads_per_worker(devices: Sequence[str]) -> int:
    """An equal share of the usable cores for each CPU worker, or for each worker where none is on a CPU."""
    num_sharing = sum(device.startswith("cpu") for device in devices) or len(devices)
    return max(1, usable_cores() // num_sharing)


def usable_cores(quota_file: Path = CPU_QUOTA_FILE) -> int:
    """Cores that this process may use: its affinity, and in a container its CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return min(cores, max(1, ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # No cgroup v2, or "max": no quota.
        return cores


async def _count_cuda_devices() -> int:
    """CUDA devices that the driver shows, `CUDA_VISIBLE_DEVICES` applied; 0 without a driver."""
    probe = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _COUNT_CUDA_DEVICES,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(probe.communicate(), _PROBE_TIMEOUT_SECONDS)
    except TimeoutError:
        probe.kill()
        await probe.wait()
        return 0
    return int(output) if output.strip().isdigit() else 0
