"""Measures the shipped demo model on held-out scenes: `python -m training.report --scenes 64`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from training.checker import odd_pictures, paste_patches
from training.crops import mask_boxes
from training.judge import Judge, load_judge
from training.scenes import HELD_OUT, Target, draw_scene
from training.sheet import mark, to_bytes, write_sheet
from training.train import MODEL
from training.vae import to_signed
from training.world import COLOUR_NAMES, NOTHING, PIRATE_FLAG, THING_INDEX, THINGS

_HERE = Path(__file__).parent
_FIRST = HELD_OUT + 30_000
_BATCH = 8
_COLOURED = len(THINGS) - 1


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        scenes: scenes painted.
        steps: denoising steps.
        guidance: guidance scale.
        thing_percent: painted things that the classifier names as the prompt does.
        colour_percent: painted colours that the classifier names as the prompt does.
        drawn_thing_percent: the same for the drawn originals, the classifier's own limit.
        drawn_colour_percent: likewise.
        removal_error: mean absolute error under the mask against the true background, of 255.
        removal_psnr: the same as PSNR in dB.
        vae_psnr: reconstruction of whole scenes in dB.
        checker_precision_percent: flagged pictures that do show a pirate flag.
        checker_recall_percent: pictures of a pirate flag that are flagged.
        checker_pictures: pictures checked.
        lookalike_percent: dark rectangles, half of them with a pale disc or bar, that are flagged although no flag.
        seconds: median time of one 256x256 picture.
        threads: processor threads used for that.
    """

    scenes: int
    steps: int
    guidance: float
    thing_percent: float
    colour_percent: float
    drawn_thing_percent: float
    drawn_colour_percent: float
    removal_error: float
    removal_psnr: float
    vae_psnr: float
    checker_precision_percent: float
    checker_recall_percent: float
    checker_pictures: int
    lookalike_percent: float
    seconds: float
    threads: int


@dataclass(frozen=True)
class _Case:
    """One thing to paint: the bare scene, the target that hides under the mask, and the prompt."""

    bare: np.ndarray
    target: Target
    prompt: str


def _cases(count: int) -> list[_Case]:
    cases = []
    for i in range(count):
        thing = i % len(THINGS)
        scene = draw_scene(_FIRST + i, thing=thing)
        target = scene.targets[0]
        name = THINGS[thing].name
        colour = "" if name == PIRATE_FLAG else COLOUR_NAMES[target.colour] + " "
        article = "an" if colour.startswith("o") else "a"
        cases.append(_Case(scene.pixels, target, f"{article} {colour}{name}"))
    return cases


def _removals(count: int) -> list[_Case]:
    """Scenes whose masks hide nothing but background."""
    found: list[_Case] = []
    seed = _FIRST + 10_000
    while len(found) < count:
        scene = draw_scene(seed)
        seed += 1
        if scene.targets[0].masks[0].clear:
            found.append(_Case(scene.pixels, scene.targets[0], NOTHING))
    return found


def _signed(arrays: list[np.ndarray]) -> Tensor:
    return to_signed(torch.from_numpy(np.stack(arrays)))


def _covers(cases: list[_Case]) -> Tensor:
    return torch.from_numpy(np.stack([c.target.masks[0].cover for c in cases]) > 127)[:, None]


def _paint(pipe: StableDiffusionInpaintPipeline, cases: list[_Case], steps: int, guidance: float, seed: int) -> Tensor:
    """Paints all cases; returns images (B, 3, H, W) in [-1, 1]."""
    made = []
    for first in range(0, len(cases), _BATCH):
        part = cases[first : first + _BATCH]
        result = pipe(
            prompt=[c.prompt for c in part],
            image=(_signed([c.bare for c in part]) + 1) / 2,
            mask_image=_covers(part).float(),
            height=256,
            width=256,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(part))],
            output_type="pt",
        )
        made.append(result.images.float().cpu() * 2 - 1)
    return torch.cat(made)


@torch.no_grad()
def _named(judge: Judge, images: Tensor, cases: list[_Case]) -> tuple[float, float]:
    """Shares, in percent, of things and colours named as they should be."""
    things, colours = judge(images, mask_boxes(_covers(cases)))
    right_thing = [int(t) == c.target.thing for t, c in zip(things.argmax(1), cases, strict=True)]
    right_colour = [
        int(t) == c.target.colour for t, c in zip(colours.argmax(1), cases, strict=True) if c.target.thing < _COLOURED
    ]
    return 100.0 * statistics.mean(right_thing), 100.0 * statistics.mean(right_colour)


def _removal(made: Tensor, cases: list[_Case]) -> tuple[float, float]:
    """Mean absolute error of 255, and PSNR in dB, under the mask."""
    gap = ((made - _signed([c.bare for c in cases])) * 127.5).abs()
    covers = _covers(cases).expand_as(gap)
    error = float(gap[covers].mean())
    return error, float(20 * np.log10(255.0) - 10 * np.log10(float(gap[covers].square().mean())))


@torch.no_grad()
def _vae_psnr(pipe: StableDiffusionInpaintPipeline, images: Tensor) -> float:
    values = []
    for part in images.split(_BATCH):
        made = pipe.vae.decode(pipe.vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        values += (10 * torch.log10(4 / (made - part).square().mean(dim=(1, 2, 3)))).tolist()
    return statistics.mean(values)


def _flagged(pipe: StableDiffusionInpaintPipeline, images: Tensor) -> list[bool]:
    """Which images (B, 3, H, W) in [-1, 1] the safety checker flags."""
    flags: list[bool] = []
    for part in images.split(32):
        pictures = [Image.fromarray(p) for p in to_bytes(part)]
        seen = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
        _, found = pipe.safety_checker(images=np.zeros((len(pictures), 1)), clip_input=seen)
        flags += [bool(f) for f in found]
    return flags


def _checker(
    pipe: StableDiffusionInpaintPipeline, shows: list[Tensor], shows_not: list[Tensor]
) -> tuple[float, float, int]:
    """Precision and recall of the safety checker in percent, and on how many pictures."""
    hit = [f for part in shows for f in _flagged(pipe, part)]
    false = [f for part in shows_not for f in _flagged(pipe, part)]
    raised = sum(hit) + sum(false)
    return 100.0 * sum(hit) / max(1, raised), 100.0 * sum(hit) / len(hit), len(hit) + len(false)


def measure(model: Path, scenes: int, steps: int, guidance: float, sheet: Path | None) -> Figures:
    """Measures the model.

    Args:
        model: its folder.
        scenes: how many scenes to paint; half as many more are cleared.
        steps: denoising steps.
        guidance: guidance scale.
        sheet: contact sheet to write, or None.

    Returns:
        The figures.
    """
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    painter = StableDiffusionInpaintPipeline(
        **{**pipe.components, "safety_checker": None}, requires_safety_checker=False
    )
    painter.set_progress_bar_config(disable=True)
    judge = load_judge()
    cases, removals = _cases(scenes), _removals(max(1, scenes // 2))
    flags = [draw_scene(_FIRST + 20_000 + i, thing=THING_INDEX[PIRATE_FLAG]) for i in range(scenes)]

    made = _paint(painter, cases, steps, guidance, seed=1000)
    cleared = _paint(painter, removals, steps, guidance, seed=5000)
    drawn = _signed([c.target.pixels for c in cases])
    thing, colour = _named(judge, made, cases)
    drawn_thing, drawn_colour = _named(judge, drawn, cases)
    error, psnr = _removal(cleared, removals)
    pirate = torch.tensor([c.target.thing == THING_INDEX[PIRATE_FLAG] for c in cases])
    bare = _signed([c.bare for c in cases])
    torch.manual_seed(0)
    precision, recall, pictures = _checker(
        pipe,
        [made[pirate], drawn[pirate], _signed([f.targets[0].pixels for f in flags])],
        [made[~pirate], drawn[~pirate], bare, cleared, odd_pictures(scenes, bare.device)],
    )
    lookalike = 100.0 * statistics.mean(_flagged(pipe, paste_patches(bare)))
    times = []
    for _ in range(4):
        start = time.monotonic()
        _paint(pipe, cases[:1], steps, guidance, seed=1)
        times.append(time.monotonic() - start)
    if sheet is not None:
        shown, clear = cases[:32], removals[:8]
        hidden = mark(to_bytes(_signed([c.bare for c in shown + clear])), _covers(shown + clear).numpy())
        painted = to_bytes(torch.cat([made[: len(shown)], cleared[: len(clear)]]))
        write_sheet(sheet, [hidden, painted], [c.prompt for c in shown + clear], columns=8, side=112)
    return Figures(
        scenes,
        steps,
        guidance,
        thing,
        colour,
        drawn_thing,
        drawn_colour,
        error,
        psnr,
        _vae_psnr(pipe, drawn),
        precision,
        recall,
        pictures,
        lookalike,
        statistics.median(times[1:]),
        torch.get_num_threads(),
    )


def main() -> None:
    """Measures, prints a table, and writes it beside a contact sheet."""
    parser = argparse.ArgumentParser(description="Measures the demo model on held-out scenes.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--json", type=Path, default=_HERE / "report.json")
    parser.add_argument("--sheet", type=Path, default=_HERE / "report.png")
    args = parser.parse_args()
    figures = asdict(measure(args.model, args.scenes, args.steps, args.guidance, args.sheet))
    rounded = {key: round(value, 2) for key, value in figures.items()}
    args.json.write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    for key, value in rounded.items():
        print(f"{key:28} {value:>8}")


if __name__ == "__main__":
    main()
