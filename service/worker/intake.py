"""From the loop to the thread that prepares: it takes at once all that can be prepared together."""

import threading
from collections.abc import Iterable

from service.worker.batcher import Generation


class Intake:
    """Admitted generations whose preparation has not begun. Safe to use from several threads.

    What is admitted while another preparation runs is taken together, however many
    jobs were submitted for it; the jobs that come after find nothing left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._admitted: list[Generation] = []

    def add(self, generations: Iterable[Generation]) -> None:
        """Leave them to the next `take`."""
        with self._lock:
            self._admitted += generations

    def discard(self, generation: Generation) -> None:
        """Nobody waits for it any more; nothing happens if it has been taken."""
        with self._lock:
            if generation in self._admitted:
                self._admitted.remove(generation)

    def take(self) -> list[Generation]:
        """The oldest and all others of its key; empty when nothing is left."""
        with self._lock:
            taken = [one for one in self._admitted if one.key == self._admitted[0].key]
            self._admitted = [one for one in self._admitted if one not in taken]
            return taken
