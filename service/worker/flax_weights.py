"""Weights that were saved by Flax: the `*.msgpack` files of diffusers up to 0.39 and transformers up to 4.

Flax serialises a tree of names to msgpack, with its arrays as extension types;
nothing in such a file can run code. Its modules are named as PyTorch's are but
for the numbered ones (`down_blocks_0` for `down_blocks.0`, in CLIP
`layers` / `0`), so a weight is found by its name with every separator written
alike. Layouts differ: kernels have their output channels last.
"""

import importlib
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from service.errors import StartupError

logger = logging.getLogger(__name__)

FLAX_FILES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
"""What diffusers and transformers call the file in a part's folder."""

_ARRAY, _SCALAR = 1, 3
"""Flax's extension types of msgpack."""

_CHUNKED = "__msgpack_chunked_array__"

_DTYPES = {
    b"float16": torch.float16,
    b"bfloat16": torch.bfloat16,
    b"V2": torch.bfloat16,
    b"float32": torch.float32,
    b"float64": torch.float64,
    b"int32": torch.int32,
    b"int64": torch.int64,
}

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Flax's names of the one weight of a layer. Other parameters are called the same in both."""

_MODULES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out_0"}
"""The VAE's attention layers were renamed in PyTorch only."""

_WRAPPERS = ("text_model", "vision_model")
"""Modules of Flax's CLIP around what is the model itself in PyTorch."""

_NOT_LEARNED = "position_ids"
"""Counts upwards from zero; old checkpoints hold it among their weights, models compute it."""


def read_flax_weights(path: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read a Flax file as the weights of a PyTorch model.

    Args:
        path: The file, in the folder of the part that it belongs to.
        model: What the weights are for; it is not changed.

    Returns:
        As many tensors as `model.state_dict()` has, under its names and in its layouts, in the file's own dtypes.

    Raises:
        StartupError: The package msgpack is not installed, or the file is not readable or does not fit the model.
    """
    part = path.parent.name
    wanted = model.state_dict()
    names = {name.replace(".", "_"): name for name in wanted}
    weights: dict[str, torch.Tensor] = {}
    unused = []
    for keys, array in _arrays(path):
        name = _torch_name(keys, names)
        if name is not None and name not in weights:
            weights[name] = _torch_layout(keys[-1], array)
        elif keys[-1] != _NOT_LEARNED:
            unused.append("/".join(keys))
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise StartupError(f"{part} lacks {len(missing)} of its weights in {path.name}, the first is {missing[0]}")
    misshaped = sorted(name for name, weight in weights.items() if weight.shape != wanted[name].shape)
    if misshaped:
        first = misshaped[0]
        raise StartupError(
            f"{part} has {len(misshaped)} weights of the wrong shape in {path.name}, the first is {first}"
            f" with {tuple(weights[first].shape)} for {tuple(wanted[first].shape)}"
        )
    if unused:
        raise StartupError(
            f"{part} has {len(unused)} weights in {path.name} that its model lacks, the first is {min(unused)!r}"
        )
    return weights


def _torch_name(keys: tuple[str, ...], names: dict[str, str]) -> str | None:
    """What PyTorch calls this parameter, None if the model has no such one."""
    parts = [*(_MODULES.get(key, key) for key in keys[:-1]), _LEAVES.get(keys[-1], keys[-1])]
    name = names.get("_".join(parts))
    if name is None and parts[0] in _WRAPPERS:
        name = names.get("_".join(parts[1:]))
    return name


def _torch_layout(leaf: str, array: torch.Tensor) -> torch.Tensor:
    if leaf != "kernel":
        return array
    if array.ndim == 4:  # noqa: PLR2004 - a convolution: height, width, input channels, output channels
        return array.permute(3, 2, 0, 1).contiguous()
    return array.T.contiguous() if array.ndim == 2 else array  # noqa: PLR2004 - a dense layer: input, output


def _arrays(path: Path) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Every parameter of the file with the names on the way to it; the tree is taken apart on the way."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), _tree(path))]
    while pending:
        keys, node = pending.pop()
        try:
            if isinstance(node, dict) and _CHUNKED not in node:
                pending.extend(((*keys, str(key)), child) for key, child in node.items())
                continue
            array = _unchunked(node) if isinstance(node, dict) else node
            if not keys or not isinstance(array, torch.Tensor):
                raise _unreadable(path)
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise _unreadable(path) from error
        yield keys, array


def _unchunked(node: dict[str, Any]) -> torch.Tensor:
    """An array that was too large for one msgpack object: flat pieces, and tuples written as numbered tables."""
    shape, chunks = ([node[key][str(index)] for index in range(len(node[key]))] for key in ("shape", "chunks"))
    return torch.cat(chunks).reshape(shape)


def _tree(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    msgpack = _import_msgpack()

    def unpack_extension(code: int, data: bytes) -> torch.Tensor:
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"extension type {code} is no array")
        shape, dtype, values = msgpack.unpackb(data, raw=True)
        # A copy: torch does not take memory that it may not write.
        return torch.frombuffer(bytearray(values), dtype=_DTYPES[dtype]).reshape(shape)

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return msgpack.unpackb(content, ext_hook=unpack_extension, raw=False)
    except Exception as error:
        logger.debug("unpacking failed", exc_info=error)
        raise _unreadable(path) from error


def _import_msgpack() -> Any:  # noqa: ANN401 - a module without types
    try:
        return importlib.import_module("msgpack")
    except ImportError:
        raise StartupError("weights saved by Flax need msgpack: pip install inpaint-service[flax]") from None


def _unreadable(path: Path) -> StartupError:
    return StartupError(f"{path.parent.name}/{path.name} is no complete Flax file")
