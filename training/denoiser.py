"""The denoiser: a 9-channel UNet led by a small CLIP text encoder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.averaging import Average
from training.pool import CaptionTable, LatentPool
from training.words import MAX_LENGTH

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
_TEXT_WIDTH = 192


@dataclass(frozen=True)
class DenoiserSettings:
    """How the denoiser is trained.

    Attributes:
        batch: scenes a step.
        rate: highest learning rate.
        warm_up: steps until it is reached.
        bare: share of scenes in which nothing is wanted.
        dropped: share of captions left empty, for guidance.
        least_ratio: signal-to-noise ratio above which steps weigh no more ("min-SNR").
        inside: extra weight of what is under the mask.
        decay: of the averaged weights.
    """

    batch: int = 384
    rate: float = 8e-4
    warm_up: int = 300
    bare: float = 0.14
    dropped: float = 0.10
    least_ratio: float = 5.0
    inside: float = 2.0
    decay: float = 0.999


def build_unet() -> UNet2DConditionModel:
    """A fresh UNet for 32x32 latents."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=9,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=_TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Denoiser(nn.Module):
    """UNet and text encoder together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def signal_levels(device: torch.device) -> Tensor:
    """Cumulative products of alpha for each training step, (TRAIN_STEPS,), as the shipped scheduler has them."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64).square()
    return torch.cumprod(1.0 - betas, dim=0).float().to(device)


@dataclass(frozen=True)
class _Batch:
    """What one step needs: latents (B, 4, 32, 32), conditions (B, 5, 32, 32), masks (B, 1, 32, 32), ids (B, 77)."""

    clean: Tensor
    condition: Tensor
    masks: Tensor
    ids: Tensor


def _draw_batch(pool: LatentPool, captions: CaptionTable, settings: DenoiserSettings) -> _Batch:
    device = pool.masks.device
    per_target = pool.masks.shape[0] // pool.shown.shape[0]
    per_scene = pool.masks.shape[0] // pool.bare.shape[0]
    pick = torch.randint(pool.masks.shape[0], (settings.batch,), device=device)
    label = pool.label[pick]
    chance = torch.rand(2, settings.batch, device=device)
    # Only a mask that nothing else reaches into can ask for the bare background; 0.6 of them are so.
    bare = (chance[0] < settings.bare / 0.6) & (label[:, 3] == 1)
    clean = torch.where(bare[:, None, None, None], pool.bare[pick // per_scene], pool.shown[pick // per_target])
    masks = pool.masks[pick].float()
    condition = torch.cat([masks, pool.hidden[pick].float()], dim=1)
    return _Batch(clean.float(), condition, masks, captions.draw(label, bare, chance[1] < settings.dropped))


def _step_loss(
    run: Callable[..., tuple[Tensor]],
    text_encoder: CLIPTextModel,
    batch: _Batch,
    levels: Tensor,
    settings: DenoiserSettings,
) -> Tensor:
    count, device = batch.clean.shape[0], batch.clean.device
    spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    steps = (spread[torch.randperm(count, device=device)] * TRAIN_STEPS).long().clamp_max(TRAIN_STEPS - 1)
    level = levels[steps][:, None, None, None]
    noise = torch.randn_like(batch.clean)
    noisy = level.sqrt() * batch.clean + (1.0 - level).sqrt() * noise
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        states = text_encoder(batch.ids)[0]
        inputs = torch.cat([noisy, batch.condition], dim=1).contiguous(memory_format=torch.channels_last)
        guess = run(inputs, steps, states, return_dict=False)[0]
    ratio = level / (1.0 - level)
    weight = (settings.least_ratio / ratio).clamp_max(1.0) * (1.0 + settings.inside * batch.masks)
    return (weight * (guess.float() - noise).square()).mean()


def compile_ahead(settings: DenoiserSettings, device: torch.device) -> None:
    """Compiles the UNet's training step into the compiler's cache on disk, so that the real one starts sooner."""
    unet = build_unet().to(device).to(memory_format=torch.channels_last).train()
    run = torch.compile(unet)
    inputs = torch.randn(settings.batch, 9, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    steps = torch.randint(TRAIN_STEPS, (settings.batch,), device=device)
    states = torch.randn(settings.batch, MAX_LENGTH, _TEXT_WIDTH, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        guess = run(inputs, steps, states, return_dict=False)[0]
    guess.float().square().mean().backward()


def train_denoiser(
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    pool: LatentPool,
    settings: DenoiserSettings,
    *,
    seconds: float,
    part: tuple[float, float],
    device: torch.device,
    compiled: bool,
    report: Callable[[str], None],
    optimizer_state: dict[str, object] | None = None,
    max_steps: int | None = None,
) -> tuple[Average, dict[str, object]]:
    """Trains the denoiser for a given time.

    Args:
        denoiser: trained in place.
        tokenizer: of its text encoder.
        pool: encoded scenes, on `device`.
        settings: how.
        seconds: how long.
        part: where on the whole learning-rate curve, from 0 to 1, this run begins and ends.
        device: where.
        compiled: whether to compile the UNet.
        report: takes lines of progress.
        optimizer_state: the optimizer's state from the run before, or None.
        max_steps: stop after so many steps, or None.

    Returns:
        Averaged weights, and the optimizer's state.
    """
    denoiser.to(device).train()
    denoiser.unet.to(memory_format=torch.channels_last)
    captions = CaptionTable(tokenizer, device)
    run = torch.compile(denoiser.unet) if compiled else denoiser.unet
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    average = Average(denoiser, settings.decay)
    levels = signal_levels(device)
    start = begun = time.monotonic()
    step, total = 0, torch.zeros((), device=device)
    while True:
        spent = time.monotonic() - start
        if spent >= seconds or (max_steps is not None and step >= max_steps):
            break
        where = part[0] + (part[1] - part[0]) * spent / seconds
        warm = min(1.0, (step + 1) / settings.warm_up) if optimizer_state is None else 1.0
        rate = settings.rate * warm * (0.5 + 0.5 * math.cos(math.pi * where)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = _draw_batch(pool, captions, settings)
        loss = _step_loss(run, denoiser.text_encoder, batch, levels, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        average.update()
        total += loss.detach()
        step += 1
        if step == 1 or step % 250 == 0:
            now = time.monotonic()
            count = 1 if step == 1 else 249 if step == 250 else 250
            report(
                f"unet step {step} {now - start:.0f}s loss {total.item() / count:.4f} rate {rate:.2e} "
                f"{1000 * (now - begun) / count:.1f} ms a step"
            )
            begun = now
            total.zero_()
    report(f"unet stopped after {step} steps")
    return average, optimizer.state_dict()
