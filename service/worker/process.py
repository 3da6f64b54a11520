"""A worker process from start to end; the supervisor's child runs this."""

import logging
import time
from multiprocessing.connection import Connection

import diffusers
import torch
import transformers

from service.errors import StartupError
from service.messages import CannotStart, Loading, Ready
from service.settings import Settings
from service.worker.batcher import Batcher
from service.worker.checkpoint import load
from service.worker.loop import Worker
from service.worker.pipeline import InpaintPipeline

logger = logging.getLogger(__name__)


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """Load, warm up, and serve the pipe until drained or abandoned.

    Args:
        connection: The worker's end of the pipe.
        settings: The operator's settings.
        device: A torch device, e.g. "cpu" or "cuda:0".
        cpu_threads: Threads of torch on a CPU device.
    """
    started_at = time.monotonic()
    torch.set_num_threads(cpu_threads)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        connection.send(Loading("loading the model"))
        components = load(settings, _device(device))
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
    Worker(connection, pipeline, Batcher(max_images)).run()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartupError(f"no such device: {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartupError(f"device {name!r} does not exist: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
