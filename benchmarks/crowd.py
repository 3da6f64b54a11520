"""Clients that ask again and again; how many there are can be changed at any time."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

from benchmarks.exchange import Address, Wire, exchange

ANSWER_SECONDS = 120.0
PAUSE_SECONDS = 0.3
"""Of a client that did not get a picture."""


class Crowd:
    """Clients of one kind of request each.

    Args:
        address: Of the service.
        wires: What they send, by turns.
    """

    def __init__(self, address: Address, wires: Sequence[Wire]) -> None:
        self.statuses: Counter[int | None] = Counter()
        """How often which status was answered; None for no answer."""
        self._address = address
        self._wires = itertools.cycle(wires)
        self._clients: list[asyncio.Task[None]] = []

    def become(self, num_clients: int) -> None:
        """So many from now on; those that go hang up."""
        while len(self._clients) > num_clients:
            self._clients.pop().cancel()
        while len(self._clients) < num_clients:
            self._clients.append(asyncio.create_task(self._ask()))

    async def grow(self, num_clients: int, seconds: float) -> None:
        """Become more, one by one."""
        count = num_clients - len(self._clients)
        for _ in range(count):
            self.become(len(self._clients) + 1)
            await asyncio.sleep(seconds / count)

    async def leave(self) -> None:
        """All hang up."""
        clients, self._clients = self._clients, []
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    async def _ask(self) -> None:
        while True:
            answer = await exchange(self._address, next(self._wires), ANSWER_SECONDS)
            self.statuses[answer.status] += 1
            if answer.status != 200:
                await asyncio.sleep(PAUSE_SECONDS)
