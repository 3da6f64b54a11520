"""Loading a folder in diffusers format, whole or not at all.

diffusers and transformers fill weights that they do not find with random
numbers and say so only in a log line; here every weight has to be in the folder.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer

from service.errors import StartupError, first_line
from service.worker.flax_weights import FLAX_FILES, read_flax_weights
from service.worker.weight_files import choose_variant, listed, variants

logger = logging.getLogger(__name__)

_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "unet": (UNet2DConditionModel,),
    "vae": (AutoencoderKL, AsymmetricAutoencoderKL),
    "text_encoder": (CLIPTextModel,),
    "safety_checker": (StableDiffusionSafetyChecker,),
}
"""The weights that are checked, and the only classes that are served."""

_OTHER_NAMES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
"""Pipelines of Stable Diffusion's parts that are not called so: those of LCM-distilled checkpoints."""

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
        parts["feature_extractor"] = _load_extractor(folder / "feature_extractor")
    return parts


def examine_folder(folder: Path, *, name: str, variant: str | None) -> dict[str, list[Path]]:
    """What `load_folder` would find wrong before it reads weights.

    Args:
        folder: The checkpoint.
        name: What messages call it.
        variant: Of the weights' files.

    Returns:
        The files with the weights of each part, by part.

    Raises:
        StartupError: It is not complete, pickled, or of another kind.
    """
    index = _read_index(folder, name)
    present = [part for part in _WEIGHTS if _is_present(index, part)]
    _check_variant([folder / part for part in present], variant, name)
    files: dict[str, list[Path]] = {}
    for part in present:
        _class_of(part, index[part][1], name)
        flax_file = _flax_file(folder / part)
        if flax_file is not None:
            files[part] = [flax_file]
            continue
        chosen = choose_variant(folder / part, variant, f"model {name!r}: {part}")
        files[part] = variants(folder / part)[chosen]
    return files


def examine_safety_checker(folder: Path, *, name: str) -> list[Path]:
    """The files of a safety checker's weights; see `load_safety_checker`.

    Raises:
        StartupError: It is not there, not complete, or pickled.
    """
    checker, _ = _safety_checker_folders(folder, name)
    return variants(checker)[choose_variant(checker, None, f"safety checker {name!r}")]


def load_safety_checker(folder: Path, *, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """A safety checker from a folder of its own, with its preprocessing beside it, or from another checkpoint's folder.

    Args:
        folder: Either.
        dtype: What type its weights become.
        name: What messages call it.

    Returns:
        `safety_checker` and `feature_extractor`.

    Raises:
        StartupError: It is not there, not complete, or pickled.
    """
    checker, extractor = _safety_checker_folders(folder, name)
    (cls,) = _WEIGHTS["safety_checker"]
    return {
        "safety_checker": _read_weights(checker, cls, dtype=dtype, what=f"safety checker {name!r}", variant=None),
        "feature_extractor": _load_extractor(extractor),
    }


def _safety_checker_folders(folder: Path, name: str) -> tuple[Path, Path]:
    """Of the checker, and of its preprocessing."""
    checker, extractor = folder / "safety_checker", folder / "feature_extractor"
    if not checker.is_dir():
        checker = extractor = folder
    if not (checker / "config.json").is_file() or not (extractor / "preprocessor_config.json").is_file():
        raise StartupError(f"safety checker {name!r} lacks its config.json or preprocessor_config.json")
    return checker, extractor


def _load_extractor(folder: Path) -> CLIPImageProcessorPil:
    # The Pillow one, wherever torchvision is installed too: other resampling gives other NSFW scores.
    return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    """The checkpoint's table of contents, once it is known to be of a kind that is served."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index.get("_class_name", "")
    except FileNotFoundError:
        raise StartupError(
            f"model {name!r} is no diffusers folder: it has no model_index.json{_what_is_there(folder)}"
        ) from None
    except (ValueError, AttributeError, OSError):
        raise StartupError(f"model {name!r}: its model_index.json is not readable") from None
    is_known = kind.removeprefix("Flax").startswith("StableDiffusion") or kind in _OTHER_NAMES
    is_later = "XL" in kind or kind.startswith("StableDiffusion3") or {"text_encoder_2", "transformer"} & index.keys()
    if is_later or not is_known:
        raise StartupError(
            f"model {name!r} is a {kind or 'model of unknown kind'}; Stable Diffusion 1.x or 2.x is needed"
        )
    missing = [part for part in _NEEDED if not _is_present(index, part)]
    if missing:
        raise StartupError(f"model {name!r} lacks {', '.join(missing)}")
    return dict(index)


def _what_is_there(folder: Path) -> str:
    """What a folder is that is no checkpoint, where that can be told."""
    if (folder / "adapter_config.json").is_file() or any(folder.glob("*lora*.safetensors")):
        return ", but a LoRA"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name") or config["architectures"][0]
    except (ValueError, LookupError, AttributeError, OSError):
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        return f"; to serve a single file, name {files[0]} itself" if files else ""
    return f", but one part alone, a {kind}"


def _is_present(index: dict[str, Any], part: str) -> bool:
    """Whether the checkpoint has this part; a part that was left out stands as [null, null]."""
    return bool((index.get(part) or [None, None])[1])


def _check_variant(folders: list[Path], variant: str | None, name: str) -> None:
    """Whether the variant that was asked for is anywhere in the checkpoint."""
    found = {known: files for folder in folders for known, files in variants(folder).items()}
    if variant is not None and variant not in found:
        raise StartupError(f"model {name!r} has no variant {variant!r} of its weights; variants there: {listed(found)}")


def _load_weights(folder: Path, class_name: str, *, dtype: torch.dtype, name: str, variant: str | None) -> Any:  # noqa: ANN401
    """One part of the checkpoint, every weight of it accounted for."""
    part = folder.name
    cls = _class_of(part, class_name, name)
    flax_file = _flax_file(folder)
    if flax_file is not None:
        return _load_flax(flax_file, cls, name, dtype)
    return _read_weights(folder, cls, dtype=dtype, what=f"model {name!r}: {part}", variant=variant)


def _class_of(part: str, class_name: str, name: str) -> Any:  # noqa: ANN401
    """The class that reads a part's weights."""
    cls = next((known for known in _WEIGHTS[part] if known.__name__ == class_name.removeprefix("Flax")), None)
    if cls is None:
        raise StartupError(f"model {name!r}: {part} is a {class_name}, which is not supported")
    return cls


def _flax_file(folder: Path) -> Path | None:
    """The weights that Flax saved, where there are no others."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((path for path in (folder / file for file in FLAX_FILES) if path.is_file()), None)


def _read_weights(folder: Path, cls: Any, *, dtype: torch.dtype, what: str, variant: str | None) -> Any:  # noqa: ANN401
    """A model of the safetensors of its folder."""
    chosen = choose_variant(folder, variant, what)
    try:
        model, loading = cls.from_pretrained(
            folder,
            dtype=dtype,
            variant=chosen,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # Into the loading info, and refused below.
            output_loading_info=True,
        )
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        raise StartupError(f"{what} cannot be loaded: {first_line(error)}") from error
    for keys, fault in (
        (loading["missing_keys"], "lacks {} of its weights, the first is {}"),
        (loading["mismatched_keys"], "has {} weights of another shape, the first is {}"),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if names:
            raise StartupError(f"{what} {fault.format(len(names), names[0])}")
    return model


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
