"""A clock that moves when something happens, and a list of what is to happen when."""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from unittest.mock import patch


class VirtualTime:
    """Events in the order of their moments; those of one moment in the order in which they were planned.

    What happens at a moment may take time: it calls `pass_by`, and then it is later for it, and for what it plans,
    while events that are due before are still to come. So devices work side by side. That is right as long as an
    event looks at what others do only at its own moment, before it passes any time by.
    """

    def __init__(self) -> None:
        self.now = 0.0
        """In seconds."""
        self._numbers = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def monotonic(self) -> float:
        """In place of `time.monotonic`."""
        return self.now

    def pass_by(self, seconds: float) -> None:
        """What happens takes this long."""
        self.now += seconds

    def plan(self, delay_seconds: float, event: Callable[[], None]) -> None:
        """Have something happen, so many seconds from now."""
        heapq.heappush(self._events, (self.now + delay_seconds, next(self._numbers), event))

    def run(self, until: Callable[[], bool]) -> None:
        """Let everything happen, until this is true or nothing is planned."""
        while self._events and not until():
            self.now, _, event = heapq.heappop(self._events)
            event()

    @contextmanager
    def in_place_of_the_real_one(self) -> Iterator[None]:
        """Engine and worker read this clock, and the worker's loop waits for nothing: it is called when there is some.

        The only two things that a simulation puts in the place of the service's own.
        """
        with (
            patch("time.monotonic", self.monotonic),
            patch("service.worker.loop.wait", lambda *_: []),
        ):
            yield
