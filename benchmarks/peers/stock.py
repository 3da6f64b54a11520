"""The stock diffusers pipeline, as the peers run it."""

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from benchmarks.peers.wire import PeerRequest
from service.request import Pixels

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
"""The noise schedulers of `benchmarks.traffic`, by their short names."""

COMPILE_MODE = "reduce-overhead"
"""Two rows of a UNet are computed sooner than their kernels are launched one by one, so CUDA graphs are what counts.
Autotuning, which the documentation's "max-autotune" adds to them, searches for minutes at each size."""

MAX_COMPILED = 64
"""Sizes, times two for guidance on and off, beyond which torch would refuse to compile another."""

WARM_UP_STEPS = 3
"""The first call compiles, the second records the graphs, the third plays them."""


class StockPipeline:
    """A `StableDiffusionInpaintPipeline` with its safety checker on.

    Args:
        model: Folder in diffusers format.
        device: Where to.
        dtype: Of the weights.
    """

    def __init__(self, model: Path, device: str, dtype: torch.dtype) -> None:
        self._pipeline = StableDiffusionInpaintPipeline.from_pretrained(model, dtype=dtype, local_files_only=True)
        self._pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler.config

    @property
    def native_size(self) -> int:
        """Side in pixels of the square that the model works on."""
        return int(self._pipeline.unet.config.sample_size * self._pipeline.vae_scale_factor)

    def compile(self) -> None:
        """What diffusers' documentation advises for speed ("Accelerate inference").

        Shapes are static: each size has kernels of its own, compiled when it first comes.
        """
        pipeline = self._pipeline
        torch._dynamo.config.recompile_limit = MAX_COMPILED  # noqa: SLF001 - where torch documents it
        pipeline.fuse_qkv_projections()
        for model in (pipeline.unet, pipeline.vae):
            model.to(memory_format=torch.channels_last)
        # Their methods and not the modules, so that the UNet's hooks stay outside and no generator goes in.
        for module in (pipeline.unet, pipeline.vae.encoder, pipeline.vae.decoder):
            module.forward = torch.compile(module.forward, mode=COMPILE_MODE, fullgraph=True, dynamic=False)
        pipeline.unet.register_forward_pre_hook(_uniform_inputs)
        pipeline.unet.register_forward_hook(_own_outputs)

    def warm_up(self, sizes: Iterable[int], guidance_scales: Iterable[float], num_images: int = 1) -> None:
        """Paint blank pictures.

        Args:
            sizes: Sides of the pictures in pixels.
            guidance_scales: All of these at each size.
            num_images: Of a batch.
        """
        scales = list(guidance_scales)
        for size in sizes:
            for guidance_scale in scales:
                self.paint([_blank(size, guidance_scale)] * num_images)

    def paint(self, requests: Sequence[PeerRequest]) -> list[Pixels]:
        """Their pictures, (H, W, 3) uint8 each, of one call of the pipeline.

        Args:
            requests: With equal `settings_of`; nothing else can share a call.

        Raises:
            KeyError: There is no such noise scheduler here.
        """
        first = requests[0]
        self._pipeline.scheduler = SCHEDULERS[first.scheduler].from_config(self._own_scheduler)
        images = self._pipeline(
            prompt=[request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            image=[Image.fromarray(request.image) for request in requests],
            mask_image=[Image.fromarray(request.mask) for request in requests],
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            strength=first.strength,
            height=first.height,
            width=first.width,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        ).images
        return [np.asarray(image) for image in images]


def settings_of(request: PeerRequest) -> Hashable:
    """What has to be equal for requests to share a call of the stock pipeline."""
    return (
        request.num_inference_steps,
        request.guidance_scale,
        request.strength,
        request.scheduler,
        request.height,
        request.width,
    )


def _uniform_inputs(_unet: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same types and strides of every scheduler: other ones would be compiled for anew."""
    latents, timestep = inputs
    return latents.contiguous(memory_format=torch.channels_last), timestep.float()


def _own_outputs(_unet: torch.nn.Module, _inputs: tuple[Any, ...], outputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A copy of the graph's own memory, which the next call overwrites while schedulers look back at it."""
    return (outputs[0].clone(),)


def _blank(size: int, guidance_scale: float) -> PeerRequest:
    return PeerRequest(
        prompt="",
        negative_prompt="",
        num_inference_steps=WARM_UP_STEPS,
        guidance_scale=guidance_scale,
        strength=1.0,
        scheduler="ddim",
        seed=0,
        height=size,
        width=size,
        image=np.zeros((size, size, 3), np.uint8),
        mask=np.full((size, size), 255, np.uint8),
    )
