"""Latents of all scenes, encoded once, from which the denoiser's batches are drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from training.data import SceneArrays
from training.landscape import SIZE
from training.vae import SCALING, encode_moments, to_signed
from training.words import MAX_LENGTH
from training.world import COLOUR_NAMES, SIZES, THINGS, caption, nothing_caption

POOL_BATCH = 256
"""Images encoded at a time."""
VARIANTS = 48
"""Captions drawn for each thing, colour and size."""


@dataclass(frozen=True)
class LatentPool:
    """Encoded scenes; T targets, N scenes, T * M masks. Latents are scaled to unit deviation.

    Attributes:
        shown: scenes with their target, (T, 4, 32, 32) float16.
        bare: scenes without it, (N, 4, 32, 32) float16.
        hidden: scenes with the mask blanked, (T * M, 4, 32, 32) float16.
        masks: masks at latent size, as the pipeline resizes them, (T * M, 1, 32, 32) uint8.
        label: thing, colour, size class and clearness of each mask's target, (T * M, 4) int64.
    """

    shown: Tensor
    bare: Tensor
    hidden: Tensor
    masks: Tensor
    label: Tensor

    def save(self, path: Path) -> None:
        """Writes the pool to a file."""
        torch.save({f.name: getattr(self, f.name).cpu() for f in fields(self)}, path)

    @staticmethod
    def load(path: Path, device: torch.device) -> LatentPool:
        """Reads a pool that save wrote."""
        return LatentPool(**{k: v.to(device) for k, v in torch.load(path, weights_only=True).items()})


def unpack_masks(packed: Tensor) -> Tensor:
    """Bit-packed masks (B, SIZE * SIZE // 8) uint8 to bool (B, 1, SIZE, SIZE)."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[:, :, None] >> shifts) & 1
    return bits.reshape(-1, 1, SIZE, SIZE).bool()


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Samples scaled latents of images, as the pipeline does.

    Args:
        vae: the autoencoder.
        images: (B, 3, H, W) in [-1, 1].

    Returns:
        Latents (B, 4, H / 8, W / 8), float16.
    """
    device = images.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        mean, deviation = encode_moments(vae, images.contiguous(memory_format=torch.channels_last), images.shape[0])
    return ((mean + deviation * torch.randn_like(mean)) * SCALING).half()


@torch.no_grad()
def build_pool(vae: AutoencoderKL, arrays: SceneArrays, device: torch.device, batch: int = POOL_BATCH) -> LatentPool:
    """Encodes all scenes.

    Args:
        vae: the trained autoencoder, on `device`.
        arrays: the scenes.
        device: where to encode, and where the pool is to lie.
        batch: images at a time.

    Returns:
        The pool.
    """
    scenes, count, per = arrays.masks.shape[:3]

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    bare = [encode(vae, to_signed(put(arrays.bare[i : i + batch]))) for i in range(0, scenes, batch)]
    shown, hidden, masks = [], [], []
    flat_shown = arrays.shown.reshape(-1, SIZE, SIZE, 3)
    flat_masks = arrays.masks.reshape(scenes * count, per, -1)
    for i in range(0, scenes * count, batch):
        images = to_signed(put(flat_shown[i : i + batch]))
        shown.append(encode(vae, images))
        each = []
        for m in range(per):
            covers = unpack_masks(put(flat_masks[i : i + batch, m]))
            each.append(encode(vae, images.masked_fill(covers, 0.0)))
            masks.append(covers[:, :, ::8, ::8].to(torch.uint8))
        hidden.append(torch.stack(each, dim=1).flatten(0, 1))
        masks[-per:] = [torch.stack(masks[-per:], dim=1).flatten(0, 1)]
    label = np.concatenate([np.repeat(arrays.label[:, :, None], per, axis=2), arrays.mask_label], axis=-1).reshape(
        -1, 4
    )
    return LatentPool(
        torch.cat(shown), torch.cat(bare), torch.cat(hidden), torch.cat(masks), put(label.astype(np.int64))
    )


def compile_ahead(vae: AutoencoderKL, device: torch.device) -> None:
    """Compiles the encoder, for build_pool, into the compiler's cache on disk."""
    vae.to(device).to(memory_format=torch.channels_last).eval()
    vae.encoder.compile()
    with torch.no_grad():
        encode(vae, torch.zeros(POOL_BATCH, 3, SIZE, SIZE, device=device))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids of captions, padded as the pipeline pads them, (B, 77) int64."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return ids.input_ids


class CaptionTable:
    """Token ids of captions drawn ahead for each thing, colour and size."""

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device, seed: int = 0) -> None:
        rng = random.Random(seed)  # noqa: S311
        texts = [
            caption(thing, colour, size, rng)
            for thing in range(len(THINGS))
            for colour in range(len(COLOUR_NAMES) + 1)
            for size in range(len(SIZES))
            for _ in range(VARIANTS)
        ]
        texts += [nothing_caption(rng) for _ in range(VARIANTS)] + [""]
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        rows = tokenize(tokenizer, list(unique))
        self._ids = rows[torch.tensor([unique[text] for text in texts])].to(device)
        self._nothing = len(texts) - 1 - VARIANTS
        self._empty = len(texts) - 1

    def draw(self, label: Tensor, bare: Tensor, dropped: Tensor) -> Tensor:
        """Draws captions.

        Args:
            label: thing, colour, size class and clearness, (B, 4).
            bare: where the background alone is wanted, (B,) bool.
            dropped: where the caption is left empty, (B,) bool.

        Returns:
            Token ids, (B, 77).
        """
        variant = torch.randint(VARIANTS, label.shape[:1], device=label.device)
        colours, sizes = len(COLOUR_NAMES) + 1, len(SIZES)
        row = ((label[:, 0] * colours + label[:, 1]) * sizes + label[:, 2]) * VARIANTS + variant
        row = torch.where(bare, self._nothing + variant, row)
        return self._ids[torch.where(dropped, torch.full_like(row, self._empty), row)]
