"""Models made faster without other results: fused projections, channels last, compiled for any number of rows."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from service.errors import StartupError
from service.worker.captured import NoisePredictor


def use_compile_cache(folder: Path, name: str) -> None:
    """Keep compiled code in a folder, so that the next start finds it.

    Args:
        folder: The operator's.
        name: Of what torch's own keys do not tell apart.

    Raises:
        StartupError: The folder cannot be made.
    """
    path = folder.expanduser() / f"torch-{torch.__version__}-{name}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"cannot keep compiled code in {str(folder)!r}: {error.strerror}") from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)


def compiled(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The model compiled once for one row, and once for any larger number of them.

    Every argument's first dimension is the rows'.
    """
    function = torch.compile(model, fullgraph=True)

    def call(*arguments: torch.Tensor) -> torch.Tensor:
        if len(arguments[0]) > 1:  # torch takes a batch of one for another program.
            for argument in arguments:
                torch._dynamo.mark_dynamic(argument, 0)  # noqa: SLF001 - documented under this name
        with _trying_convolutions():
            result: torch.Tensor = function(*arguments)
        return result

    return call


@contextmanager
def _trying_convolutions() -> Iterator[None]:
    """Inside, cuDNN tries what it has for each new shape, and keeps to the fastest.

    Only where the shapes are few: other sizes would pay for trials. (`cudnn.flags` would reset the other flags.)
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fuse_projections(unet: UNet2DConditionModel) -> None:
    """Compute queries, keys and values of an attention layer in one product, where the layers are the usual ones.

    The separate weights become views of the fused ones: who changes them, as LoRAs do, changes both.
    """
    if any(type(processor) is not AttnProcessor2_0 for processor in unet.attn_processors.values()):
        return
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    if any(layer.use_bias or (layer.is_cross_attention and layer.added_kv_proj_dim) for layer in layers):
        return
    unet.fuse_qkv_projections()
    for layer in layers:
        parts = [layer.to_k, layer.to_v] if layer.is_cross_attention else [layer.to_q, layer.to_k, layer.to_v]
        fused = layer.to_kv if layer.is_cross_attention else layer.to_qkv
        for part, weight in zip(parts, fused.weight.data.chunk(len(parts)), strict=True):
            part.weight.data = weight
    unet.requires_grad_(False)


def noise_predictor(unet: UNet2DConditionModel, *, is_compiled: bool) -> NoisePredictor:
    """The UNet as captured ticks call it."""
    model = _Predictor(unet)
    return compiled(model) if is_compiled else model


class _Predictor(torch.nn.Module):
    """A UNet of images, timesteps and embeddings alone."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self._unet = unet

    def forward(self, rows: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """(R, C, h, w), in the UNet's type."""
        noise_pred: torch.Tensor = self._unet(rows, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]
        return noise_pred
