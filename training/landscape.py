"""Draws backgrounds: a sky by day, dusk or night over hills and meadow, sand or water."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 256
"""Side of a scene in pixels."""

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@dataclass(frozen=True)
class Landscape:
    """A background.

    Attributes:
        pixels: float32 in [0, 1], shape (SIZE, SIZE, 3).
        mood: "day", "dusk" or "night".
        horizon: row of the horizon in pixels.
        water: (first row, last row) of open water, or None.
    """

    pixels: np.ndarray
    mood: str
    horizon: int
    water: tuple[int, int] | None


@dataclass(frozen=True)
class _Mood:
    """Colours (8-bit RGB) of a time of day, and how much light falls on the ground."""

    high: tuple[int, int, int]
    low: tuple[int, int, int]
    light: tuple[float, float, float]


_MOODS: dict[str, tuple[_Mood, ...]] = {
    "day": (
        _Mood((104, 170, 228), (206, 230, 244), (1.0, 1.0, 1.0)),
        _Mood((136, 190, 232), (226, 236, 236), (1.0, 1.0, 0.98)),
        _Mood((92, 178, 214), (214, 238, 228), (1.0, 1.0, 1.0)),
    ),
    "dusk": (
        _Mood((96, 92, 152), (250, 182, 130), (0.94, 0.82, 0.78)),
        _Mood((142, 104, 150), (252, 204, 156), (0.96, 0.85, 0.80)),
    ),
    "night": (
        _Mood((18, 26, 62), (62, 76, 122), (0.50, 0.56, 0.72)),
        _Mood((26, 24, 58), (84, 78, 126), (0.52, 0.54, 0.72)),
    ),
}
_MEADOWS = ((132, 182, 88), (116, 170, 92), (152, 190, 100), (120, 178, 110))
_SANDS = ((232, 210, 158), (224, 196, 144), (238, 218, 176))
_WATERS = ((84, 152, 196), (78, 162, 188), (96, 160, 208))
_HILLS = ((122, 164, 120), (104, 150, 128), (142, 168, 132), (120, 146, 160), (150, 150, 168))


def _paint(pixels: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> None:
    """Lays a colour (3,) or picture (SIZE, SIZE, 3) over `pixels` where `cover` (SIZE, SIZE) is 1."""
    pixels += (colour - pixels) * cover[..., None]


def _varied(colour: tuple[int, int, int], rng: np.random.Generator, spread: float = 10.0) -> np.ndarray:
    return np.clip((np.array(colour) + rng.uniform(-spread, spread, 3)) / 255.0, 0, 1).astype(np.float32)


def _ridge(rng: np.random.Generator, level: float, height: float, waves: float) -> np.ndarray:
    """Row of a rolling ridge for each column, shape (SIZE,)."""
    x = np.arange(SIZE, dtype=np.float32) / SIZE
    line = np.zeros(SIZE, dtype=np.float32)
    for k in (1.0, 1.9, 3.1):
        line += np.sin(2 * np.pi * (k * waves * x + rng.random())) * rng.uniform(0.4, 1.0) / k
    return level - height * 0.5 * (1.0 + line / 1.7)


def _below(line: np.ndarray) -> np.ndarray:
    """Antialiased cover of everything below a ridge line, shape (SIZE, SIZE)."""
    return np.clip(_Y - line[None, :] + 0.5, 0.0, 1.0)


def _disc(cx: float, cy: float, rx: float, ry: float, soft: float) -> np.ndarray:
    """Cover of an ellipse whose edge is `soft` pixels wide."""
    distance = (np.sqrt(((_X - cx) / rx) ** 2 + ((_Y - cy) / ry) ** 2) - 1.0) * min(rx, ry)
    return np.clip(0.5 - distance / soft, 0.0, 1.0)


def _clouds(pixels: np.ndarray, rng: np.random.Generator, horizon: int, tint: np.ndarray) -> None:
    for _ in range(int(rng.integers(0, 4))):
        cx, cy = rng.uniform(0, SIZE), rng.uniform(14, horizon * 0.72)
        size = rng.uniform(12, 24)
        cover = np.zeros((SIZE, SIZE), dtype=np.float32)
        for dx, dy, scale in ((-1.1, 0.18, 0.62), (0.0, 0.0, 1.0), (1.1, 0.2, 0.68), (0.55, -0.15, 0.7)):
            lobe = _disc(cx + dx * size, cy + dy * size, size * scale * 1.15, size * scale * 0.62, 2.5)
            cover = np.maximum(cover, lobe)
        _paint(pixels, tint, cover * rng.uniform(0.55, 0.9))


def _ground(
    pixels: np.ndarray, rng: np.random.Generator, horizon: int, light: np.ndarray, sky: np.ndarray
) -> tuple[int, int] | None:
    """Paints what lies below the horizon; returns the rows of open water, if any."""
    depth = np.clip((_Y - horizon) / (SIZE - horizon), 0.0, 1.0)[..., None]
    kind = rng.choice(["meadow", "meadow", "sand", "lake", "sea"])
    below = np.clip(_Y - horizon + 0.5, 0.0, 1.0)
    if kind in ("meadow", "sand"):
        colour = _varied((_MEADOWS if kind == "meadow" else _SANDS)[rng.integers(3)], rng) * light
        far, near = colour * 1.06, colour * 0.84
        _paint(pixels, np.clip(far + (near - far) * depth, 0, 1), below)
        for _ in range(int(rng.integers(0, 3))):
            level = rng.uniform(horizon + 14, SIZE - 18)
            swell = _below(_ridge(rng, level, rng.uniform(5, 18), rng.uniform(0.4, 0.8)))
            _paint(pixels, np.clip((far + (near - far) * depth) * rng.uniform(0.92, 1.07), 0, 1), swell)
        return None
    water = _varied(_WATERS[rng.integers(3)], rng) * light
    far = 0.55 * water + 0.45 * sky
    _paint(pixels, far + (water * 0.86 - far) * depth, below)
    for _ in range(int(rng.integers(3, 8))):  # a few calm glints
        cy = rng.uniform(horizon + 6, SIZE - 6)
        width = rng.uniform(10, 34) * (0.5 + (cy - horizon) / (SIZE - horizon))
        glint = _disc(rng.uniform(0, SIZE), cy, width, rng.uniform(1.3, 2.2), 2.0)
        _paint(pixels, np.clip(far * 1.2 + 0.04, 0, 1), glint * 0.55)
    if kind == "sea" and rng.random() < 0.5:
        return horizon, SIZE - 1
    shore = rng.uniform(horizon + 0.45 * (SIZE - horizon), SIZE - 30)
    line = _ridge(rng, shore, rng.uniform(6, 20), rng.uniform(0.3, 0.7))
    bank = _varied((_SANDS if kind == "sea" else _MEADOWS)[rng.integers(3)], rng) * light
    _paint(pixels, np.clip(far * 1.25 + 0.05, 0, 1), _below(line - 2.5) * 0.6)
    _paint(pixels, np.clip(bank * 1.04 - 0.14 * depth, 0, 1), _below(line))
    return horizon, int(line.min())


def draw_landscape(rng: np.random.Generator) -> Landscape:
    """Draws a background with nothing standing in it.

    Args:
        rng: decides everything.

    Returns:
        The landscape.
    """
    mood = str(rng.choice(["day", "dusk", "night"], p=[0.58, 0.22, 0.20]))
    tone = _MOODS[mood][rng.integers(len(_MOODS[mood]))]
    high, low = _varied(tone.high, rng), _varied(tone.low, rng)
    light = np.array(tone.light, dtype=np.float32)
    horizon = int(rng.uniform(0.40, 0.66) * SIZE)

    rise = np.clip(_Y / horizon, 0.0, 1.0)[..., None] ** 1.2
    pixels = (high + (low - high) * rise).astype(np.float32)
    if mood == "night":
        for _ in range(int(rng.integers(4, 13))):
            star = _disc(rng.uniform(0, SIZE), rng.uniform(0, horizon * 0.8), *([rng.uniform(1.0, 1.7)] * 2), 1.4)
            _paint(pixels, np.array((0.96, 0.95, 0.86), dtype=np.float32), star * rng.uniform(0.6, 1.0))
    else:
        tint = np.array((1.0, 1.0, 1.0) if mood == "day" else (1.0, 0.86, 0.80), dtype=np.float32)
        _clouds(pixels, rng, horizon, tint)
    haze = low
    count = int(rng.integers(0, 4))
    for layer in range(count):
        near = (layer + 1) / (count + 1)
        hill = _varied(_HILLS[rng.integers(len(_HILLS))], rng) * light
        colour = hill * (0.45 + 0.45 * near) + haze * (0.55 - 0.45 * near)
        level = horizon + 4 - (1 - near) * 8
        line = _ridge(rng, level, rng.uniform(14, 58) * (1.15 - 0.6 * near), rng.uniform(0.5, 1.3))
        _paint(pixels, np.clip(colour, 0, 1), _below(np.minimum(line, horizon + 2)))
    water = _ground(pixels, rng, horizon, light, low)
    return Landscape(np.clip(pixels, 0.0, 1.0), mood, horizon, water)
