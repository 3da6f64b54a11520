"""The reference: `StableDiffusionInpaintPipeline` run alone on one request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from numpy.typing import NDArray
from PIL import Image

from service.request import Floats, InpaintRequest, IpAdapterUse, LoraUse
from service.worker.schedulers import make_scheduler

OUTPUT_TYPES = {"pixels": "pil", "floats": "np", "latents": "latent"}


class Stock:
    """The stock pipeline of one checkpoint, on the CPU in float32.

    Args:
        folder: The checkpoint.
        embeddings: Textual inversions to load, by their tokens.
        ip_adapter: An IP-Adapter's file, with `image_encoder` beside it; loaded only for requests that use it.
    """

    def __init__(
        self, folder: Path, embeddings: Mapping[str, Path] = MappingProxyType({}), ip_adapter: Path | None = None
    ) -> None:
        self.pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self._scheduler_config = self.pipeline.scheduler.config
        self._set_text_model()
        for token, path in embeddings.items():
            self.pipeline.load_textual_inversion(path.parent, weight_name=path.name, token=token)
        self._adapters: dict[tuple[str, str], str] = {}
        self._ip_adapter = ip_adapter

    def __call__(self, request: InpaintRequest, **changes: Any) -> tuple[NDArray[Any], list[bool]]:
        """What one request gives when it is run alone.

        Args:
            request: At working size.
            changes: Arguments of the pipeline's call in the place of the request's own.

        Returns:
            (n, H, W, 3) uint8 pictures, or floats or latents as the request asks; and the safety checker's flags.
        """
        params, tensors = request.params, request.tensors
        self.pipeline.scheduler = make_scheduler(params.scheduler, self._scheduler_config, seed=params.seed)
        seeds = [params.seed + index for index in range(params.num_images_per_prompt)]
        if hasattr(self.pipeline.scheduler, "noise_sampler_seed"):
            # Its Brownian noise ignores the generators; a list gives each image of a batch its own, too.
            self.pipeline.scheduler.noise_sampler_seed = seeds
        self._set_loras(params.loras)
        if params.freeu is not None:
            freeu = params.freeu
            self.pipeline.enable_freeu(s1=freeu.s1, s2=freeu.s2, b1=freeu.b1, b2=freeu.b2)
        latents_of_image = _tensor(tensors.image_latents)
        arguments: dict[str, Any] = {
            "prompt": params.prompt if tensors.prompt_embeds is None else None,
            "prompt_embeds": _batched(tensors.prompt_embeds),
            "negative_prompt": params.negative_prompt if tensors.negative_prompt_embeds is None else None,
            "negative_prompt_embeds": _batched(tensors.negative_prompt_embeds),
            "image": Image.fromarray(request.image) if latents_of_image is None else latents_of_image,
            "mask_image": Image.fromarray(request.mask),
            "latents": _tensor(tensors.latents),
            "masked_image_latents": _tensor(tensors.masked_image_latents),
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "timesteps": None if params.timesteps is None else list(params.timesteps),
            "sigmas": None if params.sigmas is None else list(params.sigmas),
            "guidance_scale": params.guidance_scale,
            "strength": params.strength,
            "num_images_per_prompt": params.num_images_per_prompt,
            "eta": params.eta,
            "clip_skip": params.clip_skip or None,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": OUTPUT_TYPES[params.output],
        }
        if params.ip_adapter is not None:
            self._load_ip_adapter(params.ip_adapter)
            given, picture = _tensor(tensors.ip_adapter_image_embeds), request.ip_adapter_image
            arguments["ip_adapter_image_embeds"] = None if given is None else [given]
            arguments["ip_adapter_image"] = None if picture is None else Image.fromarray(picture)
        try:
            with torch.inference_mode():
                output = self.pipeline(**{**arguments, **changes})
        finally:
            self.pipeline.disable_freeu()
            if params.ip_adapter is not None:
                self.pipeline.unload_ip_adapter()
        flags = output.nsfw_content_detected or [False] * params.num_images_per_prompt
        if isinstance(output.images, torch.Tensor):
            return output.images.numpy(), flags
        return np.stack([np.asarray(image) for image in output.images]), flags

    def _set_loras(self, loras: Sequence[LoraUse]) -> None:
        """`load_lora_weights` for each new file, then `set_adapters`."""
        if not loras:
            if self._adapters:
                self.pipeline.disable_lora()
            return
        for lora in loras:
            if (lora.path, lora.version) not in self._adapters:
                self._adapters[lora.path, lora.version] = self._load_lora(Path(lora.path))
        self.pipeline.enable_lora()
        names = [self._adapters[lora.path, lora.version] for lora in loras]
        self.pipeline.set_adapters(names, [_weights(lora) for lora in loras])

    def _load_lora(self, path: Path) -> str:
        name = f"adapter_{len(self._adapters)}"
        self.pipeline.text_encoder.__dict__.pop("text_model", None)  # By this stock tells how the layers are called.
        self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        self._set_text_model()
        return name

    def _load_ip_adapter(self, use: IpAdapterUse) -> None:
        assert self._ip_adapter is not None
        self.pipeline.load_ip_adapter(self._ip_adapter.parent, subfolder="", weight_name=self._ip_adapter.name)
        self.pipeline.set_ip_adapter_scale(json.loads(use.block_scales) if use.block_scales else use.scale)

    def _set_text_model(self) -> None:
        """Stock's clip_skip looks for `text_encoder.text_model`, which transformers 5.6 removed."""
        encoder = self.pipeline.text_encoder
        encoder.__dict__.setdefault("text_model", encoder)


def _weights(lora: LoraUse) -> dict[str, Any]:
    unet = json.loads(lora.block_scales) if lora.block_scales else lora.unet_scale
    return {"unet": unet, "text_encoder": lora.text_encoder_scale}


def _tensor(array: Floats | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array.copy())


def _batched(embeds: Floats | None) -> torch.Tensor | None:
    return None if embeds is None else torch.from_numpy(embeds.copy())[None]
