"""Who may join, who must wait, whose turn it is."""

from service.worker.batcher import Batcher, Generation
from tests.unit.fake_pipeline import make_request


def generation(name: str, **changes: object) -> Generation:
    return Generation(name, make_request(**changes))  # type: ignore[arg-type]


def names(generations: list[Generation]) -> list[str]:
    return [one.request_id for one in generations]


def add(batcher: Batcher, *generations: Generation) -> None:
    for one in generations:
        batcher.add(one)


def test_requests_of_any_settings_share_a_batch() -> None:
    """Steps, scheduler, guidance, strength, eta and seed do not keep requests of one size apart."""
    batcher = Batcher(max_images=8)
    add(
        batcher,
        generation("a", num_inference_steps=10),
        generation("b", scheduler="euler", guidance_scale=1.0),
        generation("c", strength=0.5, eta=1.0, seed=9),
    )
    for one in batcher.admit(now=0.0):
        batcher.start(one)
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
    for one in batcher.admit(now=0.0):
        batcher.start(one)
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
    (admitted,) = batcher.admit(now=0.0)
    assert admitted.request_id == "eight"
    batcher.start(admitted)
    assert batcher.admit(now=0.0) == []


def test_small_requests_pass_a_large_one_but_not_for_ever() -> None:
    """A head that does not fit is looked past for a bounded time, then room is kept for it."""
    batcher = Batcher(max_images=4, max_overtaken_seconds=2.0)
    add(batcher, generation("running", num_images_per_prompt=2))
    for one in batcher.admit(now=0.0):
        batcher.start(one)
    add(batcher, generation("large", num_images_per_prompt=4), generation("small", admitted_at=1.0))
    assert names(batcher.admit(now=1.0)) == ["small"]
    add(batcher, generation("late", admitted_at=2.5))
    assert batcher.admit(now=2.5) == []
    assert names(list(batcher.waiting)) == ["large", "late"]


def test_remove_forgets_a_generation_wherever_it_is() -> None:
    """What is cancelled holds no place, waiting or running."""
    batcher = Batcher(max_images=1)
    running, waiting = generation("running"), generation("waiting")
    add(batcher, running, waiting)
    for one in batcher.admit(now=0.0):
        batcher.start(one)
    batcher.remove(running)
    batcher.remove(waiting)
    batcher.remove(waiting)
    assert batcher.is_idle
    assert batcher.find("running") is None
