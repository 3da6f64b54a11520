"""Loading a folder in diffusers format, whole or not at all.

diffusers and transformers fill weights that they do not find with random
numbers and say so only in a log line; here every weight has to be in the folder.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.worker.flax_weights import FLAX_FILES, read_flax_weights

_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "unet": (UNet2DConditionModel,),
    "vae": (AutoencoderKL, AsymmetricAutoencoderKL),
    "text_encoder": (CLIPTextModel,),
    "safety_checker": (StableDiffusionSafetyChecker,),
}
"""The weights that are checked, and the only classes that are served."""

_WEIGHTS_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
)
"""The names that diffusers and transformers look for; shards were numbered before the variant, and once after it."""

_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def load_folder(
    folder: Path, *, dtype: torch.dtype, name: str, variant: str | None, on_stage: Callable[[str], None]
) -> dict[str, Any]:
    """The parts of a checkpoint, on the CPU.

    Args:
        folder: The checkpoint.
        dtype: What type its weights become.
        name: What messages call it.
        variant: Of the weights' files, e.g. "fp16".
        on_stage: Told of each part.

    Returns:
        `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`; `safety_checker` and `feature_extractor` where
        there is a checker.

    Raises:
        StartupError: It is not complete, pickled, or of another kind.
    """
    index = _read_index(folder, name)
    parts: dict[str, Any] = {}
    present = [part for part in _WEIGHTS if _is_present(index, part)]
    _check_variant([folder / part for part in present], variant, name)
    for number, part in enumerate(present, start=1):
        on_stage(f"loading {part} ({number} of {len(present)})")
        parts[part] = _load_weights(folder / part, index[part][1], dtype=dtype, name=name, variant=variant)
    scheduler_class = getattr(diffusers, index["scheduler"][1].removeprefix("Flax"))
    parts["scheduler"] = scheduler_class.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    if "safety_checker" in parts:
        # The Pillow one, wherever torchvision is installed too: other resampling gives other NSFW scores.
        parts["feature_extractor"] = CLIPImageProcessorPil.from_pretrained(
            folder, subfolder="feature_extractor", local_files_only=True
        )
    return parts


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    """The checkpoint's table of contents, once it is known to be of a kind that is served."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index.get("_class_name", "")
    except FileNotFoundError:
        raise StartupError(f"model {name!r} is no diffusers folder: it has no model_index.json") from None
    except (ValueError, AttributeError, OSError):
        raise StartupError(f"model {name!r}: its model_index.json is not readable") from None
    if "XL" in kind or "text_encoder_2" in index or not kind.removeprefix("Flax").startswith("StableDiffusion"):
        raise StartupError(
            f"model {name!r} is a {kind or 'model of unknown kind'}; Stable Diffusion 1.x or 2.x is needed"
        )
    missing = [part for part in _NEEDED if not _is_present(index, part)]
    if missing:
        raise StartupError(f"model {name!r} lacks {', '.join(missing)}")
    return dict(index)


def _is_present(index: dict[str, Any], part: str) -> bool:
    """Whether the checkpoint has this part; a part that was left out stands as [null, null]."""
    return bool((index.get(part) or [None, None])[1])


def _load_weights(folder: Path, class_name: str, *, dtype: torch.dtype, name: str, variant: str | None) -> Any:  # noqa: ANN401
    """One part of the checkpoint, every weight of it accounted for."""
    part = folder.name
    cls = next((known for known in _WEIGHTS[part] if known.__name__ == class_name.removeprefix("Flax")), None)
    if cls is None:
        raise StartupError(f"model {name!r}: {part} is a {class_name}, which is not supported")
    if not any(folder.glob("*.safetensors")):
        flax_files = [path for path in (folder / file for file in FLAX_FILES) if path.is_file()]
        if flax_files:
            return _load_flax(flax_files[0], cls, name, dtype)
        raise StartupError(f"model {name!r}: {part} has no .safetensors weights; pickles are not loaded")
    variants = _variants(folder)
    # A part without the variant has its plain weights, as in stock.
    chosen = variant if variant in variants else None
    if variants and chosen not in variants:
        raise StartupError(
            f"model {name!r}: {part} has only variants of its weights: set INPAINT_VARIANT to {_listed(variants)}"
        )
    model, loading = cls.from_pretrained(
        folder,
        dtype=dtype,
        variant=chosen,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    faults = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if faults:
        raise StartupError(f"model {name!r}: {part} lacks {len(faults)} of its weights, the first is {faults[0]}")
    return model


def _variants(folder: Path) -> set[str | None]:
    """Of a part's weights; None for the plain ones."""
    matches = (_WEIGHTS_FILE.fullmatch(path.name) for path in folder.glob("*.safetensors"))
    return {match["variant"] for match in matches if match is not None}


def _check_variant(folders: Sequence[Path], variant: str | None, name: str) -> None:
    """Whether the variant is anywhere in the checkpoint."""
    found = set().union(*map(_variants, folders))
    if variant is not None and variant not in found:
        raise StartupError(f"model {name!r} has no variant {variant!r} of its weights; it has {_listed(found)}")


def _listed(variants: Iterable[str | None]) -> str:
    return ", ".join(sorted(variant for variant in variants if variant)) or "none"


def _load_flax(path: Path, cls: Any, name: str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """A part of which the checkpoint has only the weights that Flax saved."""
    if issubclass(cls, diffusers.ModelMixin):
        model = cls.from_config(cls.load_config(path.parent, local_files_only=True))
    else:
        model = cls(cls.config_class.from_pretrained(path.parent, local_files_only=True))
    try:
        weights = read_flax_weights(path, model)
    except StartupError as error:
        raise StartupError(f"model {name!r}: {error}") from error
    model.load_state_dict(weights, strict=True)
    # Not diffusers' own method, which warns of modules kept in float32 where there are none.
    return torch.nn.Module.to(model, dtype)
