"""Requests for a simulation: when they come, how much work they are, which LoRA they use."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.arrivals import poisson_arrivals
from benchmarks.simulation.device import MODEL
from service.request import InpaintParams, LoraUse

PIXELS = np.zeros((1, 1, 3), np.uint8)
MASK = np.zeros((1, 1), np.uint8)
"""Nothing looks at them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request.

    Attributes:
        due_seconds: When it is sent, from the start.
        num_steps: Model calls, with guidance.
        lora: Number of the LoRA that it uses; 0 for none.
    """

    due_seconds: float
    num_steps: int
    lora: int = 0

    def params(self, seed: int) -> InpaintParams:
        """What the service is asked."""
        name = f"lora-{self.lora}"
        return InpaintParams(
            prompt="",
            negative_prompt="",
            num_inference_steps=self.num_steps,
            guidance_scale=7.5,
            strength=1.0,
            num_images_per_prompt=1,
            seed=seed,
            scheduler=MODEL.default_scheduler,
            eta=0.0,
            clip_skip=0,
            height=MODEL.native_size,
            width=MODEL.native_size,
            loras=(LoraUse(name, name, "1", 1.0, 1.0),) if self.lora else (),
        )


def poisson_traffic(
    per_second: float, seconds: float, steps: tuple[int, int], loras: Sequence[float], seed: int
) -> tuple[Wanted, ...]:
    """Poisson arrivals, steps equally often, LoRAs by their weights.

    Args:
        per_second: Mean rate.
        seconds: Length of the window.
        steps: Least and most steps.
        loras: Share of requests without a LoRA, with the first, the second, …
        seed: The same seed gives the same requests.
    """
    draw = random.Random(seed)  # noqa: S311 - traffic, no secret
    return tuple(
        Wanted(moment, draw.randint(*steps), draw.choices(range(len(loras)), loras)[0])
        for moment in poisson_arrivals(per_second, seconds, seed)
    )
