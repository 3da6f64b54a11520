"""A real worker whose UNet fails as files beside its model say; see `Faults`.

Only tests can have it: they name it as the engine's `worker_target`.
"""

import functools
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from service.settings import Settings


class Faults:
    """What a test asks of the worker, and may ask while it runs.

    Args:
        model: The checkpoint's folder.
    """

    def __init__(self, model: Path) -> None:
        self.short_of_memory = model / "short-of-memory"
        """While it exists, UNet calls of more than four rows lack memory."""
        self.lost = model / "lost"
        """Once it exists, the device is lost, once."""


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """As `service.worker.process.run`."""
    import torch  # noqa: PLC0415 - in the child, as the worker does
    from diffusers import UNet2DConditionModel  # noqa: PLC0415

    from service.worker import process  # noqa: PLC0415

    faults = Faults(Path(settings.model))
    forward = UNet2DConditionModel.forward

    @functools.wraps(forward)
    def failing(self: UNet2DConditionModel, sample: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if faults.lost.exists():
            faults.lost.unlink()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if faults.short_of_memory.exists() and len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, sample, *arguments, **keywords)

    UNet2DConditionModel.forward = failing
    process.run(connection, settings, device, cpu_threads)
