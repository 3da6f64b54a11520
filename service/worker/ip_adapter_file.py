"""An IP-Adapter's weights: found, read and made into diffusers' modules, or refused in one line.

The published layout, safetensors only: `image_proj.*` makes tokens of a picture's embedding; `ip_adapter.1.to_k_ip.*`,
`1.to_v_ip`, `3.to_k_ip`, … make keys and values of these tokens, for each cross-attention layer of the UNet.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor
from safetensors import SafetensorError, safe_open

from service.errors import StartupError
from service.messages import IpAdapterKind

logger = logging.getLogger(__name__)

_PARTS = ("image_proj", "ip_adapter")


@dataclass(frozen=True, slots=True)
class IpAdapterWeights:
    """What a file holds.

    Attributes:
        name: What the operator knows it by.
        kind: How a picture becomes tokens.
        image_proj: Weights by name, without the prefix.
        ip_adapter: Likewise.
    """

    name: str
    kind: IpAdapterKind
    image_proj: Mapping[str, torch.Tensor]
    ip_adapter: Mapping[str, torch.Tensor]

    @property
    def embeds_width(self) -> int:
        """D of a picture's embedding."""
        names = {"plain": "proj.weight", "full": "proj.0.weight", "plus": "proj_in.weight"}
        return int(self.image_proj[names[self.kind]].shape[1])


def refuse(name: str, reason: str) -> NoReturn:
    """End the start with one line."""
    raise StartupError(f"IP-Adapter {name!r} {reason}")


def locate(path: Path) -> Path:
    """The weights' file: the path itself, or the only one in a folder.

    Raises:
        StartupError: There is none, or more than one.
    """
    path = path.expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            refuse(path.name, "is no .safetensors file; pickles are not loaded")
        return path
    if not path.is_dir():
        refuse(str(path), "does not exist")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        refuse(path.name, "has no .safetensors weights; pickles are not loaded")
    if len(files) > 1:
        refuse(path.name, f"has {len(files)} .safetensors files: name one of them, e.g. {files[0].name}")
    return files[0]


def read_weights(path: Path) -> IpAdapterWeights:
    """Read a file.

    Raises:
        StartupError: It is not readable, or no IP-Adapter of a kind that is served.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, _, name = key.partition(".")
                if part in parts:
                    parts[part][name] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        logger.debug("reading %s failed", path, exc_info=error)
        refuse(path.name, "is not readable as safetensors")
    if not all(parts.values()):
        refuse(path.name, f"lacks weights named {' or '.join(f'{part}.*' for part in _PARTS)}")
    return IpAdapterWeights(path.name, _kind(path.name, parts["image_proj"]), parts["image_proj"], parts["ip_adapter"])


def _kind(name: str, image_proj: Mapping[str, torch.Tensor]) -> IpAdapterKind:
    """Told apart as stock's `_convert_ip_adapter_image_proj_to_diffusers` does."""
    if "proj.weight" in image_proj:
        return "plain"
    if {"proj.0.weight", "proj.3.weight"} <= set(image_proj):
        return "full"
    if {"latents", "proj_in.weight"} <= set(image_proj):
        return "plus"
    if "perceiver_resampler.proj_in.weight" in image_proj or "norm.weight" in image_proj:
        refuse(name, "is of a FaceID kind, which needs embeddings of another model; it is not supported")
    refuse(name, "is of an unknown kind")


def make_projection(weights: IpAdapterWeights, unet: UNet2DConditionModel) -> torch.nn.Module:
    """Stock's module from embeddings to tokens, on the UNet's device and of its type.

    Takes (n, D) of the plain kind, else (n, T, D); gives (n, tokens, width of the UNet's prompts).

    Raises:
        StartupError: Weights are missing, or for another architecture.
    """
    try:
        projection: torch.nn.Module = unet._convert_ip_adapter_image_proj_to_diffusers(  # noqa: SLF001 - stock's own
            dict(weights.image_proj), low_cpu_mem_usage=False
        )
        embeds = torch.zeros((1, weights.embeds_width) if weights.kind == "plain" else (1, 1, weights.embeds_width))
        with torch.inference_mode():
            width = projection(embeds).shape[-1]
    except (KeyError, RuntimeError) as error:
        logger.debug("the projection of %s failed", weights.name, exc_info=error)
        refuse(weights.name, "lacks weights of its image projection, or has others")
    if width != unet.config.cross_attention_dim:
        refuse(weights.name, f"is for prompts {width} wide; the model's are {unet.config.cross_attention_dim}")
    return projection.to(unet.device, unet.dtype).eval().requires_grad_(requires_grad=False)


def make_processors(weights: IpAdapterWeights, unet: UNet2DConditionModel) -> dict[str, torch.nn.Module]:
    """Stock's attention processors with the adapter's keys and values, by the name of each cross-attention's own.

    Raises:
        StartupError: The UNet has other layers.
    """
    layers = {name: processor for name, processor in unet.attn_processors.items() if "attn2" in name}
    # Self-attention has the even numbers, and no weights.
    numbers = [2 * index + 1 for index in range(len(layers))]
    names = {f"{number}.to_{part}_ip.weight" for number in numbers for part in "kv"}
    if set(weights.ip_adapter) != names:
        refuse(weights.name, "is for a UNet of another architecture")
    processors = {}
    for number, (name, processor) in zip(numbers, layers.items(), strict=True):
        key, value = (weights.ip_adapter[f"{number}.to_{part}_ip.weight"] for part in "kv")
        shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        if key.shape != shape or value.shape != shape:
            refuse(weights.name, "is for a UNet of another architecture")
        is_xformers = "XFormers" in type(processor).__name__
        made = (IPAdapterXFormersAttnProcessor if is_xformers else IPAdapterAttnProcessor2_0)(*shape)
        made.load_state_dict({"to_k_ip.0.weight": key, "to_v_ip.0.weight": value})
        processors[name] = made.to(unet.device, unet.dtype).eval().requires_grad_(requires_grad=False)
    return processors
