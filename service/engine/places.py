"""A bounded number of places, of which no client can keep the others out."""

from collections import Counter

from service.engine.clients import Client


class Places:
    """First come, first served while there are free places; when all are taken, by equal shares.

    A client that meets taken places only is still let in while it has fewer than an equal share of them: the number
    of places divided by the clients that have any, itself included, and at least one. So one client may use all
    places while nobody else wants them, and is the first to be refused when others do. Nobody is thrown out for it:
    of n places, k clients take at most n + n/2 + … + n/k, each term at least 1.

    Args:
        num_places: How many there are.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._taken: Counter[Client] = Counter()
        self._num_taken = 0

    @property
    def num_taken(self) -> int:
        """Places that are taken."""
        return self._num_taken

    def has_room(self, client: Client) -> bool:
        """Whether a client may take one more."""
        if self._num_taken < self._num_places:
            return True
        num_clients = len(self._taken) + (client not in self._taken)
        return self._taken[client] < max(1, self._num_places // num_clients)

    def take(self, client: Client) -> None:
        """Take one, also where there is no room: that is for the caller to ask."""
        self._taken[client] += 1
        self._num_taken += 1

    def give_back(self, client: Client) -> None:
        """Give back one that was taken."""
        self._taken[client] -= 1
        self._num_taken -= 1
        if not self._taken[client]:
            del self._taken[client]
