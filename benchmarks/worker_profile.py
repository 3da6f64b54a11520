"""A real worker under a profiler: loaded as its process loads it, its loop on this thread, kept saturated."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.feeder import Load, feed
from benchmarks.profiled import ProfiledPipeline
from benchmarks.timeline import Host
from service.settings import Settings
from service.worker.batcher import Batcher
from service.worker.checkpoint import load
from service.worker.loop import Worker
from service.worker.pipeline import InpaintPipeline
from service.worker.process import jobs_for
from service.worker.runtime import open_device
from service.worker.warm_up import warm_up

SETTLE_ROUNDS = 2
"""Requests that each place of the batch has served before the window begins."""
END_SECONDS = 10.0


class NoProfileError(Exception):
    """The worker ended before there was a profile."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What was recorded.

    Attributes:
        max_images: Images that may share the running batch.
        size: Side of the pictures in pixels.
        events: Of the trace.
        host: What the loop did in the window.
        before: The same of the time before it, without the profiler.
    """

    max_images: int
    size: int
    events: Sequence[dict[str, Any]]
    host: Host
    before: Host


def take(
    settings: Settings,
    device: str,
    *,
    threads: int,
    steps: int,
    seconds: float,
    seed: int,
    on_stage: Callable[[str], None],
) -> Profile:
    """Load a worker, saturate it, profile some seconds of it.

    Args:
        settings: The operator's settings.
        device: "cpu" or "cuda:0".
        threads: Of torch on a CPU.
        steps: Of each request.
        seconds: Length of the window.
        seed: Of the requests.
        on_stage: Told in a few words what is being done.

    Raises:
        StartupError: It cannot be loaded.
        NoProfileError: It ended too early.
    """
    torch_device = open_device(device, threads)
    _prime(torch_device)
    components = load(settings, torch_device, on_stage)
    pipeline = InpaintPipeline(components, settings.nsfw_policy)
    max_images = warm_up(pipeline, settings, on_stage).max_images
    on_stage(f"saturating it with {max_images} images at once")

    # A process, as the service is one: a thread would take the interpreter's lock from the loop.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    is_over = context.Event()
    size = components.info.native_size
    in_flight = max_images + max(1, max_images // 4)  # As many as the service keeps in flight.
    profiler = _profiler(torch_device)
    profiled = ProfiledPipeline(
        pipeline, profiler, settle_ticks=SETTLE_ROUNDS * steps, seconds=seconds, on_end=is_over.set
    )
    feeder = context.Process(target=feed, args=(theirs, Load(in_flight, size, steps, seed), is_over), daemon=True)
    feeder.start()
    theirs.close()
    try:
        jobs = jobs_for(torch_device.type, settings.hang_timeout)
        Worker(ours, profiled, Batcher(max_images), jobs).run()
    finally:
        ours.close()
        feeder.join(END_SECONDS)
    if not profiled.has_ended or feeder.exitcode != 0:
        raise NoProfileError("the worker ended before its profile was complete, or a request failed")
    on_stage("reading the profile")
    return Profile(max_images, size, _events(profiler), profiled.recorded(steps), profiled.settled(steps))


def _profiler(device: torch.device) -> profile:
    """On CUDA the device alone: to record operators, too, would slow down the host that is to be measured."""
    return profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])


def _prime(device: torch.device) -> None:
    """Have CUDA's profiling interface ready, which takes seconds, and before any graph is captured that it is to see.

    It stays: to end it and begin anew while there are graphs has crashed.
    """
    if device.type == "cuda":
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        with _profiler(device):
            torch.zeros(1, device=device).add_(1)
            torch.cuda.synchronize(device)


def _events(profiler: profile) -> list[dict[str, Any]]:
    """The trace's events, by way of the one format of it that is documented."""
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        # Not strict: kernels have had names with control characters.
        document = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    events: list[dict[str, Any]] = document["traceEvents"]
    return events
