"""The requests of a measurement: the same for every server, drawn once from a seed."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

PROMPTS = (
    "a red house",
    "a green tree",
    "nothing",
    "a blue car",
    "a yellow sun",
    "a red ball",
    "a small green tree",
    "a white house",
)
"""Things of the bundled model's world, so that the pictures can be looked at."""

SCHEDULERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")
"""Noise schedulers with exactly one model call a step, so that steps count the work."""

MIN_STEPS, MAX_STEPS = 6, 14
GUIDANCE_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Attributes:
        fields: Form fields under the names of `POST /v1/inpaint`.
        image: The picture, PNG bytes.
        mask: Its mask, PNG bytes.
        size: Side in pixels of the picture and of the answer.
        num_steps: Steps, which are model calls too.
    """

    fields: dict[str, str]
    image: bytes
    mask: bytes
    size: int
    num_steps: int


def draw_jobs(count: int, size: int, seed: int) -> tuple[Job, ...]:
    """`count` requests of mixed prompts, seeds, steps, schedulers and masks.

    Every nine in a row hold each number of steps once, so that rounds weigh about the same.

    Args:
        count: How many.
        size: Side of the square pictures in pixels.
        seed: The same seed gives the same requests.
    """
    draw = random.Random(seed)  # noqa: S311 - traffic, no secret
    steps: list[int] = []
    while len(steps) < count:
        block = list(range(MIN_STEPS, MAX_STEPS + 1))
        draw.shuffle(block)
        steps += block
    return tuple(_draw_job(num_steps, size, draw) for num_steps in steps[:count])


def num_model_calls(jobs: Sequence[Job]) -> int:
    """Calls of the UNet per image that these requests take, guidance not counted twice."""
    return sum(job.num_steps for job in jobs)


def _draw_job(num_steps: int, size: int, draw: random.Random) -> Job:
    fields = {
        "prompt": draw.choice(PROMPTS),
        "num_inference_steps": str(num_steps),
        "guidance_scale": str(GUIDANCE_SCALE),
        "scheduler": draw.choice(SCHEDULERS),
        "seed": str(draw.randrange(2**32)),
        "height": str(size),
        "width": str(size),
    }
    return Job(fields=fields, image=_landscape(size, draw), mask=_mask(size, draw), size=size, num_steps=num_steps)


def _landscape(size: int, draw: random.Random) -> bytes:
    """Sky over ground, in flat shades with a little grain so that the PNG is no trivial one."""
    horizon = round(size * draw.uniform(0.5, 0.7))
    picture = Image.new("RGB", (size, size), (150, 200, 240))
    canvas = ImageDraw.Draw(picture)
    canvas.rectangle((0, horizon, size, size), fill=(110, 160, 80))
    for _ in range(size * 8):
        x, y = draw.randrange(size), draw.randrange(size)
        shade = draw.randint(-12, 12)
        red, green, blue = (110, 160, 80) if y >= horizon else (150, 200, 240)
        canvas.point((x, y), fill=(red + shade, green + shade, blue + shade))
    return _png(picture)


def _mask(size: int, draw: random.Random) -> bytes:
    side = round(size * draw.uniform(0.35, 0.55))
    left, top = draw.randrange(size - side), draw.randrange(size - side)
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).rectangle((left, top, left + side, top + side), fill=255)
    return _png(mask)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
