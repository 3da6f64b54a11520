"""Cuts boxes out of images on the accelerator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mask_boxes(covers: Tensor) -> Tensor:
    """Bounds of masks.

    Args:
        covers: (B, 1, H, W) bool, none of them empty.

    Returns:
        Left, top, right, bottom in pixels, (B, 4) float.
    """
    columns, rows = covers.any(dim=2)[:, 0], covers.any(dim=3)[:, 0]
    width, height = columns.shape[1], rows.shape[1]
    left, top = columns.float().argmax(1), rows.float().argmax(1)
    right, bottom = width - columns.flip(1).float().argmax(1), height - rows.flip(1).float().argmax(1)
    return torch.stack([left, top, right, bottom], dim=1).float()


def cut(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cuts boxes out of images and resizes them, blurring first what shrinks.

    Args:
        images: (B, C, H, W).
        boxes: left, top, right, bottom in pixels, (B, 4); they may reach beyond the image.
        side: side of a cutting in pixels.

    Returns:
        (B, C, side, side).
    """
    height, width = images.shape[2:]
    size = torch.tensor([width, height], device=images.device, dtype=torch.float32)
    low, high = boxes[:, :2] / size * 2 - 1, boxes[:, 2:] / size * 2 - 1
    middle, half = (low + high) / 2, (high - low) / 2
    theta = torch.zeros(images.shape[0], 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = half[:, 0], half[:, 1], middle
    grid = functional.affine_grid(theta, [images.shape[0], images.shape[1], side * 2, side * 2], align_corners=False)
    found = functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return functional.avg_pool2d(found, 2)
