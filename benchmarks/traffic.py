"""The requests of a measurement: the same for every server, drawn once from a seed."""

import functools
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
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

NUM_PICTURES = 16
"""Different pictures of one size: drawing one for every request would take longer than sending it."""

NO_GUIDANCE = 1.0
SKY, GROUND = (150, 200, 240), (110, 160, 80)


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are drawn from.

    Attributes:
        steps: Least and most steps; all numbers between come up equally often.
        sizes: Weights of the pictures' sides in pixels.
        schedulers: Noise schedulers, equally often.
        guided_share: Share of requests with guidance, 0 to 1.
        guidance_scale: Theirs; the others have 1, which turns it off.
        prompts: Prompts, equally often.
    """

    steps: tuple[int, int]
    sizes: Mapping[int, float]
    schedulers: Sequence[str] = SCHEDULERS
    guided_share: float = 1.0
    guidance_scale: float = 4.0
    prompts: Sequence[str] = PROMPTS


@dataclass(frozen=True, slots=True)
class Wish:
    """What one request of a trace has of its own; the rest comes from the mix."""

    num_steps: int | None = None
    size: int | None = None
    scheduler: str | None = None


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
    image: bytes = field(repr=False)
    mask: bytes = field(repr=False)
    size: int
    num_steps: int


def draw_jobs(count: int, mix: Mix, seed: int) -> tuple[Job, ...]:
    """`count` requests of a mix.

    Numbers of steps are dealt like cards: every block of as many requests as there are
    numbers holds each of them once, so that rounds weigh about the same.

    Args:
        count: How many.
        mix: What they are drawn from.
        seed: The same seed gives the same requests.
    """
    return fulfil([Wish()] * count, mix, seed)


def fulfil(wishes: Sequence[Wish], mix: Mix, seed: int) -> tuple[Job, ...]:
    """One request per wish; what a wish leaves open is drawn from the mix, as by `draw_jobs`."""
    draw = random.Random(seed)  # noqa: S311 - traffic, no secret
    steps: list[int] = []
    while len(steps) < len(wishes):
        block = list(range(mix.steps[0], mix.steps[1] + 1))
        draw.shuffle(block)
        steps += block
    return tuple(_draw_job(wish, num_steps, mix, draw) for wish, num_steps in zip(wishes, steps, strict=False))


def num_model_calls(jobs: Sequence[Job]) -> int:
    """Calls of the UNet per image that these requests take, guidance not counted twice."""
    return sum(job.num_steps for job in jobs)


def _draw_job(wish: Wish, drawn_steps: int, mix: Mix, draw: random.Random) -> Job:
    num_steps = wish.num_steps or drawn_steps
    size = wish.size or draw.choices(list(mix.sizes), list(mix.sizes.values()))[0]
    is_guided = draw.random() < mix.guided_share
    fields = {
        "prompt": draw.choice(mix.prompts),
        "num_inference_steps": str(num_steps),
        "guidance_scale": str(mix.guidance_scale if is_guided else NO_GUIDANCE),
        "scheduler": wish.scheduler or draw.choice(mix.schedulers),
        "seed": str(draw.randrange(2**32)),
        "height": str(size),
        "width": str(size),
    }
    image, mask = _draw_picture(size, draw.randrange(NUM_PICTURES))
    return Job(fields=fields, image=image, mask=mask, size=size, num_steps=num_steps)


@functools.cache
def _draw_picture(size: int, number: int) -> tuple[bytes, bytes]:
    """Picture and mask number `number` of a size, PNG bytes."""
    draw = random.Random(f"{size} {number}")  # noqa: S311 - traffic, no secret
    return _landscape(size, draw), _mask(size, draw)


def _landscape(size: int, draw: random.Random) -> bytes:
    """Sky over ground with the grain of a photograph, so that the PNG is as long as one of a photograph."""
    horizon = round(size * draw.uniform(0.5, 0.7))
    picture = np.empty((size, size, 3))
    picture[:horizon], picture[horizon:] = SKY, GROUND
    picture += np.random.default_rng(draw.getrandbits(32)).normal(0, 3, picture.shape)
    return _png(Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)))


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
