"""In which order the requests of several clients are served.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): everybody has a clock
that the work it is given advances, and whoever's clock is furthest behind goes
next. While two clients have requests waiting, what they are given differs by
no more than about one request of each. Who had nothing waiting for a while
starts at the time of the one that was served last, so that what was not used
is not saved up.

Work is counted in pixels times model calls, whole numbers that do not round.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Generic, TypeVar

from service.engine.handle import Handle

_K = TypeVar("_K")


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request in the queue.

    Attributes:
        handle: The request.
        number: Which one to arrive it is.
        work: Estimated pixels times model calls.
    """

    handle: Handle
    number: int
    work: int


class FairClock(Generic[_K]):
    """The clocks of everybody at one level."""

    def __init__(self) -> None:
        self._now = 0
        self._times: dict[_K, int] = {}

    def join(self, who: _K) -> None:
        """It starts to wait."""
        self._times[who] = max(self.time_of(who), self._now)

    def time_of(self, who: _K) -> int:
        """What its clock shows."""
        return self._times.get(who, 0)

    def serve(self, who: _K, amount: int) -> None:
        """Work of this amount is given to it."""
        started_at = self.time_of(who)
        self._now = max(self._now, started_at)
        self._times[who] = started_at + amount


@dataclass(frozen=True, slots=True)
class Line:
    """What somebody has waiting, and how it stands to others.

    Attributes:
        time: What its clock shows.
        rank: Goes first among equal times if lower; then who arrived first does.
        cost: By how much its clock advances for each unit of work.
        waiting: Its requests, in their order.
    """

    time: int
    rank: int
    cost: int
    waiting: Iterator[Waiting]


def in_turn(lines: Iterable[Line]) -> Iterator[Waiting]:
    """The requests of all lines in the order in which they are served, should nobody arrive any more."""
    heap = [
        (line.time, line.rank, first.number, first, line)
        for line in lines
        if (first := next(line.waiting, None)) is not None
    ]
    heapify(heap)
    while heap:
        time, rank, _, head, line = heap[0]
        yield head
        following = next(line.waiting, None)
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (time + line.cost * head.work, rank, following.number, following, line))
