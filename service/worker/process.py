"""A worker process from start to end; the supervisor's child runs this."""

import os
import time
from multiprocessing.connection import Connection

from service.errors import StartupError
from service.messages import CannotStart, Loading, Ready
from service.settings import Settings
from service.worker.background import InlineJobs, Jobs, ThreadedJobs
from service.worker.batcher import Batcher
from service.worker.loop import Worker


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """Load, warm up, and serve the pipe until drained or abandoned.

    Args:
        connection: The worker's end of the pipe.
        settings: The operator's settings.
        device: A torch device, e.g. "cpu" or "cuda:0".
        cpu_threads: Threads of torch on a CPU device.
    """
    started_at = time.monotonic()
    connection.send(Loading("starting torch"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # Read once, when it is imported.
    # Here, not above: these imports take seconds, which are part of loading.
    from service.worker.checkpoint import load  # noqa: PLC0415
    from service.worker.pipeline import InpaintPipeline  # noqa: PLC0415
    from service.worker.runtime import open_device  # noqa: PLC0415

    try:
        torch_device = open_device(device, cpu_threads)
        components = load(settings, torch_device, lambda stage: connection.send(Loading(stage)))
        pipeline = InpaintPipeline(components, settings.nsfw_policy)
        connection.send(Loading("warming up"))
        max_images, step_seconds = pipeline.warm_up(settings.max_images)
    except StartupError as error:
        connection.send(CannotStart(str(error)))
        return
    connection.send(
        Ready(
            model=components.info,
            device=device,
            dtype=str(components.dtype).removeprefix("torch."),
            max_images=max_images,
            step_seconds=step_seconds,
            load_seconds=time.monotonic() - started_at,
        )
    )
    # On a CPU, threads would only take the cores from the running batch.
    jobs: Jobs = ThreadedJobs() if torch_device.type == "cuda" else InlineJobs()
    Worker(connection, pipeline, Batcher(max_images), jobs).run()
