"""Pictures of unfinished requests: which are due, which are being made, which wait to be shown.

They are a courtesy: at most one of a request is in the making, and what comes
too late is not shown.
"""

from collections.abc import Iterable
from math import ceil

from service.request import Pixels
from service.worker.batcher import Generation

MAX_PREVIEWS = 10
"""Previews of one request at most: each costs its neighbours the time of a decode and a check."""

MIN_PREVIEW_STEP = 2
"""The first step knows nothing but noise."""


class Previews:
    """The previews of one worker's running requests."""

    def __init__(self) -> None:
        self._in_the_making: set[Generation] = set()
        self._made: dict[Generation, Pixels] = {}

    def begin(self, generations: Iterable[Generation]) -> list[Generation]:
        """Those of which one is due and none is in the making; from here on one is."""
        due = [one for one in generations if _is_due(one) and one not in self._in_the_making]
        self._in_the_making.update(due)
        return due

    def end(self, generation: Generation, picture: Pixels | None) -> None:
        """One is made, or there is nothing to show."""
        self._in_the_making.remove(generation)
        if picture is not None:
            self._made[generation] = picture

    def take(self, generation: Generation) -> Pixels | None:
        """The newest that has not been shown."""
        return self._made.pop(generation, None)

    def forget(self, generation: Generation) -> None:
        """It has been answered: what is made is not shown."""
        self._made.pop(generation, None)


def _is_due(generation: Generation) -> bool:
    """Whether to show what it has become: after some steps, evenly spread; not after the first or the last."""
    if not generation.request.params.previews or generation.is_denoised or generation.steps_done < MIN_PREVIEW_STEP:
        return False
    return generation.steps_done % max(1, ceil(generation.steps / MAX_PREVIEWS)) == 0
