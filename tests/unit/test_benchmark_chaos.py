"""`benchmarks.chaos`: the plan of faults, what strikes a pipeline, the log, and the verdicts."""

import dataclasses
import os
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos_worker
from benchmarks.assassin import KILL, Attack
from benchmarks.chaos_log import Recovery, WorkersLog, read_log
from benchmarks.chaos_report import Chaos, Left, chaos_document, chaos_markdown, chaos_verdicts, is_explained
from benchmarks.chaos_worker import Faults
from benchmarks.fault_plan import (
    BEFORE,
    FAILS_ALONE,
    FAILS_ONCE,
    KINDS,
    LOSES_DEVICE,
    NOT_A_NUMBER,
    TOO_LARGE_ALONE,
    WITHIN,
    Fault,
    FaultPlan,
    Strike,
    Strikes,
)
from benchmarks.load import GOOD, NO_ANSWER
from benchmarks.mixed import HUNG_UP, Outcome
from benchmarks.verdicts import all_hold
from service.worker.faults import DeviceLost

# --- the plan ------------------------------------------------------------------------


def test_a_seed_and_the_number_of_a_start_give_the_same_faults(tmp_path: Path) -> None:
    """Each start of a worker has faults of its own, and they come again with the seed."""
    plan = FaultPlan(tmp_path, seed=3, interval_seconds=5.0)

    def drawn(number: int) -> list[Strike]:
        strikes = Strikes(plan, number)
        return [strikes.next() for _ in range(400)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert set(Counter(strike.kind for strike in drawn(0))) == set(KINDS)
    assert sum(strike.wait_seconds for strike in drawn(0)) / 400 == pytest.approx(5.0, rel=0.2)


def test_plan_and_notes_pass_through_their_folder(tmp_path: Path) -> None:
    """What the benchmark writes a worker reads, and the other way round; faults begin and end by a file."""
    plan = FaultPlan(tmp_path, seed=3, interval_seconds=5.0)
    plan.write()
    theirs = FaultPlan.read(tmp_path)
    assert theirs == plan
    assert (plan.has_begun, plan.noted()) == (False, [])
    plan.begin()
    assert theirs.has_begun
    plan.end()
    assert not theirs.has_begun
    theirs.note(FAILS_ALONE, WITHIN, ["req_1", "req_2"], ["req_2"])
    (fault,) = plan.noted()
    assert (fault.pid, fault.kind, fault.num_requests, fault.victims) == (os.getpid(), FAILS_ALONE, 2, ("req_2",))
    assert theirs.number_of_start() == 0


# --- what strikes --------------------------------------------------------------------


class Block:
    """A UNet's block, which calls what was hooked to it."""

    def register_forward_pre_hook(self, hook: Callable[..., None]) -> None:
        """As torch's."""
        self.run = lambda: hook(self, ())


class Pipeline:
    """Gathers, then runs its block, as a step does."""

    def __init__(self) -> None:
        self.components = types.SimpleNamespace(unet=types.SimpleNamespace(mid_block=Block()))

    def _gather(self, generations: list[Any]) -> int:
        return len(generations)

    def step(self, *generations: Any) -> int:
        """How many were stepped."""
        count = self._gather(list(generations))
        self.components.unet.mid_block.run()
        return count


def generation(name: str) -> Any:
    """A running request with one image."""
    slot = types.SimpleNamespace(state=1.0)
    return types.SimpleNamespace(request_id=f"{name}.17", latents=types.SimpleNamespace(slots=[slot]))


ONE, TWO = "req_one", "req_two"


def struck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str = BEFORE
) -> tuple[Pipeline, FaultPlan]:
    """A pipeline whose next step has a fault, and none after it."""
    plan = FaultPlan(tmp_path, seed=1, interval_seconds=1.0)
    strikes = iter([Strike(0.0, kind, place, 0.9), Strike(1e9, kind, place, 0.9)])
    monkeypatch.setattr(chaos_worker, "Strikes", lambda *_: types.SimpleNamespace(next=lambda: next(strikes)))
    pipeline = Pipeline()
    Faults(plan).inject(pipeline)
    return pipeline, plan


def test_nothing_strikes_before_the_plan_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References are taken from the same workers, undisturbed."""
    pipeline, plan = struck(tmp_path, monkeypatch, FAILS_ONCE)
    assert pipeline.step(generation(ONE)) == 1
    plan.begin()
    with pytest.raises(RuntimeError, match="injected"):
        pipeline.step(generation(ONE))


@pytest.mark.parametrize("place", [BEFORE, WITHIN])
def test_an_exception_once_has_victims_only_where_it_struck_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A batch of two is tried again in halves, and both must succeed."""
    pipeline, plan = struck(tmp_path, monkeypatch, FAILS_ONCE, place)
    one, two = generation(ONE), generation(TWO)
    plan.begin()
    with pytest.raises(RuntimeError, match="injected"):
        pipeline.step(one, two)
    assert [pipeline.step(one), pipeline.step(two)] == [1, 1]
    assert [fault.victims for fault in plan.noted()] == [()]


@pytest.mark.parametrize("place", [BEFORE, WITHIN])
def test_a_cursed_request_fails_again_and_its_neighbour_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whatever batch it is in; the note names it as the client knows it."""
    pipeline, plan = struck(tmp_path, monkeypatch, FAILS_ALONE, place)
    one, two = generation(ONE), generation(TWO)
    plan.begin()
    for batch in ((one, two), (two,), (one, two)):
        with pytest.raises(RuntimeError, match="injected"):
            pipeline.step(*batch)
    assert pipeline.step(one) == 1
    assert [fault.victims for fault in plan.noted()] == [(TWO,)]


def test_a_lost_device_is_no_requests_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it struck one alone: that one is run again elsewhere."""
    pipeline, plan = struck(tmp_path, monkeypatch, LOSES_DEVICE)
    plan.begin()
    with pytest.raises(DeviceLost):
        pipeline.step(generation(ONE))
    assert [fault.victims for fault in plan.noted()] == [()]


def test_not_a_number_spoils_the_victim_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step itself goes well."""
    pipeline, plan = struck(tmp_path, monkeypatch, NOT_A_NUMBER)
    one, two = generation(ONE), generation(TWO)
    plan.begin()
    assert pipeline.step(one, two) == 2
    assert one.latents.slots[0].state == 1.0
    assert two.latents.slots[0].state != two.latents.slots[0].state
    assert [fault.victims for fault in plan.noted()] == [(TWO,)]


# --- the log -------------------------------------------------------------------------

LOG = """\
2026-11-25T22:00:00.000+00:00 INFO inpaint-service 1.0 listens on http://127.0.0.1:1
2026-11-25T22:00:00.100+00:00 INFO worker 0 (cpu) started, pid 10
2026-11-25T22:00:00.200+00:00 INFO worker 1 (cpu) started, pid 11
2026-11-25T22:00:04.000+00:00 INFO worker 0 (cpu) ready after 3.5 s: m, float32, at most 4 images at once
2026-11-25T22:00:04.500+00:00 INFO worker 1 (cpu) ready after 4.0 s: m, float32, at most 4 images at once
2026-11-25T22:01:00.500+00:00 WARNING worker 0 (cpu) lost with 2 requests, 2 of them are run again
2026-11-25T22:01:00.500+00:00 WARNING worker 0 (cpu) lost: killed by SIGKILL; starting it again in 0.5 s
Traceback (most recent call last):
2026-11-25T22:01:01.000+00:00 INFO worker 0 (cpu) started, pid 12
2026-11-25T22:01:06.000+00:00 INFO worker 0 (cpu) ready after 4.0 s: m, float32, at most 4 images at once
2026-11-25T22:02:00.000+00:00 WARNING worker 1 (cpu) lost: no sign of life for 5 s; starting it again in 0.5 s
2026-11-25T22:02:00.500+00:00 INFO worker 1 (cpu) started, pid 13
2026-11-25T22:02:02.000+00:00 WARNING worker 1 (cpu) lost: killed by SIGKILL; starting it again in 1 s
2026-11-25T22:02:03.000+00:00 INFO worker 1 (cpu) started, pid 14
2026-11-25T22:02:13.100+00:00 INFO worker 1 (cpu) ready after 4.0 s: m, float32, at most 4 images at once
2026-11-25T22:03:00.000+00:00 WARNING worker 0 (cpu) lost: exited with status 13; starting it again in 2 s
"""
KILLED_AT = 1795644060.0  # 2026-11-25T22:01:00Z


def test_recoveries_count_from_the_kill_where_it_is_known() -> None:
    """And from the log's line where it is not; losses on the way are counted."""
    log = read_log(LOG, {10: KILLED_AT, 11: KILLED_AT - 3600})
    assert [(one.worker, one.reason, one.num_losses) for one in log.recoveries] == [
        ("0", "killed by SIGKILL", 1),
        ("1", "no sign of life for 5 s", 2),
    ]
    first, second = log.recoveries
    assert (first.seconds, first.pause_seconds, first.load_seconds) == (pytest.approx(6.0), 0.5, 4.0)
    assert first.beside_seconds == pytest.approx(1.5)
    assert first.is_in_time
    assert (second.seconds, second.pause_seconds) == (pytest.approx(13.1), 1.5)
    assert not second.is_in_time


def test_log_tells_which_workers_there_are() -> None:
    """Also those that are gone."""
    log = read_log(LOG, {})
    assert log.num_losses == 4
    assert log.pids == (10, 11, 12, 13, 14)
    assert log.current == {"0": 12, "1": 14}
    assert log.ready == {"1"}
    assert read_log("", {}) == WorkersLog((), 0, (), {}, frozenset())


# --- the verdicts --------------------------------------------------------------------


def outcome(kind: str = GOOD, status: int | None = 200, fault: str | None = None, request_id: str = ONE) -> Outcome:
    return Outcome("plain", kind, status, request_id, 0.1, fault)


def fault(kind: str, *victims: str) -> Fault:
    return Fault(KILLED_AT, 10, kind, BEFORE, 2, victims)


@pytest.mark.parametrize(
    ("answer", "faults", "num_losses", "expected"),
    [
        (outcome("500 nan_output", 500), [fault(NOT_A_NUMBER, ONE)], 0, True),
        (outcome("500 nan_output", 500), [fault(NOT_A_NUMBER, TWO)], 0, False),
        (outcome("500 nan_output", 500), [fault(FAILS_ALONE, ONE)], 0, False),
        (outcome("500 internal", 500), [fault(FAILS_ALONE, TWO), fault(FAILS_ONCE, ONE)], 0, True),
        (outcome("500 internal", 500), [fault(FAILS_ONCE)], 9, False),
        (outcome("507 out_of_memory", 507), [fault(TOO_LARGE_ALONE, ONE)], 0, True),
        (outcome("503 worker_lost", 503), [], 2, True),
        (outcome("503 worker_lost", 503), [], 1, False),
        (outcome("503 not_ready", 503), [], 1, True),
        (outcome("503 not_ready", 503), [], 0, False),
        (outcome("504 deadline", 504, None), [], 0, True),
        (outcome("504 deadline", 504, "504 deadline"), [], 9, False),
        (outcome("500 safety_failed", 500, "500 safety_failed"), [fault(FAILS_ALONE, ONE)], 9, False),
    ],
)
def test_an_error_needs_a_fault_that_accounts_for_it(
    answer: Outcome, faults: list[Fault], num_losses: int, expected: bool
) -> None:
    """Of its own kind and of its own request, or as many losses as it takes."""
    assert is_explained(answer, faults, num_losses) is expected


LEFT = Left(14, 3, ("torchinductor",))
CALM = Chaos(
    outcomes=(outcome(), outcome(HUNG_UP, None), outcome("500 nan_output", 500)),
    faults=(fault(NOT_A_NUMBER, ONE),),
    attacks=(Attack(KILLED_AT, 10, KILL, was_replaced=False),),
    log=WorkersLog((Recovery("0", "killed by SIGKILL", 6.0, 0.5, 4.0, 1),), 1, (10, 11, 12), {}, frozenset()),
    is_ready_again=True,
    num_cases=14,
    num_good_in_the_end=14,
    before=LEFT,
    after=LEFT,
    num_processes_left=0,
    files_left=("torchinductor",),
    exit_status=0,
)


def test_chaos_that_keeps_all_promises() -> None:
    """Its report says what was sent, answered and injected."""
    verdicts = chaos_verdicts(CALM)
    assert all_hold(verdicts)
    report = chaos_markdown(CALM, verdicts, {"model": "demo"})
    assert "| 500 nan_output | 1 |" in report
    assert "| SIGKILL | 1 |" in report
    assert "- ready after a loss, longest: 6.0 s" in report
    assert chaos_document(CALM, verdicts, {})["injected"] == {KILL: 1, NOT_A_NUMBER: 1}


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"outcomes": (outcome(NO_ANSWER, None, "timeout"),)}, "requests answered exactly once"),
        ({"outcomes": (outcome(NO_ANSWER, None, "timeout"),)}, "unanswered"),
        ({"outcomes": (outcome("wrong picture", 200, "wrong"),)}, "wrong pictures"),
        ({"outcomes": (outcome("500 nan_output", 500, request_id=TWO),)}, "answers of 5xx that no fault"),
        ({"outcomes": (outcome("500 internal", 500, "500 internal"),)}, "unexpected answers"),
        ({"log": WorkersLog((Recovery("0", "", 9.6, 0.5, 4.0, 1),), 1, (), {}, frozenset())}, "ready again within"),
        ({"log": WorkersLog((), 1, (), {}, frozenset())}, "ready again within"),
        ({"is_ready_again": False}, "both workers ready"),
        ({"num_good_in_the_end": 13}, "right answers in the end"),
        ({"after": dataclasses.replace(LEFT, processes=4)}, "processes at rest"),
        ({"after": dataclasses.replace(LEFT, descriptors=15)}, "descriptors of the API process"),
        ({"files_left": ("torchinductor", "upload")}, "temporary files left"),
        ({"num_processes_left": 1}, "processes left in the end"),
        ({"exit_status": None}, "exit status"),
        ({"exit_status": 1}, "exit status"),
        ({"faults": ()}, "faults were injected"),
        ({"attacks": ()}, "faults were injected"),
    ],
)
def test_chaos_that_breaks_a_promise(changes: dict[str, Any], promise: str) -> None:
    """Each promise has a verdict that can fail."""
    verdicts = chaos_verdicts(dataclasses.replace(CALM, **changes))
    assert any(verdict.promise.startswith(promise) for verdict in verdicts if not verdict.holds)
