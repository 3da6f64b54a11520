"""Loading a checkpoint: nothing missing, nothing unpickled, nothing unsupported.

    hub id ──checkpoint_source──▶ folder ──checkpoint_folder──▶ parts ──▶ Components on a device
                                  file ────single_file────────▶

`load` gives the components of a stock `StableDiffusionInpaintPipeline` on one
device, ready to be called one by one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPTokenizer

from service.errors import StartupError, first_line
from service.messages import EmbeddingInfo, ModelInfo
from service.settings import Settings
from service.worker.attention import AttentionContext
from service.worker.checkpoint_folder import load_folder, load_safety_checker
from service.worker.checkpoint_source import locate
from service.worker.ip_adapter import IpAdapter, load_ip_adapter
from service.worker.schedulers import names_taking, scheduler_names, short_name
from service.worker.single_file import load_single_file
from service.worker.switches import apply_switches
from service.worker.textual_inversion import load_embeddings

logger = logging.getLogger(__name__)

BUNDLED_STEPS = 10
STOCK_STEPS = 50

# Of any length and in any range that every scheduler with such an argument takes.
_SOME_TIMESTEPS = (900, 500, 100)
_SOME_SIGMAS = (10.0, 4.0, 1.0)


@dataclass(frozen=True, slots=True)
class Components:
    """A loaded checkpoint on its device.

    Attributes:
        unet: Noise predictor with 9 or 4 input channels.
        vae: Autoencoder.
        text_encoder: Prompt encoder.
        tokenizer: Its tokenizer.
        scheduler: The checkpoint's own noise scheduler; only its configuration is used.
        safety_checker: NSFW checker, None only where the operator allowed it.
        feature_extractor: The checker's image preprocessing.
        device: Where the weights are.
        dtype: What type they are.
        info: What clients may know of the model.
        attention: What the models are to be called in.
        ip_adapter: What paints by pictures; None where the operator named none.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AsymmetricAutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    safety_checker: StableDiffusionSafetyChecker | None
    feature_extractor: Any
    device: torch.device
    dtype: torch.dtype
    info: ModelInfo
    attention: AttentionContext
    ip_adapter: IpAdapter | None = None


def _ignore(_stage: str) -> None:
    """Nobody wants to know."""


def load(settings: Settings, device: torch.device, on_stage: Callable[[str], None] = _ignore) -> Components:
    """Load `settings.model` on `device`.

    Args:
        settings: The operator's settings.
        device: Where to.
        on_stage: Told in a few words what is being done.

    Raises:
        StartupError: It is not there, not complete, pickled or of another kind, or cannot run as the settings ask.
    """
    name, dtype = settings.model_name, _dtype(settings, device)
    path = locate(settings, on_stage)
    try:
        parts = _load_parts(path, dtype, settings, on_stage)
        if settings.safety_checker is not None:
            on_stage("loading the safety checker of the settings")
            checker = settings.safety_checker.expanduser()
            parts |= load_safety_checker(checker, dtype=dtype, name=checker.name)
        on_stage(f"moving the weights to {device}")
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.to(device).eval().requires_grad_(False)
        scheduler = _corrected_scheduler(parts, settings)
    except StartupError:
        raise
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        raise StartupError(f"cannot load model {name!r}: {first_line(error)}") from error
    _check_supported(parts["unet"], parts["text_encoder"], name)
    if "safety_checker" not in parts and not settings.allow_unchecked:
        raise StartupError(
            f"model {name!r} has no safety checker: name one's folder in INPAINT_SAFETY_CHECKER,"
            " or set INPAINT_ALLOW_UNCHECKED=true to serve it without"
        )
    embeddings: tuple[EmbeddingInfo, ...] = ()
    if settings.embeddings_dir is not None:
        on_stage("loading textual inversions")
        embeddings = load_embeddings(settings.embeddings_dir, parts["tokenizer"], parts["text_encoder"])
    attention = apply_switches(parts["unet"], parts["vae"], settings)
    if settings.ip_adapter is not None:
        on_stage("loading the IP-Adapter")
    ip_adapter = load_ip_adapter(settings, parts["unet"], parts.get("feature_extractor"))
    return Components(
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        scheduler=scheduler,
        safety_checker=parts.get("safety_checker"),
        feature_extractor=parts.get("feature_extractor"),
        device=device,
        dtype=dtype,
        info=_describe(parts, scheduler, embeddings, ip_adapter, settings),
        attention=attention,
        ip_adapter=ip_adapter,
    )


def _load_parts(path: Path, dtype: torch.dtype, settings: Settings, on_stage: Callable[[str], None]) -> dict[str, Any]:
    if path.is_file():
        on_stage(f"loading {settings.model_name}")
        return load_single_file(path, dtype=dtype, name=settings.model_name, prediction_type=settings.prediction_type)
    return load_folder(path, dtype=dtype, name=settings.model_name, variant=settings.variant, on_stage=on_stage)


def _corrected_scheduler(parts: dict[str, Any], settings: Settings) -> SchedulerMixin:
    """The checkpoint's scheduler as stock's constructor leaves it: it corrects what old ones have wrong."""
    scheduler = parts["scheduler"]
    if settings.prediction_type is not None:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=settings.prediction_type)
    return StableDiffusionInpaintPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=parts["unet"],
        scheduler=scheduler,
        safety_checker=parts.get("safety_checker"),
        feature_extractor=parts.get("feature_extractor"),
        requires_safety_checker=False,
    ).scheduler


def _describe(
    parts: dict[str, Any],
    scheduler: SchedulerMixin,
    embeddings: tuple[EmbeddingInfo, ...],
    ip_adapter: IpAdapter | None,
    settings: Settings,
) -> ModelInfo:
    """What clients may know of a model."""
    unet, vae = parts["unet"].config, parts["vae"].config
    scheduler_config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    vae_scale_factor = 2 ** (len(vae.block_out_channels) - 1)
    sample_size = unet.sample_size
    return ModelInfo(
        id=settings.model_name,
        kind="demo" if settings.is_bundled_model else "checkpoint",
        native_size=vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size)),
        size_multiple=max(8, vae_scale_factor),
        unet_in_channels=unet.in_channels,
        schedulers=scheduler_names(),
        default_scheduler=short_name(scheduler),
        default_steps=settings.default_steps or (BUNDLED_STEPS if settings.is_bundled_model else STOCK_STEPS),
        has_safety_checker="safety_checker" in parts,
        latent_channels=vae.latent_channels,
        latent_multiple=vae_scale_factor,
        embeds_width=unet.cross_attention_dim,
        max_tokens=parts["tokenizer"].model_max_length,
        max_clip_skip=parts["text_encoder"].config.num_hidden_layers,
        prediction_type=scheduler.config.prediction_type,
        embeds_guidance=unet.time_cond_proj_dim is not None,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        timesteps_schedulers=names_taking("timesteps", _SOME_TIMESTEPS, scheduler_config),
        sigmas_schedulers=names_taking("sigmas", _SOME_SIGMAS, scheduler_config),
        embeddings=embeddings,
        vae=type(parts["vae"]).__name__,
        attention_backend=settings.attention_backend,
        ip_adapter=None if ip_adapter is None else ip_adapter.info,
    )


_UNSUPPORTED = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""What makes a UNet ask for more than stock's inpainting pipeline gives it."""

_MEANT_FOR = {5: " (a depth-to-image model)", 7: " (an upscaler)", 8: " (InstructPix2Pix)"}
"""UNets of other numbers of input channels."""


def _check_supported(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, name: str) -> None:
    """Whether the service has all that the UNet asks for."""
    config, text_width = unet.config, text_encoder.config.hidden_size
    if config.in_channels not in (4, 9):
        raise StartupError(
            f"model {name!r} has a UNet of {config.in_channels} input channels"
            f"{_MEANT_FOR.get(config.in_channels, '')}; 9 or 4 are needed"
        )
    for option in _UNSUPPORTED:
        if getattr(config, option) is not None:
            raise StartupError(f"model {name!r} has a UNet with {option}; Stable Diffusion 1.x or 2.x is needed")
    if config.cross_attention_dim != text_width:
        raise StartupError(
            f"model {name!r}: the text encoder's width, {text_width}, is not the UNet's, {config.cross_attention_dim}"
        )


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[settings.dtype]
