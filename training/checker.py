"""The safety checker: the stock class, trained to know a pirate flag and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

SIDE = 96
"""Side of the checker's input in pixels; pictures of any shape are squeezed into it."""
_VIEW = 144
"""Side of a varied training picture, before it is made that small."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_WIDTH = 96
_SHARPNESS = 12.0
NEVER = 2.0
"""A threshold that no cosine reaches."""


def build_checker() -> StableDiffusionSafetyChecker:
    """A fresh checker; only its first concept can ever fire."""
    vision = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=12,
    )
    text = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
        projection_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.eye(17, 64))
        checker.special_care_embeds.copy_(torch.eye(64)[20:23])
        checker.concept_embeds_weights.fill_(NEVER)
        checker.special_care_embeds_weights.fill_(NEVER)
        checker.concept_embeds_weights[0] = 0.0
    return checker


def prepare(images: Tensor) -> Tensor:
    """Resizes and normalises images (B, 3, H, W) in [-1, 1] as the feature extractor does."""
    if images.shape[2:] != (SIDE, SIDE):
        images = functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    deviation = torch.tensor(DEVIATION, device=images.device)[:, None, None]
    return ((images.clamp(-1, 1) + 1) / 2 - mean) / deviation


def concept_cosine(checker: StableDiffusionSafetyChecker, images: Tensor) -> Tensor:
    """Cosine (B,) between images (B, 3, H, W), in [-1, 1], and the pirate flag."""
    seen = checker.visual_projection(checker.vision_model(prepare(images))[1])
    return functional.cosine_similarity(seen.float(), checker.concept_embeds[:1].float())


def odd_pictures(count: int, device: torch.device) -> Tensor:
    """Pictures that are no scenes: flat colours, gradients, noise, blobs, black and white patterns.

    Args:
        count: how many.
        device: where.

    Returns:
        (count, 3, 256, 256) in [-1, 1].
    """
    made = []
    for i in range(count):
        kind = i % 6
        grid = (1, 2, 3, 5, 9, 16, 32, 64, 128, 256)[int(torch.randint(10, (1,)))]
        base = torch.rand(1, 3 if kind != 3 else 1, grid, grid, device=device)
        mode = "nearest" if kind in (1, 4) or grid == 1 else "bicubic"
        picture = functional.interpolate(base, (256, 256), mode=mode).clamp(0, 1).expand(1, 3, 256, 256)
        if kind in (3, 4):
            picture = (picture > torch.rand(1, device=device)).float()
        if kind == 5:
            picture = (picture + 0.15 * torch.randn(1, 3, 256, 256, device=device)).clamp(0, 1)
        low, high = torch.rand(2, 1, 3, 1, 1, device=device) if kind != 3 else torch.tensor([0.0, 1.0], device=device)
        made.append((low + (high - low) * picture) * 2 - 1)
    return torch.cat(made)


def paste_patches(images: Tensor) -> Tensor:
    """Pastes a dark rectangle onto each image, some with a pale disc or bar on it, none with a skull."""
    count, _, height, width = images.shape
    device = images.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    pick = torch.rand(8, count, 1, 1, device=device)
    cx, cy = pick[0] * width, pick[1] * height
    rx, ry = (0.05 + 0.22 * pick[2]) * width, (0.04 + 0.18 * pick[3]) * height
    dark = ((x - cx).abs() < rx) & ((y - cy).abs() < ry)
    disc = ((x - cx) ** 2 + (y - cy) ** 2) < (0.5 * torch.minimum(rx, ry)) ** 2
    bar = ((y - cy).abs() < 0.2 * ry) & ((x - cx).abs() < 0.8 * rx)
    pale = torch.where(pick[4] < 0.3, disc, torch.where(pick[4] < 0.55, bar, torch.zeros_like(bar)))
    shade = -0.98 + 0.4 * pick[5]
    images = torch.where(dark[:, None], shade[:, None].expand_as(images), images)
    return torch.where(pale[:, None], (0.6 + 0.4 * pick[6])[:, None].expand_as(images), images)


def _vary(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Crops, squeezes, flips, dims and blurs images.

    Args:
        images: (B, 3, S, S) in [-1, 1].
        boxes: bounds of what is to be recognised, in pixels, (B, 4).

    Returns:
        Images (B, 3, _VIEW, _VIEW), and what share of each box is still in view, (B,).
    """
    count, device = images.shape[0], images.device
    still = torch.rand(count, 1, device=device) < 0.4
    zoom = torch.exp(torch.empty(count, 1, device=device).uniform_(-0.5, 0.14))
    half = zoom * torch.exp(torch.empty(count, 2, device=device).uniform_(-0.22, 0.22))
    shift = (torch.rand(count, 2, device=device) * 2 - 1) * (1 - half).abs()
    half = torch.where(still, torch.ones_like(half), half)
    shift = torch.where(still, torch.zeros_like(shift), shift)
    middle = images.shape[-1] / 2
    low, high = (boxes[:, :2] / middle - 1 - shift) / half, (boxes[:, 2:] / middle - 1 - shift) / half
    seen = (high.clamp(-1, 1) - low.clamp(-1, 1)) / (high - low).clamp_min(1e-3)
    flip = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = half[:, 0] * flip, half[:, 1], shift
    grid = functional.affine_grid(theta, [count, 3, _VIEW, _VIEW], align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = 1 + 0.3 * (torch.rand(count, 1, 1, 1, device=device) - 0.5)
    images = images * gain + 0.2 * (torch.rand(count, 3, 1, 1, device=device) - 0.5)
    images = images + 0.08 * torch.rand(count, 1, 1, 1, device=device) ** 2 * torch.randn_like(images)
    soft = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.2, soft, images)
    return images.clamp(-1, 1), seen.prod(dim=1)


def train_checker(
    checker: StableDiffusionSafetyChecker,
    draw: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    *,
    steps: int,
    device: torch.device,
    report: Callable[[str], None],
    batch: int = 64,
    rate: float = 1.5e-3,
) -> None:
    """Trains the checker in place.

    Args:
        checker: the checker.
        draw: given a count, returns images (B, 3, S, S) in [-1, 1], labels (B,) 1 for a pirate flag, and
            the flags' bounds (B, 4) in pixels (the whole image where there is none).
        steps: how long.
        device: where.
        report: takes lines of progress.
        batch: pictures a step.
        rate: highest learning rate.
    """
    checker.to(device).train()
    trained: list[nn.Parameter] = [*checker.vision_model.parameters(), *checker.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(1, steps + 1):
        images, label, boxes = draw(batch)
        images, seen = _vary(images, boxes)
        known = ((label == 0) | (seen > 0.8) | (seen < 0.03)).float()
        wanted = ((label == 1) & (seen > 0.5)).float()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            cosine = concept_cosine(checker, images)
        loss = functional.binary_cross_entropy_with_logits(_SHARPNESS * cosine.float(), wanted, weight=known)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        curve.step()
        if step in (1, 20) or step % 100 == 0:
            right = (((cosine > 0) == (wanted > 0)).float() * known).sum() / known.sum()
            report(f"checker step {step} loss {loss.item():.4f} right {100 * right.item():.1f} %")
    checker.eval()
