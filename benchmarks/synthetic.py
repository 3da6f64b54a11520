"""A checkpoint of the true architecture of Stable Diffusion 1.5 inpainting, with random weights.

    python -m benchmarks.synthetic FOLDER [--tiny] [--seed 0] [--dtype float16]

Neither time nor memory depends on what the weights are, so servers are measured on it
where no trained checkpoint may be fetched. It is in diffusers format; the tokenizer is
the bundled model's, the safety checker flags nothing. `--tiny` has the same parts, layer
types and files, but of a size that runs on a CPU in a blink.
"""

import argparse
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

BUNDLED_TOKENIZER = Path(__file__).parent.parent / "service" / "worker" / "models" / "demo" / "tokenizer"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

NEVER_FLAGGED = 2.0
"""A threshold that no cosine reaches."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a checkpoint's parts, as arguments of their classes.

    Attributes:
        unet: Of `UNet2DConditionModel`.
        vae: Of `AutoencoderKL`.
        text_encoder: Of `CLIPTextConfig`.
        vision: Of the safety checker's `CLIPVisionConfig`.
        projection_dim: Width of the safety checker's embeddings.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vision: Mapping[str, Any]
    projection_dim: int


_UNET_BLOCKS: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
}
_VAE_BLOCKS: dict[str, Any] = {
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}

FULL_SIZE = Architecture(
    unet=_UNET_BLOCKS | {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    vae=_VAE_BLOCKS | {"sample_size": 512, "block_out_channels": (128, 256, 512, 512)},
    text_encoder={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 224,
        "patch_size": 14,
    },
    projection_dim=768,
)
"""Stable Diffusion 1.5 inpainting."""

TINY = Architecture(
    unet=_UNET_BLOCKS
    | {
        "sample_size": 8,
        "block_out_channels": (16, 16, 32, 32),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
    vae=_VAE_BLOCKS | {"sample_size": 64, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
    text_encoder={"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    vision={
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    projection_dim=16,
)
"""Works on pictures of 64x64."""


def write(folder: Path, *, tiny: bool = False, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
    """Write a checkpoint.

    Args:
        folder: Where to; created.
        tiny: The architecture for tests.
        seed: The same seed gives the same weights.
        dtype: Of the weights.
    """
    architecture = TINY if tiny else FULL_SIZE
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_TOKENIZER, local_files_only=True)
    with torch.device("meta"):  # Initialising what is overwritten would take minutes.
        unet = UNet2DConditionModel(**architecture.unet)
        vae = AutoencoderKL(**architecture.vae)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                **architecture.text_encoder,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        safety_checker = StableDiffusionSafetyChecker(
            CLIPConfig(
                projection_dim=architecture.projection_dim,
                vision_config=CLIPVisionConfig(**architecture.vision).to_dict(),
                text_config=CLIPTextConfig(**architecture.text_encoder).to_dict(),
            )
        )
    for number, model in enumerate((unet, vae, text_encoder, safety_checker)):
        torch.nn.Module.to(model, dtype).to_empty(device="cpu")  # diffusers' own `to` warns of nothing.
        fill(model, (seed, number))
    safety_checker.concept_embeds_weights.data.fill_(NEVER_FLAGGED)
    safety_checker.special_care_embeds_weights.data.fill_(NEVER_FLAGGED)
    image_size = architecture.vision["image_size"]
    StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=safety_checker,
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
    ).save_pretrained(folder, safe_serialization=True)


def fill(model: torch.nn.Module, seed: tuple[int, ...]) -> None:
    """Give a model random weights that keep the scale of what passes through, so that float16 does not overflow.

    Matrices and kernels have a variance of 1 / fan-in (LeCun et al., "Efficient BackProp", 4.6); norms and
    biases do nothing.

    Args:
        model: With memory, but no values.
        seed: The same seed gives the same weights, on any number of cores.
    """
    is_norm = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
    }

    def draw(number: int, name: str, weight: torch.Tensor) -> None:
        if weight.dim() > 1:
            bound = (3 * weight.shape[0] / weight.numel()) ** 0.5
            # NumPy draws without the interpreter's lock, a tensor per thread; torch's CPU generator is serial.
            numbers = np.random.default_rng((*seed, number)).random(weight.numel(), dtype=np.float32)
            weight.copy_(torch.from_numpy(numbers).mul_(2 * bound).sub_(bound).view_as(weight))
        else:
            weight.fill_(1.0 if name in is_norm else 0.0)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        parameters = enumerate(model.named_parameters())
        for done in [threads.submit(draw, number, name, weight.data) for number, (name, weight) in parameters]:
            done.result()


def _scheduler() -> PNDMScheduler:
    """As in the published checkpoint."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--tiny", action="store_true", help="the same parts at a size for tests")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the weights")
    arguments = parser.parse_args()
    write(arguments.folder, tiny=arguments.tiny, seed=arguments.seed, dtype=DTYPES[arguments.dtype])


if __name__ == "__main__":
    main()
