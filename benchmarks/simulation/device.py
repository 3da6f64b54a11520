"""A worker of the engine whose process is the worker's real loop, with a device that only takes time."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from benchmarks.simulation.costs import Costs
from benchmarks.simulation.virtual_time import VirtualTime
from service.engine.dispatch import Load
from service.messages import Command, LoraInfo, ModelInfo, Ready, Report
from service.request import LoraUse
from service.worker.background import InlineJobs, Lane
from service.worker.batcher import Batcher, Generation
from service.worker.loop import GATHER_SECONDS, Worker
from service.worker.stages import Finish

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

NO_PICTURE = np.zeros((0, 0, 0, 3), np.uint8)

MODEL = ModelInfo(
    id="simulated",
    kind="checkpoint",
    native_size=512,
    size_multiple=8,
    unet_in_channels=9,
    schedulers=("ddim",),
    default_scheduler="ddim",
    default_steps=50,
    has_safety_checker=True,
)


def ready_message(costs: Costs) -> Ready:
    """What a worker of these costs says when it has loaded."""
    return Ready(MODEL, "simulated", "float16", costs.max_images, dict(costs.step_seconds), costs.load_seconds)


class SimulatedPipeline:
    """`service.worker.stages.Pipeline` without tensors.

    Args:
        time: The clock that it passes by.
        costs: How long everything takes.
    """

    def __init__(self, time: VirtualTime, costs: Costs) -> None:
        self.num_switches = 0
        self.num_steps = 0
        self.num_step_rows = 0
        self._time = time
        self._costs = costs
        self._owed_seconds = 0.0  # Device time of jobs beside the steps, which the next step is longer by.
        self._loras: tuple[LoraUse, ...] = ()

    def prepare(self, generations: Sequence[Generation]) -> None:
        """Takes time; every scheduler makes one model call a step."""
        for generation in generations:
            generation.steps = generation.request.params.num_inference_steps
        num_images = _num_images(generations)
        self._owe(num_images * self._costs.prepare.device_seconds)
        self._compute(self._costs.prepare.seconds(num_images))

    def step(self, generations: Sequence[Generation]) -> None:
        """Takes time, more where LoRAs change or jobs ran beside."""
        loras = generations[0].key.loras
        seconds, self._owed_seconds = self._owed_seconds, 0.0
        if loras != self._loras:
            self._loras = loras
            self.num_switches += 1
            seconds += self._costs.switch_seconds
        num_rows = sum(generation.request.params.num_rows for generation in generations)
        self.num_steps += 1
        self.num_step_rows += num_rows
        self._compute(seconds + self._costs.step(num_rows))

    def finish(self, generations: Sequence[Generation]) -> list[Finish | Any]:
        """Takes time."""
        num_images = _num_images(generations)
        started_at = time.monotonic()
        self._owe(num_images * self._costs.finish.device_seconds)
        self._compute(self._costs.finish.seconds(num_images))
        ended_at = time.monotonic()
        return [Finish(NO_PICTURE, (False,) * one.num_images, started_at, ended_at, ended_at) for one in generations]

    def preview(self, generations: Sequence[Generation]) -> list[None]:
        """Nothing to show."""
        return [None] * len(generations)

    def inspect_lora(self, path: str) -> LoraInfo:
        """Nobody asks."""
        raise NotImplementedError(path)

    def memory_bytes(self) -> dict[str, int]:
        """As on a CPU."""
        return {}

    def _compute(self, seconds: float) -> None:
        self._time.pass_by(seconds * self._costs.slowness_at(self._time.now))

    def _owe(self, seconds: float) -> None:
        if self._costs.has_background:
            self._owed_seconds += seconds


class SimulatedJobs:
    """`service.worker.background.ThreadedJobs`, with events in place of threads."""

    are_background = True
    wake_ups = ()

    def __init__(self, time: VirtualTime, wake: Callable[[], None]) -> None:
        self._time = time
        self._wake = wake
        self._waiting: dict[Lane, deque[tuple[Callable[[], Any], Callable[[Any], None]]]] = {
            lane: deque() for lane in Lane
        }
        self._ended: list[Callable[[], None]] = []
        self._num_pending = 0

    @property
    def is_idle(self) -> bool:
        """Whether every job has been collected."""
        return self._num_pending == 0

    @property
    def has_ended(self) -> bool:
        """Whether there is something to collect."""
        return bool(self._ended)

    def submit(
        self, lane: Lane, work: Callable[[], Any], then: Callable[[Any], None], *, is_courtesy: bool = False
    ) -> None:
        """Do it after the lane's earlier jobs."""
        del is_courtesy
        self._num_pending += 1
        self._waiting[lane].append((work, then))
        if len(self._waiting[lane]) == 1:
            self._time.plan(0.0, partial(self._start, lane))

    def collect(self) -> None:
        """Do the `then` of every job that has ended."""
        ended, self._ended = self._ended, []
        self._num_pending -= len(ended)
        for end in ended:
            end()

    def _start(self, lane: Lane) -> None:
        work, then = self._waiting[lane][0]
        outcome = work()
        # It is later now.
        self._time.plan(0.0, partial(self._end, lane, partial(then, outcome)))

    def _end(self, lane: Lane, end: Callable[[], None]) -> None:
        self._ended.append(end)
        self._waiting[lane].popleft()
        self._wake()
        if self._waiting[lane]:
            self._start(lane)  # Last: it takes time.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to end."""


class SimulatedProcess:
    """One run of a worker: the real loop and batcher, called whenever there is something to do.

    Args:
        time: The clock.
        costs: Of its device.
        on_report: Given what it says, when that has come through the pipe.
    """

    def __init__(self, time: VirtualTime, costs: Costs, on_report: Callable[[Report], None]) -> None:
        self.pipeline = SimulatedPipeline(time, costs)
        self.is_lost = False
        self._time = time
        self._costs = costs
        self._on_report = on_report
        self._inbox: deque[Command] = deque()
        self._batcher = Batcher(costs.max_images)
        self._jobs: SimulatedJobs | InlineJobs = (
            SimulatedJobs(time, self._wake) if costs.has_background else InlineJobs()
        )
        self._loop = Worker(cast("Connection", self), self.pipeline, self._batcher, self._jobs)
        self._num_alarms = 0
        self._is_asleep = True

    # --- what the loop sees of its pipe ---------------------------------------------------

    def poll(self, _seconds: float = 0.0) -> bool:
        """Whether there is a message; those that an idle worker would have waited for are here already."""
        return bool(self._inbox)

    def recv(self) -> Command:
        """The next one."""
        return self._inbox.popleft()

    def send(self, report: Report) -> None:
        """Say something to the API process; a worker that was lost meanwhile has not."""
        self._time.plan(self._costs.pipe_seconds, lambda: None if self.is_lost else self._on_report(report))

    # --- what becomes of it ---------------------------------------------------------------

    def deliver(self, command: Command) -> None:
        """A message arrives."""
        self._inbox.append(command)
        self._wake()

    def _wake(self) -> None:
        if self._is_asleep:
            # An idle worker waits for more of a burst, and once more with each message.
            is_idle = self._batcher.is_idle and self._jobs.is_idle
            self._num_alarms += 1
            self._time.plan(GATHER_SECONDS if is_idle else 0.0, partial(self._on_alarm, self._num_alarms))

    def _on_alarm(self, number: int) -> None:
        if number == self._num_alarms and self._is_asleep:  # The latest one counts.
            self._is_asleep = False
            self._turn()

    def _turn(self) -> None:
        if not self.is_lost:
            self._loop.turn()
            # What it does next it decides when this is over, and others may have sent something meanwhile.
            self._time.plan(0.0, self._go_on)

    def _go_on(self) -> None:
        self._is_asleep = self._batcher.is_stuck
        if not self._is_asleep:
            self._turn()
        elif self._inbox or (isinstance(self._jobs, SimulatedJobs) and self._jobs.has_ended):
            self._wake()


class SimulatedWorker:
    """What the router sees of a `service.engine.supervisor.Worker`.

    Args:
        name: As in the metrics.
        time: The clock.
        costs: Of its device.
        make_load: What the dispatcher is to know of it.
        on_report: Given what its process says.
    """

    device = "simulated"

    def __init__(
        self,
        name: str,
        time: VirtualTime,
        costs: Costs,
        make_load: Callable[[Ready], Load],
        on_report: Callable[["SimulatedWorker", Report], None],
    ) -> None:
        self.name = name
        self.load: Load | None = None
        self.runs: list[SimulatedPipeline] = []
        self._time = time
        self._costs = costs
        self._make_load = make_load
        self._on_report = on_report
        self._process: SimulatedProcess | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.load is not None

    def start(self) -> None:
        """It has loaded."""
        self._process = SimulatedProcess(self._time, self._costs, lambda report: self._on_report(self, report))
        self.runs.append(self._process.pipeline)
        self.load = self._make_load(ready_message(self._costs))

    def lose(self) -> Load | None:
        """Its process dies; returns what it had."""
        if self._process is not None:
            self._process.is_lost = True
        self._process = None
        load, self.load = self.load, None
        return load

    def send(self, command: Command) -> None:
        """Send it a command."""
        process = self._process
        if process is not None:
            self._time.plan(self._costs.pipe_seconds, lambda: process.deliver(command))


def _num_images(generations: Sequence[Generation]) -> int:
    return sum(generation.num_images for generation in generations)
