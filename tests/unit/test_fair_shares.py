"""Several clients in one queue: whose turn it is, whose place it is, and when who was refused should come back."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.admission import PRIORITY_SHARE, WaitingQueue
from service.engine.clients import ANONYMOUS, Client
from service.engine.places import Places
from tests.process.support import PARAMS, Admitted

A, B, C = Client(1, "a"), Client(2, "b"), Client(3)
VIP, OTHER_VIP = Client(4, "vip", has_priority=True), Client(5, has_priority=True)

# Of a request with one image, in row calls: two rows with guidance, four steps.
ONE = 8


def fill(queue: WaitingQueue, client: Client, *sizes: int, age_seconds: float = 0.0) -> list[Admitted]:
    """Have a client's requests wait; `sizes` are numbers of images."""
    start = len(queue)
    handles = [
        Admitted(f"{client.number}-{start + index}", size, client=client, age_seconds=age_seconds)
        for index, size in enumerate(sizes)
    ]
    for handle in handles:
        queue.append(handle)
    return handles


def served(queue: WaitingQueue, room: int = 100) -> Iterator[Admitted]:
    """Take one request after the other."""
    while (
        taken := queue.take(lambda handle: "worker" if handle.num_images <= room else None, lambda h: h.is_suspect)
    ) is not None:
        yield taken[0]


def owners(queue: WaitingQueue, count: int) -> list[Client]:
    """Whose the next requests to be served are."""
    return [handle.client for handle, _ in zip(served(queue), range(count), strict=False)]


# --- whose turn it is -----------------------------------------------------------------


def test_newcomer_does_not_wait_for_the_queue_of_another() -> None:
    """Behind a client that has the queue full, the first request of another is next."""
    queue = WaitingQueue(100)
    fill(queue, A, *[1] * 50)
    assert owners(queue, 3) == [A, A, A]
    fill(queue, B, 1, 1)
    assert owners(queue, 5) == [B, A, B, A, A]


def test_first_in_first_out_inside_a_client_and_among_equals() -> None:
    """Each client's requests keep their order; clients that were served equally follow their arrival."""
    queue = WaitingQueue(100)
    mine, others = fill(queue, A, 1, 1, 1), fill(queue, B, 1, 1, 1)
    assert [*served(queue)] == [mine[0], others[0], mine[1], others[1], mine[2], others[2]]


def test_shares_are_of_work_and_not_of_requests() -> None:
    """A client with large requests gets fewer of them."""
    queue = WaitingQueue(100)
    fill(queue, A, *[4] * 10)
    fill(queue, B, *[1] * 40)
    first = owners(queue, 25)
    assert (first.count(A), first.count(B)) == (5, 20)


@given(st.lists(st.integers(1, 8), min_size=5, max_size=40), st.lists(st.integers(1, 8), min_size=5, max_size=40))
def test_while_both_wait_shares_differ_by_one_request_of_each(first: list[int], second: list[int]) -> None:
    """Whatever two clients send, what they were given while both waited differs by their largest requests at most."""
    queue = WaitingQueue(1000)
    waiting = {A: len(first), B: len(second)}
    fill(queue, A, *first)
    fill(queue, B, *second)
    given_images = {A: 0, B: 0}
    for handle in served(queue):
        given_images[handle.client] += handle.num_images
        waiting[handle.client] -= 1
        if not all(waiting.values()):
            break
        assert abs(given_images[A] - given_images[B]) <= max(first) + max(second)


def test_idling_saves_nothing_up() -> None:
    """A client that comes back gets its share from then on, and not what it did not use before."""
    queue = WaitingQueue(100)
    fill(queue, A, *[1] * 40)
    assert owners(queue, 20) == [A] * 20
    fill(queue, B, *[1] * 20)
    assert owners(queue, 10).count(B) in (5, 6)


def test_who_hangs_up_is_not_charged() -> None:
    """Requests that leave the queue before their turn cost their client nothing."""
    queue = WaitingQueue(100)
    gone = fill(queue, A, 8, 8, 8)
    fill(queue, A, 1, 1)
    fill(queue, B, 1, 1)
    for handle in gone:
        assert queue.remove(handle)
    assert sorted(client.number for client in owners(queue, 2)) == [1, 2]


def test_large_request_is_not_starved_by_small_ones_of_others() -> None:
    """When a large request's turn has come and it has waited for long, nobody passes it, of whichever client."""
    queue = WaitingQueue(100)
    (large,) = fill(queue, A, 4, age_seconds=3)
    fill(queue, B, *[1] * 10)
    assert next(served(queue, room=2), None) is None
    assert next(served(queue, room=4)) is large


def test_young_large_request_holds_up_nobody() -> None:
    """A large request that fits nowhere now is looked past, and still is next when there is room."""
    queue = WaitingQueue(100)
    (large,) = fill(queue, A, 4)
    (small,) = fill(queue, B, 1)
    assert next(served(queue, room=2)) is small
    assert next(served(queue, room=4)) is large


def test_what_a_lost_worker_gives_back_comes_before_every_client_and_is_not_charged_twice() -> None:
    """Requests of a lost worker are next, also before priority keys, and leave their client's share as it was."""
    queue = WaitingQueue(100)
    fill(queue, VIP, 1)
    again = [Admitted("again-0", 8, client=A), Admitted("again-1", 8, client=A)]
    queue.put_back(again)
    fill(queue, A, 1)
    fill(queue, B, 1)
    assert [queue.position(handle) for handle in again] == [0, 1]
    order = [*served(queue)]
    assert order[:2] == again
    assert [handle.client for handle in order[2:]] == [VIP, A, B]


def test_held_suspects_of_one_client_hold_up_nobody() -> None:
    """Requests that wait for each other after a loss do not keep other clients' from starting."""
    queue = WaitingQueue(100)
    queue.put_back([Admitted(f"s-{n}", 4, age_seconds=60, num_losses=1, client=A) for n in range(50)])
    (small,) = fill(queue, B, 1)
    assert next(served(queue, room=2)) is small


# --- priority -----------------------------------------------------------------------------


def test_priority_goes_first() -> None:
    """A request of a priority key is before all that wait, however many and for however long."""
    queue = WaitingQueue(100)
    fill(queue, A, *[1] * 20)
    fill(queue, B, *[1] * 20)
    assert len(owners(queue, 7)) == 7
    (urgent,) = fill(queue, VIP, 1)
    assert queue.position(urgent) == 0
    assert owners(queue, 1) == [VIP]


@given(st.lists(st.integers(1, 8), min_size=20, max_size=40), st.lists(st.integers(1, 8), min_size=6, max_size=12))
def test_priority_does_not_starve_the_rest(urgent: list[int], ordinary: list[int]) -> None:
    """While both wait, priority keys are given four times the work of all others, to within a request of each."""
    queue = WaitingQueue(1000)
    waiting = {True: len(urgent), False: len(ordinary)}
    fill(queue, VIP, *urgent[::2])
    fill(queue, OTHER_VIP, *urgent[1::2])
    fill(queue, A, *ordinary[::2])
    fill(queue, B, *ordinary[1::2])
    images = {True: 0, False: 0}
    for handle in served(queue):
        images[handle.client.has_priority] += handle.num_images
        waiting[handle.client.has_priority] -= 1
        if not all(waiting.values()):
            break
        assert abs(images[True] - PRIORITY_SHARE * images[False]) <= max(urgent) + PRIORITY_SHARE * max(ordinary)


def test_ordinary_clients_share_what_priority_leaves() -> None:
    """Beside a busy priority key two ordinary clients each get half of a fifth."""
    queue = WaitingQueue(1000)
    fill(queue, VIP, *[1] * 200)
    fill(queue, A, *[1] * 100)
    fill(queue, B, *[1] * 100)
    first = owners(queue, 100)
    assert (first.count(VIP), first.count(A), first.count(B)) == (80, 10, 10)


# --- the place that is shown ------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([A, B, C, VIP, OTHER_VIP]), st.integers(1, 8)), min_size=1, max_size=30))
def test_position_is_the_real_order(arrivals: list[tuple[Client, int]]) -> None:
    """If nobody else comes, requests are served in the order of the positions that they were shown."""
    queue = WaitingQueue(1000)
    handles = [handle for client, size in arrivals for handle in fill(queue, client, size)]
    for _ in range(len(handles) // 3):
        handles.remove(next(served(queue)))
    positions = {handle.key: queue.position(handle) for handle in handles}
    assert sorted(positions.values()) == list(range(len(handles)))
    assert [positions[handle.key] for handle in served(queue)] == list(range(len(handles)))
    assert len(queue) == 0


# --- places in the queue ------------------------------------------------------------------------


def test_queue_that_one_client_fills_admits_another() -> None:
    """A client may take the whole queue, but then is the one that is refused; others get their share of places."""
    queue = WaitingQueue(10)
    fill(queue, A, *[1] * 10)
    assert queue.is_full(A)
    for _ in range(5):
        assert not queue.is_full(B)
        fill(queue, B, 1)
    assert queue.is_full(B)
    assert queue.is_full(A)
    for _ in range(3):
        assert not queue.is_full(C)
        fill(queue, C, 1)
    assert queue.is_full(C)
    for _ in range(5):
        next(served(queue))
    assert [queue.is_full(client) for client in (A, B, C)] == [True, True, False]


def test_everybody_gets_a_place() -> None:
    """Also where there are more clients than places, each may have one request waiting."""
    queue = WaitingQueue(2)
    for number in range(1, 20):
        client = Client(number)
        assert not queue.is_full(client)
        fill(queue, client, 1)
        if number >= 2:
            assert queue.is_full(client)


def test_without_keys_the_queue_is_one_clients() -> None:
    """Nobody is told apart, so the queue is full when it is full."""
    queue = WaitingQueue(3)
    fill(queue, ANONYMOUS, 1, 1, 1)
    assert queue.is_full()


@given(st.integers(1, 20), st.lists(st.integers(0, 7), max_size=200))
def test_places_are_bounded_whoever_asks(num_places: int, asking: list[int]) -> None:
    """However clients ask, no more places are taken than the bound says, and all are given back."""
    places = Places(num_places)
    taken = []
    for number in asking:
        if places.has_room(Client(number)):
            places.take(Client(number))
            taken.append(Client(number))
    num_clients = len(set(taken))
    bound = sum(max(1, num_places / count) for count in range(1, num_clients + 1))
    assert places.num_taken == len(taken) <= bound
    for client in taken:
        places.give_back(client)
    assert places.num_taken == 0
    assert places.has_room(ANONYMOUS)


# --- when to come back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "num_requests"),
    [
        (A, 10 + 2 + 0),  # All its own, and what B has in the meantime.
        (B, 2 + 2),
        (C, 0),
    ],
)
def test_work_before_a_client_has_nothing_waiting(client: Client, num_requests: int) -> None:
    """A client waits for its own requests, and for as much of others' as they get meanwhile."""
    queue = WaitingQueue(100)
    fill(queue, A, *[1] * 10)
    fill(queue, B, 1, 1)
    assert queue.num_row_calls(PARAMS.width, client) == num_requests * ONE


def test_work_before_a_client_with_and_without_priority() -> None:
    """An ordinary client waits for four times its work of priority keys, as far as there is any; they for a quarter."""
    queue = WaitingQueue(100)
    fill(queue, A, *[1] * 2)
    fill(queue, B, *[1] * 10)
    fill(queue, VIP, *[1] * 12)
    assert queue.num_row_calls(PARAMS.width, A) == (2 + 2 + 12) * ONE
    assert queue.num_row_calls(PARAMS.width, VIP) == (12 + 3) * ONE
    queue.put_back([Admitted("again", client=C)])
    assert queue.num_row_calls(PARAMS.width, VIP) == (1 + 12 + 3) * ONE


@given(st.lists(st.tuples(st.sampled_from([A, B, C, VIP]), st.integers(1, 8)), min_size=1, max_size=40))
def test_estimated_wait_is_about_the_real_one(arrivals: list[tuple[Client, int]]) -> None:
    """What is served until a client's last request is, is what was estimated, to within a request of each client."""
    queue = WaitingQueue(1000)
    for client, size in arrivals:
        fill(queue, client, size)
    waiting = {client for client, _ in arrivals}
    estimates = {client: queue.num_row_calls(PARAMS.width, client) for client in waiting}
    assert all(estimate <= sum(size for _, size in arrivals) * ONE for estimate in estimates.values())
    work, until = 0.0, {}
    for handle in served(queue):
        work += handle.num_images * ONE
        until[handle.client] = work
    slack = len(waiting) * (1 + PRIORITY_SHARE) * 8 * ONE
    assert all(abs(until[client] - estimates[client]) <= slack for client in waiting)
