"""Paints many masked scenes at once, the way the stock inpainting pipeline does."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from training.denoiser import BETA_END, BETA_START, TRAIN_STEPS, Denoiser
from training.pool import encode, tokenize
from training.vae import SCALING


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The scheduler that is shipped."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        steps_offset=1,
        timestep_spacing="linspace",
    )


@torch.no_grad()
def paint(
    vae: AutoencoderKL,
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    images: Tensor,
    covers: Tensor,
    *,
    prompts: list[str],
    seed: int,
    steps: int = 10,
    guidance: float = 7.5,
    stop_after: int | None = None,
) -> Tensor:
    """Paints prompts into masked places.

    Args:
        vae: the autoencoder.
        denoiser: UNet and text encoder.
        tokenizer: of the text encoder.
        images: (B, 3, H, W) in [-1, 1].
        covers: masks, (B, 1, H, W) bool.
        prompts: B prompts.
        seed: of the noise.
        steps: denoising steps.
        guidance: guidance scale.
        stop_after: decode after so many steps, to see half-made pictures, or None for all.

    Returns:
        Images (B, 3, H, W) in [-1, 1].
    """
    device = images.device
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps, device=device)
    hidden = encode(vae, images.masked_fill(covers, 0.0)).float()
    masks = covers[:, :, ::8, ::8].float()
    condition = torch.cat([masks, hidden], dim=1).repeat(2, 1, 1, 1)
    ids = tokenize(tokenizer, [""] * len(prompts) + list(prompts)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    latents = torch.randn(hidden.shape, generator=generator, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        states = denoiser.text_encoder(ids)[0]
        for i, step in enumerate(scheduler.timesteps):
            if stop_after is not None and i >= stop_after:
                break
            inputs = torch.cat([latents.repeat(2, 1, 1, 1), condition], dim=1)
            empty, told = denoiser.unet(inputs, step, states).sample.float().chunk(2)
            latents = scheduler.step(empty + guidance * (told - empty), step, latents).prev_sample
        made = vae.decoder(vae.post_quant_conv(latents / SCALING))
    return made.float().clamp(-1.0, 1.0)
