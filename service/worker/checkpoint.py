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

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.messages import ModelInfo
from service.settings import Settings
from service.worker.schedulers import scheduler_names, short_name

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parent / "models" / "demo"
BUNDLED_STEPS = 10
STOCK_STEPS = 50

_COMPONENT_CLASSES = {
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

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, as stock's `vae_scale_factor`."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def load(settings: Settings, device: torch.device) -> Components:
    """Load `settings.model` on `device`.

    Raises:
        StartupError: It is not there, not complete, pickled or of another kind.
    """
    name = settings.model_name
    folder = _locate(settings)
    _check_kind(folder, name)
    dtype = _dtype(settings, device)
    try:
        pipeline = _from_folder(folder, settings, dtype)
    except StartupError:
        raise
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        raise StartupError(f"cannot load model {name!r}: {_first_line(error)}") from error
    if pipeline.safety_checker is None and not settings.allow_unchecked:
        raise StartupError(
            f"model {name!r} has no safety checker: set INPAINT_ALLOW_UNCHECKED=true to serve it without one"
        )
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise StartupError(f"model {name!r} has a UNet with embedded guidance, which is not supported")
    in_channels = pipeline.unet.config.in_channels
    if in_channels not in (4, 9):
        raise StartupError(f"model {name!r} has a UNet of {in_channels} input channels; 9 or 4 are needed")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        if part is not None:
            part.to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)
    sample_size = pipeline.unet.config.sample_size
    native_latent = max(sample_size) if isinstance(sample_size, (list, tuple)) else sample_size
    scale = int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))
    return Components(
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        safety_checker=pipeline.safety_checker,
        feature_extractor=pipeline.feature_extractor,
        device=device,
        dtype=dtype,
        info=ModelInfo(
            id=name,
            kind="demo" if settings.is_bundled_model else "checkpoint",
            native_size=native_latent * scale,
            size_multiple=max(8, scale),
            unet_in_channels=in_channels,
            schedulers=scheduler_names(),
            default_scheduler=short_name(pipeline.scheduler),
            default_steps=settings.default_steps or (BUNDLED_STEPS if settings.is_bundled_model else STOCK_STEPS),
            has_safety_checker=pipeline.safety_checker is not None,
        ),
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


def _check_kind(folder: Path, name: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise StartupError(f"model {name!r} is no diffusers folder: it has no model_index.json")
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        kind = components.get("_class_name", "")
    except (ValueError, AttributeError):
        raise StartupError(f"model {name!r}: its model_index.json is not readable") from None
    if "XL" in kind or "text_encoder_2" in components or not kind.startswith("StableDiffusion"):
        raise StartupError(
            f"model {name!r} is a {kind or 'checkpoint of unknown kind'}; Stable Diffusion 1.x or 2.x is needed"
        )
    missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if part not in components]
    if missing:
        raise StartupError(f"model {name!r} lacks {', '.join(missing)}")


def _from_folder(folder: Path, settings: Settings, dtype: torch.dtype) -> StableDiffusionInpaintPipeline:
    """The stock pipeline on the CPU, with every weight accounted for."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for part, expected in _COMPONENT_CLASSES.items():
        _, class_name = index.get(part) or (None, None)
        if class_name is None:
            parts[part] = None
            continue
        if class_name != expected.__name__:
            raise StartupError(f"model {settings.model_name!r}: {part} is a {class_name}, which is not supported")
        parts[part] = _load_part(folder, part, expected, settings, dtype)
    return StableDiffusionInpaintPipeline.from_pretrained(
        folder,
        **parts,
        requires_safety_checker=parts["safety_checker"] is not None,
        local_files_only=True,
    )


def _load_part(folder: Path, part: str, cls: type, settings: Settings, dtype: torch.dtype) -> Any:  # noqa: ANN401
    if not any((folder / part).glob("*.safetensors")):
        raise StartupError(f"model {settings.model_name!r}: {part} has no .safetensors weights; pickles are not loaded")
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
        raise StartupError(
            f"model {settings.model_name!r}: {part} lacks {len(faults)} of its weights, the first is {faults[0]}"
        )
    return model


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[settings.dtype]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
