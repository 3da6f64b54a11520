"""Draws the things of the world as antialiased sprites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from training.world import COLOUR_NAMES, COLOURS, NO_COLOUR, THINGS

Rgb = tuple[int, int, int]
Point = tuple[float, float]

_OVERSAMPLE = 4
_WOOD: Rgb = (126, 84, 54)
_DARK: Rgb = (52, 50, 58)
_PALE: Rgb = (236, 232, 220)
_GLASS: Rgb = (196, 224, 236)


def shade(colour: Rgb, amount: float) -> Rgb:
    """Lightens (amount > 0, toward white) or darkens (amount < 0, toward black) a colour."""
    goal = 255.0 if amount > 0 else 0.0
    part = abs(amount)
    return tuple(round(c + (goal - c) * part) for c in colour)  # type: ignore[return-value]


class Canvas:
    """A transparent drawing board whose coordinates run from 0 to 1 both ways, y downward."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width * _OVERSAMPLE
        self.height = height * _OVERSAMPLE
        self.image = Image.new("RGBA", (self.width, self.height), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def _xy(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.width, y * self.height) for x, y in points]

    def polygon(self, points: Sequence[Point], fill: Rgb) -> None:
        """Fills a polygon."""
        self._draw.polygon(self._xy(points), fill=(*fill, 255))

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb, radius: float = 0.0) -> None:  # noqa: PLR0917
        """Fills a box, its corners rounded by `radius` (in widths)."""
        (ax, ay), (bx, by) = self._xy([(x0, y0), (x1, y1)])
        self._draw.rounded_rectangle((ax, ay, bx, by), radius=radius * self.width, fill=(*fill, 255))

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill: Rgb) -> None:
        """Fills an ellipse given by its centre and radii."""
        (ax, ay), (bx, by) = self._xy([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        self._draw.ellipse((ax, ay, bx, by), fill=(*fill, 255))

    def erase_ellipse(self, cx: float, cy: float, rx: float, ry: float) -> None:
        """Makes an ellipse transparent again."""
        (ax, ay), (bx, by) = self._xy([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        self._draw.ellipse((ax, ay, bx, by), fill=(0, 0, 0, 0))

    def line(self, points: Sequence[Point], width: float, fill: Rgb) -> None:
        """Strokes a line with round ends; `width` is in widths of the board."""
        thick = max(1, round(width * self.width))
        xy = self._xy(points)
        self._draw.line(xy, fill=(*fill, 255), width=thick, joint="curve")
        for x, y in (xy[0], xy[-1]):
            self._draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=(*fill, 255))


def _house(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    roof = (104, 62, 50) if rng.random() < 0.6 else (84, 84, 98)
    eaves = 0.42 + rng.uniform(-0.03, 0.03)
    if rng.random() < 0.6:
        c.box(0.70, 0.10, 0.80, 0.36, shade(roof, -0.25))
    c.box(0.09, eaves - 0.02, 0.91, 0.985, colour)
    c.box(0.78, eaves - 0.02, 0.91, 0.985, shade(colour, -0.16))
    c.polygon([(0.0, eaves + 0.02), (0.5, 0.02), (1.0, eaves + 0.02)], roof)
    c.polygon([(0.5, 0.02), (1.0, eaves + 0.02), (0.87, eaves + 0.02)], shade(roof, -0.18))
    door = 0.30 if rng.random() < 0.5 else 0.62
    other = 0.62 if door == 0.30 else 0.26
    c.box(door - 0.085, 0.66, door + 0.085, 0.985, _WOOD, 0.02)
    c.box(other - 0.10, 0.56, other + 0.10, 0.76, _PALE, 0.01)
    c.box(other - 0.075, 0.585, other + 0.075, 0.735, (250, 226, 140), 0.0)


def _tree(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    c.polygon([(0.43, 0.55), (0.57, 0.55), (0.60, 0.99), (0.40, 0.99)], _WOOD)
    c.polygon([(0.51, 0.55), (0.57, 0.55), (0.60, 0.99), (0.52, 0.99)], shade(_WOOD, -0.2))
    lobes = [(0.27, 0.48, 0.26), (0.73, 0.48, 0.26), (0.5, 0.28, 0.31), (0.5, 0.52, 0.30)]
    ratio = c.width / c.height
    for x, y, r in lobes:
        c.ellipse(x, y, r, r * ratio, shade(colour, -0.14))
    for x, y, r in lobes:
        c.ellipse(x - 0.015, y - 0.02, r * 0.93, r * 0.93 * ratio, colour)
    c.ellipse(0.40 + rng.uniform(-0.04, 0.04), 0.24, 0.15, 0.13 * ratio, shade(colour, 0.16))


def _sun(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    rays = 10
    turn = rng.uniform(0, 2 * math.pi / rays)
    for i in range(rays):
        a = turn + 2 * math.pi * i / rays
        left, right = a - 0.16, a + 0.16
        c.polygon(
            [
                (0.5 + 0.36 * math.cos(left), 0.5 + 0.36 * math.sin(left)),
                (0.5 + 0.49 * math.cos(a), 0.5 + 0.49 * math.sin(a)),
                (0.5 + 0.36 * math.cos(right), 0.5 + 0.36 * math.sin(right)),
            ],
            colour,
        )
    c.ellipse(0.5, 0.5, 0.315, 0.315, shade(colour, -0.07))
    c.ellipse(0.5, 0.5, 0.285, 0.285, shade(colour, 0.12))


def _moon(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    side = 1.0 if rng.random() < 0.5 else -1.0
    c.ellipse(0.5, 0.5, 0.48, 0.48, colour)
    c.erase_ellipse(0.5 + side * 0.24, 0.44, 0.39, 0.39)


def _boat(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    side = 1.0 if rng.random() < 0.5 else -1.0

    def flip(points: Sequence[Point]) -> list[Point]:
        return [(0.5 + side * (x - 0.5), y) for x, y in points]

    c.line([(0.48, 0.03), (0.48, 0.74)], 0.035, _WOOD)
    c.polygon(flip([(0.52, 0.04), (0.92, 0.64), (0.52, 0.64)]), shade(colour, 0.22))
    c.polygon(flip([(0.44, 0.16), (0.44, 0.64), (0.14, 0.64)]), shade(colour, 0.48))
    c.polygon([(0.02, 0.72), (0.98, 0.72), (0.82, 0.97), (0.18, 0.97)], colour)
    c.polygon([(0.02, 0.72), (0.98, 0.72), (0.95, 0.775), (0.05, 0.775)], shade(colour, -0.3))


def _car(c: Canvas, colour: Rgb, _rng: np.random.Generator) -> None:
    ratio = c.width / c.height
    c.polygon([(0.20, 0.46), (0.31, 0.06), (0.66, 0.06), (0.82, 0.46)], colour)
    c.polygon([(0.26, 0.44), (0.345, 0.14), (0.475, 0.14), (0.475, 0.44)], _GLASS)
    c.polygon([(0.52, 0.44), (0.52, 0.14), (0.635, 0.14), (0.75, 0.44)], _GLASS)
    c.box(0.015, 0.40, 0.985, 0.80, colour, 0.06)
    c.box(0.015, 0.66, 0.985, 0.80, shade(colour, -0.18), 0.04)
    c.box(0.93, 0.46, 0.985, 0.58, (255, 236, 160), 0.01)
    for x in (0.235, 0.765):
        c.ellipse(x, 0.78, 0.118, 0.118 * ratio, _DARK)
        c.ellipse(x, 0.78, 0.055, 0.055 * ratio, (190, 190, 196))


def _ball(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    c.ellipse(0.5, 0.5, 0.48, 0.48, shade(colour, -0.16))
    c.ellipse(0.48, 0.48, 0.45, 0.45, colour)
    stripe = shade(colour, 0.72) if min(colour) < 200 else (150, 150, 158)
    turn = rng.uniform(-0.5, 0.5)
    points = []
    for i in range(25):
        a = math.pi * (i / 24 - 0.5)
        points.append((0.11 * math.cos(a), 0.465 * math.sin(a)))
    for i in range(25):
        a = math.pi * (0.5 - i / 24)
        points.append((-0.11 * math.cos(a), 0.465 * math.sin(a)))
    cos, sin = math.cos(turn), math.sin(turn)
    c.polygon([(0.5 + x * cos - y * sin, 0.5 + x * sin + y * cos) for x, y in points], stripe)


def _flower(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    ratio = c.width / c.height
    stem = (62, 128, 60)
    c.line([(0.5, 0.40), (0.5 + rng.uniform(-0.05, 0.05), 0.70), (0.5, 0.97)], 0.065, stem)
    c.polygon([(0.5, 0.86), (0.72, 0.68), (0.86, 0.70), (0.74, 0.84)], shade(stem, 0.08))
    c.polygon([(0.5, 0.92), (0.28, 0.74), (0.14, 0.76), (0.26, 0.90)], shade(stem, -0.05))
    turn = rng.uniform(0, 2 * math.pi / 6)
    cy = 0.48 * ratio
    for i in range(6):
        a = turn + 2 * math.pi * i / 6
        c.ellipse(0.5 + 0.27 * math.cos(a), cy + 0.27 * ratio * math.sin(a), 0.20, 0.20 * ratio, colour)
    c.ellipse(0.5, cy, 0.17, 0.17 * ratio, (250, 206, 70) if colour[2] > 110 or colour[0] < 200 else (120, 70, 40))


def _fence(c: Canvas, colour: Rgb, _rng: np.random.Generator) -> None:
    count = 5
    for y in (0.38, 0.68):
        c.box(0.0, y, 1.0, y + 0.10, shade(colour, -0.2))
    for i in range(count):
        x = 0.035 + i * (1 - 0.07 - 0.125) / (count - 1)
        c.polygon([(x, 0.18), (x + 0.0625, 0.02), (x + 0.125, 0.18), (x + 0.125, 0.98), (x, 0.98)], colour)
        c.polygon([(x + 0.09, 0.11), (x + 0.125, 0.18), (x + 0.125, 0.98), (x + 0.09, 0.98)], shade(colour, -0.12))


def _cloth(phase: float, top: float, bottom: float, left: float, right: float) -> list[Point]:
    """Outline of a waving cloth."""
    steps = [i / 20 for i in range(21)]
    wave = [0.035 * math.sin(phase + 5.0 * s) * min(1.0, 3 * s) for s in steps]
    upper = [(left + (right - left) * s, top + w) for s, w in zip(steps, wave, strict=True)]
    lower = [(left + (right - left) * s, bottom + w) for s, w in zip(steps, wave, strict=True)]
    return upper + lower[::-1]


def _flag(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    c.line([(0.10, 0.04), (0.10, 0.97)], 0.06, _WOOD)
    phase = rng.uniform(-0.6, 0.6)
    c.polygon(_cloth(phase, 0.08, 0.56, 0.12, 0.98), colour)
    c.polygon(_cloth(phase, 0.44, 0.56, 0.12, 0.98), shade(colour, -0.12))


def _pirate_flag(c: Canvas, _colour: Rgb, rng: np.random.Generator) -> None:
    ratio = c.width / c.height
    c.line([(0.06, 0.03), (0.06, 0.97)], 0.055, _WOOD)
    cloth = (26, 26, 30)
    bone = (244, 242, 236)
    c.polygon(_cloth(rng.uniform(-0.6, 0.6), 0.06, 0.70, 0.08, 0.985), cloth)
    x, y = 0.53, 0.36
    for a, b in (((-0.25, 0.10), (0.25, 0.25)), ((-0.25, 0.25), (0.25, 0.10))):
        c.line([(x + a[0], y + a[1]), (x + b[0], y + b[1])], 0.055, bone)
    c.ellipse(x, y - 0.06, 0.165, 0.155 * ratio, bone)
    c.box(x - 0.09, y + 0.0, x + 0.09, y + 0.13, bone, 0.03)
    for dx in (-0.07, 0.07):
        c.ellipse(x + dx, y - 0.05, 0.05, 0.055 * ratio, cloth)


def _balloon(c: Canvas, colour: Rgb, _rng: np.random.Generator) -> None:
    ratio = c.width / c.height
    c.line([(0.30, 0.62), (0.42, 0.86)], 0.025, _WOOD)
    c.line([(0.70, 0.62), (0.58, 0.86)], 0.025, _WOOD)
    c.polygon([(0.08, 0.50), (0.92, 0.50), (0.62, 0.78), (0.38, 0.78)], colour)
    c.ellipse(0.5, 0.49 * ratio, 0.48, 0.48 * ratio, colour)
    light = shade(colour, 0.45) if min(colour) < 200 else (176, 178, 188)
    c.ellipse(0.5, 0.49 * ratio, 0.17, 0.475 * ratio, light)
    c.polygon([(0.37, 0.54), (0.63, 0.54), (0.55, 0.78), (0.45, 0.78)], light)
    c.box(0.40, 0.85, 0.60, 0.985, _WOOD, 0.03)


def _mushroom(c: Canvas, colour: Rgb, rng: np.random.Generator) -> None:
    c.polygon([(0.39, 0.50), (0.61, 0.50), (0.66, 0.98), (0.34, 0.98)], (240, 228, 204))
    c.polygon([(0.53, 0.50), (0.61, 0.50), (0.66, 0.98), (0.55, 0.98)], (216, 202, 176))
    cap = [(0.5 - 0.48 * math.cos(math.pi * i / 30), 0.58 - 0.54 * math.sin(math.pi * i / 30)) for i in range(31)]
    c.polygon(cap, colour)
    c.ellipse(0.5, 0.57, 0.48, 0.085, shade(colour, -0.2))
    dot = (250, 248, 240) if min(colour) < 200 else (214, 120, 100)
    shift = rng.uniform(-0.03, 0.03)
    for x, y, r in ((0.50, 0.20, 0.085), (0.27, 0.38, 0.07), (0.74, 0.36, 0.075)):
        c.ellipse(x + shift, y, r, r * 0.9, dot)


_DRAWERS: dict[str, Callable[[Canvas, Rgb, np.random.Generator], None]] = {
    "house": _house,
    "tree": _tree,
    "sun": _sun,
    "moon": _moon,
    "boat": _boat,
    "car": _car,
    "ball": _ball,
    "flower": _flower,
    "fence": _fence,
    "flag": _flag,
    "pirate flag": _pirate_flag,
    "balloon": _balloon,
    "mushroom": _mushroom,
}


def draw_thing(thing: int, colour: int, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one thing.

    Args:
        thing: index into THINGS.
        colour: index into COLOUR_NAMES, or NO_COLOUR.
        width: width of the sprite in pixels.
        height: height of the sprite in pixels.
        rng: decides the small variations.

    Returns:
        Premultiplied RGBA, float32 in [0, 1], shape (height, width, 4).
    """
    base = np.array((30, 30, 34) if colour == NO_COLOUR else COLOURS[COLOUR_NAMES[colour]], dtype=np.float32)
    varied = np.clip(base * rng.uniform(0.94, 1.05) + rng.uniform(-8, 8, 3), 0, 255)
    canvas = Canvas(width, height)
    _DRAWERS[THINGS[thing].name](canvas, tuple(int(v) for v in varied), rng)  # type: ignore[arg-type]
    pixels = np.asarray(canvas.image.convert("RGBa").reduce(_OVERSAMPLE), dtype=np.float32) / 255.0
    light = np.linspace(1.05, 0.95, height, dtype=np.float32)[:, None, None]  # light falls from above
    pixels[..., :3] = np.minimum(pixels[..., :3] * light, pixels[..., 3:])
    return pixels
