"""One tick: every image of a batch advances by one model call.

Reproduces step 10 of `StableDiffusionInpaintPipeline.__call__` for images whose
noise schedulers, positions and guidance differ. With the state s = (x, h1..hK)
of an image, its scheduler's step is s' = M (s, ε, z); see `service.worker.sampler`.

`tick` computes anything anywhere. `service.worker.captured` computes the most usual
of it as CUDA graphs, of the same pieces.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from service.worker.sampler import Schedule
from service.worker.slots import Estimate, Slot, SlotBatch
from service.worker.streams import send

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
    scaled = _scale_model_input(slots, states[:, 0])  # (N, C, h, w)
    noise_pred = _predict(unet, batch, scaled, pad_rows)  # (R, C, h, w) float32
    noise_pred = guide(noise_pred, batch.uncond_row, batch.cond_row, batch.guidance_scale)  # (N, C, h, w)
    drawn = draw_noise(slots)
    noise = torch.zeros_like(noise_pred) if drawn is None else send(drawn, states.device)
    advanced = advance(_transitions(slots, states.device), states, noise_pred, noise)
    conclude(batch, noise_pred, advanced)


def guide(
    noise_pred: torch.Tensor, uncond_row: torch.Tensor, cond_row: torch.Tensor, guidance_scale: torch.Tensor
) -> torch.Tensor:
    """(N, C, h, w) of (R, C, h, w): classifier-free guidance as stock's; without it both rows are the same one.

    Args:
        noise_pred: What the UNet says of each row.
        uncond_row: (N,) the row of the negative prompt.
        cond_row: (N,) the row of the prompt.
        guidance_scale: (N, 1, 1, 1) weights of the prompt.
    """
    uncond, cond = noise_pred[uncond_row], noise_pred[cond_row]
    return uncond + guidance_scale * (cond - uncond)


def advance(
    transitions: torch.Tensor, states: torch.Tensor, noise_pred: torch.Tensor, drawn: torch.Tensor
) -> torch.Tensor:
    """(N, 1 + K, C, h, w): the schedulers' steps of all images in one product, s' = M (s, ε, z).

    Args:
        transitions: (N, 1 + K, K + 3) M of each image.
        states: (N, 1 + K, C, h, w) s.
        noise_pred: (N, C, h, w) ε.
        drawn: (N, C, h, w) z.
    """
    inputs = torch.cat([states, noise_pred[:, None], drawn[:, None]], dim=1)  # (N, K + 3, C, h, w)
    return torch.bmm(transitions, inputs.flatten(2)).view_as(states)


def draw_noise(slots: Sequence[Slot]) -> torch.Tensor | None:
    """(N, C, h, w) on the CPU, this step's noise of each image, or zeros; None where nobody's scheduler draws."""
    is_drawing = [isinstance(slot.plan, Schedule) and slot.plan.draws_noise[slot.call] for slot in slots]
    if not any(is_drawing):
        return None
    shape = slots[0].latents.shape
    noise = torch.zeros(len(slots), *shape)
    for index, slot in enumerate(slots):
        if is_drawing[index]:
            if slot.drawn is None:
                # As stock's `randn_tensor` with a list of generators: one image at a time.
                slot.drawn = torch.randn((1, *shape), generator=slot.generator)[0]
            noise[index] = slot.drawn
    return noise


def conclude(batch: SlotBatch, noise_pred: torch.Tensor, advanced: torch.Tensor) -> None:
    """Take what has been computed into the slots.

    Args:
        batch: The gathered slots.
        noise_pred: (N, C, h, w) with guidance.
        advanced: (N, 1 + K, C, h, w), written to where an image has a scheduler of its own, or the UNet no mask.
    """
    slots = batch.slots
    for index, slot in enumerate(slots):
        if slot.instance is not None:
            if slot.advanced is None:
                x, eps = slot.latents[None], noise_pred[index : index + 1]
                slot.advanced = slot.instance.step(eps, x, slot.call, slot.generator)[0]
            advanced[index, 0] = slot.advanced
    if batch.mask is not None:
        advanced[:, 0] = _blend_known_region(batch, advanced[:, 0])
    for index, slot in enumerate(slots):
        if slot.has_previews:
            slot.estimate = Estimate(slot.latents, noise_pred[index], slot.call)
        slot.state = advanced[index]
        slot.call += 1
        slot.drawn = slot.advanced = None


def _scale_model_input(slots: Sequence[Slot], latents: torch.Tensor) -> torch.Tensor:
    scales = torch.ones(len(slots))
    for index, slot in enumerate(slots):
        if isinstance(slot.plan, Schedule):
            scales[index] = slot.plan.input_scale[slot.call]
    scaled = latents * send(scales, latents.device).view(-1, 1, 1, 1)
    for index, slot in enumerate(slots):
        if slot.instance is not None:
            scaled[index] = slot.instance.scale(latents[index : index + 1], slot.call)[0]
    return scaled


def _predict(unet: UNet2DConditionModel, batch: SlotBatch, scaled: torch.Tensor, pad_rows: RowPadding) -> torch.Tensor:
    """One UNet call for all rows, each at its own timestep."""
    timesteps = send(torch.stack([slot.plan.timesteps[slot.call] for slot in batch.slots]), scaled.device)
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


def _transitions(slots: Sequence[Slot], device: torch.device) -> torch.Tensor:
    """(N, 1 + K, K + 3); zeros for images with a scheduler of their own."""
    num_state = len(slots[0].state)
    transitions = torch.zeros(len(slots), num_state, num_state + 2)
    for index, slot in enumerate(slots):
        if isinstance(slot.plan, Schedule):
            transitions[index] = slot.plan.transition[slot.call]
    return send(transitions, device)


def _blend_known_region(batch: SlotBatch, latents: torch.Tensor) -> torch.Tensor:
    """A 4-channel UNet knows no mask: outside it, put the noised original back (stock's step 10, last part)."""
    assert batch.mask is not None  # noqa: S101 - for the type checker: all three come together
    assert batch.image_latents is not None  # noqa: S101
    assert batch.noise is not None  # noqa: S101
    renoise = send(torch.stack([slot.plan.renoise[slot.call] for slot in batch.slots]), latents.device)
    image_scale, noise_scale = renoise.view(-1, 2, 1, 1, 1).unbind(1)
    known = image_scale * batch.image_latents + noise_scale * batch.noise
    return (1 - batch.mask) * known + batch.mask * latents
