"""A worker process that is the service's own but for faults, injected before and within the steps of its pipeline."""

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.fault_plan import (
    EXITS,
    FAILS_ALONE,
    HANGS,
    LOSES_DEVICE,
    NOT_A_NUMBER,
    PLAN_VARIABLE,
    TOO_LARGE,
    TOO_LARGE_ALONE,
    WITHIN,
    FaultPlan,
    Strike,
    Strikes,
)
from service.settings import Settings
from service.worker import process
from service.worker.background import Jobs
from service.worker.batcher import Batcher, Generation
from service.worker.faults import DeviceLost
from service.worker.loop import Worker

EXIT_STATUS = 13
HANG_SECONDS = 3600.0


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """The worker's whole life; faults may strike once it is ready and the plan has begun."""
    process.Worker = _FaultyWorker  # What its `run` makes at the end of loading.
    process.run(connection, settings, device, cpu_threads)


class _FaultyWorker(Worker):
    def __init__(self, connection: Connection, pipeline: Any, batcher: Batcher, jobs: Jobs | None = None) -> None:  # noqa: ANN401
        Faults(FaultPlan.read(Path(os.environ[PLAN_VARIABLE]))).inject(pipeline)
        super().__init__(connection, pipeline, batcher, jobs)


class Faults:
    """Strikes the steps of one pipeline.

    Args:
        plan: What goes wrong.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._strikes = Strikes(plan, plan.number_of_start())
        self._next = self._strikes.next()
        self._due_at: float | None = None
        self._cursed: dict[str, Strike] = {}
        """Requests that fail whenever they are stepped."""
        self._within: Callable[[], None] | None = None

    def inject(self, pipeline: Any) -> None:  # noqa: ANN401 - a protocol of tensors, or any stand-in
        """Have what gathers a step's batch strike first, and the UNet in its middle."""
        gather = pipeline._gather  # noqa: SLF001 - called inside what turns torch's errors into the worker's own

        def struck(generations: Sequence[Generation]) -> Any:  # noqa: ANN401
            self._within = None
            self.strike(generations)
            return gather(generations)

        pipeline._gather = struck  # noqa: SLF001
        pipeline.components.unet.mid_block.register_forward_pre_hook(lambda *_: self._strike_within())

    def strike(self, generations: Sequence[Generation]) -> None:
        """Whatever is due for a batch that is about to be stepped."""
        for generation in generations:
            if (strike := self._cursed.get(generation.request_id)) is not None:
                self._do(strike, lambda strike=strike: _fail(strike.kind))
        if not self._plan.has_begun:
            self._due_at = None
            return
        now = time.monotonic()
        if self._due_at is None:
            self._due_at = now + self._next.wait_seconds
        if now < self._due_at:
            return
        strike, self._next = self._next, self._strikes.next()
        self._due_at = now + self._next.wait_seconds
        self._begin(strike, generations)

    def _begin(self, strike: Strike, generations: Sequence[Generation]) -> None:
        victim = generations[int(strike.victim * len(generations))]
        is_for_one = strike.kind in (TOO_LARGE_ALONE, FAILS_ALONE, NOT_A_NUMBER)
        is_fatal = strike.kind in (EXITS, LOSES_DEVICE, HANGS)
        # A batch of one has no halves: its only request fails with it.
        victims = [victim] if is_for_one or (len(generations) == 1 and not is_fatal) else []
        names = [[_client_id(one) for one in some] for some in (generations, victims)]
        self._plan.note(strike.kind, strike.place, *names)
        if strike.kind == NOT_A_NUMBER:
            slot = victim.latents.slots[0]
            slot.state = slot.state * float("nan")
            return
        if is_for_one:
            self._cursed[victim.request_id] = strike
        self._do(strike, lambda: _fail(strike.kind))

    def _do(self, strike: Strike, fail: Callable[[], None]) -> None:
        if strike.place == WITHIN:
            self._within = fail
        else:
            fail()

    def _strike_within(self) -> None:
        fail, self._within = self._within, None
        if fail is not None:
            fail()


def _fail(kind: str) -> None:
    """Go wrong in this way.

    Raises:
        Exception: Nearly always.
    """
    if kind in (TOO_LARGE, TOO_LARGE_ALONE):
        import torch  # noqa: PLC0415 - loading it is part of the worker's start, and long done

        raise torch.OutOfMemoryError("injected")
    if kind == LOSES_DEVICE:
        raise DeviceLost("injected")
    if kind == EXITS:
        os._exit(EXIT_STATUS)
    if kind == HANGS:
        time.sleep(HANG_SECONDS)
    raise RuntimeError("injected")


def _client_id(generation: Generation) -> str:
    """What the client knows it by; the engine appends a number."""
    return generation.request_id.rpartition(".")[0]
