"""Scales of adapters: a number, or by UNet block as stock's `set_adapters` and `set_ip_adapter_scale` take them."""

import json
import re
from collections.abc import Iterator
from math import isfinite

from service.api.json_text import fault
from service.errors import ErrorCode

MAX_SCALE = 10
MAX_BLOCK_SCALES = 64

_BLOCK = re.compile(r"block_(0|[1-9][0-9]?)")


def read_scale(value: object) -> float:
    """One weight.

    Raises:
        PydanticCustomError: `INVALID_FIELD` or `OUT_OF_RANGE`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault(ErrorCode.INVALID_FIELD, "A scale should be a number")
    if not isfinite(value) or abs(value) > MAX_SCALE:
        raise fault(ErrorCode.OUT_OF_RANGE, f"A scale should be from -{MAX_SCALE} to {MAX_SCALE}")
    return float(value)


def read_block_scales(blocks: dict[str, object]) -> str:
    """The weights by block, checked, as canonical JSON; "" where there is none.

    Raises:
        PydanticCustomError: `INVALID_FIELD` or `OUT_OF_RANGE`.
    """
    numbers = list(_block_numbers(blocks))
    if len(numbers) > MAX_BLOCK_SCALES:
        raise fault(ErrorCode.OUT_OF_RANGE, f"Input should have at most {MAX_BLOCK_SCALES} scales")
    for number in numbers:
        read_scale(number)
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
