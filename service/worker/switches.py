"""The operator's trade of memory against time: slicing, tiling, and what computes attention.

Each switch is the stock one, turned on once after loading. What a model or device
cannot do is found here, at start: a request never meets it.
"""

import importlib
import logging

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from service.errors import StartupError
from service.settings import Settings
from service.worker.attention import SDP_BACKENDS, AttentionContext, attention_on, head_sizes, probe

logger = logging.getLogger(__name__)


def apply_switches(unet: UNet2DConditionModel, vae: AutoencoderKL, settings: Settings) -> AttentionContext:
    """Turn on what the operator asked for, on models that are loaded and on their device.

    Returns:
        The context in which the models are to be called.

    Raises:
        StartupError: The model, its type or the device does not have it.
    """
    if settings.attention_slicing is not None and settings.attention_backend != "auto":
        raise StartupError(
            f"attention slicing computes attention itself: it cannot be combined with the attention backend "
            f"{settings.attention_backend!r}"
        )
    if settings.vae_slicing:
        _enable(vae, "slicing")
    if settings.vae_tiling:
        _enable(vae, "tiling")
    if settings.attention_slicing is not None:
        _slice_attention(unet, settings.attention_slicing)
    if settings.attention_backend == "xformers":
        _use_xformers(unet, vae)
    backend = SDP_BACKENDS.get(settings.attention_backend)
    if backend is not None:
        probe(settings.attention_backend, attention_on(backend), unet, head_sizes(unet))
    return AttentionContext(backend)


def _enable(vae: AutoencoderKL, switch: str) -> None:
    try:
        getattr(vae, f"enable_{switch}")()
    except (AttributeError, NotImplementedError):
        raise StartupError(f"the VAE is a {type(vae).__name__}, which has no {switch}") from None


def _slice_attention(unet: UNet2DConditionModel, size: str | int) -> None:
    """Stock's `enable_attention_slicing`; of the pipeline's parts, only the UNet has it."""
    num_heads = min(module.heads for module in unet.modules() if isinstance(module, Attention))
    largest = num_heads // 2 if size == "auto" else num_heads
    if largest < (size if isinstance(size, int) else 1):
        raise StartupError(
            f"attention slicing {str(size)!r} does not fit the UNet: its layers have as few as {num_heads} heads"
        )
    unet.set_attention_slice(size)


def _use_xformers(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    if unet.device.type != "cuda":
        raise StartupError(f"the attention backend 'xformers' does not run on {unet.device.type}")
    try:
        operators = importlib.import_module("xformers.ops")
    except (ImportError, OSError) as error:
        logger.debug("importing xformers failed", exc_info=error)
        raise StartupError("the attention backend 'xformers' needs the package xformers") from None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Rows and heads in one dimension, as diffusers calls it.
        flat = operators.memory_efficient_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
        attended: torch.Tensor = flat.view_as(query)
        return attended

    probe("xformers", attend, unet, head_sizes(unet) | head_sizes(vae))
    unet.enable_xformers_memory_efficient_attention()
    vae.enable_xformers_memory_efficient_attention()
