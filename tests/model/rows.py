"""Requests for every row of the README's table of the stock pipeline: what each row changes, one at a time.

A row is the stock pipeline's own name of a parameter, method or switch. Its
requests go through the worker singly and in one mixed batch, and through the
stock pipeline alone; see `tests/model/test_every_row.py`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from service.request import FreeU, InpaintParams, InpaintRequest, InpaintTensors, LoraUse
from tests.model.mixed_requests import paint_target


@dataclass(frozen=True)
class Model:
    """What requests need to know of a checkpoint.

    Attributes:
        size: Its native size.
        width: Of its text encoder.
        loras: LoRAs that fit it, by any name; at least two.
        tokens: Textual inversions that it has; the second has several vectors.
        scheduler: Its own scheduler's name.
        embeds_guidance: Whether its UNet takes the guidance scale as an input.
    """

    size: int
    width: int
    loras: Mapping[str, Path]
    tokens: tuple[str, ...] = ()
    scheduler: str = "pndm"
    embeds_guidance: bool = False

    def request(self, *, tensors: InpaintTensors | None = None, **changes: object) -> InpaintRequest:
        """The usual request with other parameters."""
        params = InpaintParams(
            prompt="a red house",
            negative_prompt="",
            num_inference_steps=4,
            guidance_scale=7.5,
            strength=1.0,
            num_images_per_prompt=1,
            seed=11,
            scheduler=self.scheduler,
            eta=0.0,
            clip_skip=0,
            height=self.size,
            width=self.size,
            embeds_guidance=self.embeds_guidance,
        )
        request = paint_target(dataclasses.replace(params, **changes), seed=5)  # type: ignore[arg-type]
        return request if tensors is None else dataclasses.replace(request, tensors=tensors)

    def embeds(self, num_tokens: int = 77, seed: int = 1) -> np.ndarray:
        """(T, D) noise."""
        return np.random.default_rng(seed).standard_normal((num_tokens, self.width)).astype(np.float32)

    def latents(self, count: int = 1, seed: int = 1) -> np.ndarray:
        """(n, 4, h, w) noise."""
        side = self.size // 8
        return np.random.default_rng(seed).standard_normal((count, 4, side, side)).astype(np.float32)

    def lora(self, index: int, scale: float, text_encoder_scale: float | None = None, blocks: object = None) -> LoraUse:
        """The index-th LoRA at a scale."""
        name, path = list(self.loras.items())[index]
        stat = path.stat()
        return LoraUse(
            name=name,
            path=str(path),
            version=f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}",
            unet_scale=scale,
            text_encoder_scale=scale if text_encoder_scale is None else text_encoder_scale,
            block_scales="" if blocks is None else json.dumps(blocks),
        )


Maker = Callable[[Model], list[InpaintRequest]]

FREEU = FreeU(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _loras(model: Model) -> list[InpaintRequest]:
    return [
        model.request(loras=(model.lora(0, 1.0),)),
        model.request(loras=(model.lora(1, -0.7),), seed=12),
        model.request(loras=(model.lora(0, 0.8), model.lora(1, 0.4)), guidance_scale=1.0),
        model.request(loras=(model.lora(0, 0.0),)),
    ]


def _set_adapters(model: Model) -> list[InpaintRequest]:
    blocks = {"down": 0.5, "mid": 1.0, "up": 0.8}
    return [
        model.request(loras=(model.lora(0, 0.6, text_encoder_scale=0.0),)),
        model.request(loras=(model.lora(0, 0.0, text_encoder_scale=1.0),)),
        model.request(loras=(model.lora(0, 1.0, text_encoder_scale=0.3, blocks=blocks),)),
    ]


def _textual_inversion(model: Model) -> list[InpaintRequest]:
    return [
        *(model.request(prompt=f"a {token} by a tree") for token in model.tokens),
        *(model.request(negative_prompt=f"{token}, blurry") for token in model.tokens),
    ]


def _lists(argument: str, values: tuple[float, ...]) -> Maker:
    def make(model: Model) -> list[InpaintRequest]:
        changes = {argument: values, "num_inference_steps": len(values), "scheduler": "euler"}
        return [model.request(**changes), model.request(**changes, strength=0.7)]

    return make


def _given_latents(model: Model) -> list[InpaintRequest]:
    noise = InpaintTensors(latents=model.latents())
    return [
        model.request(tensors=noise),
        model.request(tensors=noise, strength=0.6, scheduler="ddim"),
        model.request(tensors=InpaintTensors(latents=model.latents(2)), num_images_per_prompt=2),
    ]


def _given_masked_latents(model: Model) -> list[InpaintRequest]:
    masked = InpaintTensors(masked_image_latents=model.latents(seed=2))
    return [model.request(tensors=masked), model.request(tensors=masked, strength=0.6)]


def _given_image_latents(model: Model) -> list[InpaintRequest]:
    """In stock, latents in the place of `image` need those of the masked one beside them."""
    both = InpaintTensors(image_latents=model.latents(seed=3), masked_image_latents=model.latents(seed=2))
    return [
        model.request(tensors=both, strength=0.6),
        model.request(tensors=both, strength=0.6, num_images_per_prompt=2),
    ]


def _prompt_embeds(model: Model) -> list[InpaintRequest]:
    short, long = model.embeds(40), model.embeds(154)
    return [
        model.request(tensors=InpaintTensors(prompt_embeds=model.embeds())),
        model.request(tensors=InpaintTensors(prompt_embeds=short)),
        model.request(tensors=InpaintTensors(prompt_embeds=long), guidance_scale=1.0),
    ]


def _negative_prompt_embeds(model: Model) -> list[InpaintRequest]:
    long = InpaintTensors(prompt_embeds=model.embeds(154), negative_prompt_embeds=model.embeds(154, seed=2))
    return [model.request(tensors=InpaintTensors(negative_prompt_embeds=model.embeds())), model.request(tensors=long)]


ROWS: Mapping[str, Maker] = MappingProxyType(
    {
        "prompt": lambda model: [model.request(prompt="nothing"), model.request(prompt="x " * 90)],
        "image": lambda model: [model.request(), *_given_image_latents(model)],
        "masked_image_latents": _given_masked_latents,
        "height": lambda model: [model.request(height=model.size + 16, width=model.size - 8)],
        "strength": lambda model: [model.request(strength=0.5), model.request(strength=0.8, scheduler="ddim")],
        "num_inference_steps": lambda model: [model.request(num_inference_steps=number) for number in (1, 7)],
        "timesteps": _lists("timesteps", (961, 640, 333, 20)),
        "sigmas": _lists("sigmas", (12.0, 4.0, 1.1, 0.2)),
        "guidance_scale": lambda model: [model.request(guidance_scale=scale) for scale in (0.0, 1.0, 1.5, 12.0)],
        "negative_prompt": lambda model: [model.request(negative_prompt="blurry, ugly")],
        "num_images_per_prompt": lambda model: [model.request(num_images_per_prompt=3)],
        "eta": lambda model: [model.request(eta=0.7, scheduler="ddim")],
        "generator": lambda model: [model.request(seed=0), model.request(seed=2**32 - 1, scheduler="euler_a")],
        "latents": _given_latents,
        "prompt_embeds": _prompt_embeds,
        "negative_prompt_embeds": _negative_prompt_embeds,
        "output_type": lambda model: [model.request(output=output) for output in ("floats", "latents")],
        "clip_skip": lambda model: [model.request(clip_skip=1), model.request(clip_skip=2, guidance_scale=1.0)],
        "scheduler": lambda model: [
            model.request(scheduler=name)
            for name in ("dpmpp_2m_karras", "euler_exponential", "unipc_beta", "lcm", "tcd", "dpmpp_sde", "heun")
        ],
        "load_lora_weights": _loras,
        "set_adapters": _set_adapters,
        "load_textual_inversion": _textual_inversion,
        "enable_freeu": lambda model: [model.request(freeu=FREEU), model.request(freeu=FREEU, strength=0.6)],
    }
)
"""By the name in the table: requests that use it."""
