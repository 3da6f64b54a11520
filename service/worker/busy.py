"""How busy a worker is."""

import time
from collections import deque


class BusyClock:
    """Share of the last seconds spent inside `with`, for `inpaint_gpu_busy_ratio`.

    Asked after every step, so it keeps count: how many spans the window holds makes no difference.

    Args:
        window_seconds: How far back it looks.
    """

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._spans: deque[tuple[float, float]] = deque()
        self._spans_seconds = 0.0  # Of all spans together.
        self._started_at = time.monotonic()
        self._entered_at = self._started_at

    def __enter__(self) -> None:
        self._entered_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._spans.append((self._entered_at, now))
        self._spans_seconds += now - self._entered_at

    def ratio(self) -> float:
        """Busy share of the window up to now, 0 to 1; the span that is open counts."""
        now = time.monotonic()
        since = max(self._started_at, now - self._window_seconds)
        while self._spans and self._spans[0][1] < since:
            start, end = self._spans.popleft()
            self._spans_seconds -= end - start
        if not self._spans:
            self._spans_seconds = 0.0  # Whatever rounding has left.
        before = max(0.0, since - self._spans[0][0]) if self._spans else 0.0
        busy = self._spans_seconds - before + (now - max(self._entered_at, since))
        return min(1.0, busy / (now - since)) if now > since else 0.0
