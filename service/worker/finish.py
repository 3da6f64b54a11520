"""From latents to checked pictures: the last steps of `StableDiffusionInpaintPipeline.__call__`, batched."""

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from service.errors import ErrorCode, InpaintError
from service.request import NsfwPolicy, Pixels
from service.worker.checkpoint import Components
from service.worker.loop import Finish
from service.worker.safety import SafetyCheck
from service.worker.slots import Slot

logger = logging.getLogger(__name__)

MAX_DECODE_BATCH = 8


class Finisher:
    """Decodes latents, checks pictures and blackens what is flagged.

    Args:
        components: The loaded checkpoint.
        nsfw_policy: Only "black" changes pictures here; the others are rendered later.
    """

    def __init__(self, components: Components, nsfw_policy: NsfwPolicy) -> None:
        self._components = components
        self._nsfw_policy = nsfw_policy
        checker = components.safety_checker
        self._safety = None if checker is None else SafetyCheck(checker, components.feature_extractor)

    def finish(self, generations: Sequence[Sequence[Slot]]) -> list[Finish | InpaintError]:
        """Pictures of each request, or why it has none; times are of the batch that it shared.

        Args:
            generations: The slots of each request, all of one working size.
        """
        results: dict[int, Finish | InpaintError] = {}
        sound: list[int] = []
        for index, slots in enumerate(generations):
            if all(bool(torch.isfinite(slot.latents).all()) for slot in slots):
                sound.append(index)
            else:
                results[index] = InpaintError(ErrorCode.NAN_OUTPUT, "The model's output was not a number.")

        started_at = time.monotonic()
        decoded = self._decode([slot for index in sound for slot in generations[index]])
        decoded_at = time.monotonic()
        pictures: dict[int, list[Pixels]] = {}
        for index in sound:
            own, decoded = decoded[: len(generations[index])], decoded[len(generations[index]) :]
            if any(picture is None for picture in own):
                results[index] = InpaintError(ErrorCode.NAN_OUTPUT, "The decoder's output was not a number.")
            else:
                pictures[index] = [picture for picture in own if picture is not None]
        checked = self._check(pictures)
        safety_seconds = time.monotonic() - decoded_at
        for index, flags in checked.items():
            if isinstance(flags, InpaintError):
                results[index] = flags
                continue
            images = np.stack(pictures[index])
            if self._nsfw_policy == "black":
                images[np.array(flags)] = 0
            results[index] = Finish(images, flags, decoded_at - started_at, safety_seconds)
        return [results[index] for index in range(len(generations))]

    def _decode(self, slots: Sequence[Slot]) -> list[Pixels | None]:
        """(H, W, 3) uint8 pictures; None where the decoder's output is not finite."""
        components = self._components
        pictures: list[Pixels | None] = []
        for first in range(0, len(slots), MAX_DECODE_BATCH):
            latents = torch.stack([slot.latents for slot in slots[first : first + MAX_DECODE_BATCH]])
            latents = latents.to(components.dtype) / components.vae.config.scaling_factor
            decoded = components.vae.decode(latents, return_dict=False)[0]
            is_finite = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
            images = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
            for image, is_sound in zip(images, is_finite, strict=True):
                pictures.append((image * 255).round().astype(np.uint8) if is_sound else None)
        return pictures

    def _check(self, pictures: dict[int, list[Pixels]]) -> dict[int, tuple[bool, ...] | InpaintError]:
        """Flags of each request's pictures; a batch that fails is checked request by request."""
        if self._safety is None:
            return {index: (False,) * len(own) for index, own in pictures.items()}
        try:
            flags = iter(self._safety.verdicts([picture for own in pictures.values() for picture in own]))
            return {index: tuple(next(flags) for _ in own) for index, own in pictures.items()}
        except InpaintError as error:
            logger.exception("the safety checker failed")
            if len(pictures) == 1:
                return dict.fromkeys(pictures, error)
            return {index: self._check({index: own})[index] for index, own in pictures.items()}
