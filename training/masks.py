"""Draws masks that hide a thing: boxes, ellipses, brush strokes, outlines, and much larger ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.landscape import SIZE

KINDS: tuple[str, ...] = ("box", "ellipse", "brush", "outline")
_SHARES = (0.38, 0.22, 0.24, 0.16)


@dataclass(frozen=True)
class Mask:
    """A mask over a scene.

    Attributes:
        cover: uint8, 255 where something is to be painted, shape (SIZE, SIZE).
        kind: one of KINDS.
        size: size class of the thing in it (0 middling, 1 small, 2 big), as captions say it.
        clear: whether nothing else that stands in the scene reaches into it.
    """

    cover: np.ndarray
    kind: str
    size: int
    clear: bool


Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are one past the last."""


def bounding_box(alpha: np.ndarray) -> Box:
    """Bounds of everything visible.

    Args:
        alpha: opacity, shape (SIZE, SIZE).

    Returns:
        Its bounding box.
    """
    seen = alpha > 0
    rows = np.flatnonzero(seen.any(axis=1))
    columns = np.flatnonzero(seen.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _dilated(alpha: np.ndarray, radius: int) -> Image.Image:
    """Everything within about `radius` pixels of the visible, as a 0/255 picture."""
    picture = Image.fromarray(np.where(alpha > 0.0, 255, 0).astype(np.uint8))
    return picture.filter(ImageFilter.BoxBlur(radius)).point(lambda v: 255 if v > 2 else 0)


def _loosened(box: Box, rng: np.random.Generator, least: float) -> tuple[float, float, float, float]:
    """A box around `box`, larger by a random factor each way, with the inner one near its middle."""
    draw = rng.random()
    if draw < 0.62:
        low, high = 1.04, 1.35
    elif draw < 0.88:
        low, high = 1.30, 1.9
    else:
        low, high = 1.8, 3.2
    common = rng.uniform(low, high)
    sides = []
    for near, far in ((box[0], box[2]), (box[1], box[3])):
        length = far - near
        factor = max(least, common * rng.uniform(0.9, 1.12), 1.02)
        slack = length * (factor - 1.0) + 4.0
        share = float(np.clip(rng.normal(0.5, 0.14), 0.1, 0.9)) if least <= 1.0 else 0.5
        sides.append((near - slack * share, far + slack * (1.0 - share)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def _brush(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], rng: np.random.Generator) -> None:
    """Scribbles to and fro over a box with a thick round brush."""
    x0, y0, x1, y1 = box
    strokes = int(rng.integers(3, 6))
    pitch = (y1 - y0) / strokes
    width = max(8, round(pitch * rng.uniform(1.1, 1.7)))
    points = []
    for i in range(strokes):
        y = y0 + (i + 0.5) * pitch
        ends = (x0 + width / 3, x1 - width / 3) if i % 2 == 0 else (x1 - width / 3, x0 + width / 3)
        points += [(e + rng.normal(0, 3), y + rng.normal(0, 0.12 * pitch)) for e in ends]
    draw.line(points, fill=255, width=width, joint="curve")
    for x, y in points:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)


def _draw_cover(alpha: np.ndarray, box: Box, kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "outline":
        return np.asarray(_dilated(alpha, int(rng.integers(3, 13))))
    picture = _dilated(alpha, 2)
    draw = ImageDraw.Draw(picture)
    bounds = _loosened(box, rng, 1.22 if kind == "ellipse" else 1.0)
    if kind == "box":
        draw.rectangle(bounds, fill=255)
    elif kind == "ellipse":
        draw.ellipse(bounds, fill=255)
    else:
        _brush(draw, bounds, rng)
    return np.asarray(picture)


def draw_mask(alpha: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Mask:
    """Draws a random mask that hides a thing completely, and little of anything else.

    Args:
        alpha: the thing's opacity, shape (SIZE, SIZE).
        others: opacity of whatever else stands in the scene, shape (SIZE, SIZE).
        rng: decides everything.

    Returns:
        The mask.
    """
    box = bounding_box(alpha)
    beside = (others > 0) & (alpha <= 0)
    allowed = 0.12 * float((others > 0).sum())
    for _attempt in range(4):
        kind = str(rng.choice(KINDS, p=_SHARES))
        cover = _draw_cover(alpha, box, kind, rng)
        if rng.random() < 0.015:
            cover = np.full((SIZE, SIZE), 255, dtype=np.uint8)
        if int((beside & (cover > 0)).sum()) <= allowed:
            break
    else:
        kind, cover = "outline", np.asarray(_dilated(alpha, 4))
    outer = bounding_box(cover)
    share = ((box[2] - box[0]) * (box[3] - box[1])) / ((outer[2] - outer[0]) * (outer[3] - outer[1]))
    fill = float(np.sqrt(share))
    clear = not bool(((others > 0) & (cover > 0)).any())
    return Mask(cover, kind, 1 if fill < 0.6 else 2 if fill > 0.84 else 0, clear)
