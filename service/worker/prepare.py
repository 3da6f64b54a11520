"""From requests to slots: steps 3 to 9 of `StableDiffusionInpaintPipeline.__call__`, batched.

Every request draws from its own generators, in stock's order: a VAE sample of
the picture (where its latents are needed), the initial noise, a VAE sample of
the masked picture; nothing is drawn for what the client has sent itself. As
with stock and a list of generators, the VAE samples come from the first image's
generator and serve all images of the request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AsymmetricAutoencoderKL, StableDiffusionInpaintPipeline
from diffusers.utils.torch_utils import randn_tensor

from service.errors import ErrorCode, InpaintError
from service.request import REPAINT_FROM, Floats, InpaintParams, InpaintRequest
from service.worker.autoencoder import MAX_BATCH, Autoencoder
from service.worker.checkpoint import Components
from service.worker.probe import Steps
from service.worker.sampler import MAX_HISTORY, InstancePlan, Schedule, SchedulePlanner
from service.worker.slots import Slot
from service.worker.texts import TextConditions


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


@dataclass(slots=True)
class _Picture:
    """One request's picture on its way to latents.

    Attributes:
        image: (3, H, W) float32 in [-1, 1].
        mask: (1, H, W) float32 of 0 and 1.
        image_posterior: Of the picture; None where its latents are given or not needed.
        masked_posterior: Of the picture without what is repainted; None where its latents are given.
    """

    image: torch.Tensor
    mask: torch.Tensor
    image_posterior: _Posterior | None = None
    masked_posterior: _Posterior | None = None


@dataclass(frozen=True, slots=True)
class _Start:
    """What one image of a request starts from; all (C, h, w).

    Attributes:
        noise: The initial noise.
        image_latents: Of the picture; None where they are not needed.
        masked_image_latents: Of the masked picture.
    """

    noise: torch.Tensor
    image_latents: torch.Tensor | None
    masked_image_latents: torch.Tensor


class Preparer:
    """Makes slots of requests.

    Args:
        components: The loaded checkpoint.
        autoencoder: Its VAE.
    """

    def __init__(self, components: Components, autoencoder: Autoencoder) -> None:
        self._components = components
        self._autoencoder = autoencoder
        self._planner = SchedulePlanner(components.scheduler)
        self._texts = TextConditions(components)
        self._is_plain_unet = components.info.unet_in_channels == 4  # noqa: PLR2004 - 4 latent channels and no mask
        self._decoder_sees_picture = isinstance(components.vae, AsymmetricAutoencoderKL)

    def capture_text_encoder(self) -> None:
        """Have prompts encoded by a captured graph from now on; see `PromptEncoder.capture`."""
        self._texts.capture()

    def prepare(self, requests: Sequence[InpaintRequest]) -> list[list[Slot]]:
        """Slots of each request, one per image.

        Args:
            requests: Requests of one batch key, for whose LoRAs the text encoder has its weights; one that asked
                for a batch of its own comes alone.

        Raises:
            InpaintError: A request asks for what the model does not have.
        """
        plans = [self._plan(request.params) for request in requests]
        embeds = self._texts.embeds(requests)
        tokens = self._image_tokens(requests)
        pictures = self._encode(requests)
        return [
            self._slots(request, plan, embed, token, picture)
            for request, plan, embed, token, picture in zip(requests, plans, embeds, tokens, pictures, strict=True)
        ]

    def _plan(self, params: InpaintParams) -> list[Schedule | InstancePlan]:
        """One schedule per image; they differ only where a scheduler has a seed of its own."""
        if params.clip_skip > self._texts.max_clip_skip:
            raise InpaintError(
                ErrorCode.OUT_OF_RANGE,
                f"clip_skip must be at most {self._texts.max_clip_skip} for this model.",
                field="clip_skip",
            )
        steps = Steps(params.num_inference_steps, params.strength, params.timesteps, params.sigmas)
        return [
            self._planner.plan(params.scheduler, steps, eta=params.eta, seed=params.seed + image)
            for image in range(params.num_images_per_prompt)
        ]

    def _image_tokens(self, requests: Sequence[InpaintRequest]) -> list[tuple[torch.Tensor, ...]]:
        """Of each request's rows, for the IP-Adapter; those of one batch key all use it, or none does."""
        use, ip_adapter = requests[0].params.ip_adapter, self._components.ip_adapter
        if use is None or ip_adapter is None:
            return [()] * len(requests)
        ip_adapter.check(use)
        return ip_adapter.tokens(requests)

    # --- pictures ----------------------------------------------------------------

    def _encode(self, requests: Sequence[InpaintRequest]) -> list[_Picture]:
        """Every request's picture, with what the VAE says of it, all in as few batches as fit."""
        pictures = [_picture(request) for request in requests]
        needs_image = [self._needs_image_latents(request) for request in requests]
        needs_masked = [request.tensors.masked_image_latents is None for request in requests]
        posteriors = iter(
            self._posteriors(
                [picture.image for picture, needed in zip(pictures, needs_image, strict=True) if needed]
                + [
                    picture.image * (1 - picture.mask)
                    for picture, needed in zip(pictures, needs_masked, strict=True)
                    if needed
                ]
            )
        )
        for picture, needed in zip(pictures, needs_image, strict=True):
            picture.image_posterior = next(posteriors) if needed else None
        for picture, needed in zip(pictures, needs_masked, strict=True):
            picture.masked_posterior = next(posteriors) if needed else None
        return pictures

    def _needs_image_latents(self, request: InpaintRequest) -> bool:
        tensors = request.tensors
        is_used = self._is_plain_unet or (request.params.strength < 1 and tensors.latents is None)
        return is_used and tensors.image_latents is None

    def _posteriors(self, pictures: Sequence[torch.Tensor]) -> list[_Posterior]:
        components = self._components
        posteriors: list[_Posterior] = []
        for first in range(0, len(pictures), MAX_BATCH):
            batch = torch.stack(list(pictures[first : first + MAX_BATCH]))
            encoded = self._autoencoder.encode(batch.to(components.device, components.dtype))
            posteriors += [_Posterior(mean, std) for mean, std in zip(encoded.mean, encoded.std, strict=True)]
        return posteriors

    # --- slots -------------------------------------------------------------------

    def _slots(
        self,
        request: InpaintRequest,
        plans: Sequence[Schedule | InstancePlan],
        embeds: tuple[torch.Tensor, ...],
        image_tokens: tuple[torch.Tensor, ...],
        picture: _Picture,
    ) -> list[Slot]:
        params, device = request.params, self._components.device
        generators = [
            torch.Generator().manual_seed(params.seed + image) for image in range(params.num_images_per_prompt)
        ]
        starts = self._starts(request, generators, picture)
        latent_mask = torch.nn.functional.interpolate(picture.mask[None], size=starts[0].noise.shape[1:])[0].to(device)
        timestep_cond = self._timestep_cond(params)
        slots = []
        for generator, plan, start in zip(generators, plans, starts, strict=True):
            latents = _first_latents(plan, start, is_noise_given=request.tensors.latents is not None)
            state = torch.zeros(1 + MAX_HISTORY, *latents.shape, device=device)
            state[0] = latents
            is_plain, sees_picture = self._is_plain_unet, self._decoder_sees_picture
            slots.append(
                Slot(
                    plan=plan,
                    instance=plan.start() if isinstance(plan, InstancePlan) else None,
                    generator=generator,
                    state=state,
                    embeds=embeds,
                    guidance_scale=params.guidance_scale if params.is_guided else 1.0,
                    timestep_cond=timestep_cond,
                    conditioning=None if is_plain else self._conditioning(latent_mask, start),
                    mask=latent_mask if is_plain else None,
                    image_latents=start.image_latents.float() if is_plain and start.image_latents is not None else None,
                    noise=start.noise if is_plain else None,
                    picture=picture.image if sees_picture else None,
                    picture_mask=picture.mask if sees_picture else None,
                    image_tokens=image_tokens,
                )
            )
        slots[0].has_previews = params.previews
        return slots

    def _starts(
        self, request: InpaintRequest, generators: Sequence[torch.Generator], picture: _Picture
    ) -> list[_Start]:
        """What each image starts from: what the client sent, and the rest drawn in stock's order."""
        tensors, num_images = request.tensors, len(generators)
        scaling_factor = self._components.vae.config.scaling_factor
        image_latents = self._given(tensors.image_latents, num_images)
        if image_latents is None and picture.image_posterior is not None:
            image_latents = [picture.image_posterior.sample(generators[0], scaling_factor)] * num_images
        noises = self._given(tensors.latents, num_images) or self._draw(request.params, generators)
        masked = self._given(tensors.masked_image_latents, num_images)
        if masked is None:
            assert picture.masked_posterior is not None  # noqa: S101 - for the type checker: encoded where not given
            masked = [picture.masked_posterior.sample(generators[0], scaling_factor)] * num_images
        return [
            _Start(noises[image].float(), None if image_latents is None else image_latents[image], masked[image])
            for image in range(num_images)
        ]

    def _given(self, latents: Floats | None, num_images: int) -> list[torch.Tensor] | None:
        """A client's latents for each image; one for all, or one each, as stock repeats them."""
        if latents is None:
            return None
        given = torch.from_numpy(latents.copy()).to(self._components.device, self._components.dtype)
        return [given[image % len(given)] for image in range(num_images)]

    def _draw(self, params: InpaintParams, generators: Sequence[torch.Generator]) -> list[torch.Tensor]:
        components = self._components
        multiple = components.info.latent_multiple
        shape = (1, components.info.latent_channels, params.height // multiple, params.width // multiple)
        return [
            randn_tensor(shape, generator=generator, device=components.device, dtype=components.dtype)[0]
            for generator in generators
        ]

    def _conditioning(self, latent_mask: torch.Tensor, start: _Start) -> torch.Tensor:
        """What a 9-channel UNet is given beside the latents."""
        dtype = self._components.dtype
        return torch.cat([latent_mask.to(dtype), start.masked_image_latents.to(dtype)])

    def _timestep_cond(self, params: InpaintParams) -> torch.Tensor | None:
        """Step 9.2: the guidance scale as an input of the UNet, for those that have one."""
        width = self._components.unet.config.time_cond_proj_dim
        if width is None:
            return None
        weight = torch.tensor([params.guidance_scale - 1])
        # A method in name only: it uses nothing of its object.
        embed = StableDiffusionInpaintPipeline.get_guidance_scale_embedding
        embedded: torch.Tensor = embed(None, weight, embedding_dim=width)[0]
        return embedded.to(self._components.device, self._components.dtype)


def _picture(request: InpaintRequest) -> _Picture:
    """Step 5: the picture, and the mask binarised at one half."""
    image = torch.from_numpy(request.image.copy()).permute(2, 0, 1).float() / 255.0
    mask = (torch.from_numpy(request.mask.copy())[None] >= REPAINT_FROM).float()
    return _Picture(2.0 * image - 1.0, mask)


def _first_latents(plan: Schedule | InstancePlan, start: _Start, *, is_noise_given: bool) -> torch.Tensor:
    """(C, h, w) float32, as stock's `prepare_latents`: given latents are noise alone, at any strength."""
    if is_noise_given:
        return plan.init_noise_sigma * start.noise
    image_scale, noise_scale = plan.initial
    latents = noise_scale * start.noise
    if start.image_latents is not None and image_scale:
        latents = image_scale * start.image_latents.float() + latents
    return latents
