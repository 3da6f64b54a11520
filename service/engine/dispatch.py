"""Which worker a request goes to: the one with the least remaining work that has room.

Estimates are in *row calls*: one UNet row of the model's native size through
one model call. A worker's pace, seconds per row call, is measured at warm-up
and follows every step it reports.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from service.engine.handle import Handle, expected_model_calls
from service.messages import Ready, StepProgress, Ticked

# Weight of the newest step in the pace: about the last ten steps count.
_PACE_SMOOTHING = 0.1


@dataclass(slots=True)
class _InFlight:
    handle: Handle
    row_weight: float  # UNet rows, in rows of the native size.
    remaining_calls: int


class Load:
    """What one ready worker has to do.

    Args:
        ready: The worker's own report.
    """

    def __init__(self, ready: Ready) -> None:
        self.max_images = ready.max_images
        self.num_running_images = 0
        self.last_chosen = 0
        self._native_size = ready.model.native_size
        self._seconds_per_row_call = min(
            (seconds / rows for rows, seconds in ready.step_seconds.items() if seconds > 0), default=1.0
        )
        self._in_flight: dict[str, _InFlight] = {}

    @property
    def num_requests(self) -> int:
        """Requests in the worker, also those that are cancelled but not yet dropped."""
        return len(self._in_flight)

    @property
    def num_images(self) -> int:
        """Images of those."""
        return sum(entry.handle.num_images for entry in self._in_flight.values())

    @property
    def num_undenoised_images(self) -> int:
        """Images that take a place in the running batch, or will; the others are being decoded."""
        return sum(entry.handle.num_images for entry in self._in_flight.values() if entry.remaining_calls > 0)

    @property
    def max_undenoised_images(self) -> int:
        """A few more than may run: the next request is already prepared when a place becomes free."""
        return self.max_images + max(1, self.max_images // 4)

    @property
    def has_suspect(self) -> bool:
        """Whether one of them was in a worker that died."""
        return any(entry.handle.is_suspect for entry in self._in_flight.values())

    @property
    def seconds_per_row_call(self) -> float:
        """The measured pace."""
        return self._seconds_per_row_call

    @property
    def remaining_seconds(self) -> float:
        """Estimated work left."""
        row_calls = sum(entry.remaining_calls * entry.row_weight for entry in self._in_flight.values())
        return row_calls * self._seconds_per_row_call

    def has_room(self, num_images: int) -> bool:
        """Whether so many images may be sent; an idle worker takes any number."""
        if not self._in_flight:
            return True
        # Where decoding falls behind, no more is sent either.
        return (
            self.num_undenoised_images + num_images <= self.max_undenoised_images
            and self.num_images + num_images <= self.max_undenoised_images + self.max_images
        )

    def has(self, handle: Handle) -> bool:
        """Whether the request is in the worker."""
        return handle.key in self._in_flight

    def handles(self) -> list[Handle]:
        """The requests in the worker, in the order they were sent."""
        return [entry.handle for entry in self._in_flight.values()]

    def add(self, handle: Handle) -> None:
        """A request was sent to the worker."""
        params = handle.request.params
        row_weight = params.num_rows * params.height * params.width / self._native_size**2
        self._in_flight[handle.key] = _InFlight(handle, row_weight, expected_model_calls(params))

    def progress(self, progress: StepProgress) -> Handle | None:
        """A request has done a step; None if it is not known."""
        entry = self._in_flight.get(progress.request_id)
        if entry is None:
            return None
        entry.remaining_calls = progress.steps - progress.step
        return entry.handle

    def ticked(self, ticked: Ticked) -> None:
        """Follow the pace of the step that was reported."""
        self.num_running_images = ticked.images
        self.max_images = ticked.max_images
        entries = (self._in_flight.get(progress.request_id) for progress in ticked.progress)
        num_row_calls = sum(entry.row_weight for entry in entries if entry is not None)
        if num_row_calls > 0:
            newest = ticked.step_seconds / num_row_calls
            self._seconds_per_row_call += _PACE_SMOOTHING * (newest - self._seconds_per_row_call)

    def remove(self, key: str) -> Handle | None:
        """The worker has answered, so its images are out of the batch; None if it is not known."""
        entry = self._in_flight.pop(key, None)
        if not self._in_flight:
            self.num_running_images = 0
        return None if entry is None else entry.handle


class Dispatcher:
    """Chooses among ready workers; remembers whose turn it is among equals."""

    def __init__(self) -> None:
        self._num_chosen = 0

    def choose(self, handle: Handle, loads: Iterable[Load]) -> Load | None:
        """The worker that should take the request now; None if it has to wait.

        Suspects go to a worker one at a time. If one of them kills its worker
        again, the others of its batch have not been there to be lost twice.
        """
        candidates = [
            load for load in loads if load.has_room(handle.num_images) and not (handle.is_suspect and load.has_suspect)
        ]
        if not candidates:
            return None
        chosen = min(candidates, key=lambda load: (load.remaining_seconds, load.num_requests, load.last_chosen))
        self._num_chosen += 1
        chosen.last_chosen = self._num_chosen
        return chosen


def is_held(handle: Handle, loads: Iterable[Load]) -> bool:
    """Whether a suspect waits for other suspects, and not for room."""
    return handle.is_suspect and all(load.has_suspect for load in loads)
