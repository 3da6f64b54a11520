"""A worker process from start to end; the supervisor's child runs this."""

import gc
import os
import sys
import time
from multiprocessing.connection import Connection

from service.errors import StartupError
from service.messages import CannotStart, Loading, Ready
from service.settings import Settings
from service.worker.background import InlineJobs, Jobs, ThreadedJobs
from service.worker.batcher import Batcher
from service.worker.loop import Worker

SWITCH_SECONDS = 0.0005
"""How long a thread that computes in Python may keep the loop from starting the next step; Python's own is ten times
as long."""


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
    from service.worker.warm_up import warm_up  # noqa: PLC0415

    try:
        torch_device = open_device(device, cpu_threads)

        def on_stage(stage: str) -> None:
            connection.send(Loading(stage))

        components = load(settings, torch_device, on_stage)
        pipeline = InpaintPipeline(components, settings.nsfw_policy)
        warmed_up = warm_up(pipeline, settings, on_stage)
    except StartupError as error:
        connection.send(CannotStart(str(error)))
        return
    gc.collect()
    gc.freeze()  # All that is loaded stays: to look for garbage in it would stop every thread for tenths of a second.
    connection.send(
        Ready(
            model=components.info,
            device=device,
            dtype=str(components.dtype).removeprefix("torch."),
            max_images=warmed_up.max_images,
            step_seconds=dict(warmed_up.step_seconds),
            load_seconds=time.monotonic() - started_at,
        )
    )
    jobs = jobs_for(torch_device.type, settings.hang_timeout)
    Worker(connection, pipeline, Batcher(warmed_up.max_images), jobs).run()


def jobs_for(device_type: str, max_job_seconds: float) -> Jobs:
    """Where a worker prepares and finishes.

    On a CPU, threads would only take the cores from the running batch.

    Args:
        device_type: Of the torch device.
        max_job_seconds: A job beside the loop that takes longer is taken to hang.
    """
    if device_type == "cpu":
        return InlineJobs()
    sys.setswitchinterval(SWITCH_SECONDS)
    return ThreadedJobs(max_job_seconds)
