"""The queue of admitted requests."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from service.engine.admission import WaitingQueue, backlog_seconds, retry_after
from service.engine.clients import Client
from service.engine.handle import Handle
from tests.process.support import PARAMS, Admitted


def take(queue: WaitingQueue, room: int, *, is_held: Callable[[Handle], bool] = lambda _: False) -> str | None:
    """Take the first request with at most `room` images; its key."""
    taken = queue.take(lambda handle: "worker" if handle.num_images <= room else None, is_held)
    return None if taken is None else taken[0].key


def queue_of(*handles: Handle, max_size: int = 100) -> WaitingQueue:
    """A queue that holds these."""
    queue = WaitingQueue(max_size)
    for handle in handles:
        queue.append(handle)
    return queue


def test_first_in_first_out() -> None:
    """Requests are started in the order of their admission."""
    queue = queue_of(Admitted("a"), Admitted("b"), Admitted("c"))
    assert [take(queue, 1) for _ in range(4)] == ["a", "b", "c", None]


def test_looks_past_what_does_not_fit() -> None:
    """A large request does not block smaller ones behind it."""
    queue = queue_of(Admitted("large", 4), Admitted("small", 1))
    assert take(queue, 2) == "small"
    assert take(queue, 2) is None
    assert take(queue, 4) == "large"


def test_overtaking_has_an_end() -> None:
    """A large request that has waited for long is not overtaken any more, so it is not starved."""
    queue = queue_of(Admitted("large", 4, age_seconds=3), Admitted("small", 1))
    assert take(queue, 2) is None
    assert take(queue, 4) == "large"


def test_held_requests_block_nobody() -> None:
    """Suspects that wait for each other, however long and many, do not hold up others."""
    suspects = [Admitted(f"suspect-{number}", 4, age_seconds=60, num_losses=1) for number in range(100)]
    queue = queue_of(*suspects, Admitted("small", 1))
    assert take(queue, 2, is_held=lambda handle: handle.is_suspect) == "small"


def test_what_a_lost_worker_gives_back_is_next() -> None:
    """Requests of a lost worker go to the head of the queue, in their order."""
    queue = queue_of(Admitted("waiting"))
    queue.put_back([Admitted("a"), Admitted("b")])
    assert [take(queue, 1) for _ in range(3)] == ["a", "b", "waiting"]


def test_position_counts_those_before() -> None:
    """Position 0 is the next one; who does not wait has none."""
    first, second, stranger = Admitted("a"), Admitted("b"), Admitted("c")
    queue = queue_of(first, second)
    assert [queue.position(handle) for handle in (first, second, stranger)] == [0, 1, None]
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.position(second) == 0


def test_queue_is_bounded() -> None:
    """The queue is full at its size, and has room again when one leaves."""
    first = Admitted("a")
    queue = queue_of(first, Admitted("b"), max_size=2)
    assert queue.is_full()
    queue.remove(first)
    assert not queue.is_full()


@given(st.lists(st.tuples(st.sampled_from(["append", "put_back", "remove", "take"]), st.integers(1, 8))))
def test_waiting_work_is_that_of_who_waits(operations: list[tuple[str, int]]) -> None:
    """Retry-After is computed from the requests that wait, whatever came and went before."""
    queue = WaitingQueue(100)
    waiting: list[Handle] = []
    for number, (operation, num_images) in enumerate(operations):
        handle = Admitted(str(number), num_images)
        match operation:
            case "append":
                queue.append(handle)
                waiting.append(handle)
            case "put_back":
                queue.put_back([handle])
                waiting.insert(0, handle)
            case "remove" if waiting:
                assert queue.remove(waiting.pop())
            case "take" if waiting:
                assert take(queue, 8) == waiting.pop(0).key
    assert len(queue) == len(waiting)
    # Two rows an image with guidance, at the native size, four calls each.
    assert queue.num_row_calls(PARAMS.width) == sum(2 * handle.num_images * 4 for handle in waiting)


def test_backlog_is_shared_by_the_workers() -> None:
    """Two workers need half as long, and a fast one counts for more."""
    assert backlog_seconds(100, [0.1]) == 10
    assert backlog_seconds(100, [0.1, 0.1]) == 5
    assert round(backlog_seconds(100, [0.1, 0.4]), 6) == 8
    assert backlog_seconds(100, []) == 0


@given(st.floats(-10, 1e9))
def test_retry_after_is_whole_and_bounded(seconds: float) -> None:
    """Retry-After is at least a second, whole, never early within its bounds, and never absurd."""
    value = retry_after(seconds)
    assert isinstance(value, int)
    assert 1 <= value <= 300
    assert value >= min(seconds, 300)


@given(st.lists(st.tuples(st.sampled_from("adrp"), st.integers(1, 4), st.integers(0, 2)), max_size=40))
def test_places_are_those_of_the_queue_as_it_is(events: list[tuple[str, int, int]]) -> None:
    """After any arrivals, departures and losses, a request's place is when it would be taken, and work adds up."""
    queue, waiting, taken = WaitingQueue(100), {}, []
    for number, (event, num_images, client) in enumerate(events):
        if event == "a":
            handle = Admitted(str(number), num_images, client=Client(client, has_priority=client == 2))
            queue.append(handle)
            waiting[handle.key] = handle
        elif event == "d" and waiting:
            assert queue.remove(waiting.pop(next(iter(waiting))))
        elif event == "r" and (found := queue.take(lambda _: True, is_held=lambda _: False)):
            taken.append(waiting.pop(found[0].key))
        elif event == "p" and taken:
            queue.put_back([taken.pop()])
            waiting = {entry.handle.key: entry.handle for entry in queue._in_turn()}
        order = [entry.handle for entry in queue._in_turn()]
        assert [queue.position(handle) for handle in order] == list(range(len(waiting)))
        rows = [handle.request.params.num_rows * 4 for handle in order]
        through = [queue.num_row_calls_through(handle, 64) for handle in order]
        assert through == [sum(rows[: place + 1]) for place in range(len(order))]
    assert queue.position(Admitted("nobody")) is None
    assert queue.num_row_calls_through(Admitted("nobody"), 64) is None
