"""One inpainting request and its result, as they travel through the service.

All of these are frozen: they cross threads and processes. Arrays are uint8 in
row-major order, height before width, and are not written to after creation.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

Batching = Literal["shared", "solo"]
PromptSyntax = Literal["plain", "a1111"]
Output = Literal["pixels", "floats", "latents"]
NsfwPolicy = Literal["black", "blur", "flag"]

REPAINT_FROM = 128
"""Mask values from here on are repainted: the stock pipeline's threshold of one half, in uint8."""


@dataclass(frozen=True, slots=True)
class LoraUse:
    """One LoRA as a request uses it.

    Attributes:
        name: Its registered name.
        path: Its file; never shown to clients.
        version: Of the file when the request was admitted; another version is another LoRA.
        unet_scale: Weight in the UNet, as in stock's `set_adapters`; 0 and negative ones too.
        text_encoder_scale: Weight in the text encoder.
        block_scales: Weights by UNet block, the nested mapping of `set_adapters` as JSON; "" where there is but one.
    """

    name: str
    path: str
    version: str
    unet_scale: float
    text_encoder_scale: float
    block_scales: str = ""


@dataclass(frozen=True, slots=True)
class FreeU:
    """The factors of stock's `enable_freeu`: s for skip connections, b for backbone features."""

    s1: float
    s2: float
    b1: float
    b2: float


@dataclass(frozen=True, slots=True)
class IpAdapterUse:
    """The IP-Adapter as a request uses it.

    Attributes:
        scale: Weight of the picture, as in stock's `set_ip_adapter_scale`.
        block_scales: Weights by UNet block, the nested mapping of `set_ip_adapter_scale` as JSON; "" where there is
            but one.
        embeds_shape: Of what a UNet row is given: (pictures,), or (pictures, T) where each has several embeddings.
    """

    scale: float
    block_scales: str = ""
    embeds_shape: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What must be equal for images to share a UNet call.

    Attributes:
        height: Working height in pixels.
        width: Working width in pixels.
        solo: The id of a request that asked for a batch of its own, else None.
        loras: What is merged into the weights.
        freeu: What the UNet's skip connections are weighted with.
        ip_adapter: How much the UNet heeds pictures, and of how many tokens.
    """

    height: int
    width: int
    solo: str | None = None
    loras: tuple[LoraUse, ...] = ()
    freeu: FreeU | None = None
    ip_adapter: IpAdapterUse | None = None


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
        prompt_syntax: "a1111" reads weights such as `(red:1.3)` and `BREAK` in both prompts.
        timesteps: Timesteps that replace the scheduler's own; `num_inference_steps` is then their number.
        sigmas: Noise levels that replace the scheduler's own, likewise.
        loras: LoRAs to apply, in the order asked for.
        freeu: FreeU's factors, None for none.
        ip_adapter: How to use the IP-Adapter, None for a request without it.
        embeds_guidance: Whether the UNet takes the guidance scale as an input, as LCM-distilled ones do.
        output: What the result's images are: pixels, floats from 0 to 1, or latents.
        previews: Whether to show pictures of the unfinished steps.
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
    prompt_syntax: PromptSyntax = "plain"
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    loras: tuple[LoraUse, ...] = ()
    freeu: FreeU | None = None
    ip_adapter: IpAdapterUse | None = None
    embeds_guidance: bool = False
    output: Output = "pixels"
    previews: bool = False

    @property
    def is_guided(self) -> bool:
        """Whether two UNet rows are spent on each image, as stock's `do_classifier_free_guidance`."""
        return self.guidance_scale > 1 and not self.embeds_guidance

    @property
    def num_rows(self) -> int:
        """UNet rows that the request occupies in a batch."""
        return self.num_images_per_prompt * (2 if self.is_guided else 1)

    def batch_key(self, request_id: str) -> BatchKey:
        """With whom the request can share a UNet call.

        Args:
            request_id: The request's own name, unique, for one that asks for a batch of its own.
        """
        solo = request_id if self.batching == "solo" else None
        return BatchKey(self.height, self.width, solo, self.loras, self.freeu, self.ip_adapter)


@dataclass(frozen=True, slots=True, eq=False)
class InpaintTensors:
    """What the client has computed itself, under the stock pipeline's names; None where the service does it.

    n is `num_images_per_prompt`, C the latent channels, h x w the working size in latents,
    T tokens and D the width of the text encoder.

    Attributes:
        prompt_embeds: (T, D).
        negative_prompt_embeds: (T, D), of the same T.
        latents: (n, C, h, w) initial noise.
        masked_image_latents: (1 or n, C, h, w), scaled.
        image_latents: (1 or n, C, h, w), scaled: what stock takes in the place of `image`.
        ip_adapter_image_embeds: (2 or 1, m, [T,] D) of m pictures, behind those of no picture when guided; what
            stock takes as a list of one.
    """

    prompt_embeds: Floats | None = None
    negative_prompt_embeds: Floats | None = None
    latents: Floats | None = None
    masked_image_latents: Floats | None = None
    image_latents: Floats | None = None
    ip_adapter_image_embeds: Floats | None = None


NO_TENSORS = InpaintTensors()


@dataclass(frozen=True, slots=True)
class InpaintRequest:
    """What a worker needs to paint: parameters and pixels at working size.

    Attributes:
        params: Resolved parameters.
        image: The picture, (height, width, 3) uint8 RGB.
        mask: What to repaint, (height, width) uint8; ≥ 128 repaints.
        admitted_at: `time.monotonic()` of admission, comparable across processes of one machine.
        deadline: `time.monotonic()` after which nobody waits for the answer.
        tensors: What the client has computed itself.
        ip_adapter_image: A picture to paint by, (H, W, 3) uint8 RGB of any size.
    """

    params: InpaintParams
    image: Pixels
    mask: Pixels
    admitted_at: float
    deadline: float
    tensors: InpaintTensors = NO_TENSORS
    ip_adapter_image: Pixels | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one request spent in each stage of the worker.

    On CUDA the host runs ahead of the device: `denoise` may end, and `vae_decode` begin, some milliseconds early.

    Attributes:
        queue: All waiting: from admission to the start of `prepare`, for a place in the running batch, for the decoder.
        prepare: Text encoding, VAE encoding, noise.
        denoise: From joining the running batch to the last step.
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
class Moments:
    """When the stages of one request began and ended in a worker; None for what it did not come to.

    All are `time.monotonic()`, which on Linux is one clock for all processes of a machine. What lies between them is
    waiting: for a place in the running batch before `joined_at`, for the decoder before `finish_started_at`.

    Attributes:
        prepare_started_at: Its preparation began.
        prepared_at: Its first step could begin.
        joined_at: It joined the running batch.
        first_step_at: Its first step was done.
        denoised_at: Its last step was done.
        finish_started_at: The job began that makes pictures of it.
        decode_started_at: The decode that it shared began.
        decoded_at: The decode was done, and the safety check began.
        checked_at: The safety check was done.
    """

    prepare_started_at: float | None = None
    prepared_at: float | None = None
    joined_at: float | None = None
    first_step_at: float | None = None
    denoised_at: float | None = None
    finish_started_at: float | None = None
    decode_started_at: float | None = None
    decoded_at: float | None = None
    checked_at: float | None = None


NO_MOMENTS = Moments()


@dataclass(frozen=True, slots=True)
class InpaintResult:
    """What a worker painted.

    Attributes:
        images: (n, height, width, 3) uint8 RGB at working size, the same as float32 from 0 to 1, or
            (n, C, h, w) float32 latents, as `output` asked; flagged images are already black (all zeros)
            unless the operator chose another policy.
        nsfw: One flag per image.
        timings: Seconds by stage.
        mean_images: Mean number of images that shared this request's steps, itself included.
        moments: When its stages began and ended.
    """

    images: Pixels | Floats
    nsfw: tuple[bool, ...]
    timings: Timings
    mean_images: float = field(default=1.0)
    moments: Moments = NO_MOMENTS
