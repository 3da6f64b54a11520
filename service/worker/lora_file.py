"""LoRA files: from any format that diffusers reads to low-rank matrices by module.

The keys are read by diffusers' own converters, in the order of stock's
`load_lora_weights`: its own formats (with `lora_A`/`lora_B`, `.lora.down`,
`_lora.down` and `lora_linear_layer.down`), kohya's, and whatever else
`lora_state_dict` knows. Stock hands the result to peft; here it stays as it is.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import get_peft_kwargs
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import load

from service.errors import ErrorCode, InpaintError

PARTS = ("unet", "text_encoder")

ADAPTER_METADATA = "lora_adapter_metadata"
"""Under this name diffusers' `save_lora_weights` keeps peft's configuration in the file's header."""

_DOWN, _UP, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

_OTHER_KINDS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon with a core tensor",
    "lora_B.bias": "LoRA with biases",
}

_PLAIN_PATTERN = re.compile(r"\^?[\w.]+", re.ASCII)

_PEFT_ALPHA = 8
"""What peft's `LoraConfig` takes where it has no `lora_alpha`."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What a LoRA adds to one layer's weight W: `scaling` · up · down, times what the request asks for.

    Attributes:
        down: A, (r, in) or (r, in, kh, kw).
        up: B, (out, r) or (out, r, 1, 1).
        scaling: alpha / r.
        magnitude: (out,) of a DoRA, else None.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)


LoraLayers = Mapping[str, LowRank]
"""By the module's name, as the file has it."""


def refused(message: str) -> InpaintError:
    """A LoRA that cannot be used; the message is for the client."""
    return InpaintError(ErrorCode.INVALID_LORA, message, field="loras")


def read_lora(path: Path, version: str | None = None) -> dict[str, LoraLayers]:
    """The matrices of a file, by part ("unet", "text_encoder").

    Args:
        path: A `.safetensors` file; a pickle is not one, whatever its name.
        version: What `AdapterFolder.resolve` said of it; None takes the file as it is.

    Raises:
        InpaintError: `UNKNOWN_LORA`, the file is gone or another one; `INVALID_LORA`, it is no LoRA.
    """
    data = _read(path, version)
    try:
        tensors = load(data)
        metadata = _metadata(data)
    except Exception as error:
        raise refused("The LoRA is not a readable .safetensors file.") from error
    return parse_lora(tensors, metadata)


def _read(path: Path, version: str | None) -> bytes:
    """The whole of one version of a file."""
    try:
        with path.open("rb") as file:
            before = _version(file.fileno())
            data = file.read()
            after = _version(file.fileno())
    except OSError:
        raise InpaintError(ErrorCode.UNKNOWN_LORA, "There is no such LoRA any more.", field="loras") from None
    if before != after or version not in (None, before):
        message = "A LoRA was replaced while the request waited; send it again."
        raise InpaintError(ErrorCode.UNKNOWN_LORA, message, field="loras")
    return data


def _version(descriptor: int) -> str:
    status = os.fstat(descriptor)
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _metadata(data: bytes) -> Mapping[str, Any] | None:
    """Peft's configuration, where the file has it."""
    (length,) = struct.unpack_from("<Q", data)
    text = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(ADAPTER_METADATA)
    metadata = json.loads(text) if text else None
    return metadata if isinstance(metadata, dict) else None


# --- keys ------------------------------------------------------------------------------


def parse_lora(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> dict[str, LoraLayers]:
    """The matrices of a state dict, by part.

    Args:
        tensors: As they are in the file.
        metadata: peft's configuration, with the part's name before each key.

    Raises:
        InpaintError: `INVALID_LORA`.
    """
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in key for key in tensors):
            raise refused(f"The file is a {kind}, which is not supported.")
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in tensors):
        raise refused("The LoRA is for Stable Diffusion XL; the served model is of another kind.")
    with _refusing("The file's keys are not those of a LoRA for Stable Diffusion 1.x or 2.x."):
        state_dict, network_alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors))
        if not state_dict or not all("lora" in key for key in state_dict):
            raise ValueError("no LoRA")
        if not any(key.startswith(tuple(f"{part}." for part in PARTS)) for key in state_dict):
            state_dict = {f"unet.{key}": tensor for key, tensor in state_dict.items()}  # as `load_attn_procs` has it
        return {
            part: _layers(part, _part_of(state_dict, part), _part_of(network_alphas or {}, part), metadata)
            for part in _parts_in(state_dict)
        }


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Turn what converters raise over unexpected keys into one answer."""
    try:
        yield
    except InpaintError:
        raise
    except Exception as error:
        raise refused(message) from error


def _parts_in(state_dict: Mapping[str, Any]) -> list[str]:
    found = {key.partition(".")[0] for key in state_dict}
    if not found <= set(PARTS):
        raise ValueError("keys of no known part")
    return [part for part in PARTS if part in found]


def _part_of(mapping: Mapping[str, Any], part: str) -> dict[str, Any]:
    prefix = f"{part}."
    return {key.removeprefix(prefix): value for key, value in mapping.items() if key.startswith(prefix)}


def _layers(
    part: str,
    state_dict: Mapping[str, torch.Tensor],
    network_alphas: Mapping[str, float],
    metadata: Mapping[str, Any] | None,
) -> LoraLayers:
    """One part's matrices, its keys brought to peft's form as stock does."""
    peft = _to_peft(part, state_dict)
    names = sorted({name for name, _, suffix in map(_split, peft) if suffix in (_DOWN, _UP)})
    magnitudes = {_split(key)[0]: tensor for key, tensor in peft.items() if _split(key)[2] == _MAGNITUDE}
    if len(peft) != 2 * len(names) + len(magnitudes):
        raise ValueError("keys that are neither A, B nor a magnitude")
    if magnitudes and magnitudes.keys() != set(names):
        raise ValueError("a DoRA without all of its magnitudes")
    config = None if metadata is None else _part_of(metadata, part)
    if config:
        _check_config(config, is_dora=bool(magnitudes))
    pairs = {name: (_finite(peft[f"{name}.{_DOWN}"]), _finite(peft[f"{name}.{_UP}"])) for name in names}
    ranks = {name: len(down) for name, (down, _) in pairs.items()}
    scalings = _configured_scalings(config, ranks) if config else _scalings(part, network_alphas, ranks)
    if not all(math.isfinite(scaling) for scaling in scalings.values()):
        raise ValueError("an alpha that is not finite")
    return {
        name: LowRank(down, up, scalings[name], _finite(magnitudes[name]).flatten() if name in magnitudes else None)
        for name, (down, up) in pairs.items()
    }


def _finite(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, in a type that can be computed with."""
    if not matrix.is_floating_point():
        raise ValueError("a matrix of integers")
    if matrix.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        matrix = matrix.float()
    if not bool(torch.isfinite(matrix).all()):
        raise refused("The LoRA has values that are not finite.")
    return matrix


def _to_peft(part: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if part == "text_encoder":
        converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(state_dict)))
    else:
        is_peft = "lora_A" in next(iter(state_dict))
        converted = dict(state_dict) if is_peft else convert_unet_state_dict_to_peft(dict(state_dict))
    # DoRA's vectors come with and without ".weight"; and like stock, look for alphas by the names of today's CLIP.
    return {
        key.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE).removeprefix("text_model."): tensor
        for key, tensor in converted.items()
    }


def _split(key: str) -> tuple[str, str, str]:
    """Module and what is said of it: ("mid_block.…to_q", ".", "lora_A.weight")."""
    name, dot, suffix = key.partition(".lora_")
    return name, dot, f"lora_{suffix}"


# --- scalings ----------------------------------------------------------------------------


def _scalings(part: str, network_alphas: Mapping[str, float], ranks: Mapping[str, int]) -> dict[str, float]:
    """Alpha / r of each module by stock's rule; 1 where the file has no alphas.

    Where alphas differ, stock's `get_peft_kwargs` finds those of some modules by their names, and takes the commonest
    of the file for the others (the UNet's attention projections, the text encoder). So does this.
    """
    if not network_alphas:
        return dict.fromkeys(ranks, 1.0)
    kwargs = get_peft_kwargs(ranks, network_alphas, ranks, is_unet=part == "unet")
    return _divide(kwargs["lora_alpha"], kwargs["alpha_pattern"], ranks)


def _configured_scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Alpha / r, or alpha / √r with rank-stabilised scaling, by peft's configuration."""
    alpha, patterns = config.get("lora_alpha", _PEFT_ALPHA), dict(config.get("alpha_pattern") or {})
    return _divide(alpha, patterns, ranks, power=0.5 if config.get("use_rslora") else 1.0)


def _check_config(config: Mapping[str, Any], *, is_dora: bool) -> None:
    """Refuse what the matrices contradict, what changes weights before it is added, and what is not understood.

    peft takes patterns for regular expressions. Trainers write names; what a stranger writes can match for ever.
    """
    if bool(config.get("use_dora")) != is_dora:
        raise ValueError("a configuration that contradicts the matrices")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError("made for weights that are changed first, as PiSSA's are")
    if not all(_PLAIN_PATTERN.fullmatch(pattern) for pattern in config.get("alpha_pattern") or {}):
        raise ValueError("regular expressions")


def _divide(
    alpha: float, patterns: Mapping[str, float], ranks: Mapping[str, int], power: float = 1.0
) -> dict[str, float]:
    """Each module's alpha, of the first pattern that is its name or the end of it, by a power of its rank."""
    order = {pattern: index for index, pattern in enumerate(patterns)}
    scalings = {}
    for name, rank in ranks.items():
        pattern = min(_ends(name) & order.keys(), key=order.__getitem__, default=None)
        scalings[name] = float(alpha if pattern is None else patterns[pattern]) / rank**power
    return scalings


def _ends(name: str) -> set[str]:
    """What peft's `get_pattern_key` finds a module by: its whole name, or that from any dot on."""
    levels = name.split(".")
    return {f"^{name}", *(".".join(levels[first:]) for first in range(len(levels)))}
