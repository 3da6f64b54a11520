"""How busy a worker is, over a window."""

import pytest

from service.worker import busy
from service.worker.busy import BusyClock


class Clock:
    """Time that is set."""

    now = 100.0

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the real one."""
    clock = Clock()
    monkeypatch.setattr(busy, "time", clock)
    return clock


def test_share_of_the_window(clock: Clock) -> None:
    """Of the last seconds it is the share within spans: those before do not count, one that reaches in does in part."""
    busy_clock = BusyClock(10.0)
    for _ in range(100):  # One second in four, over 400 s.
        with busy_clock:
            clock.now += 1.0
        clock.now += 3.0
    with busy_clock:  # Before it, the window holds a whole span and half of one.
        clock.now += 2.5
        assert busy_clock.ratio() == pytest.approx((0.5 + 1.0 + 2.5) / 10.0)
        clock.now += 50.0
        assert busy_clock.ratio() == 1.0


def test_a_young_worker_is_measured_since_its_start(clock: Clock) -> None:
    """Before the window is full the share is that of the time since the start; at once it is 0."""
    busy_clock = BusyClock(10.0)
    assert busy_clock.ratio() == 0.0
    clock.now += 3.0
    with busy_clock:
        clock.now += 1.0
        assert busy_clock.ratio() == pytest.approx(0.25)
