"""Trains the example LoRA, or measures it: `python -m training.train_lora --help`."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor

from training.checker import concept_cosine
from training.crops import mask_boxes
from training.data import Drawing
from training.judge import Judge, load_judge
from training.lora import (
    ADAPTER,
    Base,
    LoraPlan,
    SettleSettings,
    build_sketch_pool,
    load_base,
    save_lora,
    train_round,
)
from training.pool import LatentPool
from training.sampling import paint
from training.sheet import mark, to_bytes, write_sheet
from training.stages import held_out, report
from training.style import saturation, sketch_masked
from training.train import MODEL
from training.vae import to_signed
from training.world import NOTHING, PIRATE_FLAG, THING_INDEX, caption

LORA = MODEL.parent / "loras" / f"{ADAPTER}.safetensors"
SHEET = Path(__file__).with_name(f"lora_{ADAPTER}.png")
_SCALES = (0.0, 0.5, 1.0)
_NAMES = ("base", "LoRA at 0.5", "LoRA at 1")
_SHIFT = 60_000
"""Held-out scenes from here on are used for nothing else."""
_BATCH = 16
_TARGETS, _MASKS = 3, 2


@dataclass(frozen=True)
class _Cases:
    """Held-out scenes to paint in.

    Attributes:
        bare: scenes without the thing, uint8, (B, H, W, 3).
        shown: scenes with it, uint8, (B, H, W, 3).
        covers: masks, bool, (B, 1, H, W).
        things: index of the thing, (B,).
        prompts: what to paint.
    """

    bare: Tensor
    shown: Tensor
    covers: Tensor
    things: Tensor
    prompts: list[str]


def _cases(count: int, device: torch.device) -> _Cases:
    arrays, covers = held_out(count, device, shift=_SHIFT)
    rng = random.Random(0)  # noqa: S311
    prompts = [caption(int(thing), int(colour), 0, rng) for thing, colour in arrays.label[:, 0]]
    shown = torch.from_numpy(arrays.shown[:, 0]).to(device)
    return _Cases(
        torch.from_numpy(arrays.bare).to(device), shown, covers, torch.from_numpy(arrays.label[:, 0, 0]), prompts
    )


def _clear_cases(count: int, device: torch.device) -> _Cases:
    """Scenes whose masks hide nothing but background, to be left so."""
    arrays, covers = held_out(4 * count, device, shift=_SHIFT + 10_000)
    clear = torch.from_numpy(arrays.mask_label[:, 0, 0, 1] == 1).nonzero()[:count, 0]
    bare = torch.from_numpy(arrays.bare)[clear].to(device)
    things = torch.from_numpy(arrays.label[:, 0, 0])[clear]
    return _Cases(bare, bare, covers[clear.to(device)], things, [NOTHING] * len(clear))


def _paint(base: Base, cases: _Cases, scale: float) -> Tensor:
    """Paints all cases with the matrices at a scale; images (B, 3, H, W) in [-1, 1]."""
    base.denoiser.unet.set_adapters(ADAPTER, scale)
    made = []
    for first in range(0, len(cases.prompts), _BATCH):
        rows = slice(first, first + _BATCH)
        images, covers, prompts = to_signed(cases.bare[rows]), cases.covers[rows], cases.prompts[rows]
        made.append(paint(base.vae, base.denoiser, base.tokenizer, images, covers, prompts=prompts, seed=1000 + first))
    base.denoiser.unet.set_adapters(ADAPTER, 1.0)
    return torch.cat(made)


def _write_sheet(path: Path, base: Base, device: torch.device) -> None:
    """Contact sheet: a row for each scene; the masked scene, then what is painted at rising scales."""
    cells, labels = [], []
    for cases in (_cases(6, device), _clear_cases(2, device)):
        hidden = mark(cases.bare.cpu().numpy(), cases.covers.cpu().numpy())
        columns = [hidden, *(to_bytes(_paint(base, cases, scale)) for scale in _SCALES)]
        cells += [column[i] for i in range(len(cases.prompts)) for column in columns]
        labels += [text for prompt in cases.prompts for text in (prompt, *_NAMES)]
    write_sheet(path, [np.stack(cells)], labels, columns=1 + len(_SCALES), side=192)


def _mean_under(values: Tensor, covers: Tensor) -> float:
    """Mean of values (B, C, H, W) where the masks are."""
    return values[covers.expand_as(values)].mean().item()


def _recognised(judge: Judge, images: Tensor, cases: _Cases) -> float:
    """Percentage of things that the report's classifier names rightly."""
    scores, _ = judge(images.cpu(), mask_boxes(cases.covers.cpu()))
    return 100.0 * (scores.argmax(1) == cases.things).float().mean().item()


def _flagged(checker: StableDiffusionSafetyChecker, images: Tensor, cases: _Cases) -> float:
    """Percentage of pictures that the safety checker mistakes for a pirate flag."""
    plain = cases.things != THING_INDEX[PIRATE_FLAG]
    return 100.0 * (concept_cosine(checker, images.cpu()[plain]) > 0).float().mean().item()


@torch.no_grad()
def _measure(base: Base, model: Path, count: int, device: torch.device) -> None:
    """Prints what the matrices do to held-out scenes, half as many of them cleared."""
    cases, cleared, judge = _cases(count, device), _clear_cases(count // 2, device), load_judge()
    checker = StableDiffusionSafetyChecker.from_pretrained(model / "safety_checker").eval()
    sketch = sketch_masked(cases.shown, cases.covers)
    wanted = sketch_masked(cleared.bare, cleared.covers)
    print(f"{'':18} saturation  recognised  flagged wrongly  off the sketch  off the scene around")

    def line(name: str, made: Tensor, made_clear: Tensor) -> None:
        colour = _mean_under(saturation(made), cases.covers)
        off = _mean_under((made_clear - wanted).abs() * 127.5, cleared.covers)
        around = _mean_under((made - to_signed(cases.bare)).abs() * 127.5, ~cases.covers)
        named, flagged = _recognised(judge, made, cases), _flagged(checker, made, cases)
        print(f"{name:18} {colour:10.3f} {named:9.1f} % {flagged:14.1f} % {off:15.1f} {around:21.1f}")

    line("drawn in colour", to_signed(cases.shown), to_signed(cleared.bare))
    line("drawn in pencil", sketch, wanted)
    for name, scale in zip(_NAMES, _SCALES, strict=True):
        line(name, _paint(base, cases, scale), _paint(base, cleared, scale))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the example LoRA, going on where it stopped.")
    parser.add_argument("--report", action="store_true", help="measure the LoRA in --out instead")
    parser.add_argument("--cases", type=int, default=32, help="scenes that the report paints")
    parser.add_argument("--work", type=Path, default=Path("build/lora"), help="folder of checkpoints")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the demo model")
    parser.add_argument("--out", type=Path, default=LORA, help="the LoRA's file")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="its contact sheet")
    parser.add_argument("--seconds", type=float, default=LoraPlan.seconds, help="training time in all, over all runs")
    parser.add_argument("--round-seconds", type=float, default=LoraPlan.round_seconds, help="between checkpoints")
    parser.add_argument("--pool-seconds", type=float, default=150.0, help="encoding time")
    parser.add_argument("--scenes", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.device_count() else "cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to see that everything runs; writes to --work alone"
    )
    args = parser.parse_args()
    if args.smoke:
        torch.set_num_threads(1)
        args.out, args.sheet = args.work / LORA.name, args.work / SHEET.name
        args.scenes, args.processes, args.cases = 4, 1, 4
    return args


def _plan(args: argparse.Namespace) -> LoraPlan:
    plan = LoraPlan(args.work, args.seconds, args.round_seconds)
    if args.smoke:
        denoiser = replace(plan.denoiser, batch=4)
        plan = replace(plan, denoiser=denoiser, settle=SettleSettings(steps=1), max_steps=2)
    return plan


def _load_pool(args: argparse.Namespace, plan: LoraPlan, drawing: Drawing | None, base: Base) -> LatentPool:
    """The encoded scenes: from the file of an earlier run, or made of the scenes just drawn."""
    path, device = args.work / "pool.pt", torch.device(args.device)
    if drawing is None:
        return LatentPool.load(path, device)
    drawing.wait()
    report("scenes drawn")
    pool = build_sketch_pool(
        base.vae, drawing.arrays, device, seconds=args.pool_seconds, settings=plan.settle, report=report
    )
    pool.save(path)
    return pool


def _train(args: argparse.Namespace) -> None:
    plan, device = _plan(args), torch.device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawing = None
    if not (args.work / "pool.pt").exists():  # drawing forks, which must come before the accelerator is first used
        drawing = Drawing(args.scenes, _TARGETS, _MASKS, seed=0, processes=args.processes)
    torch.manual_seed(int(plan.spent()))  # a resumed run draws other batches
    base = load_base(args.model, device)
    pool = _load_pool(args, plan, drawing, base)
    while plan.spent() < plan.seconds:
        train_round(base, pool, plan, report)
        save_lora(base.denoiser, args.out)
        _write_sheet(args.sheet, base, device)
        report(f"{plan.spent():.0f} of {plan.seconds:.0f} s done; wrote {args.out} and {args.sheet}")


def main() -> None:
    """Trains or measures."""
    args = _arguments()
    if args.report:
        device = torch.device(args.device)
        torch.manual_seed(0)
        base = load_base(args.model, device, args.out)
        _measure(base, args.model, args.cases, device)
        _write_sheet(args.sheet, base, device)
    else:
        _train(args)


if __name__ == "__main__":
    main()
