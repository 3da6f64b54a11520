"""The operator's trade of memory against time: slicing, tiling, and what computes attention.

Each switch is the stock one, turned on once after loading. What a model or device
cannot do is found here, at start: a request never meets it.
"""

import importlib
import itertools
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from service.errors import StartupError
from service.settings import AttentionBackend, Settings

logger = logging.getLogger(__name__)

_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_SDP_BACKENDS: dict[AttentionBackend, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

_PROBE_TOKENS = (64, 77)
"""Keys of the trial calls: an even number as of latents, and a prompt's."""

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a backend, about ten roundings of the type; TF32 counts as float32."""


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What computes attention inside `with context.active()`; can be entered any number of times.

    Attributes:
        backend: Torch's backend for every call that it can compute; None leaves the choice to torch.
    """

    backend: SDPBackend | None = None

    def active(self) -> AbstractContextManager[Any]:
        """A context manager for one use.

        The model has calls that a fused backend cannot compute, e.g. the VAE's, whose one head is 512 wide,
        and rows with masked tokens: there, and only there, torch chooses among the others.
        """
        if self.backend is None:
            return nullcontext()
        if self.backend is SDPBackend.MATH:
            return sdpa_kernel(self.backend)  # It computes everything.
        others = [backend for backend in reversed(_SDP_BACKENDS.values()) if backend is not self.backend]
        return sdpa_kernel([self.backend, *others], set_priority=True)


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
    backend = _SDP_BACKENDS.get(settings.attention_backend)
    if backend is not None:
        _probe(settings.attention_backend, _on(backend), unet, _head_sizes(unet))
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

    _probe("xformers", attend, unet, _head_sizes(unet) | _head_sizes(vae))
    unet.enable_xformers_memory_efficient_attention()
    vae.enable_xformers_memory_efficient_attention()


def _head_sizes(model: torch.nn.Module) -> set[int]:
    return {module.inner_dim // module.heads for module in model.modules() if isinstance(module, Attention)}


def _on(backend: SDPBackend) -> _Attend:
    """Attention that raises where this backend cannot compute it."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value)

    return attend


def _probe(name: str, attend: _Attend, unet: UNet2DConditionModel, head_sizes: set[int]) -> None:
    """Try attention on small random numbers of the model's type and head sizes, beside float32 on the CPU.

    Raises:
        StartupError: It cannot compute it, or computes something else.
    """
    draw = torch.Generator().manual_seed(0)
    where = f"on {unet.device.type} in {str(unet.dtype).removeprefix('torch.')} with heads of"
    for head_size, num_keys in itertools.product(sorted(head_sizes), _PROBE_TOKENS):
        shapes = [(2, 2, tokens, head_size) for tokens in (_PROBE_TOKENS[0], num_keys, num_keys)]
        inputs = [torch.randn(shape, generator=draw).to(unet.device, unet.dtype) for shape in shapes]
        query, key, value = inputs
        expected = _on(SDPBackend.MATH)(query.float().cpu(), key.float().cpu(), value.float().cpu())
        try:
            # Torch warns of every reason against a backend before it raises.
            with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
                attended = attend(query, key, value).float().cpu()
        except (RuntimeError, ValueError) as error:
            logger.debug("the attention backend %s failed", name, exc_info=error)
            raise StartupError(f"the attention backend {name!r} does not run {where} {head_size}") from None
        difference = float((attended - expected).norm() / expected.norm())
        if not difference <= _TOLERANCES[unet.dtype]:  # A result that is not a number fails, too.
            raise StartupError(
                f"the attention backend {name!r} computes wrongly {where} {head_size}: off by {difference:.2g}"
            )
