"""How much memory a worker uses of its device."""

import math
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

LOOK_SECONDS = 1.0
"""Every step reports, and to look takes torch about as long as everything else that is done between two steps."""


class MemoryGauge:
    """The memory of one device, looked at now and then.

    Args:
        device: Which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._looked_at = -math.inf
        self._found: dict[str, int] = {}

    def bytes_by_kind(self) -> dict[str, int]:
        """As `memory_bytes`, up to `LOOK_SECONDS` old."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at, self._found = now, memory_bytes(self._device)
        return self._found


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes by kind: "allocated" and "reserved" by torch on CUDA, "resident" of this process on a CPU.

    A CPU's are empty where the system does not tell, which is elsewhere than on Linux.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
        }
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return {"resident": int(pages) * os.sysconf("SC_PAGE_SIZE")}
    return {}
