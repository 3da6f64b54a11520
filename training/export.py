"""Writes the model folder that the stock inpainting pipeline opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor

from training.checker import DEVIATION, MEAN, SIDE
from training.denoiser import Denoiser
from training.sampling import build_scheduler
from training.words import write_tokenizer

_CARD = Path(__file__).with_name("model_card.md")


def _text_key(key: str) -> str:
    """Name of a text encoder's weight as Stable Diffusion 1.5 files have it."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _checker_key(key: str) -> str:
    """Name of a safety checker's weight as Stable Diffusion 1.5 files have it."""
    inner = "vision_model."
    if key.startswith(inner) and not key.startswith(inner * 2):
        return inner + key
    return key


def _write_weights(path: Path, weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> None:
    """Writes weights in half precision, refusing what half precision cannot hold."""
    halves = {}
    for key, value in weights.items():
        if not value.is_floating_point():
            continue
        half = value.detach().cpu().to(torch.float16).contiguous()
        if not bool(torch.isfinite(half).all()):
            raise ValueError(f"{key} does not fit half precision")
        halves[rename(key)] = half.clone()
    save_file(halves, path, metadata={"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_transformer_config(path: Path, config: Mapping[str, Any], architecture: str) -> None:
    left_out = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}
    kept = {k: v for k, v in config.items() if k not in left_out}
    for part in ("text_config", "vision_config"):
        if isinstance(kept.get(part), Mapping):
            kept[part] = {k: v for k, v in kept[part].items() if k not in left_out}
    # The files are half precision, but opened without a dtype the model is to be full precision throughout.
    _write_json(path, {**kept, "architectures": [architecture], "torch_dtype": "float32"})


def export_model(folder: Path, vae: AutoencoderKL, denoiser: Denoiser, checker: StableDiffusionSafetyChecker) -> None:
    """Writes all parts of the pipeline, weights in half precision.

    Args:
        folder: where to, created if needed.
        vae: the autoencoder.
        denoiser: UNet and text encoder.
        checker: the safety checker.
    """
    for part, model in (("vae", vae), ("unet", denoiser.unet)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        model.save_config(folder / part)
        _write_weights(folder / part / "diffusion_pytorch_model.safetensors", model.state_dict(), str)
    text = denoiser.text_encoder
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    _write_transformer_config(folder / "text_encoder" / "config.json", text.config.to_dict(), "CLIPTextModel")
    _write_weights(folder / "text_encoder" / "model.safetensors", text.state_dict(), _text_key)
    (folder / "safety_checker").mkdir(parents=True, exist_ok=True)
    _write_transformer_config(
        folder / "safety_checker" / "config.json", checker.config.to_dict(), "StableDiffusionSafetyChecker"
    )
    _write_weights(folder / "safety_checker" / "model.safetensors", checker.state_dict(), _checker_key)
    write_tokenizer(folder / "tokenizer")
    scheduler = json.loads(build_scheduler().to_json_string())
    # As in published checkpoints: what other schedulers need to know when a user switches to them.
    switching = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler | switching)
    (folder / "feature_extractor").mkdir(parents=True, exist_ok=True)
    _write_json(
        folder / "feature_extractor" / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"height": SIDE, "width": SIDE},
            "resample": 3,
            "do_center_crop": False,
            "crop_size": {"height": SIDE, "width": SIDE},
            "do_convert_rgb": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(DEVIATION),
        },
    )
    diffusers_version = denoiser.unet.config.get("_diffusers_version", "0.42.1")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": diffusers_version,
        "requires_safety_checker": True,
        "image_encoder": [None, None],
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    _write_json(folder / "model_index.json", index)
    if _CARD.exists():
        (folder / "README.md").write_text(_CARD.read_text(encoding="utf-8"), encoding="utf-8")


def folder_size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
