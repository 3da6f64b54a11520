"""A clock for what is kept for a while."""

from dataclasses import dataclass


@dataclass
class Clock:
    """A clock that goes when it is told to."""

    now: float = 100.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now
