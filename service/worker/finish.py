"""From latents to checked pictures: the last steps of `StableDiffusionInpaintPipeline.__call__`, batched."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from service.errors import ErrorCode, InpaintError
from service.request import Floats, NsfwPolicy, Output, Pixels
from service.worker.autoencoder import MAX_BATCH, Autoencoder
from service.worker.checkpoint import Components
from service.worker.device_errors import is_out_of_memory
from service.worker.safety import SafetyCheck
from service.worker.slots import Slot
from service.worker.stages import Finish
from service.worker.streams import note_use

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Decoded:
    """One picture from the decoder.

    Attributes:
        pixels: (H, W, 3) uint8, where they were computed: that is where they are checked.
        floats: (H, W, 3) float32 from 0 to 1, where they are asked for.
    """

    pixels: torch.Tensor
    floats: Floats | None


class Finisher:
    """Decodes latents, checks pictures and blackens what is flagged.

    Args:
        components: The loaded checkpoint.
        autoencoder: Its VAE.
        nsfw_policy: Only "black" changes pictures here; the others are rendered later.
    """

    def __init__(self, components: Components, autoencoder: Autoencoder, nsfw_policy: NsfwPolicy) -> None:
        self._components = components
        self._autoencoder = autoencoder
        self._nsfw_policy = nsfw_policy
        checker = components.safety_checker
        self._safety = None if checker is None else SafetyCheck(checker, components.feature_extractor)

    def capture_safety_checker(self) -> None:
        """Have pictures checked by a captured graph from now on, where they are; see `SafetyCheck.capture`."""
        if self._safety is not None:
            self._safety.capture()

    def finish(self, generations: Sequence[Sequence[Slot]], outputs: Sequence[Output]) -> list[Finish | InpaintError]:
        """Pictures of each request, or why it has none; times are of the batch that it shared.

        Latents are decoded and checked like pictures, though they are answered as they are: whoever has
        them has the picture.

        Args:
            generations: The slots of each request, all of one working size.
            outputs: What each request asked for.
        """
        results: dict[int, Finish | InpaintError] = {}
        sound: list[int] = []
        is_finite = _are_finite(torch.stack([slot.latents for slots in generations for slot in slots]))
        for index, slots in enumerate(generations):
            of_slots, is_finite = is_finite[: len(slots)], is_finite[len(slots) :]
            if all(of_slots):
                sound.append(index)
            else:
                results[index] = InpaintError(ErrorCode.NAN_OUTPUT, "The model's output was not a number.")

        started_at = time.monotonic()
        decoded = self._decode(
            [slot for index in sound for slot in generations[index]],
            [outputs[index] == "floats" for index in sound for _ in generations[index]],
        )
        decoded_at = time.monotonic()
        pictures: dict[int, list[_Decoded]] = {}
        for index in sound:
            own, decoded = decoded[: len(generations[index])], decoded[len(generations[index]) :]
            if any(picture is None for picture in own):
                results[index] = InpaintError(ErrorCode.NAN_OUTPUT, "The decoder's output was not a number.")
            else:
                pictures[index] = [picture for picture in own if picture is not None]
        checked = self._check({index: [picture.pixels for picture in own] for index, own in pictures.items()})
        checked_at = time.monotonic()
        for index, flags in checked.items():
            if isinstance(flags, InpaintError):
                results[index] = flags
                continue
            images = _images(generations[index], pictures[index], outputs[index])
            if self._nsfw_policy == "black":
                images[np.array(flags)] = 0
            results[index] = Finish(images, flags, started_at, decoded_at, checked_at)
        return [results[index] for index in range(len(generations))]

    def preview(self, slots: Sequence[Slot]) -> list[Pixels | None]:
        """(H, W, 3) uint8 of the finished pictures as the latest step guesses them.

        None where there is no guess yet, or the safety checker does not let it pass.
        """
        estimates = [self._estimate(slot) for slot in slots]
        guessed = [index for index, estimate in enumerate(estimates) if estimate is not None]
        decoded = self._decode_latents(
            [slots[index] for index in guessed],
            [estimate for estimate in estimates if estimate is not None],
            [False] * len(guessed),
        )
        sound = {index: [picture.pixels] for index, picture in zip(guessed, decoded, strict=True) if picture}
        flags = self._check(sound)
        return [
            sound[index][0].cpu().numpy() if index in sound and flags[index] == (False,) else None
            for index in range(len(slots))
        ]

    def _estimate(self, slot: Slot) -> torch.Tensor | None:
        """(C, h, w) latents x0 that the UNet's output points to; None where the noise level is not known.

        With x = a x0 + b ε, brought to a² + b² = 1: x0 = (x - b ε) / a, or a x - b v (Salimans and Ho,
        "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D).
        """
        estimate = slot.estimate
        if estimate is None or estimate.call == 0:
            return None
        note_use((estimate.latents, estimate.output))  # The next step may replace it while this is computed.
        if self._prediction_type == "sample":
            return estimate.output
        image_scale, noise_scale = slot.plan.renoise[estimate.call - 1].tolist()
        norm = math.hypot(image_scale, noise_scale)
        image_scale, noise_scale = image_scale / norm, noise_scale / norm
        latents = estimate.latents / norm
        if self._prediction_type == "v_prediction":
            guess: torch.Tensor = image_scale * latents - noise_scale * estimate.output
        else:
            guess = (latents - noise_scale * estimate.output) / image_scale
        return guess

    @property
    def _prediction_type(self) -> str:
        return str(self._components.scheduler.config.prediction_type)

    def _decode(self, slots: Sequence[Slot], keeps_floats: Sequence[bool]) -> list[_Decoded | None]:
        """Pictures of finished latents; None where the decoder's output is not finite, not in float32 either."""
        pictures = self._decode_latents(slots, [slot.latents for slot in slots], keeps_floats)
        unsound = [index for index, picture in enumerate(pictures) if picture is None]
        if unsound and self._components.dtype is not torch.float32:
            logger.warning("the decoder's output was not a number: %d pictures are decoded in float32", len(unsound))
            again = self._decode_in_float32([slots[index] for index in unsound], [keeps_floats[i] for i in unsound])
            for index, picture in zip(unsound, again, strict=True):
                pictures[index] = picture
        return pictures

    def _decode_latents(
        self, slots: Sequence[Slot], latents: Sequence[torch.Tensor], keeps_floats: Sequence[bool]
    ) -> list[_Decoded | None]:
        pictures: list[_Decoded | None] = []
        for first in range(0, len(slots), MAX_BATCH):
            batch = slice(first, first + MAX_BATCH)
            decoded = self._decode_batch(self._autoencoder, slots[batch], latents[batch], self._components.dtype)
            pictures += _pictures(decoded, keeps_floats[batch])
        return pictures

    def _decode_in_float32(self, slots: Sequence[Slot], keeps_floats: Sequence[bool]) -> list[_Decoded | None]:
        """The same, one by one, with a decoder that is gone afterwards; None also where there is no room for it.

        What lacks the memory is its own failure: the batch that it shared is not tried again.
        """
        pictures: list[_Decoded | None] = [None] * len(slots)
        try:
            autoencoder = self._autoencoder.in_float32()
            for index, slot in enumerate(slots):
                decoded = self._decode_batch(autoencoder, [slot], [slot.latents], torch.float32)
                (pictures[index],) = _pictures(decoded, [keeps_floats[index]])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no memory to decode in float32: %s", error)
        return pictures

    def _decode_batch(
        self, autoencoder: Autoencoder, slots: Sequence[Slot], latents: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """(N, 3, H, W) from -1 to 1 where all goes well."""
        stacked = torch.stack(list(latents)).to(dtype) / self._components.vae.config.scaling_factor
        return autoencoder.decode(stacked, self._conditions(slots, dtype))

    def _conditions(self, slots: Sequence[Slot], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What the decoder looks at beside the latents, for those that do (`AsymmetricAutoencoderKL`)."""
        images = [slot.picture for slot in slots if slot.picture is not None]
        masks = [slot.picture_mask for slot in slots if slot.picture_mask is not None]
        if not images:
            return {}
        device = self._components.device
        return {"image": torch.stack(images).to(device, dtype), "mask": torch.stack(masks).to(device, dtype)}

    def _check(self, pictures: dict[int, list[torch.Tensor]]) -> dict[int, tuple[bool, ...] | InpaintError]:
        """Flags of each request's pictures; a batch that fails is checked request by request."""
        if self._safety is None:
            return {index: (False,) * len(own) for index, own in pictures.items()}
        try:
            all_pictures = [picture for own in pictures.values() for picture in own]
            flags = iter(self._safety.verdicts(torch.stack(all_pictures)) if all_pictures else [])
            return {index: tuple(next(flags) for _ in own) for index, own in pictures.items()}
        except InpaintError as error:
            logger.exception("the safety checker failed")
            if len(pictures) == 1:
                return dict.fromkeys(pictures, error)
            return {index: self._check({index: own})[index] for index, own in pictures.items()}


def _pictures(decoded: torch.Tensor, keeps_floats: Sequence[bool]) -> list[_Decoded | None]:
    """Pictures of what was decoded; None of what is not finite."""
    images = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    pixels = (images * 255).round().to(torch.uint8)
    floats = images.cpu().numpy() if any(keeps_floats) else None
    return [
        _Decoded(pixels[index], floats[index] if floats is not None and keeps_floats[index] else None)
        if is_sound
        else None
        for index, is_sound in enumerate(_are_finite(decoded))
    ]


def _images(slots: Sequence[Slot], pictures: Sequence[_Decoded], output: Output) -> Pixels | Floats:
    """What a request asked for, one of each image."""
    if output == "latents":
        return torch.stack([slot.latents for slot in slots]).float().cpu().numpy()
    if output == "floats":
        return np.stack([picture.floats for picture in pictures if picture.floats is not None])
    return torch.stack([picture.pixels for picture in pictures]).cpu().numpy()


def _are_finite(tensors: torch.Tensor) -> list[bool]:
    """Of each along the first dimension."""
    finite: list[bool] = torch.isfinite(tensors).flatten(1).all(dim=1).tolist()
    return finite
