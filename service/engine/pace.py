"""How fast a worker steps: as measured at warm-up, and how much slower or faster it has been lately."""

from collections.abc import Mapping

# Weight of the newest step: about the last ten steps count.
_SMOOTHING = 0.1

# LoRAs that take turns cost 0.2 to 1.1 ms a switch where the smallest step took 6 ms, and other keys rarely less.
_SWITCH_SHARE = 0.1


class Pace:
    """Of one worker.

    Steps of few rows are slow for their rows, so a step is compared with what one of as many rows took at warm-up:
    a worker does not count as slow for having had little to do.

    Args:
        step_seconds: Seconds of one step by UNet rows of the native size, measured at warm-up.
    """

    def __init__(self, step_seconds: Mapping[int, float]) -> None:
        self._known = sorted((rows, seconds) for rows, seconds in step_seconds.items() if seconds > 0) or [(1, 1.0)]
        self._best = min(seconds / rows for rows, seconds in self._known)
        fewest, seconds = self._known[0]
        self._turn = seconds - fewest * self._best + _SWITCH_SHARE * seconds
        self._slowness = 1.0

    @property
    def seconds_per_row_call(self) -> float:
        """Of one UNet row of the native size through one model call, in batches that make best use of the device."""
        return self._best * self._slowness

    @property
    def turn_seconds(self) -> float:
        """What one more step costs beside its rows: the part of a step that does not grow with them, and a switch."""
        return self._turn * self._slowness

    def follow(self, num_rows: float, step_seconds: float) -> None:
        """A step was measured.

        Args:
            num_rows: UNet rows, in rows of the native size; more than 0.
            step_seconds: What it took.
        """
        self._slowness += _SMOOTHING * (step_seconds / self._expected(num_rows) - self._slowness)

    def _expected(self, num_rows: float) -> float:
        """Seconds at warm-up: linear between what was measured, proportional beyond."""
        rows, seconds = self._known[0]
        if num_rows <= rows:
            return seconds
        for more_rows, more_seconds in self._known[1:]:
            if num_rows <= more_rows:
                return seconds + (more_seconds - seconds) * (num_rows - rows) / (more_rows - rows)
            rows, seconds = more_rows, more_seconds
        return seconds * num_rows / rows
