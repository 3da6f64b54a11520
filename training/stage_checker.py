"""The stage that trains the safety checker, and the pictures it learns from."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from training.checker import build_checker, concept_cosine, odd_pictures, paste_patches, train_checker
from training.crops import mask_boxes
from training.data import SceneArrays
from training.landscape import SIZE
from training.pool import unpack_masks
from training.sampling import paint
from training.sheet import to_bytes
from training.stages import Plan, held_out, load_denoiser, load_vae, report, save_weights
from training.vae import to_signed
from training.words import load_tokenizer
from training.world import COLOUR_NAMES, NOTHING, PIRATE_FLAG, THING_INDEX, THINGS


@torch.no_grad()
def _painted(plan: Plan, arrays: SceneArrays, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Paints pictures for the checker: images (uint8), labels, and bounds of what was painted."""
    vae, denoiser = load_vae(plan), load_denoiser(plan).eval()
    tokenizer = load_tokenizer(plan.work / "tokenizer")
    rng = random.Random(0)  # noqa: S311
    images, labels, boxes = [], [], []
    size = min(32, count)
    for index in range(count // size):
        picks = [rng.randrange(arrays.bare.shape[0]) for _ in range(size)]
        pixels = torch.from_numpy(arrays.bare[picks]).to(plan.device)
        covers = unpack_masks(torch.from_numpy(arrays.masks[picks, 0, 0]).to(plan.device))
        half_made = index % 4 == 3
        names = [t.name for t in THINGS if t.name != PIRATE_FLAG]
        prompts, label = [], []
        for _ in range(size):
            flag = not half_made and rng.random() < 0.45
            name = PIRATE_FLAG if flag else rng.choice([*names, NOTHING, "flag"])
            plain = flag or name == NOTHING
            prompts.append(name if plain else f"a {rng.choice(COLOUR_NAMES)} {name}")
            label.append(int(flag))
        made = paint(
            vae,
            denoiser,
            tokenizer,
            to_signed(pixels),
            covers,
            prompts=prompts,
            seed=index,
            steps=rng.choice((6, 10, 10, 20)),
            guidance=rng.choice((3.0, 5.0, 7.5, 7.5)),
            stop_after=rng.randrange(1, 6) if half_made else None,
        )
        images.append(torch.from_numpy(to_bytes(made)).to(plan.device))
        labels += label
        boxes.append(mask_boxes(covers))
    return torch.cat(images), torch.tensor(labels, device=plan.device), torch.cat(boxes)


@torch.no_grad()
def _rebuilt(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 as the autoencoder gives them back."""
    made = vae.decode(vae.encode(to_signed(pixels)).latent_dist.mean).sample
    return torch.from_numpy(to_bytes(made)).to(pixels.device)


_KEPT = 160
"""Side in pixels of the pictures that the checker is trained on."""


def _shrunk(pixels: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 at the side that the checker is trained on."""
    parts = []
    for part in pixels.split(64):
        small = functional.interpolate(to_signed(part), (_KEPT, _KEPT), mode="bicubic", antialias=True)
        parts.append(torch.from_numpy(to_bytes(small)).to(pixels.device))
    return torch.cat(parts)


def stage_checker(plan: Plan, flags: SceneArrays, others: SceneArrays) -> None:
    """Trains the safety checker on drawn and painted pictures, and on pictures that are no scenes."""
    device = plan.device
    vae = load_vae(plan)
    drawn = torch.cat([torch.from_numpy(a.shown[:, 0]) for a in (flags, others)])
    thing = torch.cat([torch.from_numpy(a.label[:, 0, 0]) for a in (flags, others)])
    label = (thing == THING_INDEX[PIRATE_FLAG]).long()
    box = torch.cat([torch.from_numpy(a.box[:, 0]) for a in (flags, others)]).float()
    again = torch.randperm(len(drawn))[: plan.rebuilt]
    rebuilt = torch.cat([_rebuilt(vae, drawn[rows].to(device)) for rows in again.split(16)])
    report(f"rebuilt {len(rebuilt)} pictures for the checker")
    odd = torch.from_numpy(to_bytes(odd_pictures(plan.odd, device)))
    whole = torch.tensor([0.0, 0.0, SIZE, SIZE]).repeat(plan.odd, 1)
    sources = [
        (0.62, drawn, label, box),
        (0.16, rebuilt, label[again], box[again]),
        (0.22, odd, torch.zeros(plan.odd, dtype=torch.long), whole),
    ]
    if plan.painted:
        sources.append((0.16, *_painted(plan, others, plan.painted)))
        report(f"painted {plan.painted} pictures for the checker")
    ready = [(s, _shrunk(p.to(device)), y.to(device), b.to(device) * _KEPT / SIZE) for s, p, y, b in sources]

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, boxes = [], [], []
        for share, pixels, kind, bounds in ready:
            rows = torch.randint(len(pixels), (max(1, round(share * count)),), device=device)
            part = to_signed(pixels[rows])
            few = torch.nonzero(kind[rows] == 0)[:, 0][::10]
            part[few] = paste_patches(part[few])
            images.append(part)
            labels.append(kind[rows])
            boxes.append(bounds[rows])
        return torch.cat(images), torch.cat(labels), torch.cat(boxes)

    checker = build_checker()
    train_checker(checker, draw, steps=plan.checker_steps, device=device, report=report)
    with torch.no_grad():
        arrays, _ = held_out(128, device)
        arrays_flag, _ = held_out(64, device, THING_INDEX[PIRATE_FLAG], 9000)
        plain = torch.from_numpy(arrays.bare).to(device)
        low = concept_cosine(checker, to_signed(torch.from_numpy(arrays_flag.shown[:, 0]).to(device)))
        high = concept_cosine(checker, to_signed(plain))
        report(
            f"checker: flags {low.min().item():.3f} to {low.max().item():.3f}, "
            f"plain {high.min().item():.3f} to {high.max().item():.3f}"
        )
    save_weights(plan.work / "checker.safetensors", checker)
