"""One simulated service: the real router over workers whose devices only take time, and what became of its requests."""

import asyncio
import logging
import random
import time as wall
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from benchmarks.simulation.costs import Costs
from benchmarks.simulation.device import SimulatedWorker
from benchmarks.simulation.traffic import MASK, PIXELS, Wanted
from benchmarks.simulation.virtual_time import VirtualTime
from service.engine.dispatch import Load
from service.engine.handle import Handle, Outcome
from service.engine.routing import Router
from service.engine.supervisor import Worker
from service.errors import ErrorCode, InpaintError
from service.messages import Ready, Report
from service.metrics import Metrics
from service.request import BatchKey, InpaintParams, InpaintRequest

PAINTED = "painted"
"""The outcome of a request with a picture; the others are error codes."""

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is simulated.

    Attributes:
        costs: Of each device.
        queue_size: Requests that may wait.
        places_keys: Whether the dispatcher is told which requests can share a step.
        mean_seconds_to_loss: Of each worker, from ready to lost; None for workers that are never lost.
    """

    costs: tuple[Costs, ...]
    queue_size: int = 64
    places_keys: bool = True
    mean_seconds_to_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one request.

    Attributes:
        wanted: The request.
        outcome: `PAINTED`, or the code of its error.
        seconds: From sending it to its answer.
        num_losses: How often a worker was lost with it.
    """

    wanted: Wanted
    outcome: str
    seconds: float
    num_losses: int = 0


@dataclass(frozen=True, slots=True)
class Simulated:
    """One run.

    Attributes:
        fates: Of every request, in the order in which they were sent.
        seconds: Virtual, from the start to the last answer.
        losses: Workers lost.
        switches: Changes of weights, of all workers.
        steps: Of all workers.
        step_rows: UNet rows of all steps.
        router_seconds: Real CPU time spent in the service's own router.
    """

    fates: tuple[Fate, ...]
    seconds: float
    losses: int
    switches: int
    steps: int
    step_rows: int
    router_seconds: float

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests came to what."""
        return Counter(fate.outcome for fate in self.fates)

    @property
    def painted(self) -> tuple[Fate, ...]:
        """Those with a picture."""
        return tuple(fate for fate in self.fates if fate.outcome == PAINTED)


class KeyBlindLoad(Load):
    """A worker of which the dispatcher is not told which requests can share a step."""

    def runs(self, key: BatchKey) -> bool:
        """All look alike."""
        del key
        return True

    def _entry(self, handle: Handle) -> Any:  # noqa: ANN401 - private to what it overrides
        entry = super()._entry(handle)
        entry.key = BatchKey(height=0, width=0)
        return entry


class _Handle(Handle):
    """A request that says when it has its outcome."""

    def __init__(self, key: str, request: InpaintRequest, router: Router, on_end: Callable[[str, int], None]) -> None:
        super().__init__(key, key, request, router.queue.position, router.cancel)
        self._on_end = on_end

    def end(self, outcome: Outcome) -> bool:
        """As any."""
        if not super().end(outcome):
            return False
        self._on_end(outcome.code if isinstance(outcome, InpaintError) else PAINTED, self.num_losses)
        return True


class _Run:
    """A run in the making; `on_fate` is told of each request at its end."""

    def __init__(self, fleet: Fleet, seed: int, on_fate: Callable[[int, Fate], None]) -> None:
        self.time = VirtualTime()
        self.num_losses = 0
        self.router_seconds = 0.0
        self._fleet = fleet
        self._on_fate = on_fate
        self._draw = random.Random(seed)  # noqa: S311 - moments of losses, no secret
        make_load = Load if fleet.places_keys else KeyBlindLoad
        self.workers = [
            SimulatedWorker(str(number), self.time, costs, cast("Callable[[Ready], Load]", make_load), self._on_report)
            for number, costs in enumerate(fleet.costs)
        ]
        self._router = Router(fleet.queue_size, Metrics(), cast("Sequence[Worker]", self.workers))

    # --- workers --------------------------------------------------------------------------

    def start_workers(self) -> None:
        """All at once; where workers are lost, in the state in which one would find them."""
        mean = self._fleet.mean_seconds_to_loss
        for worker, costs in zip(self.workers, self._fleet.costs, strict=True):
            if mean is not None and self._draw.random() < costs.load_seconds / (costs.load_seconds + mean):
                self.time.plan(self._draw.uniform(0, costs.load_seconds), partial(self._ready, worker, costs))
            else:
                self._ready(worker, costs)

    def _ready(self, worker: SimulatedWorker, costs: Costs) -> None:
        worker.start()
        if self._fleet.mean_seconds_to_loss is not None:
            seconds = self._draw.expovariate(1 / self._fleet.mean_seconds_to_loss)
            self.time.plan(seconds, partial(self._lose, worker, costs))
        self._router.dispatch()

    def _lose(self, worker: SimulatedWorker, costs: Costs) -> None:
        load = worker.lose()
        if load is not None:
            self.num_losses += 1
            self._router.worker_lost(cast("Worker", worker), load, are_suspect=True)
        self.time.plan(costs.load_seconds, partial(self._ready, worker, costs))

    def _on_report(self, worker: SimulatedWorker, report: Report) -> None:
        started_at = wall.process_time()
        self._router.worker_reported(cast("Worker", worker), report)
        self.router_seconds += wall.process_time() - started_at

    # --- requests -------------------------------------------------------------------------

    def send(self, number: int, wanted: Wanted, params: InpaintParams) -> None:
        """A client sends a request now."""
        edge_seconds = self._fleet.costs[0].edge_seconds
        self.time.plan(edge_seconds, partial(self._admit, number, wanted, params, self.time.now))

    def _admit(self, number: int, wanted: Wanted, params: InpaintParams, sent_at: float) -> None:
        """As `Engine.submit` does."""

        def on_end(outcome: str, num_losses: int) -> None:
            after = self._fleet.costs[0].edge_seconds if outcome == PAINTED else 0.0
            fate = Fate(wanted, outcome, self.time.now + after - sent_at, num_losses)
            self.time.plan(after, partial(self._on_fate, number, fate))

        if not any(worker.is_ready for worker in self.workers):
            on_end(ErrorCode.NOT_READY, 0)
        elif self._router.queue.is_full():
            on_end(ErrorCode.OVERLOADED, 0)
        else:
            now = self.time.now
            request = InpaintRequest(params, PIXELS, MASK, now, now + TIMEOUT_SECONDS)
            handle = _Handle(str(number), request, self._router, on_end)
            self.time.plan(TIMEOUT_SECONDS, lambda: None if handle.is_ended else self._router.expire(handle))
            started_at = wall.process_time()
            self._router.add(handle)
            self.router_seconds += wall.process_time() - started_at

    def outcome(self, fates: Sequence[Fate]) -> Simulated:
        """When all is over."""
        runs = [run for worker in self.workers for run in worker.runs]
        return Simulated(
            tuple(fates),
            seconds=max((fate.wanted.due_seconds + fate.seconds for fate in fates), default=0.0),
            losses=self.num_losses,
            switches=sum(run.num_switches for run in runs),
            steps=sum(run.num_steps for run in runs),
            step_rows=sum(run.num_step_rows for run in runs),
            router_seconds=self.router_seconds,
        )


def simulate(fleet: Fleet, traffic: Sequence[Wanted], seed: int = 1) -> Simulated:
    """An open loop: requests come when they are due.

    Args:
        fleet: What they come to.
        traffic: In the order in which they are due.
        seed: Of the workers' losses.
    """
    fates: dict[int, Fate] = {}

    def begin(run: _Run) -> None:
        for number, wanted in enumerate(traffic):
            run.time.plan(wanted.due_seconds, partial(run.send, number, wanted, wanted.params(number)))

    run = _Run(fleet, seed, fates.__setitem__)
    _drive(run, begin, lambda: len(fates) == len(traffic))
    return run.outcome([fates[number] for number in range(len(traffic))])


def simulate_closed(fleet: Fleet, steps: Sequence[int], num_clients: int, max_seconds: float) -> Simulated:
    """A closed loop: each client sends its next request when it has an answer.

    Args:
        fleet: What they come to.
        steps: Of the requests, which are taken in order.
        num_clients: How many clients there are.
        max_seconds: After these nothing more is sent.
    """
    fates: dict[int, Fate] = {}
    num_sent = 0

    def send_next(run: _Run) -> None:
        nonlocal num_sent
        if num_sent < len(steps) and run.time.now < max_seconds:
            wanted = Wanted(run.time.now, steps[num_sent])
            num_sent += 1
            run.send(num_sent - 1, wanted, wanted.params(num_sent - 1))

    def on_fate(number: int, fate: Fate) -> None:
        fates[number] = fate
        send_next(run)

    run = _Run(fleet, 1, on_fate)
    _drive(run, lambda run: [send_next(run) for _ in range(num_clients)], lambda: len(fates) == num_sent)
    return run.outcome([fates[number] for number in range(num_sent)])


def _drive(run: _Run, begin: Callable[[_Run], object], is_over: Callable[[], bool]) -> None:
    async def within_a_loop() -> None:  # Where outcomes are futures; nobody awaits them.
        with run.time.in_place_of_the_real_one():
            run.start_workers()
            begin(run)
            run.time.run(is_over)

    logger = logging.getLogger("service")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Losses are what is asked for.
    try:
        asyncio.run(within_a_loop())
    finally:
        logger.setLevel(level)
