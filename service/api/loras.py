"""The form field `loras`: JSON such as `[{"name": "pencil", "scale": 0.8}]`.

A scale is what stock's `set_adapters` takes: a number, or an object with one for "unet" and one for "text_encoder",
of which the former may go into blocks: `{"down": 0.9, "mid": 1, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1]}}`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.api.json_text import fault, read_json
from service.api.scales import MAX_SCALE, read_block_scales, read_scale
from service.engine.adapters import AdapterFolder
from service.errors import ErrorCode
from service.request import LoraUse

MAX_LORAS = 8


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

    @property
    def scale(self) -> float | dict[str, Any]:
        """As it is written in the field."""
        if not self.block_scales and self.unet_scale == self.text_encoder_scale:
            return self.unet_scale
        unet = json.loads(self.block_scales) if self.block_scales else self.unet_scale
        return {"unet": unet, "text_encoder": self.text_encoder_scale}


LORAS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_LORAS,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "scale": {
                "anyOf": [
                    {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE},
                    {
                        "type": "object",
                        "properties": {"unet": {"type": ["number", "object"]}, "text_encoder": {"type": "number"}},
                        "additionalProperties": False,
                    },
                ],
                "default": 1.0,
            },
        },
        "required": ["name"],
        "additionalProperties": False,
    },
}
"""The field, once it is read as JSON."""


def parse_loras(text: str) -> tuple[LoraChoice, ...]:
    """Read the field.

    Args:
        text: What the client sent.

    Raises:
        PydanticCustomError: `INVALID_FIELD` or `OUT_OF_RANGE`; a `ValueError`, as validators raise.
    """
    entries = read_json(text, has_integers=False)
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


# --- entries --------------------------------------------------------------------------


def _choice(entry: object) -> LoraChoice:
    if not isinstance(entry, dict) or not {"name"} <= set(entry) <= {"name", "scale"}:
        raise fault(ErrorCode.INVALID_FIELD, "Input should hold objects with a name, a scale, and nothing else")
    name, scale = entry["name"], entry.get("scale", 1.0)
    if not isinstance(name, str):
        raise fault(ErrorCode.INVALID_FIELD, "Input should name each LoRA by a text")
    if not isinstance(scale, dict):
        return LoraChoice(name, read_scale(scale), read_scale(scale))
    if not set(scale) <= {"unet", "text_encoder"}:
        raise fault(ErrorCode.INVALID_FIELD, "A scale should be a number, or an object with unet and text_encoder")
    unet, text_encoder = scale.get("unet", 1.0), read_scale(scale.get("text_encoder", 1.0))
    if not isinstance(unet, dict):
        return LoraChoice(name, read_scale(unet), text_encoder)
    return LoraChoice(name, text_encoder_scale=text_encoder, block_scales=read_block_scales(unet))
