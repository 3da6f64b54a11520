"""The bounded queue of admitted requests that wait for a worker, and when refused ones should come back."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import TypeVar

from service.engine.handle import Handle, expected_model_calls

_T = TypeVar("_T")

MIN_RETRY_AFTER_SECONDS = 1
MAX_RETRY_AFTER_SECONDS = 300

# How many requests behind a large one are tried in its stead, so that a long
# queue does not cost the event loop a long search.
_MAX_LOOK_PAST = 32


class WaitingQueue:
    """First in, first out, but a request that fits no worker now does not block smaller ones behind it.

    Args:
        max_size: Requests that may wait. Those that a lost worker gives back do not count.
        max_overtaken_seconds: After this age a request is no longer overtaken, so that room for it comes about.
    """

    def __init__(self, max_size: int, max_overtaken_seconds: float = 2.0) -> None:
        self.max_size = max_size
        self.max_overtaken_seconds = max_overtaken_seconds
        self._waiting: OrderedDict[str, Handle] = OrderedDict()
        self._num_pixel_calls = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether a new request has to be refused."""
        return len(self._waiting) >= self.max_size

    def append(self, handle: Handle) -> None:
        """Admit a request."""
        self._waiting[handle.key] = handle
        self._num_pixel_calls += _pixel_calls(handle)

    def put_back(self, handles: Sequence[Handle]) -> None:
        """Put requests that a worker was lost with at the head, in their order."""
        for handle in reversed(handles):
            self.append(handle)
            self._waiting.move_to_end(handle.key, last=False)

    def remove(self, handle: Handle) -> bool:
        """Take a request out; False if it does not wait."""
        if self._waiting.pop(handle.key, None) is None:
            return False
        self._num_pixel_calls -= _pixel_calls(handle)
        return True

    def position(self, handle: Handle) -> int | None:
        """Number of requests before it; None if it does not wait."""
        if handle.key not in self._waiting:
            return None
        return next(place for place, key in enumerate(self._waiting) if key == handle.key)

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
        for handle in self._waiting.values():
            chosen = choose(handle)
            if chosen is not None:
                self.remove(handle)
                return handle, chosen
            if is_held(handle):
                continue
            num_passed += 1
            if num_passed > _MAX_LOOK_PAST or handle.age_seconds > self.max_overtaken_seconds:
                return None
        return None

    def num_row_calls(self, native_size: int) -> float:
        """Estimated work of all who wait, in UNet rows of `native_size` times model calls."""
        return self._num_pixel_calls / native_size**2


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
