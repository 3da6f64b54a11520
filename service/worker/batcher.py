"""Which requests are denoised together, and whose turn it is.

Vocabulary: a *generation* is one request on this worker; generations with the
same `BatchKey` can share a UNet call; the *running* ones of a key are a batch.
Batches of different keys take turns, one step each. Nothing here touches a
tensor.

A generation is in one stage at a time: waiting → preparing → prepared (until
there is room) → running → finishing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from service.request import BatchKey, InpaintRequest


@dataclass(slots=True, eq=False)
class Generation:
    """One request on this worker, from its arrival to its answer.

    Attributes:
        request_id: The id under which it is reported.
        request: What was asked.
        latents: What the pipeline keeps for it between steps; opaque here.
        num_readers: Background jobs that may read `latents`.
        steps_done: Model calls so far.
        steps: Model calls in all, known once prepared.
        prepare_started_at: `time.monotonic()` when its preparation began.
        prepared_at: When its first step could begin.
        joined_at: When there was room for it in the running batch.
        first_step_at: When its first step was done.
        denoised_at: When its last step was done.
        shared_images: Sum over its steps of the images that shared them.
    """

    request_id: str
    request: InpaintRequest
    latents: Any = None
    num_readers: int = 0
    steps_done: int = 0
    steps: int = 0
    prepare_started_at: float = 0.0
    prepared_at: float = 0.0
    joined_at: float = 0.0
    first_step_at: float = 0.0
    denoised_at: float = 0.0
    shared_images: int = 0
    key: BatchKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.request.params.batch_key(self.request_id)

    @property
    def num_images(self) -> int:
        """Images that it contributes to a batch."""
        return self.request.params.num_images_per_prompt

    @property
    def is_denoised(self) -> bool:
        """Whether its last step is done."""
        return self.steps_done >= self.steps


class Batcher:
    """Every generation of one worker, by stage.

    Args:
        max_images: Images that may run at once, over all keys. A request with
            more runs when nothing else does.
        max_overtaken_seconds: How long the oldest request that waits may be
            overtaken by smaller ones; after that room is kept free for it.
    """

    def __init__(self, max_images: int, max_overtaken_seconds: float = 2.0) -> None:
        self.max_images = max_images
        self.max_overtaken_seconds = max_overtaken_seconds
        self.waiting: list[Generation] = []
        self.preparing: list[Generation] = []
        self.prepared: list[Generation] = []
        self.running: dict[BatchKey, list[Generation]] = {}
        self.finishing: list[Generation] = []

    @property
    def num_running_images(self) -> int:
        """Images in all running batches."""
        return sum(generation.num_images for generation in self._all_running())

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing in any stage."""
        return not self.all()

    @property
    def is_stuck(self) -> bool:
        """Whether nothing can run or be admitted before a job ends or a request arrives."""
        return not self.running and not self.prepared and bool(self.preparing or not self.waiting)

    def add(self, generation: Generation) -> None:
        """Queue a request that has just arrived."""
        self.waiting.append(generation)

    def admit(self, now: float, *, is_ahead: bool = False) -> list[Generation]:
        """Let the waiting generations that fit be prepared, oldest first.

        A generation that does not fit is looked past, so that a large request
        does not leave the device idle, but not for ever.

        Args:
            now: `time.monotonic()`.
            is_ahead: Whether to prepare more than may run, so that a place that becomes free
                is filled at once: as many as the service keeps in flight beyond `max_images`.
        """
        admitted_before = [*self.preparing, *self.prepared, *self._all_running()]
        max_images = self.max_images + (max(1, self.max_images // 4) if is_ahead else 0)
        admitted = self._fitting(self.waiting, max_images, admitted_before, now)
        for generation in admitted:
            self.waiting.remove(generation)
        self.preparing += admitted
        return admitted

    def keep(self, generation: Generation) -> None:
        """It is prepared, and waits for room."""
        self.preparing.remove(generation)
        self.prepared.append(generation)

    def join(self, now: float) -> list[Generation]:
        """Let the prepared generations that fit join the running batches of their keys, oldest first.

        As in `admit`, one that does not fit is looked past, but not for ever.

        Args:
            now: `time.monotonic()`.
        """
        # Those of one key are prepared together, so they may have been prepared before older ones of another.
        self.prepared.sort(key=lambda generation: generation.request.admitted_at)
        joining = self._fitting(self.prepared, self.max_images, self._all_running(), now)
        for generation in joining:
            self.prepared.remove(generation)
            self.running.setdefault(generation.key, []).append(generation)
        return joining

    def next_batch(self) -> list[Generation]:
        """The batch whose turn it is; empty when nothing runs."""
        if not self.running:
            return []
        key = next(iter(self.running))
        batch = self.running.pop(key)
        self.running[key] = batch  # To the back of the line.
        return list(batch)

    def retire(self, generation: Generation) -> None:
        """It has left the running batch, and is made into pictures."""
        self.remove(generation)
        self.finishing.append(generation)

    def remove(self, generation: Generation) -> None:
        """Forget a generation wherever it is."""
        for stage in (self.waiting, self.preparing, self.prepared, self.finishing):
            if generation in stage:
                stage.remove(generation)
        batch = self.running.get(generation.key, [])
        if generation in batch:
            batch.remove(generation)
            if not batch:
                del self.running[generation.key]

    def has(self, generation: Generation) -> bool:
        """Whether it is in any stage: it has not been answered."""
        return generation in self.all()

    def all(self) -> list[Generation]:
        """Every generation, those nearest to their end first."""
        return [*self.finishing, *self._all_running(), *self.prepared, *self.preparing, *self.waiting]

    def find(self, request_id: str) -> Generation | None:
        """The generation with this id, if it is here."""
        return next((generation for generation in self.all() if generation.request_id == request_id), None)

    def _all_running(self) -> list[Generation]:
        return [generation for batch in self.running.values() for generation in batch]

    def _fitting(
        self, queue: Iterable[Generation], max_images: int, present: Iterable[Generation], now: float
    ) -> list[Generation]:
        """Those of the queue that fit beside those present; where there are none, the first one always does."""
        num_present = sum(generation.num_images for generation in present)
        free = max_images - num_present
        is_alone = num_present == 0
        fitting: list[Generation] = []
        for generation in queue:
            if generation.num_images <= free or (is_alone and not fitting):
                fitting.append(generation)
                free -= generation.num_images
            elif now - generation.request.admitted_at > self.max_overtaken_seconds:
                break
        return fitting
