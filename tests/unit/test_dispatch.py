"""The choice of a worker."""

import dataclasses

import pytest

from service.engine.dispatch import Dispatcher, Load, is_held
from service.messages import Ready, StepProgress, Ticked
from service.request import LoraUse
from tests.fake_worker import MODEL
from tests.process.support import Admitted


def load_of(
    *handles: Admitted, max_images: int = 4, seconds_per_row: float = 0.01, seconds_per_step: float = 0.0
) -> Load:
    """A ready worker that has these."""
    step_seconds = {rows: seconds_per_step + rows * seconds_per_row for rows in (1, 2, 4)}
    load = Load(Ready(MODEL, "cpu", "float32", max_images, step_seconds, load_seconds=1.0))
    for handle in handles:
        load.add(handle)
    return load


def with_lora(name: str, key: str, *, num_steps: int = 4, num_images: int = 1) -> Admitted:
    """A request that uses a LoRA."""
    handle = Admitted(key, num_images)
    params = dataclasses.replace(
        handle.request.params, num_inference_steps=num_steps, loras=(LoraUse(name, name, "1", 1.0, 1.0),)
    )
    handle.request = dataclasses.replace(handle.request, params=params)
    return handle


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


def test_small_batches_do_not_make_a_worker_slow() -> None:
    """A step takes longer for its rows the fewer they are, as at warm-up: that says nothing of the worker."""
    load = load_of(Admitted("a"), seconds_per_step=0.1)
    pace = load.seconds_per_row_call
    assert pace == pytest.approx((0.1 + 4 * 0.01) / 4)
    for _ in range(100):
        load.ticked(ticked(StepProgress("a", 1, 4), step_seconds=0.1 + 2 * 0.01))
    assert load.seconds_per_row_call == pytest.approx(pace)


def test_turns_of_other_keys_are_work() -> None:
    """What cannot share steps takes as many more of them as the shorter of two takes, each with its own cost."""
    shared = load_of(with_lora("x", "a", num_steps=6), with_lora("x", "b", num_steps=4), seconds_per_step=0.1)
    apart = load_of(with_lora("x", "a", num_steps=6), with_lora("y", "b", num_steps=4), seconds_per_step=0.1)
    per_turn = (apart.remaining_seconds - shared.remaining_seconds) / 4
    assert per_turn == pytest.approx((0.11 - (0.1 + 4 * 0.01) / 4) + 0.1 * 0.11)
    apart.progress(StepProgress("b", 4, 4))
    alone = load_of(with_lora("x", "a", num_steps=6), seconds_per_step=0.1)
    assert apart.remaining_seconds == pytest.approx(alone.remaining_seconds)


def test_of_equal_workers_the_one_that_runs_the_key() -> None:
    """Requests of one LoRA share a worker, and a batch, where workers have about as much to do."""
    x, y = load_of(with_lora("x", "a"), seconds_per_step=0.1), load_of(with_lora("y", "b"), seconds_per_step=0.1)
    dispatcher = Dispatcher()
    for number in range(2):
        for name, load in (("x", x), ("y", y)):
            handle = with_lora(name, f"{name}-{number}")
            assert dispatcher.choose(handle, [x, y]) is load
            load.add(handle)


def test_idle_worker_rather_than_the_key() -> None:
    """Nobody waits for its own kind while a worker has nothing to do."""
    busy, idle = load_of(with_lora("x", "a"), seconds_per_step=0.1), load_of(seconds_per_step=0.1)
    handle = with_lora("x", "b")
    assert Dispatcher().choose(handle, [busy, idle]) is idle
    assert Dispatcher().choose(handle, [busy, idle], is_patient=True) is idle


def test_much_less_work_rather_than_the_key() -> None:
    """A worker with far more to do is not chosen for its key alone: work stays balanced."""
    long = load_of(with_lora("x", "a", num_steps=150, num_images=3), seconds_per_step=0.01)
    short = load_of(with_lora("y", "b"), seconds_per_step=0.01)
    assert Dispatcher().choose(with_lora("x", "new"), [long, short]) is short


def test_patience_only_where_the_key_runs() -> None:
    """The request waits for a full worker of its key only if that one is there, and others run other keys alone."""
    full = load_of(*(with_lora("x", str(number)) for number in range(5)))
    other, mixed = load_of(with_lora("y", "b")), load_of(with_lora("y", "c"), with_lora("x", "d"))
    dispatcher, handle = Dispatcher(), with_lora("x", "new")
    assert dispatcher.choose(handle, [full, other], is_patient=True) is None
    assert dispatcher.choose(handle, [full, other]) is other
    assert dispatcher.choose(handle, [full, mixed], is_patient=True) is mixed
    assert dispatcher.choose(handle, [other], is_patient=True) is other
    assert dispatcher.choose(with_lora("z", "z"), [full, other], is_patient=True) is other


def test_slow_workers_get_a_share_by_their_pace() -> None:
    """Of many equal requests a worker three times as slow gets a quarter."""
    slow, fast = load_of(seconds_per_row=0.03, max_images=64), load_of(seconds_per_row=0.01, max_images=64)
    dispatcher = Dispatcher()
    for number in range(40):
        handle = Admitted(str(number))
        chosen = dispatcher.choose(handle, [slow, fast])
        assert chosen is not None
        chosen.add(handle)
    assert slow.num_requests == 10


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
