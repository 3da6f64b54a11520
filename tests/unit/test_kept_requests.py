"""Which asynchronous requests can be asked for, by whom, for how long, and what keeping them takes."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.api.kept_requests import ENTRY_BYTES, KeptRequests, _Shelf
from service.engine.clients import ANONYMOUS, Client
from service.errors import ErrorCode, InpaintError
from tests.unit.clock import Clock

ALICE, BOB, CAROL = (Client(number, name) for number, name in ((1, "alice"), (2, "bob"), (3, "carol")))
UNIT = 1000 + ENTRY_BYTES
"""What a result of 1,000 bytes takes."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(clock: Clock) -> KeptRequests[str]:
    """Room for four results of 1,000 bytes, for a minute."""
    return KeptRequests(4 * UNIT, 100, 60.0, clock)


def run(kept: KeptRequests[str], client: Client, name: str) -> str:
    """Have a request run; its id."""
    request_id = kept.new_id(client)
    kept.add(request_id, client, name)
    return request_id


def ended(kept: KeptRequests[str], client: Client, name: str, num_bytes: int = 1000) -> str:
    """Have a request run and end; its id."""
    request_id = run(kept, client, name)
    assert kept.end(request_id, num_bytes)
    return request_id


def refusal(kept: KeptRequests[str], request_id: str, client: Client) -> ErrorCode:
    with pytest.raises(InpaintError) as raised:
        kept.find(request_id, client)
    return raised.value.code


def test_a_request_is_found_from_its_start_to_after_its_end(kept: KeptRequests[str]) -> None:
    """Its client finds it as long as it runs, and then as long as it is kept."""
    request_id = run(kept, ALICE, "a")
    assert kept.find(request_id, ALICE) == "a"
    assert (kept.num_running, kept.num_kept, kept.num_bytes) == (1, 0, 0)

    assert kept.end(request_id, 1000)

    assert kept.find(request_id, ALICE) == "a"
    assert (kept.num_running, kept.num_kept, kept.num_bytes) == (0, 1, UNIT)


@pytest.mark.parametrize("when", ["running", "ended", "deleted", "expired"])
def test_to_others_it_does_not_exist(kept: KeptRequests[str], clock: Clock, when: str) -> None:
    """Another client cannot tell a request of somebody else from none, whatever has become of it."""
    request_id = run(kept, ALICE, "a")
    if when != "running":
        kept.end(request_id, 1000)
    if when == "deleted":
        kept.forget(request_id, ALICE)
    clock.now += 61 * (when == "expired")

    assert refusal(kept, request_id, BOB) == ErrorCode.NOT_FOUND
    assert refusal(kept, request_id, ANONYMOUS) == ErrorCode.NOT_FOUND
    kept.forget(request_id, BOB)
    if when in ("running", "ended"):
        assert kept.find(request_id, ALICE) == "a"
    else:
        assert refusal(kept, request_id, ALICE) == ErrorCode.GONE


def test_what_was_is_told_from_what_never_was(kept: KeptRequests[str]) -> None:
    """An id that was given out is gone for ever; one that was not, and the same in another spelling, never existed."""
    request_id = ended(kept, ALICE, "a")
    kept.forget(request_id, ALICE)

    assert refusal(kept, request_id, ALICE) == ErrorCode.GONE
    changed = request_id[:-1] + ("0" if request_id[-1] != "0" else "1")
    strange = ["", "inp_", "a", "é", "inp_zz", "inp_" + "00" * 28, changed, request_id.upper(), request_id + "00"]
    strange += [request_id.removeprefix("inp_"), f" {request_id}", "inp_" + " ".join(request_id[4:])]
    for other in strange:
        assert refusal(kept, other, ALICE) == ErrorCode.NOT_FOUND, other


def test_another_process_knows_nothing(kept: KeptRequests[str]) -> None:
    """After a restart an id is one that never was."""
    assert refusal(KeptRequests(UNIT, 1, 60.0), run(kept, ALICE, "a"), ALICE) == ErrorCode.NOT_FOUND


def test_ids_are_never_the_same(kept: KeptRequests[str]) -> None:
    """Each has 96 random bits, and 128 that only this process can know."""
    ids = {kept.new_id(ALICE) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == len("inp_") + 2 * (12 + 16) for one in ids)


def test_ended_requests_expire_and_running_ones_do_not(kept: KeptRequests[str], clock: Clock) -> None:
    """A request is forgotten a while after its end, and its memory with it; one that runs is kept however long."""
    slow = run(kept, ALICE, "slow")
    clock.now = 150.0
    request_id = ended(kept, ALICE, "a")

    clock.now = 209.9
    assert kept.find(request_id, ALICE) == "a"
    clock.now = 210.0
    assert refusal(kept, request_id, ALICE) == ErrorCode.GONE
    assert (kept.num_kept, kept.num_bytes) == (0, 0)
    assert kept.find(slow, ALICE) == "slow"


def test_a_sweep_alone_frees_the_memory(kept: KeptRequests[str], clock: Clock) -> None:
    """Of every client what is too old goes, and nothing else."""
    ended(kept, ALICE, "a")
    ended(kept, BOB, "b")
    clock.now = 140.0
    young = ended(kept, BOB, "c")
    clock.now = 170.0

    kept.drop_expired()

    assert (kept.num_kept, kept.num_bytes) == (1, UNIT)
    assert kept.find(young, BOB) == "c"


def test_the_oldest_make_room(kept: KeptRequests[str]) -> None:
    """Where the memory is full, a client's oldest results go first, and only as many as it takes."""
    ids = [ended(kept, ALICE, str(number)) for number in range(4)]
    ids.append(ended(kept, ALICE, "large", num_bytes=UNIT + 1000))

    assert [refusal(kept, one, ALICE) for one in ids[:2]] == [ErrorCode.GONE] * 2
    assert [kept.find(one, ALICE) for one in ids[2:]] == ["2", "3", "large"]
    assert kept.num_bytes == 4 * UNIT


def test_a_number_bounds_them_too(clock: Clock) -> None:
    """However small they are, no more than so many are kept."""
    kept: KeptRequests[str] = KeptRequests(10**9, 2, 60.0, clock)
    ids = [ended(kept, ALICE, str(number), num_bytes=0) for number in range(3)]
    assert refusal(kept, ids[0], ALICE) == ErrorCode.GONE
    assert kept.num_kept == 2


@pytest.mark.parametrize("short_of", ["bytes", "number"])
def test_no_client_pushes_out_the_others(clock: Clock, short_of: str) -> None:
    """A client that ends one request after the other loses its own; those of others stay, though they are older."""
    room = (4 * UNIT, 100) if short_of == "bytes" else (10**9, 4)
    kept: KeptRequests[str] = KeptRequests(*room, 60.0, clock)
    first = ended(kept, BOB, "b")
    second = ended(kept, CAROL, "c")
    ids = [ended(kept, ALICE, str(number)) for number in range(50)]

    assert (kept.find(first, BOB), kept.find(second, CAROL)) == ("b", "c")
    assert [kept.find(one, ALICE) for one in ids[-2:]] == ["48", "49"]
    assert refusal(kept, ids[-3], ALICE) == ErrorCode.GONE


def test_among_equals_the_oldest_goes(kept: KeptRequests[str]) -> None:
    """Where all hold the same, what ended first makes room for what ended last."""
    first = ended(kept, BOB, "b")
    others = [ended(kept, Client(number), str(number)) for number in (11, 12, 13, 14)]

    assert refusal(kept, first, BOB) == ErrorCode.GONE
    assert kept.find(others[0], Client(11)) == "11"


def test_what_would_be_the_first_to_go_is_not_kept_and_drives_nobody_out(kept: KeptRequests[str]) -> None:
    """A result larger than the room, or than its client's share while others hold theirs, changes nothing."""
    older = ended(kept, ALICE, "a")
    others = [ended(kept, BOB, "b"), ended(kept, BOB, "c")]
    for num_bytes in (5 * UNIT, 2 * UNIT + 1000):
        request_id = run(kept, ALICE, "large")
        assert not kept.end(request_id, num_bytes)
        assert kept.find(request_id, ALICE) == "large"  # It may still end with less.
        assert kept.find(older, ALICE) == "a"
        assert [kept.find(one, BOB) for one in others] == ["b", "c"]
        assert kept.end(request_id, 0)
        kept.forget(request_id, ALICE)


def test_deleting_frees_the_memory(kept: KeptRequests[str]) -> None:
    """What its client deletes is gone at once, running or ended; twice is once."""
    running, over = run(kept, ALICE, "a"), ended(kept, ALICE, "b")
    for request_id in (running, over):
        kept.forget(request_id, ALICE)
        kept.forget(request_id, ALICE)
        assert refusal(kept, request_id, ALICE) == ErrorCode.GONE
    assert not kept.end(running, 1000)
    assert (kept.num_running, kept.num_kept, kept.num_bytes) == (0, 0, 0)


@dataclass
class Expected:
    """What a request should be."""

    client: Client
    num_bytes: int | None = None  # None while it runs.
    ended_at: float = field(default=0.0)


class Books(RuleBasedStateMachine):
    """In any order of events: what runs is there, what is kept is within its bounds, and nobody sees another's."""

    clients = st.sampled_from([ALICE, BOB, CAROL])

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.kept: KeptRequests[str] = KeptRequests(5 * UNIT, 4, 60.0, self.clock)
        self.known: dict[str, Expected] = {}
        self.gone: dict[str, Client] = {}

    def running(self) -> list[str]:
        """Ids of what runs."""
        return [one for one, expected in self.known.items() if expected.num_bytes is None]

    def settle(self) -> None:
        """Move what is not there any more; only what ended may vanish by itself."""
        for one, expected in list(self.known.items()):
            if expected.num_bytes is not None and one not in self.kept._shelves.get(expected.client, _Shelf()).kept:
                self.gone[one] = self.known.pop(one).client

    @rule(client=clients)
    def start(self, client: Client) -> None:
        """A request is admitted."""
        one = self.kept.new_id(client)
        self.kept.add(one, client, one)
        self.known[one] = Expected(client)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), num_bytes=st.integers(0, 6 * UNIT))
    def finish(self, data: st.DataObject, num_bytes: int) -> None:
        """A request ends; whoever loses something for it held as much as anybody of what is short."""
        one = data.draw(st.sampled_from(self.running()))
        mine = self.known[one].client
        held = {client: shelf.num_bytes for client, shelf in self.kept._shelves.items()}
        counts = {client: len(shelf.kept) for client, shelf in self.kept._shelves.items()}
        held[mine] = held.get(mine, 0) + num_bytes + ENTRY_BYTES
        counts[mine] = counts.get(mine, 0) + 1
        if not self.kept.end(one, num_bytes):
            assert sum(held.values()) > 5 * UNIT
            assert num_bytes + ENTRY_BYTES > 5 * UNIT / len(held)
            assert len(self.known) == self.kept.num_kept + self.kept.num_running
            return
        self.known[one] = Expected(mine, num_bytes, self.clock.now)
        before = set(self.known)
        self.settle()
        lost = [self.gone[other] for other in before - set(self.known)]
        if len(lost) == 1:
            is_greatest = held[lost[0]] == max(held.values()), counts[lost[0]] == max(counts.values())
            assert is_greatest[0] if sum(held.values()) > 5 * UNIT else is_greatest[1]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """A request is given up, or a result is forgotten."""
        one = data.draw(st.sampled_from(list(self.known)))
        client = self.known.pop(one).client
        self.kept.forget(one, client)
        self.gone[one] = client

    @rule(seconds=st.integers(0, 70))
    def wait(self, seconds: int) -> None:
        """Time goes by."""
        self.clock.now += seconds
        self.kept.drop_expired()
        self.settle()
        for expected in self.known.values():
            assert expected.num_bytes is None or self.clock.now - expected.ended_at < 60

    @invariant()
    def books_are_right(self) -> None:
        """Memory is that of what is kept, and within its bounds."""
        over = [expected for expected in self.known.values() if expected.num_bytes is not None]
        assert self.kept.num_running == len(self.running())
        assert self.kept.num_kept == len(over) <= 4
        assert self.kept.num_bytes == sum(one.num_bytes + ENTRY_BYTES for one in over) <= 5 * UNIT

    @invariant()
    def each_sees_its_own_alone(self) -> None:
        """What was deleted or dropped is gone to its client, and never was to others."""
        for one, expected in self.known.items():
            for client in (ALICE, BOB, CAROL):
                if client == expected.client:
                    assert self.kept.find(one, client) == one
                else:
                    assert refusal(self.kept, one, client) == ErrorCode.NOT_FOUND
        for one, owner in self.gone.items():
            for client in (ALICE, BOB, CAROL):
                expected_code = ErrorCode.GONE if client == owner else ErrorCode.NOT_FOUND
                assert refusal(self.kept, one, client) == expected_code


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=30, derandomize=True)
TestBooks = Books.TestCase
