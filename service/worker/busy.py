"""How busy a worker is."""

import time
from collections import deque


class BusyClock:
    """Share of the last seconds spent inside `with`, for `inpaint_gpu_busy_ratio`.

    Args:
        window_seconds: How far back it looks.
    """

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._spans: deque[tuple[float, float]] = deque()
        self._started_at = time.monotonic()
        self._entered_at = self._started_at

    def __enter__(self) -> None:
        self._entered_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._entered_at, time.monotonic()))

    def ratio(self) -> float:
        """Busy share of the window up to now, 0 to 1; the span that is open counts."""
        now = time.monotonic()
        since = max(self._started_at, now - self._window_seconds)
        while self._spans and self._spans[0][1] < since:
            self._spans.popleft()
        busy = sum(end - max(start, since) for start, end in self._spans) + (now - max(self._entered_at, since))
        return min(1.0, busy / (now - since)) if now > since else 0.0
