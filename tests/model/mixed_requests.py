"""Requests that differ in everything the running batch lets differ."""

import random
from collections.abc import Sequence

import numpy as np

from service.request import InpaintParams, InpaintRequest

PROMPTS = ("a red house", "a green tree by the water", "nothing", "ein Boot, blau", "a pirate flag 🏴")


def mixed_requests(schedulers: Sequence[str], num: int, size: int, *, seed: int = 0) -> list[InpaintRequest]:
    """At least `num` requests: every scheduler with and without guidance in turn, all else drawn at random.

    Args:
        schedulers: Short names, each used at least once.
        num: How many requests at least.
        size: The model's native size; some requests have another shape.
        seed: Of the draw.
    """
    draw = random.Random(seed)  # noqa: S311 - a repeatable choice, no secret
    total = max(num, len(schedulers))
    requests = []
    for index in range(total):
        height, width = draw.choice([(size, size)] * 4 + [(size, size + 16), (size - 24, size)])
        params = InpaintParams(
            prompt=draw.choice(PROMPTS),
            negative_prompt=draw.choice(["", "", "blurry"]),
            num_inference_steps=draw.randint(2, 12),
            guidance_scale=draw.choice([7.5, 3.0, 1.0, 0.0]),
            strength=draw.choice([1.0, 1.0, 0.8, 0.5]),
            num_images_per_prompt=draw.choice([1, 1, 1, 2, 3]),
            seed=draw.randint(0, 2**32 - 8),
            scheduler=schedulers[index % len(schedulers)],
            eta=draw.choice([0.0, 0.0, 0.6, 1.0]),
            clip_skip=draw.choice([0, 0, 1, 2]),
            height=height,
            width=width,
            batching=draw.choice(["shared"] * 9 + ["solo"]),
        )
        requests.append(paint_target(params, draw.randint(0, 2**31)))
    return requests


def paint_target(params: InpaintParams, seed: int) -> InpaintRequest:
    """A request over a smooth random picture with a grey-edged box as its mask."""
    random_numbers = np.random.default_rng(seed)
    height, width = params.height, params.width
    coarse = random_numbers.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    mask = np.zeros((height, width), np.uint8)
    top, left = random_numbers.integers(0, height // 2), random_numbers.integers(0, width // 2)
    mask[top : top + height // 3, left : left + width // 3] = 255
    mask[top, left : left + width // 3] = 127  # Just under half: keep.
    mask[top + 1, left : left + width // 3] = 128  # Just over half: repaint.
    return InpaintRequest(params, image, mask, admitted_at=0.0, deadline=float("inf"))
