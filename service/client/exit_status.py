"""What the exit status of `inpaint-service inpaint` says."""

from collections.abc import Iterable, Mapping
from enum import IntEnum


class ExitStatus(IntEnum):
    """A run's, and that of each picture of it."""

    PAINTED = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    FLAGGED = 4
    BUSY = 5
    INTERRUPTED = 130


MEANINGS: Mapping[ExitStatus, str] = {
    ExitStatus.PAINTED: "everything is painted",
    ExitStatus.FAILED: "the service failed or cannot be reached, or a result cannot be written",
    ExitStatus.USAGE: "the command line, or a file that it names, is wrong",
    ExitStatus.REFUSED: "the service refused a request (4xx), or there is no mask to a picture",
    ExitStatus.FLAGGED: "a result was flagged by the safety checker",
    ExitStatus.BUSY: "the service is overloaded or not ready, also after retries",
    ExitStatus.INTERRUPTED: "interrupted",
}

# What stops a run says more than what befell one picture.
_BY_WEIGHT = (
    ExitStatus.FAILED,
    ExitStatus.BUSY,
    ExitStatus.REFUSED,
    ExitStatus.FLAGGED,
    ExitStatus.PAINTED,
)


def heaviest(statuses: Iterable[ExitStatus]) -> ExitStatus:
    """The status of a run, from its pictures': of several kinds of failure the first in the order 1, 5, 3, 4."""
    return min(statuses, key=_BY_WEIGHT.index, default=ExitStatus.PAINTED)
