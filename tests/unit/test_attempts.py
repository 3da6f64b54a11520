"""One request's failure is its own: what becomes of each generation of a batch that fails."""

import gc
import weakref
from collections.abc import Sequence

import pytest

from service.errors import ErrorCode, InpaintError
from service.worker.attempts import attempt
from service.worker.batcher import Generation
from service.worker.faults import BatchTooLarge, DeviceLost
from tests.unit.fake_pipeline import make_request


def generations(*num_images: int) -> list[Generation]:
    """One for each number of images, named by its place."""
    return [
        Generation(str(index), make_request(num_images_per_prompt=number)) for index, number in enumerate(num_images)
    ]


def num_images_of(batch: Sequence[Generation]) -> int:
    return sum(one.num_images for one in batch)


def test_work_that_succeeds_is_done_once_on_all() -> None:
    """A healthy batch is not split; results keep their order."""
    calls: list[int] = []

    def work(batch: Sequence[Generation]) -> list[str]:
        calls.append(len(batch))
        return [f"picture {one.request_id}" for one in batch]

    attempted = attempt(batch := generations(1, 2, 1), work)
    assert attempted.outcomes == tuple((one, f"picture {index}") for index, one in enumerate(batch))
    assert attempted.too_many_images is None
    assert calls == [3]


@pytest.mark.parametrize("culprit", range(5))
def test_culprit_alone_has_an_error(culprit: int) -> None:
    """Whichever fails, the others have results, in order; the client is told nothing of the inside."""

    def work(batch: Sequence[Generation]) -> list[str]:
        if any(one.request_id == str(culprit) for one in batch):
            raise ValueError("secret /path")
        return [one.request_id for one in batch]

    outcomes = dict(attempt(batch := generations(1, 1, 1, 1, 1), work).outcomes)
    assert list(outcomes) == batch
    error = outcomes.pop(batch[culprit])
    assert isinstance(error, InpaintError)
    assert (error.code, "secret" in error.message) == (ErrorCode.INTERNAL, False)
    assert all(outcome == one.request_id for one, outcome in outcomes.items())


def test_smallest_batch_that_was_too_large_is_remembered() -> None:
    """The fewest images of several generations that did not fit are reported, and all are served in smaller batches."""

    def work(batch: Sequence[Generation]) -> list[str]:
        if num_images_of(batch) > 2:
            raise BatchTooLarge
        return ["picture"] * len(batch)

    attempted = attempt(generations(1, 1, 1, 1, 2, 1), work)
    assert [outcome for _, outcome in attempted.outcomes] == ["picture"] * 6
    assert attempted.too_many_images == 3


def test_one_that_is_too_large_alone_lowers_nothing() -> None:
    """A single request that does not fit says nothing of how many others may share a batch."""

    def work(_batch: Sequence[Generation]) -> list[str]:
        raise BatchTooLarge

    attempted = attempt(generations(4), work)
    ((_, error),) = attempted.outcomes
    assert isinstance(error, InpaintError)
    assert error.code is ErrorCode.OUT_OF_MEMORY
    assert attempted.too_many_images is None


def test_lost_device_is_not_tried_in_halves() -> None:
    """A device that needs a new process is not asked again."""
    calls: list[int] = []

    def work(batch: Sequence[Generation]) -> list[str]:
        calls.append(len(batch))
        raise DeviceLost

    with pytest.raises(DeviceLost):
        attempt(generations(1, 1), work)
    assert calls == [2]


def test_wrong_number_of_results_is_a_failure() -> None:
    """No request is answered with another's picture."""

    def work(batch: Sequence[Generation]) -> list[str]:
        return ["picture"] * (len(batch) - 1)

    outcomes = attempt(generations(1, 1), work).outcomes
    assert all(isinstance(outcome, InpaintError) for _, outcome in outcomes)


def test_nothing_to_do_is_not_done() -> None:
    """Without generations the pipeline is not called."""

    def work(_batch: Sequence[Generation]) -> list[str]:
        raise AssertionError

    assert attempt([], work).outcomes == ()


@pytest.mark.parametrize("num_generations", [1, 2])
def test_failed_call_keeps_nothing_alive(num_generations: int) -> None:
    """What a failed call had on the device is free before the halves are tried, and once the error is known."""

    class Tensor:
        """What a call computes."""

    held: list[weakref.ref[Tensor]] = []

    def work(_batch: Sequence[Generation]) -> list[str]:
        assert all(tensor() is None for tensor in held)
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise BatchTooLarge

    gc.disable()
    try:
        attempted = attempt(generations(*[1] * num_generations), work)
        assert len(held) == 2 * num_generations - 1
        assert all(tensor() is None for tensor in held)
    finally:
        gc.enable()
    assert len(attempted.outcomes) == num_generations
