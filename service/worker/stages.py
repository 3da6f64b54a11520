"""What the loop asks of the tensor work: the stages that a generation goes through on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.errors import InpaintError
from service.messages import LoraInfo
from service.request import Floats, Pixels
from service.worker.batcher import Generation


@dataclass(frozen=True, slots=True)
class Finish:
    """What `Pipeline.finish` made of one generation.

    Attributes:
        images: As in `InpaintResult`.
        nsfw: One flag per image.
        decode_started_at: `time.monotonic()` when the decode that it shared began.
        decoded_at: When that was done, and the safety check that it shared began.
        checked_at: When the safety check was done.
    """

    images: Pixels | Floats
    nsfw: tuple[bool, ...]
    decode_started_at: float
    decoded_at: float
    checked_at: float


class Pipeline(Protocol):
    """The tensor work. `prepare`, `step`, `finish` and `preview` take generations of one batch key.

    They raise `BatchTooLarge` or `DeviceLost` for what those say, and otherwise
    leave every generation as it was before the call, so that a smaller batch
    can try again. `finish` reports the fault of one generation in its place.

    On a CUDA device three threads call them at the same time, none of which
    need be the one that loaded the model: `prepare` has one thread; `finish`
    and `preview` share another; everything else is called by the loop's. A
    generation is prepared before it is first stepped, and finished after its
    last step was asked for.
    """

    def prepare(self, generations: Sequence[Generation]) -> None:
        """Encode text and pictures, draw noise; sets `latents` and `steps`."""

    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every image by one model call. The device need not be done with it on return."""

    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """Decode, check, and give back pictures."""

    def preview(self, generations: Sequence[Generation]) -> list[Pixels | None]:
        """What each may become, where there is something to show. May run while they are stepped or after."""

    def inspect_lora(self, path: str) -> LoraInfo:
        """What a file is as a LoRA of this model."""

    def memory_bytes(self) -> dict[str, int]:
        """Device memory by kind."""
