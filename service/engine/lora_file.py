"""Whether a file is safetensors at all: its header alone, read without the libraries that load tensors.

The format: eight bytes that give the header's length, the header as JSON, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from service.errors import ErrorCode, InpaintError

MAX_HEADER_BYTES = 8 * 1024 * 1024

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**48
_DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_METADATA = "__metadata__"


def check_safetensors(path: Path) -> None:
    """Refuse what is no whole safetensors file. Takes a while for a large header.

    Args:
        path: The file, a regular one.

    Raises:
        InpaintError: `INVALID_LORA`, with the field "adapter".
        OSError: The file cannot be read.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        is_within = num_bytes > _LENGTH_BYTES and length <= num_bytes - _LENGTH_BYTES
        if not is_within or file.peek(1)[:1] != b"{":
            raise _invalid("The file is not safetensors; pickled files (.pt, .ckpt, .bin) are never loaded.")
        if length > MAX_HEADER_BYTES:
            raise _invalid(f"The file's header has more than {MAX_HEADER_BYTES} bytes.")
        header = _parse(file.read(length))
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid("The file's metadata is not a mapping of texts.")
    if not header:
        raise _invalid("The file holds no tensors.")
    _check_layout(header.values(), num_bytes - _LENGTH_BYTES - length)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):  # Broken UTF-8, broken JSON, a name given twice; nesting without end.
        header = None
    if not isinstance(header, dict):
        raise _invalid("The file's header cannot be parsed.")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(mapping := dict(pairs)) != len(pairs):
        raise ValueError
    return mapping


def _check_layout(tensors: Iterable[object], num_bytes: int) -> None:
    """The tensors fill the file, one after the other."""
    end = 0
    for begin, tensor_end in sorted(map(_extent, tensors)):
        if begin != end:
            raise _invalid("The tensors overlap, or there are gaps between them.")
        end = tensor_end
    if end != num_bytes:
        raise _invalid("The file is cut off, or has something behind its tensors.")


def _extent(tensor: object) -> tuple[int, int]:
    """Where a tensor's bytes lie; they are as many as its shape and type say."""
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise _invalid("A tensor is not described as safetensors has it.")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    itemsize = _DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if itemsize is None:
        raise _invalid("A tensor's type is not one that a LoRA has.")
    if not (_are_sizes(shape) and len(shape) <= _MAX_DIMENSIONS and _are_sizes(offsets) and len(offsets) == 2):  # noqa: PLR2004 - begin and end
        raise _invalid("A tensor's shape or place is not valid.")
    begin, end = offsets
    if end - begin != prod(shape) * itemsize:
        raise _invalid("A tensor has another size than its shape says.")
    return begin, end


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)


def _invalid(message: str) -> InpaintError:
    return InpaintError(ErrorCode.INVALID_LORA, message, field="adapter")
