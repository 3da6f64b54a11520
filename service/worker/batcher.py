"""Which requests are denoised together, and whose turn it is.

Vocabulary: a *generation* is one request on this worker; generations with the
same `BatchKey` can share a UNet call; the *running* ones of a key are a batch.
Batches of different keys take turns, one step each. Nothing here touches a
tensor.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from service.request import FreeU, InpaintRequest, IpAdapterUse, LoraUse


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What must be equal for images to share a UNet call.

    Attributes:
        height: Working height in pixels.
        width: Working width in pixels.
        solo: The id of a request that asked for a batch of its own, else None.
        loras: What is merged into the weights.
        freeu: What the UNet's skip connections are weighted with.
        ip_adapter: How much the UNet heeds pictures, and of how many tokens.
    """

    height: int
    width: int
    solo: str | None = None
    loras: tuple[LoraUse, ...] = ()
    freeu: FreeU | None = None
    ip_adapter: IpAdapterUse | None = None


@dataclass(slots=True, eq=False)
class Generation:
    """One request on this worker, from its arrival to its answer.

    Attributes:
        request_id: The id under which it is reported.
        request: What was asked.
        latents: What the pipeline keeps for it between steps; opaque here.
        steps_done: Model calls so far.
        steps: Model calls in all, known once prepared.
        prepare_started_at: `time.monotonic()` when its turn came.
        prepared_at: When its first step could begin.
        first_step_at: When its first step was done.
        denoised_at: When its last step was done.
        shared_images: Sum over its steps of the images that shared them.
    """

    request_id: str
    request: InpaintRequest
    latents: Any = None
    steps_done: int = 0
    steps: int = 0
    prepare_started_at: float = 0.0
    prepared_at: float = 0.0
    first_step_at: float = 0.0
    denoised_at: float = 0.0
    shared_images: int = 0
    key: BatchKey = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.params
        solo = self.request_id if params.batching == "solo" else None
        self.key = BatchKey(params.height, params.width, solo, params.loras, params.freeu, params.ip_adapter)

    @property
    def num_images(self) -> int:
        """Images that it contributes to a batch."""
        return self.request.params.num_images_per_prompt

    @property
    def is_denoised(self) -> bool:
        """Whether its last step is done."""
        return self.steps_done >= self.steps


class Batcher:
    """Waiting and running generations of one worker.

    Args:
        max_images: Images that may run at once, over all keys. A request with
            more runs when nothing else does.
        max_overtaken_seconds: How long the oldest waiting request may be
            overtaken by smaller ones; after that room is kept free for it.
    """

    def __init__(self, max_images: int, max_overtaken_seconds: float = 2.0) -> None:
        self.max_images = max_images
        self.max_overtaken_seconds = max_overtaken_seconds
        self.waiting: deque[Generation] = deque()
        self.running: dict[BatchKey, list[Generation]] = {}

    @property
    def num_running_images(self) -> int:
        """Images in all running batches."""
        return sum(generation.num_images for batch in self.running.values() for generation in batch)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, generation: Generation) -> None:
        """Queue a request that has just arrived."""
        self.waiting.append(generation)

    def admit(self, now: float) -> list[Generation]:
        """Take the waiting generations that fit beside the running ones, oldest first.

        A generation that does not fit is looked past, so that a large request
        does not leave the device idle, but not for ever.

        Args:
            now: `time.monotonic()`.
        """
        free = self.max_images - self.num_running_images
        is_empty = not self.running
        admitted: list[Generation] = []
        passed: list[Generation] = []
        while self.waiting:
            generation = self.waiting.popleft()
            if generation.num_images <= free or (is_empty and not admitted):
                admitted.append(generation)
                free -= generation.num_images
                continue
            passed.append(generation)
            if now - generation.request.admitted_at > self.max_overtaken_seconds:
                break
        self.waiting.extendleft(reversed(passed))
        return admitted

    def start(self, generation: Generation) -> None:
        """Let a prepared generation join the running batch of its key."""
        self.running.setdefault(generation.key, []).append(generation)

    def next_batch(self) -> list[Generation]:
        """The batch whose turn it is; empty when nothing runs."""
        if not self.running:
            return []
        key = next(iter(self.running))
        batch = self.running.pop(key)
        self.running[key] = batch  # To the back of the line.
        return list(batch)

    def remove(self, generation: Generation) -> None:
        """Forget a generation wherever it is."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        batch = self.running.get(generation.key, [])
        if generation in batch:
            batch.remove(generation)
            if not batch:
                del self.running[generation.key]

    def all(self) -> list[Generation]:
        """Every generation, running ones first."""
        return [generation for batch in self.running.values() for generation in batch] + list(self.waiting)

    def find(self, request_id: str) -> Generation | None:
        """The generation with this id, if it is here."""
        return next((generation for generation in self.all() if generation.request_id == request_id), None)
