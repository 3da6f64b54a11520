"""Loading a checkpoint: nothing missing, nothing unpickled, nothing unsupported.

`load` gives the components of a stock `StableDiffusionInpaintPipeline` on one
device, ready to be called one by one. Every weight is checked to have come from
the checkpoint: diffusers and transformers fill what they do not find with
random numbers and say so only in a log line.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.messages import ModelInfo
from service.settings import Settings
from service.worker.schedulers import scheduler_names, short_name
from service.worker.switches import AttentionContext, apply_switches

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parent / "models" / "demo"
BUNDLED_STEPS = 10
STOCK_STEPS = 50

_WEIGHTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "safety_checker": StableDiffusionSafetyChecker,
}
"""The weights that are checked, and the only classes that are served."""


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
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    safety_checker: StableDiffusionSafetyChecker | None
    feature_extractor: Any
    device: torch.device
    dtype: torch.dtype
    info: ModelInfo
    attention: AttentionContext


def load(settings: Settings, device: torch.device) -> Components:
    """Load `settings.model` on `device`.

    Raises:
        StartupError: It is not there, not complete, pickled or of another kind, or cannot run as the settings ask.
    """
    name = settings.model_name
    folder = _locate(settings)
    index = _read_index(folder, name)
    dtype = _dtype(settings, device)
    try:
        parts = {
            part: _load_weights(folder, part, index, settings, dtype).to(device).eval().requires_grad_(False)
            for part in _WEIGHTS
            if _is_present(index, part)
        }
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        feature_extractor = None
        if "safety_checker" in parts:
            # The Pillow one, wherever torchvision is installed too: other resampling gives other NSFW scores.
            feature_extractor = CLIPImageProcessorPil.from_pretrained(
                folder, subfolder="feature_extractor", local_files_only=True
            )
        # Stock's constructor corrects what old checkpoints have wrong, e.g. `steps_offset`.
        scheduler = StableDiffusionInpaintPipeline(
            **{part: parts.get(part) for part in _WEIGHTS},
            tokenizer=tokenizer,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            requires_safety_checker=False,
        ).scheduler
    except StartupError:
        raise
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        raise StartupError(f"cannot load model {name!r}: {_first_line(error)}") from error
    _check_supported(parts["unet"], name)
    if "safety_checker" not in parts and not settings.allow_unchecked:
        raise StartupError(
            f"model {name!r} has no safety checker: set INPAINT_ALLOW_UNCHECKED=true to serve it without one"
        )
    vae_scale_factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    sample_size = parts["unet"].config.sample_size
    return Components(
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=parts.get("safety_checker"),
        feature_extractor=feature_extractor,
        device=device,
        dtype=dtype,
        info=ModelInfo(
            id=name,
            kind="demo" if settings.is_bundled_model else "checkpoint",
            native_size=vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size)),
            size_multiple=max(8, vae_scale_factor),
            unet_in_channels=parts["unet"].config.in_channels,
            schedulers=scheduler_names(),
            default_scheduler=short_name(scheduler),
            default_steps=settings.default_steps or (BUNDLED_STEPS if settings.is_bundled_model else STOCK_STEPS),
            has_safety_checker="safety_checker" in parts,
            attention_backend=settings.attention_backend,
        ),
        attention=apply_switches(parts["unet"], parts["vae"], settings),
    )


def _locate(settings: Settings) -> Path:
    """The folder of the checkpoint: bundled, local, or fetched from the hub into its cache."""
    if settings.is_bundled_model:
        return BUNDLED_FOLDER
    path = Path(settings.model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or settings.model_name != settings.model:
        state = "is not a folder in diffusers format" if path.exists() else "does not exist"
        raise StartupError(f"model {settings.model!r} {state}")
    try:
        return Path(
            DiffusionPipeline.download(
                settings.model,
                revision=settings.revision,
                variant=settings.variant,
                use_safetensors=True,
                local_files_only=settings.offline,
            )
        )
    except Exception as error:
        logger.debug("download failed", exc_info=error)
        where = "the local cache (offline)" if settings.offline else "the model hub"
        raise StartupError(f"cannot get model {settings.model!r} from {where}: {_first_line(error)}") from error


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    """The checkpoint's table of contents, once it is known to be of a kind that is served."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index.get("_class_name", "")
    except FileNotFoundError:
        raise StartupError(f"model {name!r} is no diffusers folder: it has no model_index.json") from None
    except (ValueError, AttributeError, OSError):
        raise StartupError(f"model {name!r}: its model_index.json is not readable") from None
    if "XL" in kind or "text_encoder_2" in index or not kind.startswith("StableDiffusion"):
        raise StartupError(
            f"model {name!r} is a {kind or 'model of unknown kind'}; Stable Diffusion 1.x or 2.x is needed"
        )
    missing = [
        part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not _is_present(index, part)
    ]
    if missing:
        raise StartupError(f"model {name!r} lacks {', '.join(missing)}")
    return dict(index)


def _is_present(index: dict[str, Any], part: str) -> bool:
    """Whether the checkpoint has this part; a part that was left out stands as [null, null]."""
    return bool((index.get(part) or [None, None])[1])


def _load_weights(folder: Path, part: str, index: dict[str, Any], settings: Settings, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """One part of the checkpoint on the CPU, every weight of it accounted for."""
    name, cls, class_name = settings.model_name, _WEIGHTS[part], index[part][1]
    if class_name != cls.__name__:
        raise StartupError(f"model {name!r}: {part} is a {class_name}, which is not supported")
    if not any((folder / part).glob("*.safetensors")):
        raise StartupError(f"model {name!r}: {part} has no .safetensors weights; pickles are not loaded")
    model, loading = cls.from_pretrained(
        folder,
        subfolder=part,
        dtype=dtype,
        variant=settings.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    faults = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if faults:
        raise StartupError(f"model {name!r}: {part} lacks {len(faults)} of its weights, the first is {faults[0]}")
    return model


def _check_supported(unet: UNet2DConditionModel, name: str) -> None:
    if unet.config.time_cond_proj_dim is not None:
        raise StartupError(f"model {name!r} has a UNet with embedded guidance, which is not supported")
    if unet.config.in_channels not in (4, 9):
        raise StartupError(f"model {name!r} has a UNet of {unet.config.in_channels} input channels; 9 or 4 are needed")


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[settings.dtype]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
