"""LoRAs in a prompt: `<lora:name:0.8>`, which the web UI takes out of it before it is read.

Source: `parse_prompt` in the web UI's modules/extra_networks.py, and its extension Lora: the first number is the weight
in the text encoder, the second the one in the UNet, by default the same; `te=` and `unet=` name them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from service.api.field_types import MAX_PROMPT_CHARACTERS
from service.api.problems import Fault, InvalidRequest
from service.errors import ErrorCode

NO_PROMPT = "()"
"""What the web UI's syntax reads as no text at all. Its clients may leave the prompt blank."""

_NETWORK = re.compile(r"<(\w+):([^>]+)>")

# What is longer is too long with whatever names LoRAs in it taken out, and a search could take long.
_MAX_CHARACTERS = 8 * MAX_PROMPT_CHARACTERS
_LORAS = ("lora", "lyco")
_MAX_WEIGHTS = 2


@dataclass(frozen=True, slots=True)
class PromptWithLoras:
    """A prompt as it was sent.

    Attributes:
        text: Without what named LoRAs; `NO_PROMPT` where nothing is left.
        loras: The field `loras` of the native form; empty where there are none.
    """

    text: str
    loras: str


def split_prompt(prompt: str, *, with_loras: bool) -> PromptWithLoras:
    """Take the LoRAs out of a prompt.

    Args:
        prompt: As it was sent.
        with_loras: Whether they are used; otherwise they are only taken out.

    Raises:
        InvalidRequest: A network is none that is served.
    """
    if len(prompt) > _MAX_CHARACTERS:
        return PromptWithLoras(prompt, "")
    text = _NETWORK.sub("", prompt)
    networks = _NETWORK.findall(prompt) if with_loras else []
    loras = [_lora(kind, arguments.split(":")) for kind, arguments in networks]
    return PromptWithLoras(text if text.strip() else NO_PROMPT, json.dumps(loras) if loras else "")


def _lora(kind: str, arguments: Sequence[str]) -> dict[str, object]:
    """One entry of the field."""
    if kind not in _LORAS:
        raise _refusal("Of networks named in <…>, only LoRAs are served: <lora:name:0.8>")
    named = dict(pair.split("=", 1) for pair in arguments if "=" in pair)
    name, *weights = [argument for argument in arguments if "=" not in argument] or [""]
    if len(weights) > _MAX_WEIGHTS or not set(named) <= {"te", "unet"}:
        raise _refusal("A LoRA is named as <lora:name>, <lora:name:0.8>, or <lora:name:te=0.5:unet=0.8>")
    text_encoder = _weight(named.get("te", weights[0] if weights else "1"))
    unet = _weight(named.get("unet", weights[1] if len(weights) > 1 else str(text_encoder)))
    scale = unet if unet == text_encoder else {"unet": unet, "text_encoder": text_encoder}
    return {"name": name, "scale": scale}


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not isfinite(weight):
        raise _refusal("The weight of a LoRA should be a number")
    return weight


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest((Fault("prompt", ErrorCode.INVALID_PROMPT, f"prompt: {message}."),))
