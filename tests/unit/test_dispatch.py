"""The choice of a worker."""

import dataclasses

import pytest

from service.engine.dispatch import Dispatcher, Load, is_held
from service.messages import Ready, StepProgress, Ticked
from tests.fake_worker import MODEL
from tests.process.support import Admitted


def load_of(*handles: Admitted, max_images: int = 4, seconds_per_row: float = 0.01) -> Load:
    """A ready worker that has these."""
    step_seconds = {rows: rows * seconds_per_row for rows in (1, 2, 4)}
    load = Load(Ready(MODEL, "cpu", "float32", max_images, step_seconds, load_seconds=1.0))
    for handle in handles:
        load.add(handle)
    return load


def ticked(*progress: StepProgress, step_seconds: float, max_images: int = 4) -> Ticked:
    """A step of these requests, of one image each."""
    rows = 2 * len(progress)
    return Ticked(
        rows, len(progress), step_seconds, max_images=max_images, busy_ratio=1.0, memory_bytes={}, progress=progress
    )


def test_room_sinks_with_a_cap_that_the_worker_lowered() -> None:
    """A worker that ran out of memory is sent no more than it still takes."""
    load = load_of(max_images=8)
    assert load.max_undenoised_images == 10
    load.ticked(ticked(step_seconds=0.1, max_images=2))
    assert (load.max_images, load.max_undenoised_images) == (2, 3)


@pytest.mark.parametrize(("max_images", "in_flight"), [(1, 2), (4, 5), (8, 10)])
def test_room_for_the_batch_and_the_next(max_images: int, in_flight: int) -> None:
    """Work waits in the queue: a worker holds its batch and a little more, so that the next is at hand."""
    load = load_of(max_images=max_images)
    for number in range(in_flight):
        assert load.has_room(1)
        load.add(Admitted(str(number)))
    assert not load.has_room(1)
    assert load.num_images == in_flight


def test_room_when_the_last_step_is_done() -> None:
    """A place is free when its request leaves the running batch, before its pictures are decoded."""
    load = load_of(Admitted("a"), Admitted("b"), Admitted("c"), max_images=2)
    assert not load.has_room(1)
    load.progress(StepProgress("a", 4, 4))
    assert load.has_room(1)
    assert not load.has_room(2)


def test_no_room_where_decoding_falls_behind() -> None:
    """Requests that only have to be decoded do not pile up without bound."""
    load = load_of(max_images=2)
    num_sent = 0
    while load.has_room(1):
        load.add(Admitted(str(num_sent)))
        load.progress(StepProgress(str(num_sent), 4, 4))
        num_sent += 1
    assert num_sent == 5
    load.remove("0")
    assert load.has_room(1)


def test_idle_worker_takes_any_request() -> None:
    """A request with more images than a batch holds still runs."""
    assert load_of().has_room(64)
    assert not load_of(Admitted("a")).has_room(64)


def test_least_remaining_work() -> None:
    """A request goes to the worker that has least to do, and not to the one with fewest requests."""
    few_but_long = load_of(Admitted("large", 4))
    many_but_short = load_of(Admitted("a"), Admitted("b"))
    assert Dispatcher().choose(Admitted("new"), [few_but_long, many_but_short]) is many_but_short


def test_slow_workers_get_less() -> None:
    """The same request is more work for a slow worker."""
    slow, fast = load_of(Admitted("a"), seconds_per_row=0.1), load_of(Admitted("b"), Admitted("c"))
    assert Dispatcher().choose(Admitted("new"), [slow, fast]) is fast


def test_progress_lessens_the_work() -> None:
    """Steps that are done do not count any more."""
    early, late = load_of(Admitted("a")), load_of(Admitted("b"))
    early.progress(StepProgress("a", 1, 4))
    late.progress(StepProgress("b", 3, 4))
    assert late.remaining_seconds < early.remaining_seconds < load_of(Admitted("c")).remaining_seconds


def test_schedulers_that_call_more_often_count_as_such() -> None:
    """The worker's own count of model calls replaces the estimate."""
    load = load_of(Admitted("a"))
    load.progress(StepProgress("a", 1, 8))
    assert load.remaining_seconds == pytest.approx(7 * 2 * 0.01)


def test_large_pictures_are_more_work() -> None:
    """Work grows with the working size."""
    large = Admitted("large")
    params = dataclasses.replace(large.request.params, height=128, width=128)
    large.request = dataclasses.replace(large.request, params=params)
    assert load_of(large).remaining_seconds == pytest.approx(4 * load_of(Admitted("a")).remaining_seconds)


def test_pace_follows_the_steps() -> None:
    """The pace is measured: after some slow steps a worker is known to be slow."""
    load = load_of(Admitted("a"), seconds_per_row=0.01)
    for _ in range(100):
        load.ticked(ticked(StepProgress("a", 1, 4), step_seconds=0.08))
    assert load.seconds_per_row_call == pytest.approx(0.04, rel=0.01)
    assert load.num_running_images == 1


def test_step_of_unknown_requests_tells_nothing() -> None:
    """A step whose requests are not known leaves the pace as it is."""
    load = load_of()
    load.ticked(ticked(StepProgress("gone", 1, 4), step_seconds=99.0))
    assert load.seconds_per_row_call == pytest.approx(0.01)
    assert load.progress(StepProgress("gone", 1, 4)) is None
    assert load.remove("gone") is None


def test_equals_take_turns() -> None:
    """Idle workers are used in turn."""
    loads = [load_of(), load_of(), load_of()]
    dispatcher = Dispatcher()
    chosen = [dispatcher.choose(Admitted("a"), loads) for _ in range(6)]
    assert [loads.index(load) for load in chosen] == [0, 1, 2, 0, 1, 2]


def test_fewer_requests_break_a_tie() -> None:
    """Of two workers with the same work left, the one with fewer requests is chosen."""
    two, one = load_of(Admitted("a"), Admitted("b")), load_of(Admitted("c", 2))
    assert two.remaining_seconds == one.remaining_seconds
    assert Dispatcher().choose(Admitted("new"), [two, one]) is one


def test_nobody_has_room() -> None:
    """A request that fits no worker waits."""
    assert Dispatcher().choose(Admitted("new", 4), [load_of(Admitted("a", 4))]) is None
    assert Dispatcher().choose(Admitted("new"), []) is None


def test_cancelled_request_counts_until_it_is_answered() -> None:
    """Images stay counted against the worker until it says that they are gone."""
    handle = Admitted("a", 4)
    load = load_of(handle)
    assert load.has(handle)
    assert load.remove("a") is handle
    assert not load.has(handle)
    assert load.num_images == load.num_requests == load.num_running_images == 0


def test_suspects_run_one_at_a_time() -> None:
    """A request that may have killed a worker is not sent to where another such one runs."""
    suspect = Admitted("suspect", num_losses=1)
    tainted, busy = load_of(Admitted("other", num_losses=1)), load_of(Admitted("a"), Admitted("b"), Admitted("c"))
    dispatcher = Dispatcher()
    assert dispatcher.choose(suspect, [tainted]) is None
    assert dispatcher.choose(suspect, [tainted, busy]) is busy
    assert dispatcher.choose(Admitted("innocent"), [tainted, busy]) is tainted
    assert is_held(suspect, [tainted])
    assert not is_held(suspect, [tainted, busy])
    assert not is_held(Admitted("innocent"), [tainted])
