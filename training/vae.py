"""The autoencoder: 256x256 pixels to 4x32x32 latents and back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from training.averaging import Average

SCALING = 0.18215
"""Latents times this have unit deviation, as in Stable Diffusion."""


@dataclass(frozen=True)
class VaeSettings:
    """How the autoencoder is trained.

    Attributes:
        batch: images a step.
        rate: highest learning rate.
        warm_up: steps until it is reached.
        divergence: weight of the mean divergence from the unit Gaussian.
        masked: share of images that are partly blanked, as the inpainting condition is.
        vivid: share of images whose colours are stretched or exchanged.
    """

    batch: int = 48
    rate: float = 1.5e-3
    warm_up: int = 200
    divergence: float = 3e-4
    masked: float = 0.2
    vivid: float = 0.15


def build_vae() -> AutoencoderKL:
    """A fresh autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=SCALING,
    )


class _Trainee(nn.Module):
    """Encodes, samples and decodes in one call, so that it compiles as one."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.vae.quant_conv(self.vae.encoder(images)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 10.0)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        latents = mean + noise * torch.exp(0.5 * log_variance)
        return self.vae.decoder(self.vae.post_quant_conv(latents)).float(), divergence


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Pixel error, plus errors of the gradients at three scales, which keep edges sharp.

    Args:
        made: images, (B, 3, H, W), in [-1, 1].
        wanted: what they should be, same shape.

    Returns:
        A scalar.
    """
    gap = made - wanted
    loss = (gap.square() + 1e-6).sqrt().mean() + 3.0 * gap.square().mean()
    for scale in range(3):
        if scale:
            gap = functional.avg_pool2d(gap, 2)
        across = gap[..., 1:] - gap[..., :-1]
        down = gap[..., 1:, :] - gap[..., :-1, :]
        loss = loss + 0.5 * (across.abs().mean() + down.abs().mean())
    return loss


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 images (B, H, W, 3) to floats (B, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _vary(images: Tensor, covers: Tensor, settings: VaeSettings) -> Tensor:
    """Flips, blanks and recolours some of the images."""
    count = images.shape[0]
    pick = torch.rand(4, count, device=images.device)
    images = torch.where((pick[0] < 0.5)[:, None, None, None], images.flip(3), images)
    stretch = 0.7 + 0.7 * torch.rand(count, 3, 1, 1, device=images.device)
    shift = 0.5 * (torch.rand(count, 3, 1, 1, device=images.device) - 0.5)
    recoloured = (images * stretch + shift).clamp(-1.0, 1.0)
    images = torch.where((pick[1] < settings.vivid)[:, None, None, None], recoloured, images)
    blank = (pick[2] < settings.masked)[:, None, None, None] & covers
    return images.masked_fill(blank, 0.0)


def train_vae(
    vae: AutoencoderKL,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    settings: VaeSettings,
    *,
    seconds: float,
    device: torch.device,
    compiled: bool,
    report: Callable[[str], None],
    max_steps: int | None = None,
) -> AutoencoderKL:
    """Trains the autoencoder for a given time.

    Args:
        vae: the autoencoder, trained in place.
        draw: given a count, returns that many images (B, H, W, 3) uint8 and masks (B, 1, H, W) bool.
        settings: how.
        seconds: how long; the learning rate falls to nothing by then.
        device: where.
        compiled: whether to compile it.
        report: takes lines of progress.
        max_steps: stop after so many steps, or None.

    Returns:
        The autoencoder with averaged weights.
    """
    vae.to(device).to(memory_format=torch.channels_last).train()
    trainee: nn.Module = _Trainee(vae)
    run = torch.compile(trainee) if compiled else trainee
    loss_of = torch.compile(reconstruction_loss) if compiled else reconstruction_loss
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=device.type == "cuda"
    )
    average = Average(vae, 0.998)
    start = time.monotonic()
    step, begun = 0, start
    while True:
        spent = time.monotonic() - start
        if spent >= seconds or (max_steps is not None and step >= max_steps):
            break
        part = spent / seconds
        rate = settings.rate * min(1.0, (step + 1) / settings.warm_up) * (0.5 + 0.5 * math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate + 1e-6
        pixels, covers = draw(settings.batch)
        images = _vary(to_signed(pixels), covers, settings).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(settings.batch, 4, images.shape[2] // 8, images.shape[3] // 8, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            made, divergence = run(images, noise)
        rebuilt = loss_of(made, images)
        loss = rebuilt + settings.divergence * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step in (1, 20) or step % 500 == 0:
            now = time.monotonic()
            error = functional.mse_loss(made.detach(), images).item()
            report(
                f"vae step {step} {now - start:.0f}s loss {rebuilt.item():.4f} kl {divergence.item():.2f} "
                f"psnr {10 * math.log10(4 / error):.2f} rate {rate:.2e} "
                f"last step after {now - begun:.1f}s"
            )
            begun = now
    average.copy_to(vae)
    report(f"vae stopped after {step} steps")
    return vae.eval()


@torch.no_grad()
def set_scale(vae: AutoencoderKL, images: Tensor) -> None:
    """Shifts and scales each latent channel to mean 0 and deviation 1 / SCALING.

    The affine map is folded into the 1x1 convolutions around the latents, so that nothing else changes.

    Args:
        vae: the autoencoder, changed in place.
        images: images to measure on, (B, 3, H, W) in [-1, 1].
    """
    mean, _ = encode_moments(vae, images)
    middle = mean.mean(dim=(0, 2, 3))
    factor = 1.0 / (SCALING * mean.std(dim=(0, 2, 3)))
    channels = middle.shape[0]
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] *= factor[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - middle) * factor
    into.bias[channels:] += 2.0 * factor.log()
    out.bias += (out.weight[..., 0, 0] * middle[None, :]).sum(dim=1)
    out.weight /= factor[None, :, None, None]


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of images (B, 3, H, W); both (B, 4, H / 8, W / 8), unscaled."""
    parts = [vae.quant_conv(vae.encoder(part)).float() for part in images.split(batch)]
    mean, log_variance = torch.cat(parts).chunk(2, dim=1)
    return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> float:
    """Mean over images (B, 3, H, W), in [-1, 1], of the reconstruction's PSNR in dB."""
    values = []
    for part in images.split(batch):
        mean, _ = encode_moments(vae, part, batch)
        made = vae.decoder(vae.post_quant_conv(mean)).float().clamp(-1.0, 1.0)
        error = (made - part).square().mean(dim=(1, 2, 3))
        values.append(10.0 * torch.log10(4.0 / error.clamp_min(1e-10)))
    return torch.cat(values).mean().item()
