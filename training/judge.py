"""A small classifier, trained apart on drawn scenes, that says which thing of which colour it sees."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from training.crops import cut, mask_boxes
from training.data import SceneArrays
from training.pool import unpack_masks
from training.vae import to_signed
from training.world import COLOUR_NAMES, THINGS

WEIGHTS = Path(__file__).with_name("judge.safetensors")
NO_THING = len(THINGS)
_SIDE = 64


class Judge(nn.Module):
    """Names what stands in a masked place: a thing, or none, and its colour, or none."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()) for a, b in pairwise(widths)
        )
        self.thing = nn.Linear(widths[-1] * 4, len(THINGS) + 1)
        self.colour = nn.Linear(widths[-1] * 4, len(COLOUR_NAMES) + 1)

    def forward(self, images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Judges.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            boxes: bounds of the masks in pixels, (B, 4).

        Returns:
            Scores of things (B, things + 1) and of colours (B, colours + 1).
        """
        return self.name(cut(images, boxes, _SIDE))

    def name(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Names what crops (B, 3, 64, 64) show; returns scores as forward does."""
        features = crops
        for layer in self.layers:
            features = layer(features)
        pooled = functional.adaptive_avg_pool2d(features, 2).flatten(1)
        return self.thing(pooled), self.colour(pooled)


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Opens the classifier with its trained weights."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.eval()


def save_judge(judge: Judge, path: Path = WEIGHTS) -> None:
    """Writes the classifier's weights in half precision."""
    save_file({k: v.detach().cpu().half().contiguous() for k, v in judge.state_dict().items()}, path)


def _batch(arrays: SceneArrays, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, boxes, things and colours of random scenes, a few of them bare."""
    scenes, targets, masks = arrays.masks.shape[:3]
    n = torch.randint(scenes, (count,)).numpy()
    k = torch.randint(targets, (count,)).numpy()
    m = torch.randint(masks, (count,)).numpy()
    covers = unpack_masks(torch.from_numpy(arrays.masks[n, k, m]).to(device))
    label = torch.from_numpy(arrays.label[n, k]).long().to(device)
    bare = torch.rand(count) < 0.15
    bare &= torch.from_numpy(arrays.mask_label[n, k, m, 1] == 1)
    pixels = torch.from_numpy(arrays.shown[n, k])
    pixels[bare] = torch.from_numpy(arrays.bare[n])[bare]
    images = to_signed(pixels.to(device))
    bare = bare.to(device)
    thing = torch.where(bare, torch.full_like(label[:, 0], NO_THING), label[:, 0])
    colour = torch.where(bare, torch.full_like(label[:, 1], len(COLOUR_NAMES)), label[:, 1])
    return images, mask_boxes(covers), thing, colour


def train_judge(arrays: SceneArrays, steps: int, device: torch.device, batch: int = 64) -> Judge:
    """Trains the classifier on drawn scenes, never on painted ones.

    Args:
        arrays: drawn scenes.
        steps: how long.
        device: where.
        batch: scenes a step.

    Returns:
        The classifier.
    """
    judge = Judge().to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        images, boxes, thing, colour = _batch(arrays, batch, device)
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes = boxes + (torch.rand_like(boxes) - 0.4) * torch.tensor([-0.15, -0.15, 0.15, 0.15], device=device) * size
        crops = cut(images, boxes, _SIDE)
        crops = crops * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, device=device))
        crops = crops + 0.06 * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(crops)
        soft = functional.interpolate(functional.avg_pool2d(crops, 2), scale_factor=2, mode="bilinear")
        crops = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.3, soft, crops)
        scores, shades = judge.name(crops)
        loss = functional.cross_entropy(scores, thing, label_smoothing=0.02)
        loss = loss + functional.cross_entropy(shades, colour, label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        curve.step()
    return judge.eval()


@torch.no_grad()
def judge_accuracy(judge: Judge, arrays: SceneArrays, device: torch.device) -> tuple[float, float]:
    """Shares of things and of colours that the classifier names rightly on drawn scenes."""
    images, boxes, thing, colour = _batch(arrays, min(1024, 4 * arrays.label.shape[0]), device)
    scores, shades = judge(images, boxes)
    return (scores.argmax(1) == thing).float().mean().item(), (shades.argmax(1) == colour).float().mean().item()
