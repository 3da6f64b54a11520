"""The form field `loras`: JSON such as `[{"name": "pencil", "scale": 0.8}]`.

A scale is what stock's `set_adapters` takes: a number, or an object with one for "unet" and one for "text_encoder",
of which the former may go into blocks: `{"down": 0.9, "mid": 1, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1]}}`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from service.api.fields import fault
from service.engine.adapters import AdapterFolder
from service.errors import ErrorCode
from service.request import LoraUse

MAX_LORAS = 8
MAX_SCALE = 10
MAX_BLOCK_SCALES = 64
MAX_CHARACTERS = 16 * 1024

_BLOCK = re.compile(r"block_(0|[1-9][0-9]?)")


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """One LoRA as a client asks for it.

    Attributes:
        name: What the client calls it; need not exist.
        unet_scale: Weight in the UNet; that of blocks that `block_scales` leaves out.
        text_encoder_scale: Weight in the text encoder.
        block_scales: Weights by UNet block as canonical JSON; "" where there is but one.
    """

    name: str
    unet_scale: float = 1.0
    text_encoder_scale: float = 1.0
    block_scales: str = ""


def parse_loras(text: str) -> tuple[LoraChoice, ...]:
    """Read the field.

    Args:
        text: What the client sent.

    Raises:
        PydanticCustomError: `INVALID_FIELD` or `OUT_OF_RANGE`; a `ValueError`, as validators raise.
    """
    entries = _json(text)
    if not isinstance(entries, list):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a JSON list of objects with a name and a scale")
    if len(entries) > MAX_LORAS:
        raise fault(ErrorCode.OUT_OF_RANGE, f"Input should name at most {MAX_LORAS} LoRAs")
    choices = tuple(_choice(entry) for entry in entries)
    if len({choice.name for choice in choices}) < len(choices):
        raise fault(ErrorCode.INVALID_FIELD, "Input should name each LoRA once")
    return choices


def resolve_loras(choices: Sequence[LoraChoice], folder: AdapterFolder) -> tuple[LoraUse, ...]:
    """Find the files as they are now. Looks at the disk: not for the event loop.

    Raises:
        InpaintError: `UNKNOWN_LORA`.
    """
    return tuple(_use(choice, folder) for choice in choices)


def _use(choice: LoraChoice, folder: AdapterFolder) -> LoraUse:
    path, version = folder.resolve(choice.name)
    return LoraUse(
        name=choice.name,
        path=str(path),
        version=version,
        unet_scale=choice.unet_scale,
        text_encoder_scale=choice.text_encoder_scale,
        block_scales=choice.block_scales,
    )


# --- JSON -----------------------------------------------------------------------------


def _json(text: str) -> object:
    if len(text) > MAX_CHARACTERS:
        raise fault(ErrorCode.OUT_OF_RANGE, f"Input should have at most {MAX_CHARACTERS} characters")
    try:
        # Every number as a float: one spelling of each value, and a million digits are soon read.
        return json.loads(text, parse_int=float, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):  # Also a key given twice, and nesting without end.
        raise fault(ErrorCode.INVALID_FIELD, "Input should be valid JSON") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(mapping := dict(pairs)) != len(pairs):
        raise ValueError
    return mapping


# --- entries --------------------------------------------------------------------------


def _choice(entry: object) -> LoraChoice:
    if not isinstance(entry, dict) or not {"name"} <= set(entry) <= {"name", "scale"}:
        raise fault(ErrorCode.INVALID_FIELD, "Input should hold objects with a name, a scale, and nothing else")
    name, scale = entry["name"], entry.get("scale", 1.0)
    if not isinstance(name, str):
        raise fault(ErrorCode.INVALID_FIELD, "Input should name each LoRA by a text")
    if not isinstance(scale, dict):
        return LoraChoice(name, _number(scale), _number(scale))
    if not set(scale) <= {"unet", "text_encoder"}:
        raise fault(ErrorCode.INVALID_FIELD, "A scale should be a number, or an object with unet and text_encoder")
    unet, text_encoder = scale.get("unet", 1.0), _number(scale.get("text_encoder", 1.0))
    if not isinstance(unet, dict):
        return LoraChoice(name, _number(unet), text_encoder)
    return LoraChoice(name, text_encoder_scale=text_encoder, block_scales=_block_scales(unet))


def _block_scales(blocks: dict[str, object]) -> str:
    """The weights by block, checked, as canonical JSON."""
    numbers = list(_block_numbers(blocks))
    if len(numbers) > MAX_BLOCK_SCALES:
        raise fault(ErrorCode.OUT_OF_RANGE, f"A LoRA should have at most {MAX_BLOCK_SCALES} scales")
    for number in numbers:
        _number(number)
    return json.dumps(blocks, sort_keys=True, separators=(",", ":")) if numbers else ""


def _block_numbers(blocks: dict[str, object]) -> Iterator[object]:
    """What stands where `set_adapters` has numbers."""
    for part, value in blocks.items():
        if part not in ("down", "mid", "up"):
            raise fault(ErrorCode.INVALID_FIELD, "The scales of a UNet should be for down, mid or up")
        if part == "mid" and isinstance(value, list) and len(value) > 1:
            raise fault(ErrorCode.INVALID_FIELD, "The scale of mid should be one number")
        if part == "mid" or not isinstance(value, dict):
            yield from _one_or_several(value)
            continue
        for block, scales in value.items():
            if not _BLOCK.fullmatch(block):
                raise fault(ErrorCode.INVALID_FIELD, "The scales of blocks should be for block_0, block_1 and so on")
            yield from _one_or_several(scales)


def _one_or_several(value: object) -> list[object]:
    if value == []:
        raise fault(ErrorCode.INVALID_FIELD, "A list of scales should not be empty")
    return value if isinstance(value, list) else [value]


def _number(value: object) -> float:
    if not isinstance(value, float):  # JSON's true and false are no numbers.
        raise fault(ErrorCode.INVALID_FIELD, "A scale should be a number")
    if not isfinite(value) or abs(value) > MAX_SCALE:
        raise fault(ErrorCode.OUT_OF_RANGE, f"A scale should be from -{MAX_SCALE} to {MAX_SCALE}")
    return value
