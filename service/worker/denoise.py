"""One tick: every image of a batch advances by one model call.

Reproduces step 10 of `StableDiffusionInpaintPipeline.__call__` for images whose
noise schedulers, positions and guidance differ. With the state s = (x, h1..hK)
of an image, its scheduler's step is s' = M (s, ε, z); see `service.worker.sampler`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor

from service.worker.sampler import Schedule
from service.worker.slots import Estimate, Slot, SlotBatch

RowPadding = Callable[[int], int]


def tick(unet: UNet2DConditionModel, batch: SlotBatch, pad_rows: RowPadding) -> None:
    """Advance every slot of `batch` by one model call.

    Nothing of a slot changes until the whole batch has been computed, so that
    after an exception the same step can be tried again with fewer.

    Args:
        unet: The noise predictor.
        batch: The gathered slots; none has reached its last call.
        pad_rows: How many UNet rows to run for a number of rows; padding repeats the last row.
    """
    slots = batch.slots
    states = torch.stack([slot.state for slot in slots])  # (N, 1 + K, C, h, w)
    latents = states[:, 0]
    _draw(slots, latents)

    scaled = _scale_model_input(slots, latents)  # (N, C, h, w)
    noise_pred = _predict(unet, batch, scaled, pad_rows)  # (R, C, h, w) float32

    # Guidance, as stock: without it both rows are the same one.
    uncond, cond = noise_pred[batch.uncond_row], noise_pred[batch.cond_row]
    noise_pred = uncond + batch.guidance_scale * (cond - uncond)  # (N, C, h, w)

    advanced = _scheduler_step(slots, states, noise_pred)
    if batch.mask is not None:
        advanced[:, 0] = _blend_known_region(batch, advanced[:, 0])

    for index, slot in enumerate(slots):
        if slot.has_previews:
            slot.estimate = Estimate(latents[index], noise_pred[index], slot.call)
        slot.state = advanced[index]
        slot.call += 1
        slot.drawn = slot.advanced = None


def _draw(slots: Sequence[Slot], latents: torch.Tensor) -> None:
    """Draw this step's noise from each image's own generator, where its scheduler does."""
    for slot in slots:
        if isinstance(slot.plan, Schedule) and slot.plan.draws_noise[slot.call] and slot.drawn is None:
            shape = (1, *latents.shape[1:])
            slot.drawn = randn_tensor(shape, generator=slot.generator, device=latents.device)[0]


def _scale_model_input(slots: Sequence[Slot], latents: torch.Tensor) -> torch.Tensor:
    scales = torch.ones(len(slots))
    for index, slot in enumerate(slots):
        if isinstance(slot.plan, Schedule):
            scales[index] = slot.plan.input_scale[slot.call]
    scaled = latents * scales.to(latents.device).view(-1, 1, 1, 1)
    for index, slot in enumerate(slots):
        if slot.instance is not None:
            scaled[index] = slot.instance.scale(latents[index : index + 1], slot.call)[0]
    return scaled


def _predict(unet: UNet2DConditionModel, batch: SlotBatch, scaled: torch.Tensor, pad_rows: RowPadding) -> torch.Tensor:
    """One UNet call for all rows, each at its own timestep."""
    timesteps = torch.stack([slot.plan.timesteps[slot.call] for slot in batch.slots]).to(scaled.device)
    rows = scaled.to(unet.dtype)[batch.image_of_row]
    if batch.conditioning is not None:
        rows = torch.cat([rows, batch.conditioning], dim=1)  # (R, 9, h, w)
    padding = pad_rows(batch.num_rows) - batch.num_rows
    embeds: Any = _padded(batch.embeds, padding)
    if batch.image_tokens is not None:
        # What the UNet itself makes of `image_embeds` for its attention layers, once they are projected.
        embeds = (embeds, [_padded(batch.image_tokens, padding)])
    noise_pred = unet(
        _padded(rows, padding),
        _padded(timesteps[batch.image_of_row], padding),
        encoder_hidden_states=embeds,
        encoder_attention_mask=None if batch.embeds_mask is None else _padded(batch.embeds_mask, padding),
        timestep_cond=None if batch.timestep_cond is None else _padded(batch.timestep_cond, padding),
        return_dict=False,
    )[0]
    result: torch.Tensor = noise_pred[: batch.num_rows].float()
    return result


def _padded(rows: torch.Tensor, padding: int) -> torch.Tensor:
    """The last row so many times more."""
    return torch.cat([rows, rows[-1:].expand(padding, *rows.shape[1:])]) if padding else rows


def _scheduler_step(slots: Sequence[Slot], states: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
    """All images in one product, s' = M (s, ε, z); images with a noise scheduler of their own use it."""
    num_images, num_state = states.shape[:2]
    transitions = torch.zeros(num_images, num_state, num_state + 2)
    drawn = torch.zeros_like(noise_pred)
    for index, slot in enumerate(slots):
        if isinstance(slot.plan, Schedule):
            transitions[index] = slot.plan.transition[slot.call]
        if slot.drawn is not None:
            drawn[index] = slot.drawn
    inputs = torch.cat([states, noise_pred[:, None], drawn[:, None]], dim=1)  # (N, K + 3, C, h, w)
    advanced = torch.bmm(transitions.to(states.device), inputs.flatten(2)).view_as(states)
    for index, slot in enumerate(slots):
        if slot.instance is not None:
            one = slice(index, index + 1)
            if slot.advanced is None:
                slot.advanced = slot.instance.step(noise_pred[one], states[one, 0], slot.call, slot.generator)[0]
            advanced[index, 0] = slot.advanced
    return advanced


def _blend_known_region(batch: SlotBatch, latents: torch.Tensor) -> torch.Tensor:
    """A 4-channel UNet knows no mask: outside it, put the noised original back (stock's step 10, last part)."""
    assert batch.mask is not None  # noqa: S101 - for the type checker: all three come together
    assert batch.image_latents is not None  # noqa: S101
    assert batch.noise is not None  # noqa: S101
    renoise = torch.stack([slot.plan.renoise[slot.call] for slot in batch.slots]).to(latents.device)
    image_scale, noise_scale = renoise.view(-1, 2, 1, 1, 1).unbind(1)
    known = image_scale * batch.image_latents + noise_scale * batch.noise
    return (1 - batch.mask) * known + batch.mask * latents
