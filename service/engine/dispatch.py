"""Which worker a request goes to: of those that have room, the one where it costs the least time.

Estimates are in *row calls*, one UNet row of the model's native size through one model call, and in *turns*.
Requests of one batch key share their steps; those of different keys take turns, so that a worker makes more steps,
each of fewer images, than if all were of one key. Each step more is a turn, and costs the part of a step that does
not grow with its rows, and a switch of weights. So a worker is done in

    remaining seconds = row calls * seconds per row call + turns * seconds per turn

A request adds row calls wherever it goes, and turns only among other keys. Its row calls delay the others there no
less elsewhere; its turns would be spared, and each of them is waited for by every request that is there. So they
count once for each: of workers about equally loaded, one that runs the request's key takes it, and the more so the
more are there. An idle worker has neither work nor turns, and wins.

Where all workers are busy, a place becomes free in one of them at a time, and there is no choice. Then a request
whose key runs in another worker lets those behind it go first that are of a key of this one (`is_patient`), as long
as the queue lets a request be overtaken at all; if there are none, it takes the place: none stays empty.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from service.engine.handle import Handle, expected_model_calls
from service.engine.pace import Pace
from service.messages import Ready, StepProgress, Ticked
from service.request import BatchKey


@dataclass(slots=True)
class _InFlight:
    handle: Handle
    key: BatchKey
    row_weight: float  # UNet rows, in rows of the native size.
    remaining_calls: int


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker has left.

    Attributes:
        num_requests: Requests with a model call left.
        row_calls: UNet rows of the native size times model calls.
        num_undenoised_images: Images of those requests.
        longest: Model calls left of the longest request of each key.
        num_turns: Steps beyond those that would be made if all requests were of one key.
    """

    num_requests: int
    row_calls: float
    num_undenoised_images: int
    longest: dict[BatchKey, int]
    num_turns: int


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
        self._pace = Pace(ready.step_seconds)
        self._in_flight: dict[str, _InFlight] = {}
        self._num_images = 0
        self._work: _Work | None = None  # None when it has changed since it was last asked for.

    @property
    def num_requests(self) -> int:
        """Requests in the worker, also those that are cancelled but not yet dropped."""
        return len(self._in_flight)

    @property
    def num_images(self) -> int:
        """Images of those."""
        return self._num_images

    @property
    def num_undenoised_images(self) -> int:
        """Images that take a place in the running batch, or will; the others are being decoded."""
        return self._remaining().num_undenoised_images

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
        return self._pace.seconds_per_row_call

    @property
    def remaining_seconds(self) -> float:
        """Estimated time until all it has is denoised, the turns of different keys included."""
        work = self._remaining()
        return work.row_calls * self._pace.seconds_per_row_call + work.num_turns * self._pace.turn_seconds

    def seconds_with(self, handle: Handle) -> float:
        """The same with this request, the turns that it adds counted once for each request that waits for them."""
        work, entry = self._remaining(), self._entry(handle)
        longest = work.longest | {entry.key: max(entry.remaining_calls, work.longest.get(entry.key, 0))}
        added = (_num_turns(longest) - work.num_turns) * (work.num_requests + 1)
        row_calls = work.row_calls + entry.remaining_calls * entry.row_weight
        return row_calls * self._pace.seconds_per_row_call + (work.num_turns + added) * self._pace.turn_seconds

    def runs(self, key: BatchKey) -> bool:
        """Whether requests of this key are still denoised, or will be."""
        return key in self._remaining().longest

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
        self._in_flight[handle.key] = self._entry(handle)
        self._num_images += handle.num_images
        self._work = None

    def progress(self, progress: StepProgress) -> Handle | None:
        """A request has done a step; None if it is not known."""
        entry = self._in_flight.get(progress.request_id)
        if entry is None:
            return None
        entry.remaining_calls = progress.steps - progress.step
        self._work = None
        return entry.handle

    def ticked(self, ticked: Ticked) -> None:
        """Follow the pace of the step that was reported."""
        self.num_running_images = ticked.images
        self.max_images = ticked.max_images
        entries = (self._in_flight.get(progress.request_id) for progress in ticked.progress)
        num_rows = sum(entry.row_weight for entry in entries if entry is not None)
        if num_rows > 0:
            self._pace.follow(num_rows, ticked.step_seconds)

    def remove(self, key: str) -> Handle | None:
        """The worker has answered, so its images are out of the batch; None if it is not known."""
        entry = self._in_flight.pop(key, None)
        if entry is not None:
            self._num_images -= entry.handle.num_images
            self._work = None
        if not self._in_flight:
            self.num_running_images = 0
        return None if entry is None else entry.handle

    def _entry(self, handle: Handle) -> _InFlight:
        params = handle.request.params
        row_weight = params.num_rows * params.height * params.width / self._native_size**2
        return _InFlight(handle, params.batch_key(handle.key), row_weight, expected_model_calls(params))

    def _remaining(self) -> _Work:
        if self._work is None:
            entries = [entry for entry in self._in_flight.values() if entry.remaining_calls > 0]
            longest: dict[BatchKey, int] = {}
            for entry in entries:
                longest[entry.key] = max(entry.remaining_calls, longest.get(entry.key, 0))
            self._work = _Work(
                num_requests=len(entries),
                row_calls=sum(entry.remaining_calls * entry.row_weight for entry in entries),
                num_undenoised_images=sum(entry.handle.num_images for entry in entries),
                longest=longest,
                num_turns=_num_turns(longest),
            )
        return self._work


def _num_turns(longest: dict[BatchKey, int]) -> int:
    return sum(longest.values()) - max(longest.values(), default=0)


class Dispatcher:
    """Chooses among ready workers; remembers whose turn it is among equals."""

    def __init__(self) -> None:
        self._num_chosen = 0

    def choose(self, handle: Handle, loads: Collection[Load], *, is_patient: bool = False) -> Load | None:
        """The worker that should take the request now; None if it has to wait.

        Suspects go to a worker one at a time. If one of them kills its worker
        again, the others of its batch have not been there to be lost twice.

        Args:
            handle: The request.
            loads: Of all ready workers.
            is_patient: Whether to wait for a worker that runs the request's key rather than to bring it among others.
        """
        candidates = [
            load for load in loads if load.has_room(handle.num_images) and not (handle.is_suspect and load.has_suspect)
        ]
        if not candidates or (is_patient and _is_better_placed_elsewhere(handle, candidates, loads)):
            return None
        chosen = min(candidates, key=lambda load: (load.seconds_with(handle), load.num_requests, load.last_chosen))
        self._num_chosen += 1
        chosen.last_chosen = self._num_chosen
        return chosen


def is_held(handle: Handle, loads: Iterable[Load]) -> bool:
    """Whether a suspect waits for other suspects, and not for room."""
    return handle.is_suspect and all(load.has_suspect for load in loads)


def _is_better_placed_elsewhere(handle: Handle, candidates: Iterable[Load], loads: Iterable[Load]) -> bool:
    """Whether those with room all run other keys alone, and one without room runs the request's."""
    key = handle.request.params.batch_key(handle.key)
    return not any(load.num_undenoised_images == 0 or load.runs(key) for load in candidates) and any(
        load.runs(key) for load in loads
    )
