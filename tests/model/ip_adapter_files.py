"""Tiny random IP-Adapters and image encoders in the published layout."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH = 32
"""Of the tiny checkpoints' prompts."""

LAYERS = (32, 32, 32, 32)
"""Widths of the tiny UNet's cross-attention layers: one going down, two going up, one in the middle."""

PROJECTED, HIDDEN = 12, 16
"""Widths of what the tiny image encoder gives: of the whole picture, and of each patch."""

NUM_STATES = 26
"""Patches of 6 pixels in 30 x 30, and the whole."""

PLUS_WIDTH, PLUS_QUERIES, PLUS_DEPTH = 24, 3, 4

Weights = dict[str, torch.Tensor]


def make_image_encoder(folder: Path, *, projection_dim: int = PROJECTED, image_size: int = 30) -> Path:
    """Write a tiny CLIP vision model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=HIDDEN,
                intermediate_size=24,
                num_attention_heads=2,
                num_hidden_layers=3,
                image_size=image_size,
                patch_size=6,
                projection_dim=projection_dim,
            )
        )
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def make_ip_adapter(path: Path, kind: str = "plain", layers: tuple[int, ...] = LAYERS, width: int = WIDTH) -> Path:
    """Write an IP-Adapter with random weights, large enough for a picture to be seen in the result.

    Args:
        path: The file.
        kind: "plain", "full" or "plus".
        layers: Widths of the UNet's cross-attention layers.
        width: Of the UNet's prompts.
    """
    draw = torch.Generator().manual_seed(22)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * shape[-1] ** -0.5

    projection = {"plain": _plain, "full": _full, "plus": _plus}[kind](normal, width)
    weights = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    for index, layer in enumerate(layers):
        for part in "kv":
            weights[f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"] = 3 * normal(layer, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path


def _norm(name: str, width: int) -> Weights:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _linear(normal, name: str, inputs: int, outputs: int) -> Weights:  # noqa: ANN001
    return {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}


def _plain(normal, width: int) -> Weights:  # noqa: ANN001
    return _linear(normal, "proj", PROJECTED, 4 * width) | _norm("norm", width)


def _full(normal, width: int) -> Weights:  # noqa: ANN001
    return _linear(normal, "proj.0", HIDDEN, HIDDEN) | _linear(normal, "proj.2", HIDDEN, width) | _norm("proj.3", width)


def _plus(normal, width: int) -> Weights:  # noqa: ANN001
    weights = {"latents": normal(1, PLUS_QUERIES, PLUS_WIDTH)}
    weights |= _linear(normal, "proj_in", HIDDEN, PLUS_WIDTH) | _linear(normal, "proj_out", PLUS_WIDTH, width)
    weights |= _norm("norm_out", width)
    heads = 64  # One, of the size that diffusers takes for granted.
    for index in range(PLUS_DEPTH):
        attention, feed_forward = f"layers.{index}.0", f"layers.{index}.1"
        weights |= _norm(f"{attention}.norm1", PLUS_WIDTH) | _norm(f"{attention}.norm2", PLUS_WIDTH)
        weights[f"{attention}.to_q.weight"] = normal(heads, PLUS_WIDTH)
        weights[f"{attention}.to_kv.weight"] = normal(2 * heads, PLUS_WIDTH)
        weights[f"{attention}.to_out.weight"] = normal(PLUS_WIDTH, heads)
        weights |= _norm(f"{feed_forward}.0", PLUS_WIDTH)
        weights[f"{feed_forward}.1.weight"] = normal(4 * PLUS_WIDTH, PLUS_WIDTH)
        weights[f"{feed_forward}.3.weight"] = normal(PLUS_WIDTH, 4 * PLUS_WIDTH)
    return weights
