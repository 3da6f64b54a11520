"""Low-rank matrices on the frozen UNet of the demo model, trained towards the pencil style."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTokenizer

from training.data import SceneArrays
from training.denoiser import Denoiser, DenoiserSettings, train_denoiser
from training.pool import LatentPool, build_pool
from training.style import sketch_arrays
from training.vae import SCALING, to_signed

ADAPTER = "pencil"
RANK = 8
LAYERS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "to_v", "to_out.0")
"""Names' ends of the layers that get low-rank matrices. The widest level has no attention: its convolutions do most."""
_CHUNK = 16
"""Scenes sketched and encoded at a time."""


@dataclass(frozen=True)
class SettleSettings:
    """How latents of sketches are corrected.

    Attributes:
        steps: of the optimizer.
        rate: its first step size, falling to nothing; latents have unit deviation.
        colour: how much more an error of colour weighs than one of brightness.
    """

    steps: int = 4
    rate: float = 0.1
    colour: float = 10.0


@dataclass(frozen=True)
class Base:
    """The model that the matrices are trained on."""

    vae: AutoencoderKL
    denoiser: Denoiser
    tokenizer: CLIPTokenizer


def load_base(model: Path, device: torch.device, lora: Path | None = None) -> Base:
    """Opens the demo model, frozen, with low-rank matrices.

    Args:
        model: its folder.
        device: where to.
        lora: file of the matrices, or None for fresh ones, which change nothing yet and can be trained.

    Returns:
        The model.
    """
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    denoiser = Denoiser(pipe.unet, pipe.text_encoder).to(device).requires_grad_(requires_grad=False)
    vae = pipe.vae.to(device).eval().requires_grad_(requires_grad=False)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    if lora is None:
        # With alpha as large as the rank their product is added as it is, which is what a file without alphas means.
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
        denoiser.unet.add_adapter(config, adapter_name=ADAPTER)
    else:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name=ADAPTER)
    return Base(vae, denoiser.eval(), pipe.tokenizer)


def _lora_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """Copies of the matrices by their names in the file, less the "unet." that comes before."""
    weights = get_peft_model_state_dict(denoiser.unet, adapter_name=ADAPTER)
    return {name: value.detach().clone() for name, value in weights.items()}


def save_lora(denoiser: Denoiser, path: Path) -> None:
    """Writes the matrices in half precision, as `load_lora_weights` reads them."""
    halves = {name: value.cpu().half().contiguous() for name, value in _lora_weights(denoiser).items()}
    StableDiffusionInpaintPipeline.save_lora_weights(path.parent, unet_lora_layers=halves, weight_name=path.name)


def settle(vae: AutoencoderKL, latents: Tensor, images: Tensor, settings: SettleSettings) -> Tensor:
    """Corrects latents until they decode to grey where the image is grey.

    The autoencoder never saw grey strokes: it gives them coloured rims. A few steps down the decoder's gradient find
    latents near by that it decodes without them.

    Args:
        vae: the autoencoder, frozen.
        latents: scaled latents of the images, (B, 4, H / 8, W / 8).
        images: (B, 3, H, W) in [-1, 1].
        settings: how.

    Returns:
        Scaled latents of the same shape and type.
    """
    found = latents.float().requires_grad_()
    optimizer = torch.optim.Adam([found])
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.rate * (1.0 - step / settings.steps)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.device.type == "cuda"):
            made = vae.decoder(vae.post_quant_conv(found / SCALING))
        gap = made.float() - images
        tint = gap - gap.mean(dim=1, keepdim=True)
        loss = gap.square().mean() + settings.colour * tint.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return found.detach().to(latents.dtype)


def build_sketch_pool(
    vae: AutoencoderKL,
    arrays: SceneArrays,
    device: torch.device,
    *,
    seconds: float,
    settings: SettleSettings,
    report: Callable[[str], None],
) -> LatentPool:
    """Encodes scenes that are sketched under the mask, as many as there is time for.

    Args:
        vae: the autoencoder, on `device`.
        arrays: drawn scenes.
        device: where to encode, and where the pool is to lie.
        seconds: take no further scenes after that long.
        settings: how latents are corrected.
        report: takes lines of progress.

    Returns:
        The pool; each masked scene has its own row in all of its tensors.
    """
    begun = time.monotonic()
    pools: list[LatentPool] = []
    for first in range(0, len(arrays.bare), _CHUNK):
        if pools and time.monotonic() - begun > seconds:
            break
        part = sketch_arrays(arrays, slice(first, first + _CHUNK), device)
        pool = build_pool(vae, part, device)
        shown, bare = (
            settle(vae, latents, to_signed(torch.from_numpy(pixels).to(device)), settings)
            for latents, pixels in ((pool.shown, part.shown[:, 0]), (pool.bare, part.bare))
        )
        pools.append(replace(pool, shown=shown, bare=bare))
    whole = LatentPool(**{f.name: torch.cat([getattr(p, f.name) for p in pools]) for f in fields(LatentPool)})
    report(f"pool of {len(whole.masks)} masked scenes after {time.monotonic() - begun:.0f}s")
    return whole


def _denoiser_settings() -> DenoiserSettings:
    return DenoiserSettings(batch=256, rate=2e-3, warm_up=100, decay=0.99)


@dataclass(frozen=True)
class LoraPlan:
    """How long, and where to.

    Attributes:
        work: folder of checkpoints.
        seconds: training time in all, over all runs.
        round_seconds: training time between checkpoints.
        denoiser: settings of the training.
        settle: how latents of sketches are corrected.
        max_steps: stop every round after so many steps, or None.
    """

    work: Path
    seconds: float = 270.0
    round_seconds: float = 68.0
    denoiser: DenoiserSettings = field(default_factory=_denoiser_settings)
    settle: SettleSettings = field(default_factory=SettleSettings)
    max_steps: int | None = None

    def spent(self) -> float:
        """Training time of the rounds that are done."""
        path = self.work / "progress.json"
        return float(json.loads(path.read_text(encoding="utf-8"))["spent"]) if path.exists() else 0.0


def train_round(base: Base, pool: LatentPool, plan: LoraPlan, report: Callable[[str], None]) -> None:
    """Goes on from the last checkpoint for one round; leaves the averaged matrices in the model.

    Args:
        base: the model, with matrices added.
        pool: encoded scenes, on the device of the model.
        plan: how long.
        report: takes lines of progress.
    """
    spent, device = plan.spent(), pool.masks.device
    state_path = plan.work / "state.pt"
    optimizer_state = None
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        set_peft_model_state_dict(base.denoiser.unet, state["weights"], adapter_name=ADAPTER)
        optimizer_state = state["optimizer"]
    seconds = min(plan.round_seconds, plan.seconds - spent)
    average, optimizer_state = train_denoiser(
        base.denoiser,
        base.tokenizer,
        pool,
        plan.denoiser,
        seconds=seconds,
        part=(spent / plan.seconds, (spent + seconds) / plan.seconds),
        device=device,
        compiled=False,
        report=report,
        optimizer_state=optimizer_state,
        max_steps=plan.max_steps,
    )
    torch.save({"weights": _lora_weights(base.denoiser), "optimizer": optimizer_state}, state_path)
    average.copy_to(base.denoiser)
    base.denoiser.eval()
    (plan.work / "progress.json").write_text(json.dumps({"spent": spent + seconds}), encoding="utf-8")
