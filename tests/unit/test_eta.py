"""When a request that is being painted will be done, by the pace of its own steps."""

import asyncio

import pytest

from service.engine import handle as handle_module
from service.engine.handle import Handle
from service.messages import StepProgress
from tests.process.support import Admitted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list's only element."""
    now = [100.0]
    monkeypatch.setattr(handle_module.time, "monotonic", lambda: now[0])
    return now


def run_steps(clock: list[float], *steps: tuple[float, int]) -> list[float | None]:
    """Estimates after each of some steps of ten, which are done at these times."""

    async def run() -> list[float | None]:
        admitted = Admitted("a")
        handle = Handle("a", "a", admitted.request, lambda _: None, lambda *_: None)
        handle.sent("0")
        estimates = [handle.eta_seconds]
        for at, step in steps:
            clock[0] = at
            handle.advance(StepProgress("a", step, 10))
            estimates.append(handle.eta_seconds)
        clock[0] += 1.0
        return [*estimates, handle.eta_seconds]

    return asyncio.run(run())


def test_nobody_can_tell_before_two_steps(clock: list[float]) -> None:
    """One step says nothing about the pace: compiling or loading a LoRA may be in it."""
    assert run_steps(clock, (100.0, 1)) == [None, None, None]


def test_the_rest_takes_as_long_as_steps_took_so_far(clock: list[float]) -> None:
    """Two seconds a step: eight are left after the second, and a second later one second less."""
    assert run_steps(clock, (100.0, 1), (102.0, 2), (106.0, 4)) == [None, None, 16.0, 12.0, 11.0]


def test_it_is_never_in_the_past(clock: list[float]) -> None:
    """A step that takes longer than expected leaves nothing, not less; after the last step there is nothing left."""
    assert run_steps(clock, (100.0, 8), (100.5, 9)) == [None, None, 0.5, 0.0]
    assert run_steps(clock, (100.0, 1), (101.0, 10)) == [None, None, 0.0, 0.0]


def test_another_worker_starts_anew(clock: list[float]) -> None:
    """What a lost worker did says nothing about the pace of the next."""
    assert run_steps(clock, (100.0, 1), (101.0, 2), (200.0, 1), (203.0, 2)) == [None, None, 8.0, None, 24.0, 23.0]
