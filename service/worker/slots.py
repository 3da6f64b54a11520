"""The tensors of one image between steps, and gathering many images into a batch.

A `Slot` holds one image. A `SlotBatch` is the same images stacked for one UNet
call; it is rebuilt only when images join or leave. Shapes: N images, R UNet
rows (two per guided image), C latent channels, h x w latents, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.worker.sampler import InstancePlan, InstanceState, Schedule
from service.worker.streams import note_use, send

MASK_MULTIPLE = 8
"""Masked tokens are filled up to a multiple of this, which fused attention kernels ask of a mask."""


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """What the latest step knew of the finished picture.

    Attributes:
        latents: (C, h, w) float32 before the step.
        output: (C, h, w) float32, what the UNet said of them, guidance applied.
        call: Which model call it was, from 0.
    """

    latents: torch.Tensor
    output: torch.Tensor
    call: int


@dataclass(slots=True, eq=False)
class Slot:
    """One image being denoised.

    Attributes:
        plan: Its schedule.
        instance: Its own noise scheduler, where the schedule is no table.
        generator: Its CPU generator, already advanced past what `prepare` drew.
        state: (1 + K, C, h, w) float32: the latents, then the scheduler's history.
        embeds: (T, D) of each UNet row: the prompt's, after the negative prompt's when guided.
        guidance_scale: Weight of the prompt; 1 when not guided.
        timestep_cond: (E,) guidance scale as the UNet takes it, for UNets that do, else None.
        conditioning: (1 + C, h, w) mask and masked-image latents, for a 9-channel UNet.
        mask: (1, h, w) float32, for a 4-channel UNet, else None.
        image_latents: (C, h, w) float32, for a 4-channel UNet, else None.
        noise: (C, h, w) float32, the initial noise, for a 4-channel UNet, else None.
        picture: (3, H, W) in [-1, 1], for decoders that look at it, else None.
        picture_mask: (1, H, W), likewise.
        image_tokens: (tokens, D) of each UNet row, for the IP-Adapter; empty without it.
        call: Model calls done.
        drawn: (C, h, w) noise drawn for the step at hand, on the CPU; kept so that a step
            that failed and is tried again uses the same.
        advanced: (C, h, w) latents that `instance` has already stepped to, kept likewise.
        has_previews: Whether to keep `estimate`.
        estimate: For a preview.
    """

    plan: Schedule | InstancePlan
    instance: InstanceState | None
    generator: torch.Generator
    state: torch.Tensor
    embeds: tuple[torch.Tensor, ...]
    guidance_scale: float
    timestep_cond: torch.Tensor | None
    conditioning: torch.Tensor | None
    mask: torch.Tensor | None
    image_latents: torch.Tensor | None
    noise: torch.Tensor | None
    picture: torch.Tensor | None = None
    picture_mask: torch.Tensor | None = None
    image_tokens: tuple[torch.Tensor, ...] = ()
    call: int = 0
    drawn: torch.Tensor | None = None
    advanced: torch.Tensor | None = None
    has_previews: bool = False
    estimate: Estimate | None = None

    @property
    def num_calls(self) -> int:
        """Model calls in all."""
        return len(self.plan.timesteps)

    @property
    def latents(self) -> torch.Tensor:
        """(C, h, w) float32 latents."""
        return self.state[0]

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What a step reads of it on the device."""
        own = [self.state, self.timestep_cond, self.conditioning, self.mask, self.image_latents, self.noise]
        return [*own, *self.embeds, *self.image_tokens]


@dataclass(slots=True, eq=False, weakref_slot=True)
class SlotBatch:
    """Images stacked for UNet calls.

    Attributes:
        slots: The images, in order.
        embeds: (R, T, D), zeros after the end of a shorter one.
        embeds_mask: (R, T), 1 for a token and 0 for what fills up; None where all are as long.
        image_of_row: (R,) which image a row belongs to.
        uncond_row: (N,) the row of the negative prompt; the same as `cond_row` when not guided.
        cond_row: (N,) the row of the prompt.
        guidance_scale: (N, 1, 1, 1) float32.
        timestep_cond: (R, E), or None.
        conditioning: (R, 1 + C, h, w), or None.
        mask: (N, 1, h, w), or None.
        image_latents: (N, C, h, w), or None.
        noise: (N, C, h, w), or None.
        image_tokens: (R, tokens, D) for the IP-Adapter, or None.
    """

    slots: tuple[Slot, ...]
    embeds: torch.Tensor
    embeds_mask: torch.Tensor | None
    image_of_row: torch.Tensor
    uncond_row: torch.Tensor
    cond_row: torch.Tensor
    guidance_scale: torch.Tensor
    timestep_cond: torch.Tensor | None
    conditioning: torch.Tensor | None
    mask: torch.Tensor | None
    image_latents: torch.Tensor | None
    noise: torch.Tensor | None
    image_tokens: torch.Tensor | None

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.image_of_row)

    @classmethod
    def gather(cls, slots: Sequence[Slot], device: torch.device) -> "SlotBatch":
        """Stack what stays the same from step to step; the host does not wait for the device."""
        image_of_row: list[int] = []
        uncond_row: list[int] = []
        cond_row: list[int] = []
        for image, slot in enumerate(slots):
            first_row = len(image_of_row)
            image_of_row += [image] * len(slot.embeds)
            uncond_row.append(first_row)
            cond_row.append(len(image_of_row) - 1)
        for slot in slots:
            note_use(slot.tensors)
        rows = send(torch.tensor(image_of_row), device)
        embeds, embeds_mask = _stack_embeds([embeds for slot in slots for embeds in slot.embeds])
        return cls(
            slots=tuple(slots),
            embeds=embeds,
            embeds_mask=embeds_mask,
            image_of_row=rows,
            uncond_row=send(torch.tensor(uncond_row), device),
            cond_row=send(torch.tensor(cond_row), device),
            guidance_scale=send(torch.tensor([slot.guidance_scale for slot in slots]), device).view(-1, 1, 1, 1),
            timestep_cond=_of_rows(_stack([slot.timestep_cond for slot in slots]), rows),
            conditioning=_of_rows(_stack([slot.conditioning for slot in slots]), rows),
            mask=_stack([slot.mask for slot in slots]),
            image_latents=_stack([slot.image_latents for slot in slots]),
            noise=_stack([slot.noise for slot in slots]),
            image_tokens=_stack([tokens for slot in slots for tokens in slot.image_tokens]),
        )


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Stack along a new first dimension; None when the model has no such input."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _of_rows(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """What each image has, for each of its rows."""
    return None if tensor is None else tensor[rows]


def _stack_embeds(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(R, T, D) of embeddings of any length, and which of their tokens are real; None where all are."""
    lengths = {len(tensor) for tensor in embeds}
    if len(lengths) == 1:
        return torch.stack(list(embeds)), None
    longest = -(-max(lengths) // MASK_MULTIPLE) * MASK_MULTIPLE
    stacked = torch.stack([torch.nn.functional.pad(tensor, (0, 0, 0, longest - len(tensor))) for tensor in embeds])
    mask = torch.zeros(stacked.shape[:2], dtype=stacked.dtype, device=stacked.device)
    for row, tensor in enumerate(embeds):
        mask[row, : len(tensor)] = 1
    return stacked, mask
