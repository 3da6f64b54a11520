"""A worker process that is the service's own but for faults in its steps, while they are asked for."""

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.demand import FOLDER_VARIABLE, Demand
from service.settings import Settings
from service.worker import process
from service.worker.background import Jobs
from service.worker.batcher import Batcher, Generation
from service.worker.loop import Worker


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """The worker's whole life."""
    process.Worker = _FaultyWorker  # What its `run` makes at the end of loading.
    process.run(connection, settings, device, cpu_threads)


class _FaultyWorker(Worker):
    def __init__(self, connection: Connection, pipeline: Any, batcher: Batcher, jobs: Jobs | None = None) -> None:  # noqa: ANN401
        _inject(pipeline, Demand(Path(os.environ[FOLDER_VARIABLE])))
        super().__init__(connection, pipeline, batcher, jobs)


def _inject(pipeline: Any, demand: Demand) -> None:  # noqa: ANN401 - a protocol of tensors
    gather = pipeline._gather  # noqa: SLF001 - called inside what turns torch's errors into the worker's own

    def struck(generations: Sequence[Generation]) -> Any:  # noqa: ANN401
        max_images = demand.max_images
        if max_images is not None and sum(generation.num_images for generation in generations) > max_images:
            import torch  # noqa: PLC0415 - loading it is part of the worker's start, and long done

            raise torch.OutOfMemoryError("injected")
        if demand.is_not_a_number:
            for generation in generations:
                slot = generation.latents.slots[0]
                slot.state = slot.state * float("nan")
        return gather(generations)

    pipeline._gather = struck  # noqa: SLF001
