"""Loading one `.safetensors` file in the original Stable Diffusion layout.

Such a file holds weights and hardly anything else, so the configurations and the
tokenizer's vocabulary ship with the package and nothing is fetched. diffusers
renames the weights, as its own `from_single_file` does. That one leaves weights
which it does not find at random values; here a file is loaded whole or refused
by what it is.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.worker.weight_files import is_pickle

logger = logging.getLogger(__name__)

CONFIGS_FOLDER = Path(__file__).parent / "configs"

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."
_FIRST_CONVOLUTION = f"{_UNET}input_blocks.0.0.weight"

_FOREIGN_KINDS = (
    ("conditioner.embedders.", "a Stable Diffusion XL checkpoint"),
    ("double_blocks.", "a FLUX model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("lora_", "a LoRA alone"),
    ("lora.", "a LoRA alone"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
)
"""What other kinds of file have in the names of their weights; the first that is found decides."""

_PARTS_ALONE = (
    (_UNET, "a UNet alone"),
    ("down_blocks.0.resnets.", "a UNet alone"),
    (_VAE, "a VAE alone"),
    ("decoder.conv_in.", "a VAE alone"),
    ("cond_stage_model.", "a text encoder alone"),
    ("text_model.", "a text encoder alone"),
)

_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What a UNet predicts, by how files name it in their metadata."""

_BASE_STEPS = 875_000
"""The training step that Stable Diffusion 2's 512-pixel base, which predicts noise, was saved at."""

_TELLTALE = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TELLTALE_STD = 0.09
"""Published Stable Diffusion 2 UNets deviate more here where they predict v, less where noise (found by ComfyUI)."""

_WRAPPER = "state_dict."
"""What a training loop's checkpoint has before every name."""


def load_single_file(
    path: Path, *, dtype: torch.dtype, name: str, prediction_type: str | None = None, configs: Path = CONFIGS_FOLDER
) -> dict[str, Any]:
    """The parts of a checkpoint in one file, on the CPU, every weight of them accounted for.

    Args:
        path: The file.
        dtype: What type its weights become.
        name: What messages call it.
        prediction_type: What the UNet predicts, where the operator says it.
        configs: Folder of the configurations, one folder per kind, and of the vocabulary.

    Returns:
        `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`.

    Raises:
        StartupError: It is pickled, not complete or of another kind.
    """
    with _opened(path, name) as file:
        return _load_parts(file, dtype, name, prediction_type, configs)


def examine_file(path: Path, *, name: str) -> None:
    """What `load_single_file` would find wrong before it reads weights.

    Raises:
        StartupError: It is pickled, cut off or of another kind.
    """
    with _opened(path, name) as file:
        _check(file, name)


@contextmanager
def _opened(path: Path, name: str) -> Iterator["_Unwrapped"]:
    """An open file.

    Raises:
        StartupError: It cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield _Unwrapped(file)
    except SafetensorError as error:
        if is_pickle(path):
            raise StartupError(f"model {name!r} is a pickle under another name; pickles are not loaded") from error
        raise StartupError(f"model {name!r} is truncated or no safetensors file") from error
    except OSError as error:
        raise StartupError(f"model {name!r} is not readable: {error.strerror or error}") from error


class _Unwrapped:
    """An open file whose names lack the wrapper's prefix, if it has one.

    Args:
        file: What `safe_open` gives.
    """

    def __init__(self, file: Any) -> None:  # noqa: ANN401
        self._file = file
        self._names = {key.removeprefix(_WRAPPER): key for key in file.keys()}  # noqa: SIM118 - it is no mapping

    def keys(self) -> list[str]:
        return list(self._names)

    def metadata(self) -> dict[str, str]:
        return self._file.metadata() or {}

    def get_shape(self, name: str) -> list[int]:
        shape: list[int] = self._file.get_slice(self._names[name]).get_shape()
        return shape

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self._names[name])
        return tensor


def _load_parts(
    file: _Unwrapped, dtype: torch.dtype, name: str, prediction_type: str | None, configs: Path
) -> dict[str, Any]:
    keys = file.keys()
    in_channels = _check(file, name)
    is_second = any(key.startswith(_OPEN_CLIP) for key in keys)
    prediction = prediction_type or _prediction(file, keys, in_channels, is_second=is_second)
    folder = configs / (("sd2_768" if prediction == "v_prediction" else "sd2_512") if is_second else "sd1")
    scheduler_class = getattr(diffusers, _read(folder / "scheduler" / "scheduler_config.json")["_class_name"])
    merges = (configs / "bpe" / "merges.txt").read_text(encoding="utf-8")
    return {
        "unet": _load_unet(_weights(file, keys, _UNET, dtype), folder, in_channels, name),
        "vae": _load_vae(_weights(file, keys, _VAE, dtype), folder, name),
        "text_encoder": _load_text_encoder(_weights(file, keys, "cond_stage_model.", dtype), folder, dtype, name),
        "tokenizer": _make_tokenizer(merges, _read(folder / "tokenizer" / "tokenizer_config.json")),
        "scheduler": scheduler_class.from_pretrained(
            folder, subfolder="scheduler", local_files_only=True, prediction_type=prediction
        ),
    }


def _check(file: _Unwrapped, name: str) -> int:
    """Refuse what is no model that is served; returns the UNet's input channels."""
    keys = file.keys()
    _check_kind(keys, name)
    in_channels = file.get_shape(_FIRST_CONVOLUTION)[1] if _FIRST_CONVOLUTION in keys else 4
    if in_channels not in (4, 9):
        raise StartupError(
            f"model {name!r} has a UNet of {in_channels} input channels; "
            "Stable Diffusion 1.x or 2.x with 9 or 4 is needed"
        )
    return in_channels


def _check_kind(keys: list[str], name: str) -> None:
    """Refuse what is not all of a Stable Diffusion 1.x or 2.x, by what it is."""
    for mark, kind in _FOREIGN_KINDS:
        if any(mark in key for key in keys):
            raise StartupError(f"model {name!r} is {kind}; Stable Diffusion 1.x or 2.x is needed")
    prefixes = {"UNet": (_UNET,), "VAE": (_VAE,), "text encoder": (_CLIP, _OPEN_CLIP)}
    missing = [part for part, starts in prefixes.items() if not any(key.startswith(starts) for key in keys)]
    if len(missing) == 1:
        raise StartupError(
            f"model {name!r} has no {missing[0]} of Stable Diffusion 1.x or 2.x; all of the model is needed"
        )
    if missing:
        kind = next(
            (kind for mark, kind in _PARTS_ALONE if any(key.startswith(mark) for key in keys)),
            "a model of unknown kind",
        )
        raise StartupError(f"model {name!r} is {kind}; all of a Stable Diffusion 1.x or 2.x is needed")


def _prediction(file: _Unwrapped, keys: list[str], in_channels: int, *, is_second: bool) -> str:
    """What the UNet predicts: as the file's metadata say, else as its weights do, else as diffusers infers it."""
    declared = _PREDICTIONS.get(file.metadata().get("modelspec.prediction_type", "").lower())
    if declared:
        return declared
    if not is_second or in_channels != 4:  # noqa: PLR2004 - latents alone; no published inpainting model predicts v
        return "epsilon"
    is_noise = "global_step" in keys and int(file.get_tensor("global_step")) == _BASE_STEPS
    if not is_noise and _TELLTALE in keys:
        is_noise = float(file.get_tensor(_TELLTALE).float().std(correction=0)) <= _TELLTALE_STD
    found = "epsilon" if is_noise else "v_prediction"
    logger.info("the file does not say what its UNet predicts: it looks like %s", found)
    return found


def _weights(file: _Unwrapped, keys: list[str], prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: file.get_tensor(key).to(dtype) for key in keys if key.startswith(prefix)}


def _load_unet(original: dict[str, torch.Tensor], folder: Path, in_channels: int, name: str) -> UNet2DConditionModel:
    config = UNet2DConditionModel.load_config(folder, subfolder="unet", local_files_only=True)
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config, in_channels=in_channels)
    weights = convert_ldm_unet_checkpoint(original, model.config)
    _check_complete(model, weights, "unet", name)
    if len(weights) < len(original):
        raise StartupError(f"model {name!r}: unet has weights that Stable Diffusion 1.x and 2.x do not have")
    model.load_state_dict(weights, assign=True)
    return model


def _load_vae(original: dict[str, torch.Tensor], folder: Path, name: str) -> AutoencoderKL:
    config = AutoencoderKL.load_config(folder, subfolder="vae", local_files_only=True)
    with torch.device("meta"):
        model = AutoencoderKL.from_config(config)
    weights = convert_ldm_vae_checkpoint(original, model.config)
    _check_complete(model, weights, "vae", name)
    model.load_state_dict(weights, assign=True)
    return model


def _load_text_encoder(original: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype, name: str) -> CLIPTextModel:
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder", local_files_only=True)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    if any(key.startswith(_OPEN_CLIP) for key in original):
        renamed = convert_open_clip_checkpoint(model, original)
    else:
        renamed = convert_ldm_clip_checkpoint(original)
    flat = {key.removeprefix("text_model."): weight for key, weight in renamed.items()}
    # Left over are layers after the last one that Stable Diffusion 2 uses, and the numbers of the positions.
    weights = {key: flat[key] for key in model.state_dict() if key in flat}
    _check_complete(model, weights, "text_encoder", name)
    return CLIPTextModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _check_complete(model: torch.nn.Module, weights: dict[str, torch.Tensor], part: str, name: str) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise StartupError(f"model {name!r}: {part} lacks {len(missing)} of its weights, the first is {missing[0]}")
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise StartupError(
            f"model {name!r}: {part} has weights that Stable Diffusion 1.x and 2.x do not have: {unknown[0]}"
        )
    for key, weight in expected.items():
        if weights[key].shape != weight.shape:
            raise StartupError(
                f"model {name!r}: {part} is of other dimensions than Stable Diffusion 1.x or 2.x: "
                f"{key} is {tuple(weights[key].shape)}, not {tuple(weight.shape)}"
            )


def _make_tokenizer(merges: str, config: dict[str, Any]) -> CLIPTokenizer:
    """CLIP's tokenizer: a token for every byte, for every byte that ends a word, and for every merge."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]
    pairs = [tuple(line.split()) for line in merges.splitlines()[1:]]
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *map("".join, pairs),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, pairs, **config)


def _read(path: Path) -> Any:  # noqa: ANN401
    return json.loads(path.read_text(encoding="utf-8"))
