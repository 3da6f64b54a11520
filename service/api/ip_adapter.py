"""A picture to paint by: the fields `ip_adapter_image`, `ip_adapter_image_embeds` and `ip_adapter_scale`."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from service.api.problems import Fault
from service.api.scales import MAX_SCALE
from service.errors import ErrorCode
from service.messages import IpAdapterInfo
from service.request import Floats, IpAdapterUse

IMAGE = "ip_adapter_image"
EMBEDS = "ip_adapter_image_embeds"
SCALE = "ip_adapter_scale"


@dataclass(frozen=True, slots=True)
class IpAdapterScale:
    """How much the picture counts.

    Attributes:
        scale: In the UNet; 0 where blocks have weights of their own, and in blocks that these leave out.
        block_scales: Weights by UNet block as canonical JSON; "" where there is but one.
    """

    scale: float = 1.0
    block_scales: str = ""


SCALE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE}, {"type": "object"}],
    "default": 1.0,
}
"""The field, once it is read."""


def ip_adapter_faults(sent: Collection[str], info: IpAdapterInfo | None) -> Iterator[Fault]:
    """What is wrong with the fields whatever their values.

    Args:
        sent: Names of all fields that were sent.
        info: The served model's IP-Adapter.
    """
    if info is None:
        for name in (IMAGE, EMBEDS, SCALE):
            if name in sent:
                yield _fault(name, f"The served model has no IP-Adapter, which {name} is for.")
        return
    if IMAGE in sent and EMBEDS in sent:
        yield _fault(EMBEDS, f"Send {IMAGE} or {EMBEDS}, not both.")
    if IMAGE in sent and not info.takes_images:
        yield _fault(IMAGE, f"The served IP-Adapter has no image encoder: send {EMBEDS}.")
    if SCALE in sent and not {IMAGE, EMBEDS} & set(sent):
        yield _fault(SCALE, f"{SCALE} needs {IMAGE} or {EMBEDS} beside it.")


def ip_adapter_use(
    scale: IpAdapterScale | None, info: IpAdapterInfo | None, embeds: Floats | None, *, has_image: bool
) -> IpAdapterUse | None:
    """How a valid request uses the IP-Adapter; None where it does not.

    Args:
        scale: As it was sent.
        info: The served model's IP-Adapter.
        embeds: (2 or 1, n, [T,] D), where they were sent.
        has_image: Whether a picture was sent.
    """
    if info is None or (embeds is None and not has_image):
        return None
    scale = scale or IpAdapterScale()
    if embeds is not None:
        shape = embeds.shape[1:-1]
    else:
        shape = (1,) if info.embeds_tokens is None else (1, info.embeds_tokens)
    return IpAdapterUse(scale.scale, scale.block_scales, shape)


def effective_scale(use: IpAdapterUse | None) -> float | dict[str, Any] | None:
    """A scale as it is written in the field."""
    if use is None:
        return None
    if not use.block_scales:
        return use.scale
    blocks: dict[str, Any] = json.loads(use.block_scales)
    return blocks


def _fault(name: str, message: str) -> Fault:
    return Fault(name, ErrorCode.INVALID_FIELD, message)
