"""Contact sheets: what was asked for, and what was painted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

_LABEL_HEIGHT = 14


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    signed = images.detach().float().cpu().permute(0, 2, 3, 1)
    return ((signed + 1.0) * 127.5 + 0.5).clamp(0, 255).byte().numpy()


def mark(images: np.ndarray, covers: np.ndarray) -> np.ndarray:
    """Shows masks (B, 1, H, W) bool on images (B, H, W, 3) uint8 by paling what they hide."""
    pale = (images * 0.25 + np.array([190, 190, 190])).clip(0, 255).astype(np.uint8)
    return np.where(covers[:, 0, :, :, None], pale, images)


def write_sheet(path: Path, rows: list[np.ndarray], labels: list[str], *, columns: int, side: int = 128) -> None:
    """Writes a contact sheet.

    Args:
        path: PNG file to write.
        rows: stacks of images, each (B, H, W, 3) uint8; the k-th images of all stacks stand one below the other.
        labels: B captions.
        columns: images side by side.
        side: side of a shown image in pixels.
    """
    count, stacks = len(labels), len(rows)
    cell = stacks * side + _LABEL_HEIGHT
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * side, lines * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(count):
        x, y = (i % columns) * side, (i // columns) * cell
        draw.text((x + 2, y + 1), labels[i][:24], fill="black")
        for s, stack in enumerate(rows):
            shown = Image.fromarray(stack[i])
            if shown.size != (side, side):
                shown = shown.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (x, y + _LABEL_HEIGHT + s * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
