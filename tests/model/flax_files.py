"""Flax folders, written by the rule that diffusers and transformers documented for PyTorch to Flax.

Kept apart from the service's reader: here a layer's kind says what its
parameters are called, there the file's names do.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel

MAX_CHUNK_SIZE = 2**30
"""Bytes of an array above which Flax cuts it."""

FILES = {
    "unet": (UNet2DConditionModel, "diffusion_flax_model.msgpack"),
    "vae": (AutoencoderKL, "diffusion_flax_model.msgpack"),
    "text_encoder": (CLIPTextModel, "flax_model.msgpack"),
    "safety_checker": (StableDiffusionSafetyChecker, "flax_model.msgpack"),
}

_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}


def make_flax_folder(
    source: Path, folder: Path, *, dtype: torch.dtype = torch.float32, max_chunk_size: int = MAX_CHUNK_SIZE
) -> Path:
    """Write a checkpoint as a Flax pipeline would have saved it.

    Args:
        source: A checkpoint with safetensors.
        folder: Where to; must not exist.
        dtype: Of the weights in the files.
        max_chunk_size: Larger arrays are cut, in bytes.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, (cls, file) in FILES.items():
        model = cls.from_pretrained(source, subfolder=part)
        (folder / part / file).write_bytes(flax_bytes(flax_tree(model), dtype, max_chunk_size))
        _rename_classes(folder / part / "config.json")
    _rename_classes(folder / "scheduler" / "scheduler_config.json")
    _rename_classes(folder / "model_index.json")
    return folder


def flax_tree(model: torch.nn.Module) -> dict[str, Any]:
    """A model's weights under Flax's names and in its layouts."""
    tree: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        module_name, _, leaf = name.rpartition(".")
        path, array = _flax_parameter(module_name, leaf, weight, model)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return tree


def flax_bytes(tree: dict[str, Any], dtype: torch.dtype = torch.float32, max_chunk_size: int = MAX_CHUNK_SIZE) -> bytes:
    """A tree of tensors as `flax.serialization.to_bytes` writes it."""

    def packable(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: packable(child) for key, child in node.items()}
        flat = node.to(dtype).reshape(-1)
        size = max(1, max_chunk_size // flat.itemsize)
        if flat.numel() <= size:
            return _array(node.shape, flat)
        pieces = flat.split(size)
        return {
            "__msgpack_chunked_array__": True,
            "shape": {str(index): length for index, length in enumerate(node.shape)},
            "chunks": {str(index): _array(piece.shape, piece) for index, piece in enumerate(pieces)},
        }

    return bytes(msgpack.packb(packable(tree), strict_types=True))


def leaves(tree: dict[str, Any], *path: str) -> Iterator[tuple[str, ...]]:
    """The names on the way to every array of a tree."""
    for key, node in tree.items():
        if isinstance(node, dict):
            yield from leaves(node, *path, key)
        else:
            yield (*path, key)


def _flax_parameter(
    module_name: str, leaf: str, weight: torch.Tensor, model: torch.nn.Module
) -> tuple[list[str], torch.Tensor]:
    module = model.get_submodule(module_name)
    if leaf == "weight" and isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
        leaf = "scale"
    elif leaf == "weight" and isinstance(module, torch.nn.Embedding):
        leaf = "embedding"
    elif leaf == "weight" and isinstance(module, torch.nn.Conv2d):
        leaf, weight = "kernel", weight.permute(2, 3, 1, 0)
    elif leaf == "weight" and isinstance(module, torch.nn.Linear):
        leaf, weight = "kernel", weight.T
    if isinstance(model, CLIPTextModel):
        module_name = f"text_model.{module_name}"
    elif module_name.startswith("vision_model."):
        module_name = f"vision_model.{module_name}"
    elif not isinstance(model, StableDiffusionSafetyChecker):
        module_name = re.sub(r"\.(\d+)", r"_\1", module_name)
    path = module_name.split(".") if module_name else []
    if isinstance(model, AutoencoderKL):
        path = [_VAE_ATTENTION.get(key, key) for key in path]
    return [*path, leaf], weight


def _array(shape: torch.Size, flat: torch.Tensor) -> msgpack.ExtType:
    name = str(flat.dtype).removeprefix("torch.")
    values = flat.view(torch.uint8).numpy() if flat.dtype == torch.bfloat16 else np.ascontiguousarray(flat)
    return msgpack.ExtType(1, msgpack.packb((tuple(shape), name, values.tobytes()), use_bin_type=True))


def _rename_classes(path: Path) -> None:
    """Put Flax's class names in place of PyTorch's, and what only Flax's configurations have."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "_class_name" in content:
        content["_class_name"] = "Flax" + content["_class_name"]
    if content.get("_class_name") == "FlaxUNet2DConditionModel":
        content |= {"use_memory_efficient_attention": False, "split_head_dim": False}
    if "architectures" in content:
        content["architectures"] = ["Flax" + name for name in content["architectures"]]
    for part in (*FILES, "scheduler"):
        if isinstance(content.get(part), list):
            content[part][1] = "Flax" + content[part][1]
    path.write_text(json.dumps(content), encoding="utf-8")
