"""One inpainting request and its result, as they travel through the service.

All of these are frozen: they cross threads and processes. Arrays are uint8 in
row-major order, height before width, and are not written to after creation.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

Batching = Literal["shared", "solo"]
NsfwPolicy = Literal["black", "blur", "flag"]

REPAINT_FROM = 128
"""Mask values from here on are repainted: the stock pipeline's threshold of one half, in uint8."""


@dataclass(frozen=True, slots=True)
class InpaintParams:
    """The scalar arguments of the stock pipeline's call, resolved: no field is "use the default" any more.

    Attributes:
        prompt: What to paint.
        negative_prompt: What to steer away from; unused when guidance is off.
        num_inference_steps: Steps of the noise scheduler before `strength` shortens them.
        guidance_scale: Classifier-free guidance; values ≤ 1 turn it off.
        strength: How much of the schedule to run, in (0, 1].
        num_images_per_prompt: Images to paint; image i is seeded with `seed + i`.
        seed: Seed of the first image, 0 to 2**32 - 1.
        scheduler: Short name of a diffusers scheduler, as `/v1/models` lists them.
        eta: η of DDIM, 0 to 1; ignored by schedulers without it.
        clip_skip: Text-encoder layers to skip, positive prompt only; 0 for none.
        height: Working height in pixels, a multiple of 8.
        width: Working width in pixels, a multiple of 8.
        batching: "solo" asks for a batch of its own.
    """

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    strength: float
    num_images_per_prompt: int
    seed: int
    scheduler: str
    eta: float
    clip_skip: int
    height: int
    width: int
    batching: Batching = "shared"

    @property
    def is_guided(self) -> bool:
        """Whether two UNet rows are spent on each image, as stock's `do_classifier_free_guidance`."""
        return self.guidance_scale > 1

    @property
    def num_rows(self) -> int:
        """UNet rows that the request occupies in a batch."""
        return self.num_images_per_prompt * (2 if self.is_guided else 1)


@dataclass(frozen=True, slots=True)
class InpaintRequest:
    """What a worker needs to paint: parameters and pixels at working size.

    Attributes:
        params: Resolved parameters.
        image: The picture, (height, width, 3) uint8 RGB.
        mask: What to repaint, (height, width) uint8; ≥ 128 repaints.
        admitted_at: `time.monotonic()` of admission, comparable across processes of one machine.
        deadline: `time.monotonic()` after which nobody waits for the answer.
    """

    params: InpaintParams
    image: Pixels
    mask: Pixels
    admitted_at: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one request spent in each stage of the worker.

    Attributes:
        queue: From admission to the start of `prepare`.
        prepare: Text encoding, VAE encoding, noise.
        denoise: From the end of `prepare` to the last step.
        vae_decode: Latents to pixels.
        safety: The safety checker.
        time_to_first_step: From admission to the end of the first step.
    """

    queue: float
    prepare: float
    denoise: float
    vae_decode: float
    safety: float
    time_to_first_step: float


@dataclass(frozen=True, slots=True)
class InpaintResult:
    """What a worker painted.

    Attributes:
        images: (n, height, width, 3) uint8 RGB at working size; flagged images are
            already black unless the operator chose another policy.
        nsfw: One flag per image.
        timings: Seconds by stage.
        mean_images: Mean number of images that shared this request's steps, itself included.
    """

    images: Pixels
    nsfw: tuple[bool, ...]
    timings: Timings
    mean_images: float = field(default=1.0)
