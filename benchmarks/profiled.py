"""A pipeline that runs a profiler through some seconds of a worker's life, and notes when each step began and ended."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks.timeline import Host, Tick, host_of
from service.errors import InpaintError
from service.messages import LoraInfo
from service.request import Pixels
from service.worker.batcher import Generation
from service.worker.loop import Finish, Pipeline


class Profiler(Protocol):
    """What records, from `start` to `stop`."""

    def start(self) -> object:
        """Record from now on."""

    def stop(self) -> object:
        """Record no more."""


class ProfiledPipeline:
    """Forwards everything; see `service.worker.loop.Pipeline`.

    The profiler starts and stops between two steps, on the thread that makes them: of
    a CPU it records what the thread does that started it, of a GPU all that runs there.

    Args:
        pipeline: What does the work.
        profiler: Started once.
        settle_ticks: Steps before that, until the running batch is as it stays.
        seconds: How long to record; the window ends where the next step would begin.
        on_end: Called once when the window is over.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        profiler: Profiler,
        *,
        settle_ticks: int,
        seconds: float,
        on_end: Callable[[], None],
    ) -> None:
        self._pipeline = pipeline
        self._profiler = profiler
        self._settle_ticks = settle_ticks
        self._seconds = seconds
        self._on_end = on_end
        self._settling: list[Tick] = []
        self._recorded: list[Tick] = []
        self._finished: list[tuple[float, int]] = []  # When, and how many images.
        self._began_at: float | None = None
        self._settled_at: float | None = None
        self._ended_at: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the window is over, so that there are figures."""
        return self._ended_at is not None

    def recorded(self, steps: int) -> Host:
        """Figures of the window; `steps` are those that each image takes."""
        if self._began_at is None or self._ended_at is None:
            raise ValueError("the window is not over")
        began_at, ended_at = self._began_at, self._ended_at
        finished = sum(images for at, images in self._finished if began_at <= at < ended_at)
        return host_of(self._recorded, ended_at, finished, steps)

    def settled(self, steps: int) -> Host:
        """Figures of as many steps as were let pass, of which the second half counts, without the profiler."""
        if self._settled_at is None:
            raise ValueError("the window has not begun")
        ticks = self._settling[len(self._settling) // 2 :]
        finished = sum(images for at, images in self._finished if ticks[0].began_at <= at < self._settled_at)
        return host_of(ticks, self._settled_at, finished, steps)

    def step(self, generations: Sequence[Generation]) -> None:
        """Between steps the profiler is started, and stopped."""
        if self._began_at is None and len(self._settling) >= self._settle_ticks:
            self._settled_at = time.monotonic()
            self._profiler.start()
            self._began_at = time.monotonic()
        elif self._began_at is not None and self._ended_at is None:
            now = time.monotonic()
            if now >= self._began_at + self._seconds and self._recorded:
                self._ended_at = now
                self._profiler.stop()
                self._on_end()
        began_at = time.monotonic()
        self._pipeline.step(generations)
        tick = Tick(
            began_at,
            time.monotonic(),
            rows=sum(generation.request.params.num_rows for generation in generations),
            images=sum(generation.num_images for generation in generations),
        )
        if self._began_at is None:
            self._settling.append(tick)
        elif self._ended_at is None:
            self._recorded.append(tick)

    def prepare(self, generations: Sequence[Generation]) -> None:
        """As the pipeline."""
        self._pipeline.prepare(generations)

    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """As the pipeline; counts."""
        finishes = self._pipeline.finish(generations)
        self._finished.append((time.monotonic(), sum(generation.num_images for generation in generations)))
        return finishes

    def preview(self, generations: Sequence[Generation]) -> list[Pixels | None]:
        """As the pipeline."""
        return self._pipeline.preview(generations)

    def inspect_lora(self, path: str) -> LoraInfo:
        """As the pipeline."""
        return self._pipeline.inspect_lora(path)

    def memory_bytes(self) -> dict[str, int]:
        """As the pipeline."""
        return self._pipeline.memory_bytes()
