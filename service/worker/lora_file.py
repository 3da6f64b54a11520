"""LoRA files: from any format that diffusers reads to low-rank matrices by module.

The keys are read by diffusers' own converters, in the order of stock's
`load_lora_weights`: its own formats (with `lora_A`/`lora_B`, `.lora.down`,
`_lora.down` and `lora_linear_layer.down`), kohya's, and whatever else
`lora_state_dict` knows. Stock hands the result to peft; here it stays as it is.
"""

import json
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
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
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise refused("The LoRA has values that are not finite.")
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
    if len(peft) != 2 * len(names) + sum(_split(key)[2] == _MAGNITUDE for key in peft):
        raise ValueError("keys that are neither A, B nor a magnitude")
    alphas = _alphas(part, network_alphas)
    config = None if metadata is None else _part_of(metadata, part)
    magnitudes = {_split(key)[0]: tensor for key, tensor in peft.items() if _split(key)[2] == _MAGNITUDE}
    layers = {}
    for name in names:
        down, up = peft[f"{name}.{_DOWN}"], peft[f"{name}.{_UP}"]
        rank = len(down)
        scaling = _configured_scaling(config, name, rank) if config else _alpha(alphas, name, rank) / rank
        magnitude = magnitudes.get(name)
        layers[name] = LowRank(down, up, scaling, None if magnitude is None else magnitude.flatten())
    return layers


def _to_peft(part: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if part == "text_encoder":
        converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(state_dict)))
    else:
        is_peft = "lora_A" in next(iter(state_dict))
        converted = dict(state_dict) if is_peft else convert_unet_state_dict_to_peft(dict(state_dict))
    # DoRA's vectors come with and without ".weight".
    return {key.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE): tensor for key, tensor in converted.items()}


def _split(key: str) -> tuple[str, str, str]:
    """Module and what is said of it: ("mid_block.…to_q", ".", "lora_A.weight")."""
    name, dot, suffix = key.partition(".lora_")
    return name, dot, f"lora_{suffix}"


def _alphas(part: str, network_alphas: Mapping[str, float]) -> dict[str, float]:
    """Alphas by module; kohya's converter names some by the module and some by the key of its matrix."""
    by_key = {key.removesuffix(".alpha"): alpha for key, alpha in network_alphas.items()}
    of_matrices = {key: alpha for key, alpha in by_key.items() if key.endswith(".weight")}
    alphas = {key: alpha for key, alpha in by_key.items() if key not in of_matrices}
    if of_matrices:
        converted = _to_peft(part, of_matrices)  # type: ignore[arg-type]  # it looks at keys alone
        alphas |= {_split(key)[0]: alpha for key, alpha in converted.items()}  # type: ignore[misc]
    return {name.removesuffix(".lora_linear_layer"): alpha for name, alpha in alphas.items()}


def _alpha(alphas: Mapping[str, float], name: str, rank: int) -> float:
    """The alpha of a module: its own, else the commonest of the file, else the rank; as stock's `get_peft_kwargs`."""
    if not alphas:
        return rank
    return alphas.get(name, Counter(alphas.values()).most_common(1)[0][0])


def _configured_scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha / r, or alpha / √r with rank-stabilised scaling, by peft's configuration."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
