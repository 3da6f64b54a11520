"""The inpainting pipeline of one device: what the worker's loop calls for tensor work."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch

from service.errors import InpaintError
from service.messages import LoraInfo
from service.request import FreeU, NsfwPolicy, Pixels
from service.worker.adapters import Adapters, LoadedLora
from service.worker.attention import AttentionContext
from service.worker.autoencoder import Autoencoder
from service.worker.batcher import Generation
from service.worker.captured import CapturedTicks, TickShape, row_buckets
from service.worker.checkpoint import Components
from service.worker.compiled import fuse_projections, noise_predictor
from service.worker.denoise import tick
from service.worker.device_errors import is_out_of_memory
from service.worker.faults import BatchTooLarge, DeviceLost
from service.worker.finish import Finisher
from service.worker.memory import MemoryGauge
from service.worker.pace import Pace
from service.worker.prepare import Preparer
from service.worker.slots import Slot, SlotBatch
from service.worker.stages import Finish
from service.worker.streams import ThreadStreams

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

ROW_BUCKETS = (1, 2, 4, 8, 16, 32)
"""UNet batch sizes of ticks on CUDA that are not captured, where each new size costs set-up; larger batches go in
multiples of the last."""


def _device_faults(
    method: Callable[Concatenate["InpaintPipeline", _P], _T],
) -> Callable[Concatenate["InpaintPipeline", _P], _T]:
    """Compute as the operator chose, on the thread's own stream; say in the worker's words what torch says of a device.

    Where memory is short, memory that only saves time goes first, and the call is tried again.
    """

    def attempt(self: "InpaintPipeline", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.inference_mode(), self._attention.active(), self._streams.active():
            return method(self, *args, **kwargs)

    @functools.wraps(method)
    def wrapper(self: "InpaintPipeline", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            try:
                return attempt(self, *args, **kwargs)
            except Exception as error:
                if not (is_out_of_memory(error) and self._adapters.free()):
                    raise
            torch.cuda.empty_cache()  # Does nothing where CUDA is not in use.
            return attempt(self, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                torch.cuda.empty_cache()
                raise BatchTooLarge from error
            if isinstance(error, torch.AcceleratorError):
                raise DeviceLost(str(error)) from error
            raise

    return wrapper


@dataclass(slots=True)
class Latents:
    """What a generation keeps here between steps.

    Attributes:
        slots: One for each of its images.
        loras: Held, so that they outlast their files.
        batch: The stacked batch that it was last part of; gone with the last of its generations.
        stepped: What the device records when its latest step is done; None on a CPU, and before the first.
    """

    slots: list[Slot]
    loras: tuple[LoadedLora, ...]
    batch: SlotBatch | None = None
    stepped: torch.cuda.Event | None = None


class InpaintPipeline:
    """Prepares, steps and finishes generations on one device; see `service.worker.stages.Pipeline`.

    On CUDA, `step` returns shortly before the device is done. Nothing else leaves work behind: what another thread
    takes over is ready, or waits for `Latents.stepped`.

    Args:
        components: The loaded checkpoint.
        nsfw_policy: What happens to flagged pictures.
    """

    def __init__(self, components: Components, nsfw_policy: NsfwPolicy) -> None:
        self._components = components
        self._attention = components.attention
        self._streams = ThreadStreams(components.device)
        self._autoencoder = Autoencoder(components.vae)
        self._preparer = Preparer(components, self._autoencoder)
        self._finisher = Finisher(components, self._autoencoder, nsfw_policy)
        self._adapters = Adapters(components.unet, components.text_encoder)
        self._freeu: FreeU | None = None
        self._captured: CapturedTicks | None = None
        self._captured_seconds: dict[int, float] = {}
        self._pace = Pace(components.device)
        self._memory = MemoryGauge(components.device)
        if components.device.type == "cpu":
            self.lay_out_for_speed()
        if components.device.type == "cuda":
            torch.cuda.synchronize(components.device)  # The weights are there, whichever stream asks for them.

    @property
    def components(self) -> Components:
        """The loaded checkpoint."""
        return self._components

    @_device_faults
    def prepare(self, generations: Sequence[Generation]) -> None:
        """Encode text and pictures, draw noise; sets `latents` and `steps`."""
        loras = generations[0].key.loras
        loaded = self._adapters.load(loras)
        self._adapters.apply_text_encoder(loras, loaded)
        prepared = self._preparer.prepare([generation.request for generation in generations])
        self._streams.synchronize()
        for generation, slots in zip(generations, prepared, strict=True):
            generation.latents = Latents(slots, loaded)
            generation.steps = slots[0].num_calls

    @_device_faults
    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every image by one model call."""
        key = generations[0].key
        self._adapters.apply_unet(key.loras, generations[0].latents.loras)
        batch = self._gather(generations)
        self._set_freeu(key.freeu)
        seconds = None
        if self._captured is not None and key.freeu is None and self._captured.fits(batch):
            seconds = self._captured_seconds[self._captured.tick(batch)]
        else:
            if self._components.ip_adapter is not None:
                self._components.ip_adapter.apply(key.ip_adapter)
            tick(self._components.unet, batch, self._pad_rows)
        stepped = self._pace.started(seconds)
        for generation in generations:
            generation.latents.stepped = stepped

    @_device_faults
    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """Decode, check, and give back pictures."""
        for generation in generations:
            if generation.latents.stepped is not None:
                generation.latents.stepped.synchronize()
        return self._finisher.finish(
            [generation.latents.slots for generation in generations],
            [generation.request.params.output for generation in generations],
        )

    @_device_faults
    def preview(self, generations: Sequence[Generation]) -> list[Pixels | None]:
        """The first image of each as it may become; None where nothing can be shown."""
        for generation in generations:
            if generation.latents.stepped is not None:
                generation.latents.stepped.synchronize()
        return self._finisher.preview([generation.latents.slots[0] for generation in generations])

    @_device_faults
    def inspect_lora(self, path: str) -> LoraInfo:
        """What a file is as a LoRA of this model; nothing of it is kept.

        Raises:
            InpaintError: `INVALID_LORA`.
        """
        return self._adapters.inspect(path)

    def memory_bytes(self) -> dict[str, int]:
        """Device memory by kind, up to a second old."""
        return self._memory.bytes_by_kind()

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

    # --- made ready at the start -------------------------------------------------

    @property
    def can_be_captured(self) -> bool:
        """Whether the model's UNet is given nothing but latents, what is beside them, timesteps and prompts."""
        return self._components.ip_adapter is None and self._components.unet.config.time_cond_proj_dim is None

    @property
    def captured_seconds(self) -> dict[int, float]:
        """Seconds of a captured tick, by UNet rows."""
        return dict(self._captured_seconds)

    def prefer(self, attention: AttentionContext) -> None:
        """Have attention computed so from now on."""
        self._attention = attention

    def lay_out_for_speed(self) -> None:
        """Lay out and fuse the weights for speed; results differ by rounding. Before anything is captured.

        On a CPU this takes no time, and pays at once; on CUDA only together with compiling.
        """
        self._components.unet.to(memory_format=torch.channels_last)
        self._components.vae.to(memory_format=torch.channels_last)
        fuse_projections(self._components.unet)

    @_device_faults
    def capture_ticks(self, max_rows: int, *, is_compiled: bool, on_rows: Callable[[int], None]) -> None:
        """Have ticks at the native size, of up to so many UNet rows, replayed from now on.

        Args:
            max_rows: Fewer where memory is short.
            is_compiled: Whether to compile the UNet first.
            on_rows: Told before each capture of how many rows.

        Raises:
            Exception: Whatever goes wrong in compiling; nothing has changed then.
        """
        components = self._components
        predict = noise_predictor(components.unet, is_compiled=is_compiled)
        seconds: dict[int, float] = {}
        captured: CapturedTicks | None = None
        for num_rows in reversed(row_buckets(max_rows)):
            on_rows(num_rows)
            try:
                if captured is None:
                    captured = CapturedTicks(predict, self._tick_shape(), components.device, components.dtype, num_rows)
                seconds[num_rows] = captured.capture(num_rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of device memory: no ticks of %d rows are captured", num_rows)
                if not seconds:
                    captured = None
                torch.cuda.empty_cache()
        self._captured, self._captured_seconds = captured, seconds

    @_device_faults
    def capture_autoencoder(self) -> None:
        """Have pictures of the native size encoded and decoded by captured code from now on."""
        self._autoencoder.capture(self._components.info.native_size)

    @property
    def can_capture_autoencoder(self) -> bool:
        """Whether it computes a batch as a whole."""
        return self._autoencoder.can_be_captured

    @_device_faults
    def capture_text_encoder(self) -> None:
        """Have prompts encoded by a captured graph from now on."""
        self._preparer.capture_text_encoder()

    @_device_faults
    def capture_safety_checker(self) -> None:
        """Have pictures checked by a captured graph from now on; without a checker, nothing happens."""
        self._finisher.capture_safety_checker()

    def _tick_shape(self) -> TickShape:
        components = self._components
        info, size = components.info, components.info.native_size // components.info.latent_multiple
        return TickShape(
            channels=info.latent_channels,
            conditioning_channels=info.unet_in_channels - info.latent_channels,
            height=size,
            width=size,
            num_tokens=info.max_tokens,
            embeds_width=info.embeds_width,
        )
