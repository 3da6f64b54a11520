"""The reference: `StableDiffusionInpaintPipeline` run alone on one request."""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from numpy.typing import NDArray
from PIL import Image

from service.request import InpaintRequest
from service.worker.schedulers import make_scheduler


class Stock:
    """The stock pipeline of one checkpoint, on the CPU in float32.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self._scheduler_config = self.pipeline.scheduler.config
        # Stock's clip_skip looks for `text_encoder.text_model`, which transformers 5.6 removed.
        encoder = self.pipeline.text_encoder
        encoder.__dict__.setdefault("text_model", encoder)

    def __call__(self, request: InpaintRequest) -> tuple[NDArray[np.uint8], list[bool]]:
        """(n, H, W, 3) uint8 pictures and flags of one request run alone."""
        params = request.params
        self.pipeline.scheduler = make_scheduler(params.scheduler, self._scheduler_config, seed=params.seed)
        seeds = [params.seed + index for index in range(params.num_images_per_prompt)]
        if hasattr(self.pipeline.scheduler, "noise_sampler_seed"):
            # Its Brownian noise ignores the generators; a list gives each image of a batch its own, too.
            self.pipeline.scheduler.noise_sampler_seed = seeds
        with torch.inference_mode():
            output = self.pipeline(
                prompt=params.prompt,
                negative_prompt=params.negative_prompt,
                image=Image.fromarray(request.image),
                mask_image=Image.fromarray(request.mask),
                height=params.height,
                width=params.width,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                strength=params.strength,
                num_images_per_prompt=params.num_images_per_prompt,
                eta=params.eta,
                clip_skip=params.clip_skip or None,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            )
        flags = output.nsfw_content_detected or [False] * len(output.images)
        return np.stack([np.asarray(image) for image in output.images]), flags
