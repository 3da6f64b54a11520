"""From requests to slots: steps 3 to 9 of `StableDiffusionInpaintPipeline.__call__`, batched.

Every request draws from its own generators, in stock's order: a VAE sample of
the picture (where its latents are needed), the initial noise, a VAE sample of
the masked picture. As with stock and a list of generators, the VAE samples come
from the first image's generator and serve all images of the request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from service.errors import ErrorCode, InpaintError
from service.request import REPAINT_FROM, InpaintRequest
from service.worker.checkpoint import Components
from service.worker.prompts import Prompt, PromptEncoder
from service.worker.sampler import MAX_HISTORY, InstancePlan, Schedule, SchedulePlanner
from service.worker.slots import Slot

MAX_ENCODE_BATCH = 8


@dataclass(frozen=True, slots=True)
class _Posterior:
    """What the VAE encoder says of one picture: (C, h, w) mean and standard deviation."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, generator: torch.Generator, scaling_factor: float) -> torch.Tensor:
        """Scaled latents (C, h, w), as stock's `_encode_vae_image`."""
        shape = (1, *self.mean.shape)
        noise = randn_tensor(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)[0]
        latents: torch.Tensor = scaling_factor * (self.mean + self.std * noise)
        return latents


class Preparer:
    """Makes slots of requests.

    Args:
        components: The loaded checkpoint.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        self._planner = SchedulePlanner(components.scheduler)
        self._prompts = PromptEncoder(components.tokenizer, components.text_encoder)
        self._is_plain_unet = components.info.unet_in_channels == 4  # noqa: PLR2004 - 4 latent channels and no mask

    def prepare(self, requests: Sequence[InpaintRequest]) -> list[list[Slot]]:
        """Slots of each request, one per image.

        Args:
            requests: Requests of one batch key; one that asked for a batch of its own comes alone.

        Raises:
            InpaintError: A request asks for what the model does not have.
        """
        plans = [self._plan(request) for request in requests]
        embeds = self._encode_prompts(requests)
        pictures = [self._pictures(request) for request in requests]
        needs_image = [self._needs_image_latents(request) for request in requests]
        posteriors = iter(
            self._encode_pictures(
                [image for (image, _, _), needed in zip(pictures, needs_image, strict=True) if needed]
                + [masked for _, masked, _ in pictures]
            )
        )
        image_posteriors = [next(posteriors) if needed else None for needed in needs_image]
        masked_posteriors = list(posteriors)
        return [
            self._slots(request, *parts)
            for request, *parts in zip(
                requests,
                plans,
                embeds,
                [mask for _, _, mask in pictures],
                image_posteriors,
                masked_posteriors,
                strict=True,
            )
        ]

    def _plan(self, request: InpaintRequest) -> list[Schedule | InstancePlan]:
        """One schedule per image; they differ only where a scheduler has a seed of its own."""
        params = request.params
        if params.clip_skip > self._prompts.max_clip_skip:
            raise InpaintError(
                ErrorCode.OUT_OF_RANGE,
                f"clip_skip must be at most {self._prompts.max_clip_skip} for this model.",
                field="clip_skip",
            )
        return [
            self._planner.plan(
                params.scheduler,
                num_inference_steps=params.num_inference_steps,
                strength=params.strength,
                eta=params.eta,
                seed=params.seed + image,
            )
            for image in range(params.num_images_per_prompt)
        ]

    def _encode_prompts(self, requests: Sequence[InpaintRequest]) -> list[torch.Tensor]:
        """(1 or 2, T, D) for each request: negative prompt first when guided. clip_skip is for the prompt only."""
        prompts = []
        for request in requests:
            params = request.params
            pair = [Prompt(params.prompt, params.clip_skip, params.prompt_syntax)]
            if params.is_guided:
                pair.insert(0, Prompt(params.negative_prompt, syntax=params.prompt_syntax))
            prompts.append(pair)
        is_solo = any(request.params.batching == "solo" for request in requests)
        encode = self._prompts.encode_alone if is_solo else self._prompts.encode
        encoded = encode(prompt for pair in prompts for prompt in pair)
        return [torch.stack([encoded[prompt] for prompt in pair]) for pair in prompts]

    def _pictures(self, request: InpaintRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Picture and masked picture, (3, H, W) float32 in [-1, 1], and mask, (1, H, W) float32 of 0 and 1."""
        image = torch.from_numpy(request.image.copy()).permute(2, 0, 1).float() / 255.0
        image = 2.0 * image - 1.0
        mask = (torch.from_numpy(request.mask.copy())[None] >= REPAINT_FROM).float()
        return image, image * (1 - mask), mask

    def _needs_image_latents(self, request: InpaintRequest) -> bool:
        return self._is_plain_unet or request.params.strength < 1

    def _encode_pictures(self, pictures: Sequence[torch.Tensor]) -> list[_Posterior]:
        components = self._components
        posteriors: list[_Posterior] = []
        for first in range(0, len(pictures), MAX_ENCODE_BATCH):
            batch = torch.stack(list(pictures[first : first + MAX_ENCODE_BATCH]))
            encoded = components.vae.encode(batch.to(components.device, components.dtype)).latent_dist
            posteriors += [_Posterior(mean, std) for mean, std in zip(encoded.mean, encoded.std, strict=True)]
        return posteriors

    def _slots(  # noqa: PLR0917 - one argument for each thing prepared in a batch, zipped
        self,
        request: InpaintRequest,
        plans: Sequence[Schedule | InstancePlan],
        embeds: torch.Tensor,
        mask: torch.Tensor,
        image_posterior: _Posterior | None,
        masked_posterior: _Posterior,
    ) -> list[Slot]:
        params, components = request.params, self._components
        scaling_factor = components.vae.config.scaling_factor
        generators = [
            torch.Generator().manual_seed(params.seed + image) for image in range(params.num_images_per_prompt)
        ]

        # Drawn in stock's order.
        image_latents = None
        if image_posterior is not None:
            image_latents = image_posterior.sample(generators[0], scaling_factor)
        shape = (1, *masked_posterior.mean.shape)
        noises = [
            randn_tensor(shape, generator=generator, device=components.device, dtype=components.dtype)[0].float()
            for generator in generators
        ]
        masked_image_latents = masked_posterior.sample(generators[0], scaling_factor)

        latent_mask = torch.nn.functional.interpolate(mask[None], size=masked_image_latents.shape[1:])[0]
        latent_mask = latent_mask.to(components.device)
        slots = []
        for generator, plan, noise in zip(generators, plans, noises, strict=True):
            image_scale, noise_scale = plan.initial
            latents = noise_scale * noise
            if image_latents is not None and image_scale:
                latents = image_scale * image_latents.float() + latents
            state = torch.zeros(1 + MAX_HISTORY, *latents.shape, device=components.device)
            state[0] = latents
            is_plain = self._is_plain_unet
            slots.append(
                Slot(
                    plan=plan,
                    instance=plan.start() if isinstance(plan, InstancePlan) else None,
                    generator=generator,
                    state=state,
                    embeds=embeds,
                    guidance_scale=params.guidance_scale if params.is_guided else 1.0,
                    conditioning=None
                    if is_plain
                    else torch.cat([latent_mask.to(components.dtype), masked_image_latents.to(components.dtype)]),
                    mask=latent_mask if is_plain else None,
                    image_latents=image_latents.float() if is_plain and image_latents is not None else None,
                    noise=noise if is_plain else None,
                )
            )
        return slots
