"""The stages of training, each resumable from the files in the working folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.data import Drawing, SceneArrays, draw_arrays
from training.denoiser import Denoiser, DenoiserSettings, build_text_encoder, build_unet, train_denoiser
from training.judge import judge_accuracy, save_judge, train_judge
from training.pool import LatentPool, build_pool, unpack_masks
from training.sampling import paint
from training.scenes import HELD_OUT
from training.sheet import mark, to_bytes, write_sheet
from training.vae import VaeSettings, build_vae, measure_psnr, set_scale, to_signed, train_vae
from training.words import load_tokenizer, write_tokenizer
from training.world import COLOUR_NAMES, NOTHING, PIRATE_FLAG, THINGS


@dataclass(frozen=True)
class Plan:
    """How long and how large.

    Attributes:
        work: folder of checkpoints.
        out: folder of contact sheets.
        device: where to train.
        deadline: when to stop, on the clock of time.monotonic().
        compiled: whether to compile the models.
        processes: that draw.
        scenes: drawn for training; a multiple of 256 spares a compilation.
        targets: things offered for each.
        masks: for each thing.
        vae_seconds: training time of the autoencoder.
        denoiser_seconds: training time of the denoiser in all, over all runs.
        checker_steps: training steps of the safety checker.
        judge_steps: training steps of the report's classifier.
        flags: scenes with a pirate flag drawn for the checker.
        others: scenes drawn for the checker and the classifier.
        painted: pictures painted for the checker to learn from.
        rebuilt: drawn pictures that the checker also sees as the autoencoder gives them back.
        odd: pictures that are no scenes, for the checker.
        vae: settings of the autoencoder.
        denoiser: settings of the denoiser.
        max_steps: stop the long stages after so many steps, or None.
    """

    work: Path
    out: Path
    device: torch.device
    deadline: float
    compiled: bool = False
    processes: int = 15
    scenes: int = 24064
    targets: int = 3
    masks: int = 4
    vae_seconds: float = 290.0
    denoiser_seconds: float = 700.0
    checker_steps: int = 1500
    judge_steps: int = 800
    flags: int = 1100
    others: int = 2600
    painted: int = 0
    rebuilt: int = 96
    odd: int = 512
    vae: VaeSettings = field(default_factory=VaeSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
    max_steps: int | None = None


_BEGUN = time.monotonic()


def report(line: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGUN:6.1f}] {line}", flush=True)


def save_weights(path: Path, module: nn.Module) -> None:
    """Writes a module's weights."""
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}, path)


class _Images:
    """Drawn images on the device, more of them as they are finished."""

    def __init__(self, drawing: Drawing, device: torch.device) -> None:
        arrays = drawing.arrays
        self._drawing = drawing
        self._device = device
        self._shown = torch.empty(arrays.shown.shape, dtype=torch.uint8, device=device)
        self._masks = torch.empty(arrays.masks.shape, dtype=torch.uint8, device=device)
        self._here = 0
        self._calls = 0
        self._fetch(drawing.wait(min(2048, arrays.bare.shape[0])))

    def _fetch(self, ready: int) -> None:
        rows = slice(self._here, ready)
        self._shown[rows] = torch.from_numpy(self._drawing.arrays.shown[rows]).to(self._device)
        self._masks[rows] = torch.from_numpy(self._drawing.arrays.masks[rows]).to(self._device)
        self._here = ready

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Random images (B, H, W, 3) uint8 and masks (B, 1, H, W) bool."""
        self._calls += 1
        total, targets, masks = self._masks.shape[:3]
        if self._calls % 100 == 0 and self._here < total:
            ready = self._drawing.ready()
            if ready > self._here:
                self._fetch(ready)
                if ready == total:
                    report(f"all {total} scenes drawn")
        n = torch.randint(self._here, (count,), device=self._device)
        k = torch.randint(targets, (count,), device=self._device)
        m = torch.randint(masks, (count,), device=self._device)
        return self._shown[n, k], unpack_masks(self._masks[n, k, m])


def held_out(count: int, device: torch.device, thing: int | None = None, shift: int = 0) -> tuple[SceneArrays, Tensor]:
    """Scenes that are never trained on, and their masks (B, 1, SIZE, SIZE) bool."""
    arrays = draw_arrays(count, HELD_OUT + shift, thing=thing)
    return arrays, unpack_masks(torch.from_numpy(arrays.masks[:, 0, 0]).to(device))


def load_vae(plan: Plan) -> AutoencoderKL:
    """The trained autoencoder."""
    vae = build_vae()
    vae.load_state_dict(load_file(plan.work / "vae.safetensors"))
    vae.to(plan.device)
    if plan.device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    return vae.eval()


def load_denoiser(plan: Plan) -> Denoiser:
    """The denoiser with its averaged weights."""
    write_tokenizer(plan.work / "tokenizer")
    denoiser = Denoiser(build_unet(), build_text_encoder(load_tokenizer(plan.work / "tokenizer")))
    path = plan.work / "denoiser.safetensors"
    if path.exists():
        denoiser.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return denoiser.to(plan.device)


def stage_vae(plan: Plan, drawing: Drawing) -> None:
    """Trains the autoencoder while the scenes are drawn, then encodes them all."""
    images = _Images(drawing, plan.device)
    report("first scenes on the device")
    vae = train_vae(
        build_vae(),
        images.draw,
        plan.vae,
        seconds=plan.vae_seconds,
        device=plan.device,
        compiled=plan.compiled,
        report=report,
        max_steps=plan.max_steps,
    )
    drawing.wait()
    sample, _ = images.draw(min(1024, 8 * plan.scenes))
    set_scale(vae, to_signed(sample))
    del images
    save_weights(plan.work / "vae.safetensors", vae)
    fresh, _ = held_out(96, plan.device)
    pixels = to_signed(torch.from_numpy(fresh.shown[:, 0]).to(plan.device))
    report(f"vae: held-out psnr {measure_psnr(vae, pixels, 32):.2f} dB")
    sheet_vae(plan, vae, pixels[:24])
    if plan.compiled:
        vae.encoder.compile()
    pool = build_pool(vae, drawing.arrays, plan.device)
    report(f"pool of {pool.masks.shape[0]} masked scenes; deviation {pool.shown[:4096].float().std().item():.3f}")
    pool.save(plan.work / "pool.pt")
    report("pool saved")


@torch.no_grad()
def sheet_vae(plan: Plan, vae: AutoencoderKL, pixels: Tensor) -> None:
    """Contact sheet of images above their reconstructions."""
    made = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    write_sheet(plan.out / "vae.png", [to_bytes(pixels), to_bytes(made)], [""] * len(pixels), columns=8, side=192)


def stage_denoiser(plan: Plan) -> None:
    """Trains the denoiser until the deadline or the end of its time."""
    pool = LatentPool.load(plan.work / "pool.pt", plan.device)
    denoiser = load_denoiser(plan)
    tokenizer = load_tokenizer(plan.work / "tokenizer")
    progress_path, state_path = plan.work / "progress.json", plan.work / "state.pt"
    spent = json.loads(progress_path.read_text())["spent"] if progress_path.exists() else 0.0
    optimizer_state = None
    if state_path.exists():
        state = torch.load(state_path, map_location=plan.device, weights_only=True)
        denoiser.load_state_dict(state["weights"])
        optimizer_state = state["optimizer"]
    seconds = max(1.0, min(plan.denoiser_seconds - spent, plan.deadline - time.monotonic()))
    report(
        f"denoiser: {spent:.0f}s of {plan.denoiser_seconds:.0f}s done, now {seconds:.0f}s; resumed "
        f"{optimizer_state is not None}"
    )
    part = (spent / plan.denoiser_seconds, (spent + seconds) / plan.denoiser_seconds)
    average, optimizer_state = train_denoiser(
        denoiser,
        tokenizer,
        pool,
        plan.denoiser,
        seconds=seconds,
        part=part,
        device=plan.device,
        compiled=plan.compiled,
        report=report,
        optimizer_state=optimizer_state,
        max_steps=plan.max_steps,
    )
    torch.save({"weights": denoiser.state_dict(), "optimizer": optimizer_state}, state_path)
    average.copy_to(denoiser)
    save_file(
        {k: v.detach().cpu().half().contiguous().clone() for k, v in denoiser.state_dict().items()},
        plan.work / "denoiser.safetensors",
    )
    progress_path.write_text(json.dumps({"spent": spent + seconds}))
    report("denoiser saved")


@torch.no_grad()
def stage_sheets(plan: Plan, guidance: tuple[float, ...] = (4.0, 7.5)) -> None:
    """Contact sheets of held-out scenes: masked scene above what was painted."""
    vae, denoiser = load_vae(plan), load_denoiser(plan).eval()
    tokenizer = load_tokenizer(plan.work / "tokenizer")
    arrays, covers = held_out(32, plan.device, shift=5000)
    prompts = []
    for i in range(32):
        thing = THINGS[i % len(THINGS)]
        if i >= 28:
            prompts.append(NOTHING)
        elif thing.name == PIRATE_FLAG:
            prompts.append(f"a {PIRATE_FLAG}")
        else:
            colour = COLOUR_NAMES[int(arrays.label[i, 0, 1]) % len(COLOUR_NAMES)]
            prompts.append(f"a {colour} {thing.name}")
    pixels = torch.from_numpy(arrays.bare).to(plan.device)
    for scale in guidance:
        made = paint(vae, denoiser, tokenizer, to_signed(pixels), covers, prompts=prompts, seed=1, guidance=scale)
        marked = mark(pixels.cpu().numpy(), covers.cpu().numpy())
        write_sheet(plan.out / f"painted-{scale:g}.png", [marked, to_bytes(made)], prompts, columns=8, side=160)
    report("sheets written")


def stage_judge(plan: Plan, arrays: SceneArrays, path: Path, note: Callable[[str], None] = report) -> None:
    """Trains the report's classifier."""
    judge = train_judge(arrays, plan.judge_steps, plan.device)
    fresh, _ = held_out(256, plan.device, shift=20000)
    thing, colour = judge_accuracy(judge, fresh, plan.device)
    note(f"judge: names {100 * thing:.1f} % of things and {100 * colour:.1f} % of colours")
    save_judge(judge, path)
