"""Who may join, who must wait, whose turn it is."""

import pytest

from service.worker.batcher import Batcher, Generation
from tests.unit.fake_pipeline import make_request


def generation(name: str, **changes: object) -> Generation:
    return Generation(name, make_request(**changes))  # type: ignore[arg-type]


def names(generations: list[Generation]) -> list[str]:
    return [one.request_id for one in generations]


def add(batcher: Batcher, *generations: Generation) -> None:
    for one in generations:
        batcher.add(one)


def run(batcher: Batcher, now: float = 0.0) -> list[str]:
    """Admit, prepare and let join what may; names of those that joined."""
    for one in batcher.admit(now):
        batcher.keep(one)
    return names(batcher.join(now))


def test_requests_of_any_settings_share_a_batch() -> None:
    """Steps, scheduler, guidance, strength, eta and seed do not keep requests of one size apart."""
    batcher = Batcher(max_images=8)
    add(
        batcher,
        generation("a", num_inference_steps=10),
        generation("b", scheduler="euler", guidance_scale=1.0),
        generation("c", strength=0.5, eta=1.0, seed=9),
    )
    run(batcher)
    assert names(batcher.next_batch()) == ["a", "b", "c"]


def test_sizes_and_solo_requests_have_batches_of_their_own_and_take_turns() -> None:
    """Batches of different keys alternate step by step, so none starves."""
    batcher = Batcher(max_images=8)
    add(
        batcher,
        generation("small"),
        generation("large", height=16),
        generation("solo", batching="solo"),
        generation("small2"),
    )
    run(batcher)
    turns = [names(batcher.next_batch()) for _ in range(4)]
    assert turns == [["small", "small2"], ["large"], ["solo"], ["small", "small2"]]


def test_cap_counts_images_not_requests() -> None:
    """No more than `max_images` images run at once."""
    batcher = Batcher(max_images=4)
    add(batcher, generation("three", num_images_per_prompt=3), generation("one"), generation("more"))
    assert names(batcher.admit(now=0.0)) == ["three", "one"]
    assert names(list(batcher.waiting)) == ["more"]


def test_request_larger_than_the_cap_runs_alone() -> None:
    """A request with more images than the cap is not refused: it runs when nothing else does."""
    batcher = Batcher(max_images=2)
    add(batcher, generation("eight", num_images_per_prompt=8), generation("one"))
    assert run(batcher) == ["eight"]
    assert batcher.admit(now=0.0) == []


def test_small_requests_pass_a_large_one_but_not_for_ever() -> None:
    """A head that does not fit is looked past for a bounded time, then room is kept for it."""
    batcher = Batcher(max_images=4, max_overtaken_seconds=2.0)
    add(batcher, generation("running", num_images_per_prompt=2))
    run(batcher)
    add(batcher, generation("large", num_images_per_prompt=4), generation("small", admitted_at=1.0))
    assert names(batcher.admit(now=1.0)) == ["small"]
    add(batcher, generation("late", admitted_at=2.5))
    assert batcher.admit(now=2.5) == []
    assert names(list(batcher.waiting)) == ["large", "late"]


def test_oldest_prepared_request_is_overtaken_but_not_for_ever() -> None:
    """A large request that is prepared and does not fit is passed by small ones for a bounded time only."""
    batcher = Batcher(max_images=4, max_overtaken_seconds=2.0)
    add(batcher, generation("running", num_images_per_prompt=2))
    run(batcher)
    large, small, late = (
        generation("large", num_images_per_prompt=3),
        generation("small", admitted_at=1.0),
        generation("late", admitted_at=2.5),
    )
    batcher.preparing += [small, large, late]
    batcher.keep(small)
    batcher.keep(large)
    assert names(batcher.join(now=1.5)) == ["small"]
    batcher.keep(late)
    assert batcher.join(now=2.5) == []
    batcher.retire(batcher.running[large.key][0])
    assert names(batcher.join(now=2.5)) == ["large"]
    assert names(batcher.prepared) == ["late"]


def test_oldest_joins_first_in_whatever_order_requests_were_prepared() -> None:
    """Requests of one key are prepared together, and do not for that overtake older ones of another."""
    batcher = Batcher(max_images=1)
    first, other, same = (
        generation("first", admitted_at=1.0),
        generation("other", admitted_at=2.0, height=16),
        generation("same", admitted_at=3.0),
    )
    batcher.preparing += [first, other, same]
    for one in (first, same, other):
        batcher.keep(one)
    joined = []
    while batcher.prepared:
        (one,) = batcher.join(now=3.0)
        joined.append(one.request_id)
        batcher.remove(one)
    assert joined == ["first", "other", "same"]


@pytest.mark.parametrize(("max_images", "num_ahead"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)])
def test_some_are_prepared_ahead_but_do_not_run(max_images: int, num_ahead: int) -> None:
    """With background preparation a quarter more is prepared, at least one image; it joins when a place is free."""
    batcher = Batcher(max_images)
    add(batcher, *[generation(str(index)) for index in range(3 * max_images)])
    admitted = batcher.admit(now=0.0, is_ahead=True)
    assert len(admitted) == max_images + num_ahead
    for one in admitted:
        batcher.keep(one)
    assert len(batcher.join(now=0.0)) == max_images
    assert len(batcher.prepared) == num_ahead
    assert batcher.admit(now=0.0, is_ahead=True) == []
    batcher.retire(batcher.next_batch()[0])
    assert len(batcher.join(now=0.0)) == 1
    assert len(batcher.admit(now=0.0, is_ahead=True)) == 1


def test_finishing_requests_hold_no_place() -> None:
    """A request that has done its last step makes room at once, and is here until it is answered."""
    batcher = Batcher(max_images=1)
    add(batcher, generation("done"), generation("next"))
    run(batcher)
    done = batcher.next_batch()[0]
    batcher.retire(done)
    assert batcher.find("done") is done
    assert run(batcher) == ["next"]
    batcher.remove(batcher.next_batch()[0])
    assert not batcher.is_idle
    batcher.remove(done)
    assert batcher.is_idle


def test_lowered_cap_holds_for_what_is_prepared() -> None:
    """Requests prepared under a higher cap run under the lower one."""
    batcher = Batcher(max_images=4)
    add(batcher, *[generation(name) for name in "abcd"])
    for one in batcher.admit(now=0.0):
        batcher.keep(one)
    batcher.max_images = 2
    assert names(batcher.join(now=0.0)) == ["a", "b"]


def test_batcher_is_stuck_only_where_nothing_can_move() -> None:
    """What can run or be admitted is not left waiting; a request in preparation is waited for."""
    batcher = Batcher(max_images=1)
    assert batcher.is_stuck
    one, two = generation("one"), generation("two")
    add(batcher, one, two)
    assert not batcher.is_stuck
    batcher.admit(now=0.0)
    assert batcher.is_stuck
    batcher.keep(one)
    assert not batcher.is_stuck
    batcher.join(now=0.0)
    assert not batcher.is_stuck
    batcher.retire(one)
    assert not batcher.is_stuck
    batcher.remove(two)
    assert batcher.is_stuck
    assert not batcher.is_idle


@pytest.mark.parametrize("stage", ["waiting", "preparing", "prepared", "running", "finishing"])
def test_remove_forgets_a_generation_wherever_it_is(stage: str) -> None:
    """What is cancelled holds no place, whatever its stage, and can be removed twice."""
    batcher = Batcher(max_images=1)
    gone = generation("gone")
    add(batcher, gone)
    moves = {
        "preparing": lambda: batcher.admit(now=0.0),
        "prepared": lambda: batcher.keep(gone),
        "running": lambda: batcher.join(now=0.0),
        "finishing": lambda: batcher.retire(gone),
    }
    for name, move in moves.items():
        if stage == "waiting":
            break
        move()
        if name == stage:
            break
    assert batcher.has(gone)
    assert batcher.find("gone") is gone
    batcher.remove(gone)
    batcher.remove(gone)
    assert batcher.is_idle
    assert not batcher.has(gone)
    assert batcher.find("gone") is None
