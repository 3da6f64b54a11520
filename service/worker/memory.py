"""How much memory a worker uses of its device."""

import os
from contextlib import suppress
from pathlib import Path

import torch


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
