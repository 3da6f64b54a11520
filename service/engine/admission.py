"""The bounded queue of admitted requests that wait for a worker, and when refused ones should come back."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import TypeVar

from service.engine.clients import ANONYMOUS, Client
from service.engine.fair_order import FairClock, Line, Waiting, in_turn
from service.engine.handle import Handle, expected_model_calls
from service.engine.places import Places

_T = TypeVar("_T")

MIN_RETRY_AFTER_SECONDS = 1
MAX_RETRY_AFTER_SECONDS = 300

PRIORITY_SHARE = 4
"""How much work requests of priority keys are given for one of all others, while both wait."""

# How many requests behind a large one are tried in its stead, so that a long
# queue does not cost the event loop a long search.
_MAX_LOOK_PAST = 32


@dataclass(frozen=True, slots=True)
class _Turn:
    """When a request is served: how many go before it, and the work of those and its own."""

    position: int
    work: int


class _Lane:
    """Requests in their order, and their work."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, Waiting] = OrderedDict()
        self.work = 0

    def add(self, entry: Waiting, *, is_first: bool = False) -> None:
        """At the end, or at the head."""
        self.entries[entry.handle.key] = entry
        self.entries.move_to_end(entry.handle.key, last=not is_first)
        self.work += entry.work

    def pop(self, handle: Handle) -> Waiting | None:
        """Take a request out; None if it is not here."""
        entry = self.entries.pop(handle.key, None)
        self.work -= 0 if entry is None else entry.work
        return entry


class _Tier:
    """Clients with equal rights, each with a lane while it has requests waiting.

    Args:
        cost: By how much the tier's clock advances for each unit of work.
    """

    def __init__(self, cost: int) -> None:
        self.cost = cost
        self.lanes: dict[Client, _Lane] = {}
        self.clock: FairClock[Client] = FairClock()

    @property
    def work(self) -> int:
        """Of all who wait."""
        return sum(lane.work for lane in self.lanes.values())

    def add(self, entry: Waiting) -> None:
        """At the end of its client's lane."""
        client = entry.handle.client
        if client not in self.lanes:
            self.lanes[client] = _Lane()
            self.clock.join(client)
        self.lanes[client].add(entry)

    def pop(self, handle: Handle) -> Waiting | None:
        """Take a request out; None if it is not here."""
        lane = self.lanes.get(handle.client)
        entry = None if lane is None else lane.pop(handle)
        if lane is not None and not lane.entries:
            del self.lanes[handle.client]
        return entry

    def in_turn(self) -> Iterator[Waiting]:
        """All, in the order in which they are served."""
        return in_turn(
            Line(self.clock.time_of(client), rank=0, cost=1, waiting=iter(lane.entries.values()))
            for client, lane in self.lanes.items()
        )


class WaitingQueue:
    """First in, first out for one client; fair shares of the work between clients.

    Requests of priority keys go first, for as long as they were given less than `PRIORITY_SHARE` times the work that
    all others were, of what was given while both had requests waiting. Before all of them come those that a lost worker
    gives back. A request that fits no worker now does not block smaller ones behind it.

    Args:
        max_size: Requests that may wait before a client is refused what exceeds its share of them.
        max_overtaken_seconds: After this age a request is no longer overtaken, so that room for it comes about.
    """

    def __init__(self, max_size: int, max_overtaken_seconds: float = 2.0) -> None:
        self.max_overtaken_seconds = max_overtaken_seconds
        self._places = Places(max_size)
        self._numbers = count()
        self._returned = _Lane()
        self._tiers = {has_priority: _Tier(1 if has_priority else PRIORITY_SHARE) for has_priority in (True, False)}
        self._tier_clock: FairClock[bool] = FairClock()
        self._turns: dict[str, _Turn] | None = None  # Of the queue as it is; None where it has changed since.

    def __len__(self) -> int:
        return self._places.num_taken

    def is_full(self, client: Client = ANONYMOUS) -> bool:
        """Whether a new request of this client has to be refused."""
        return not self._places.has_room(client)

    def append(self, handle: Handle) -> None:
        """Admit a request."""
        tier = self._tiers[handle.client.has_priority]
        if not tier.lanes:
            self._tier_clock.join(handle.client.has_priority)
        tier.add(self._entry(handle))

    def put_back(self, handles: Sequence[Handle]) -> None:
        """Put requests that a worker was lost with at the head, in their order. They had their turn already."""
        for handle in reversed(handles):
            self._returned.add(self._entry(handle), is_first=True)

    def remove(self, handle: Handle) -> bool:
        """Take a request out that is not to be served; False if it does not wait."""
        return self._pop(handle) is not None

    def position(self, handle: Handle) -> int | None:
        """Number of requests before it, should nobody arrive any more; None if it does not wait."""
        turn = self._turn(handle)
        return None if turn is None else turn.position

    def num_row_calls_through(self, handle: Handle, native_size: int) -> float | None:
        """Estimated work of a request and of all before it, should nobody arrive any more; None if it does not wait.

        Args:
            handle: The request.
            native_size: The side of the model's native square.

        Returns:
            UNet rows of `native_size` times model calls.
        """
        turn = self._turn(handle)
        return None if turn is None else turn.work / native_size**2

    def take(
        self, choose: Callable[[Handle], _T | None], is_held: Callable[[Handle], bool]
    ) -> tuple[Handle, _T] | None:
        """Take out the first request for which `choose` names a worker.

        Args:
            choose: The worker for a request, or None.
            is_held: Whether a request waits for something other than room, so
                that nobody needs to wait for it.

        Returns:
            The request and its worker, or None if all have to wait.
        """
        num_passed = 0
        for entry in self._in_turn():
            handle = entry.handle
            chosen = choose(handle)
            if chosen is not None:
                self._serve(entry)
                return handle, chosen
            if is_held(handle):
                continue
            num_passed += 1
            if num_passed > _MAX_LOOK_PAST or handle.age_seconds > self.max_overtaken_seconds:
                return None
        return None

    def num_row_calls(self, native_size: int, client: Client = ANONYMOUS) -> float:
        """Estimated work that is served until a client has nothing waiting any more.

        Its own, and of others what they are given meanwhile by their shares; all there is where it is alone.

        Args:
            native_size: The side of the model's native square.
            client: Whose requests are to be served.

        Returns:
            UNet rows of `native_size` times model calls.
        """
        own, others = self._tiers[client.has_priority], self._tiers[not client.has_priority]
        its_work = own.lanes[client].work if client in own.lanes else 0
        work = sum(min(lane.work, its_work) for lane in own.lanes.values())
        beside = min(others.work, work * own.cost / others.cost)
        return (self._returned.work + work + beside) / native_size**2

    def _turn(self, handle: Handle) -> _Turn | None:
        """Found out once for all that wait: as many may ask as wait, between two changes of the queue."""
        if self._turns is None:
            self._turns, work = {}, 0
            for position, entry in enumerate(self._in_turn()):
                work += entry.work
                self._turns[entry.handle.key] = _Turn(position, work)
        return self._turns.get(handle.key)

    def _entry(self, handle: Handle) -> Waiting:
        self._turns = None
        self._places.take(handle.client)
        return Waiting(handle, next(self._numbers), _pixel_calls(handle))

    def _pop(self, handle: Handle) -> Waiting | None:
        entry = self._returned.pop(handle) or self._tiers[handle.client.has_priority].pop(handle)
        if entry is not None:
            self._turns = None
            self._places.give_back(handle.client)
        return entry

    def _serve(self, entry: Waiting) -> None:
        """It has its turn, which counts; for one that was given back it did already."""
        client = entry.handle.client
        if entry.handle.key not in self._returned.entries:
            tier = self._tiers[client.has_priority]
            tier.clock.serve(client, entry.work)
            self._tier_clock.serve(client.has_priority, entry.work * tier.cost)
        self._pop(entry.handle)

    def _in_turn(self) -> Iterator[Waiting]:
        yield from self._returned.entries.values()
        yield from in_turn(
            Line(self._tier_clock.time_of(has_priority), rank=not has_priority, cost=tier.cost, waiting=tier.in_turn())
            for has_priority, tier in self._tiers.items()
        )


def _pixel_calls(handle: Handle) -> int:
    params = handle.request.params
    return params.num_rows * params.height * params.width * expected_model_calls(params)


def backlog_seconds(num_row_calls: float, paces: Iterable[float]) -> float:
    """How long workers with these paces (seconds per row call) take together; 0 without a worker."""
    speed = sum(1 / pace for pace in paces if pace > 0)
    return num_row_calls / speed if speed else 0.0


def retry_after(seconds: float) -> int:
    """An estimate as a `Retry-After`: whole seconds within bounds."""
    return min(MAX_RETRY_AFTER_SECONDS, max(MIN_RETRY_AFTER_SECONDS, ceil(seconds)))
