"""The inpainting pipeline of one device: what the worker's loop calls for tensor work."""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from service.errors import InpaintError
from service.messages import LoraInfo
from service.request import FreeU, InpaintParams, InpaintRequest, NsfwPolicy, Pixels
from service.worker.adapters import Adapters, LoadedLora
from service.worker.batcher import Generation
from service.worker.checkpoint import Components
from service.worker.denoise import tick
from service.worker.faults import BatchTooLarge, DeviceLost
from service.worker.finish import Finisher
from service.worker.prepare import Preparer
from service.worker.slots import Slot, SlotBatch
from service.worker.stages import Finish

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

ROW_BUCKETS = (1, 2, 4, 8, 16, 32)
"""UNet batch sizes on CUDA, where each new size costs set-up; larger batches go in multiples of the last."""

MAX_AUTO_IMAGES = 16
MIN_AUTO_IMAGES = 4
"""Even where more rows bring no throughput, a few share the batch: a short request need not wait for a long one."""

WARM_UP_SECONDS = 20.0
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)

KNEE = 0.95
"""Share of the best throughput at which more images in a batch only delay one another."""


def _device_faults(
    method: Callable[Concatenate["InpaintPipeline", _P], _T],
) -> Callable[Concatenate["InpaintPipeline", _P], _T]:
    """Compute as the operator chose, and say in the worker's words what torch says of a device.

    Where memory is short, memory that only saves time goes first, and the call is tried again.
    """

    def attempt(self: "InpaintPipeline", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.inference_mode(), self._components.attention.active():
            return method(self, *args, **kwargs)

    @functools.wraps(method)
    def wrapper(self: "InpaintPipeline", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            try:
                return attempt(self, *args, **kwargs)
            except _OUT_OF_MEMORY:
                if not self._adapters.free():
                    raise
            torch.cuda.empty_cache()  # Does nothing where CUDA is not in use.
            return attempt(self, *args, **kwargs)
        except _OUT_OF_MEMORY as error:
            torch.cuda.empty_cache()
            raise BatchTooLarge from error
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error

    return wrapper


@dataclass(slots=True)
class Latents:
    """What a generation keeps here between steps.

    Attributes:
        slots: One for each of its images.
        loras: Held, so that they outlast their files.
        batch: The stacked batch that it was last part of; gone with the last of its generations.
    """

    slots: list[Slot]
    loras: tuple[LoadedLora, ...]
    batch: SlotBatch | None = None


class InpaintPipeline:
    """Prepares, steps and finishes generations on one device; see `service.worker.stages.Pipeline`.

    Args:
        components: The loaded checkpoint.
        nsfw_policy: What happens to flagged pictures.
    """

    def __init__(self, components: Components, nsfw_policy: NsfwPolicy) -> None:
        self._components = components
        self._preparer = Preparer(components)
        self._finisher = Finisher(components, nsfw_policy)
        self._adapters = Adapters(components.unet, components.text_encoder)
        self._freeu: FreeU | None = None

    @_device_faults
    def prepare(self, generations: Sequence[Generation]) -> None:
        """Encode text and pictures, draw noise; sets `latents` and `steps`."""
        loras = generations[0].key.loras
        loaded = self._adapters.load(loras)
        self._adapters.apply_text_encoder(loras)
        prepared = self._preparer.prepare([generation.request for generation in generations])
        for generation, slots in zip(generations, prepared, strict=True):
            generation.latents = Latents(slots, loaded)
            generation.steps = slots[0].num_calls

    @_device_faults
    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every image by one model call."""
        key = generations[0].key
        self._adapters.apply_unet(key.loras)
        self._set_freeu(key.freeu)
        if self._components.ip_adapter is not None:
            self._components.ip_adapter.apply(key.ip_adapter)
        tick(self._components.unet, self._gather(generations), self._pad_rows)
        self._synchronize()

    @_device_faults
    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """Decode, check, and give back pictures."""
        return self._finisher.finish(
            [generation.latents.slots for generation in generations],
            [generation.request.params.output for generation in generations],
        )

    @_device_faults
    def preview(self, generations: Sequence[Generation]) -> list[Pixels | None]:
        """The first image of each as it may become; None where nothing can be shown."""
        return self._finisher.preview([generation.latents.slots[0] for generation in generations])

    @_device_faults
    def inspect_lora(self, path: str) -> LoraInfo:
        """What a file is as a LoRA of this model; nothing of it is kept.

        Raises:
            InpaintError: `INVALID_LORA`.
        """
        return self._adapters.inspect(path)

    def memory_bytes(self) -> dict[str, int]:
        """Device memory by kind; empty on a CPU."""
        device = self._components.device
        if device.type != "cuda":
            return {}
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
        }

    def _set_freeu(self, freeu: FreeU | None) -> None:
        """Stock's `enable_freeu`, for the batch whose turn it is."""
        if freeu == self._freeu:
            return
        if freeu is None:
            self._components.unet.disable_freeu()
        else:
            self._components.unet.enable_freeu(s1=freeu.s1, s2=freeu.s2, b1=freeu.b1, b2=freeu.b2)
        self._freeu = freeu

    def _gather(self, generations: Sequence[Generation]) -> SlotBatch:
        """The stacked batch, rebuilt only when its images have changed."""
        slots = tuple(slot for generation in generations for slot in generation.latents.slots)
        batch: SlotBatch | None = generations[0].latents.batch
        if batch is None or batch.slots != slots:
            batch = SlotBatch.gather(slots, self._components.device)
            for generation in generations:
                generation.latents.batch = batch
        return batch

    def _pad_rows(self, num_rows: int) -> int:
        if self._components.device.type == "cpu":
            return num_rows
        largest = ROW_BUCKETS[-1]
        return next((bucket for bucket in ROW_BUCKETS if bucket >= num_rows), -(-num_rows // largest) * largest)

    def _synchronize(self) -> None:
        if self._components.device.type == "cuda":
            torch.cuda.synchronize(self._components.device)

    # --- warm-up -------------------------------------------------------------

    def warm_up(self, max_images: int | None) -> tuple[int, dict[int, float]]:
        """Run every stage once and measure the step by batch size.

        Doubles the batch until throughput stops growing, memory or time runs out.

        Args:
            max_images: The operator's cap, or None to find one.

        Returns:
            Images that may run at once, and seconds of one step by UNet rows.
        """
        step_seconds: dict[int, float] = {}
        throughput: dict[int, float] = {}
        started_at = time.monotonic()
        num_images, largest = 1, max_images or MAX_AUTO_IMAGES
        while num_images <= largest:
            try:
                seconds = self._measure_step(num_images)
            except BatchTooLarge:
                logger.warning("out of device memory at %d images", num_images)
                if num_images == 1:
                    raise
                break
            step_seconds[2 * num_images] = seconds
            throughput[num_images] = num_images / seconds
            is_past_knee = num_images > 1 and throughput[num_images] * KNEE < throughput[num_images // 2]
            if is_past_knee or time.monotonic() - started_at > WARM_UP_SECONDS:
                break
            num_images *= 2
        best = max(throughput.values())
        knee = min(images for images, rate in throughput.items() if rate >= KNEE * best)
        return max_images or max(knee, MIN_AUTO_IMAGES), step_seconds

    def _measure_step(self, num_images: int) -> float:
        """Median seconds of a guided step at the native size, after a whole small request has run."""
        size = self._components.info.native_size
        params = InpaintParams(
            prompt="",
            negative_prompt="",
            num_inference_steps=4,
            guidance_scale=7.5,
            strength=1.0,
            num_images_per_prompt=1,
            seed=0,
            scheduler="ddim",
            eta=0.0,
            clip_skip=0,
            height=size,
            width=size,
        )
        grey, mask = np.full((size, size, 3), 128, np.uint8), np.full((size, size), 255, np.uint8)
        request = InpaintRequest(params, grey, mask, admitted_at=0.0, deadline=float("inf"))
        generations = [Generation(f"warm-up-{index}", request) for index in range(num_images)]
        self.prepare(generations)
        seconds = []
        while not generations[0].is_denoised:
            step_started_at = time.monotonic()
            self.step(generations)
            seconds.append(time.monotonic() - step_started_at)
            for generation in generations:
                generation.steps_done += 1
        self.finish(generations)
        return sorted(seconds[1:])[len(seconds[1:]) // 2]
