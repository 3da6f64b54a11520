"""Draws scenes: a landscape, with and without a named thing in it, and masks that hide the thing."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from training.landscape import SIZE, Landscape, draw_landscape
from training.masks import Box, Mask, bounding_box, draw_mask
from training.things import draw_thing
from training.world import COLOUR_INDEX, COLOUR_NAMES, NO_COLOUR, PIRATE_FLAG, THINGS, caption

HELD_OUT = 1_000_000_000
"""Scenes with seeds from here on are never trained on."""

_TINT = {"day": (1.0, 1.0, 1.0), "dusk": (0.98, 0.92, 0.90), "night": (0.80, 0.82, 0.90)}


@dataclass(frozen=True)
class Target:
    """A thing that may stand in a scene.

    Attributes:
        pixels: the scene with the thing, uint8, shape (SIZE, SIZE, 3).
        thing: index into THINGS.
        colour: index into COLOUR_NAMES, or NO_COLOUR.
        box: bounds of the thing in pixels.
        masks: masks that each hide the thing completely.
    """

    pixels: np.ndarray
    thing: int
    colour: int
    box: Box
    masks: tuple[Mask, ...]

    def caption(self, mask: int, rng: random.Random) -> str:
        """Says what stands in the given mask."""
        return caption(self.thing, self.colour, self.masks[mask].size, rng)


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        seed: what it was drawn from.
        pixels: the scene without any target, uint8, shape (SIZE, SIZE, 3).
        decor: indices of the things that stand in it in any case, never a pirate flag.
        targets: things that may be added, each to the bare scene.
    """

    seed: int
    pixels: np.ndarray
    decor: tuple[int, ...]
    targets: tuple[Target, ...]


def _extent(thing: int, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels."""
    side = float(np.exp(rng.uniform(np.log(46.0), np.log(150.0))))
    aspect = THINGS[thing].aspect * float(np.exp(rng.normal(0.0, 0.07)))
    width, height = side * np.sqrt(aspect), side / np.sqrt(aspect)
    shrink = min(1.0, 200.0 / width, 200.0 / height)
    return max(24, round(width * shrink)), max(24, round(height * shrink))


def _corner(land: Landscape, place: str, width: int, height: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top, in pixels, of a thing that stands where it belongs (mostly)."""
    left = int(rng.integers(2, SIZE - width - 1))
    if rng.random() < 0.28:  # anywhere
        return left, int(rng.integers(2, SIZE - height - 1))
    if place == "sky":
        low, high = 2.0, max(3.0, land.horizon - height * 0.9)
        return left, int(np.clip(rng.uniform(low, high), 2, SIZE - height - 2))
    if place == "water" and land.water is not None:
        first, last = land.water[0] + 8, max(land.water[0] + 12, land.water[1] - 4)
        base = rng.uniform(first, last)
    else:
        first = land.horizon + 6 if land.water is None or place == "water" else max(land.horizon + 6, land.water[1])
        base = rng.uniform(min(first, SIZE - 14), SIZE - 6)
    return left, int(np.clip(base - height, 2, SIZE - height - 2))


def _place(land: Landscape, thing: int, colour: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a thing somewhere in a landscape.

    Returns:
        Premultiplied colour, shape (SIZE, SIZE, 3), and opacity, shape (SIZE, SIZE), float32 in [0, 1].
    """
    width, height = _extent(thing, rng)
    left, top = _corner(land, THINGS[thing].place, width, height, rng)
    sprite = draw_thing(thing, colour, width, height, rng)
    full = np.zeros((SIZE, SIZE, 4), dtype=np.float32)
    full[top : top + height, left : left + width] = sprite
    return full[..., :3] * np.array(_TINT[land.mood], dtype=np.float32), full[..., 3]


def _pick(rng: np.random.Generator) -> tuple[int, int]:
    """A thing and its colour."""
    thing = int(rng.integers(len(THINGS)))
    if THINGS[thing].name == PIRATE_FLAG:
        return thing, NO_COLOUR
    if rng.random() < 0.15:
        return thing, COLOUR_INDEX[THINGS[thing].usual]
    return thing, int(rng.integers(len(COLOUR_NAMES)))


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels * 255.0 + 0.5, 0, 255).astype(np.uint8)


def draw_scene(seed: int, targets: int = 1, masks: int = 1, thing: int | None = None) -> Scene:
    """Draws a scene.

    Args:
        seed: decides everything; the same seed draws the same scene.
        targets: how many things to offer for it.
        masks: how many masks to draw for each.
        thing: index into THINGS of every target, or None for random ones.

    Returns:
        The scene.
    """
    rng = np.random.default_rng(seed)
    land = draw_landscape(rng)
    pixels = land.pixels.copy()
    decor: list[int] = []
    taken = np.zeros((SIZE, SIZE), dtype=np.float32)
    for _ in range(int(rng.choice([0, 1, 2], p=[0.45, 0.38, 0.17]))):
        kind, colour = _pick(rng)
        if THINGS[kind].name == PIRATE_FLAG:
            continue
        paint, alpha = _place(land, kind, colour, rng)
        if (taken * alpha).sum() > 0:
            continue
        pixels = pixels * (1 - alpha[..., None]) + paint
        taken = np.maximum(taken, alpha)
        decor.append(kind)
    found: list[Target] = []
    for _ in range(targets):
        kind, colour = _pick(rng)
        if thing is not None:
            kind = thing
            colour = NO_COLOUR if THINGS[kind].name == PIRATE_FLAG else int(rng.integers(len(COLOUR_NAMES)))
        for _attempt in range(3):
            paint, alpha = _place(land, kind, colour, rng)
            if (taken * alpha).sum() < 0.25 * alpha.sum():
                break
        shown = _bytes(pixels * (1 - alpha[..., None]) + paint)
        drawn = tuple(draw_mask(alpha, taken, rng) for _ in range(masks))
        found.append(Target(shown, kind, colour, bounding_box(alpha), drawn))
    return Scene(seed, _bytes(pixels), tuple(decor), tuple(found))
