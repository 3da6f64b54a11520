"""The style of the example LoRA: a graphite pencil sketch of what is under the mask."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.data import SceneArrays
from training.pool import unpack_masks
from training.sheet import to_bytes
from training.vae import to_signed

_LUMA = (0.299, 0.587, 0.114)
_PAPER = 0.96
_SHADE_SIGMA = 5.0
"""How far, in pixels, shading reaches from an outline."""
_LINE_SIGMA = 1.4
_LINE_STEEPNESS = 4.0
_LINE_STRENGTH = 0.65
_HATCH_PERIOD = (16, 32)
"""Pixels from one stroke to the next, across and down: whole cells of 8x8 pixels, so that all strokes have the same
latents, and as narrow as the autoencoder still gives them back."""
_HATCH_STRENGTH = 0.28
_HATCHED = (0.50, 0.62)
"""Brightness where hatching is full, and where it ends."""
_CLEARANCE = 6.0
"""How far, in pixels, hatching keeps from outlines: strokes this wide would break up anything small."""
_SMUDGED = (0.05, 0.60)
"""Brightness where the paper is darkest with graphite, and where it begins to darken."""
_SMUDGE_STRENGTH = 0.4


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, C, H, W), with the borders continued."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    channels = images.shape[1]
    kernel = (weights / weights.sum()).expand(channels, 1, 1, -1)
    wide = functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    return functional.conv2d(functional.conv2d(wide, kernel, groups=channels), kernel.mT, groups=channels)


def _lines(light: Tensor) -> Tensor:
    """Strength of outlines, (B, 1, H, W) in [0, 1], of images (B, 3, H, W) in [0, 1]; any colour can make one."""
    wide = functional.pad(_blur(light, _LINE_SIGMA), (1, 1, 1, 1), mode="replicate")
    across = wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2]
    down = wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1]
    steepness = (across.square() + down.square()).sqrt().amax(dim=1, keepdim=True)
    return (_LINE_STEEPNESS * steepness - 0.08).clamp(0.0, 1.0)


def _darkness(grey: Tensor, limits: tuple[float, float]) -> Tensor:
    """1 where it is as dark as the first limit, 0 where it is as light as the second."""
    dark, light = limits
    return ((light - grey) / (light - dark)).clamp(0.0, 1.0)


def _strokes(grey: Tensor) -> Tensor:
    """Slanting strokes all over (H, W), in [0, 1]."""
    rows = torch.arange(grey.shape[2], dtype=grey.dtype, device=grey.device)[:, None]
    columns = torch.arange(grey.shape[3], dtype=grey.dtype, device=grey.device)
    across, down = _HATCH_PERIOD
    return 0.5 + 0.5 * torch.cos(2 * math.pi * (columns / across + rows / down))


def pencil(images: Tensor) -> Tensor:
    """Sketches images in graphite: colour-dodge shading, outlines, and hatching where they are dark.

    The shading is the usual colour dodge (a picture divided by the inverse of its blurred negative), taken per colour
    so that it also finds edges between colours of one brightness.

    Args:
        images: (B, 3, H, W) in [-1, 1].

    Returns:
        Grey images of the same shape, in [-1, 1].
    """
    light = (images.float() + 1.0) / 2.0
    dodge = ((light + 0.04) / (_blur(light, _SHADE_SIGMA) + 0.04)).amin(dim=1, keepdim=True).clamp(0.35, 1.0)
    grey = _blur((light * light.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True), 1.5)
    lines = _lines(light)
    open_ground = (1.0 - 5.0 * _blur(lines, _CLEARANCE)).clamp(0.0, 1.0)
    sketch = _PAPER * dodge * (1.0 - _LINE_STRENGTH * lines)
    sketch = sketch * (1.0 - _HATCH_STRENGTH * _strokes(grey) * _darkness(grey, _HATCHED) * open_ground)
    sketch = sketch * (1.0 - _SMUDGE_STRENGTH * _darkness(grey, _SMUDGED))
    return (sketch * 2.0 - 1.0).expand(-1, 3, -1, -1)


def sketch_masked(pixels: Tensor, covers: Tensor) -> Tensor:
    """Scenes that are a sketch under the mask and keep their colours around it.

    Args:
        pixels: scenes, (B, H, W, 3) uint8.
        covers: K masks of each, (B * K, 1, H, W) bool.

    Returns:
        (B * K, 3, H, W) in [-1, 1].
    """
    images = to_signed(pixels)
    each = covers.shape[0] // images.shape[0]
    return torch.where(covers, pencil(images).repeat_interleave(each, 0), images.repeat_interleave(each, 0))


def sketch_arrays(arrays: SceneArrays, rows: slice, device: torch.device) -> SceneArrays:
    """The targets of training: every mask of every target as a scene of its own, sketched under that mask.

    What is left when the mask is blanked is the coloured scene, so that the condition stays as it is without a style.

    Args:
        arrays: drawn scenes; N scenes, K targets each, M masks each.
        rows: which scenes to take.
        device: where to sketch.

    Returns:
        N * K * M scenes of one target and one mask.
    """
    masks = arrays.masks.shape[2]

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array[rows]).to(device)

    covers = unpack_masks(put(arrays.masks).flatten(0, 2))
    shown = to_bytes(sketch_masked(put(arrays.shown).flatten(0, 1), covers))
    bare = to_bytes(sketch_masked(put(arrays.bare), covers))
    return SceneArrays(
        bare=bare,
        shown=shown[:, None],
        masks=arrays.masks[rows].reshape(len(bare), 1, 1, -1),
        label=np.repeat(arrays.label[rows].reshape(-1, 1, 2), masks, axis=0),
        box=np.repeat(arrays.box[rows].reshape(-1, 1, 4), masks, axis=0),
        mask_label=arrays.mask_label[rows].reshape(-1, 1, 1, 2),
    )


def saturation(images: Tensor) -> Tensor:
    """Colour saturation (largest less smallest channel, over the largest) of (B, 3, H, W) in [-1, 1]; (B, 1, H, W)."""
    light = (images + 1.0) / 2.0
    high, low = light.amax(dim=1, keepdim=True), light.amin(dim=1, keepdim=True)
    return (high - low) / high.clamp_min(1 / 255)
