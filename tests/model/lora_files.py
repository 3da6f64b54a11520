"""Tiny random LoRAs in each file format, for a model at hand."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import save_file

RANK = 3

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
FEED_FORWARD = (".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
CONVOLUTIONS = (".conv1", ".conv2", ".time_emb_proj", ".conv_shortcut")
TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
TEXT_MLP = (".fc1", ".fc2")

State = dict[str, torch.Tensor]


def make_lora(
    path: Path,
    pipeline: StableDiffusionInpaintPipeline,
    file_format: str = "peft",
    *,
    seed: int = 0,
    strength: float = 0.5,
) -> Path:
    """Write a LoRA for the layers that its format is made for.

    Args:
        path: Where to.
        pipeline: What it is for.
        file_format: One of `FORMATS`.
        seed: Of the matrices.
        strength: Standard deviation of their entries.
    """
    generator = torch.Generator().manual_seed(seed)
    state, metadata = FORMATS[file_format](_Source(pipeline, generator, strength))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=metadata)
    return path


class _Source:
    """Random matrices for a model's layers."""

    def __init__(self, pipeline: StableDiffusionInpaintPipeline, generator: torch.Generator, strength: float) -> None:
        self.models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        self._generator = generator
        self._strength = strength

    def layers(self, part: str, suffixes: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Names and weights of a model's layers that end so."""
        for name, module in self.models[part].named_modules():
            if name.endswith(tuple(suffixes)) and hasattr(module, "weight"):
                yield name, module.weight

    def pair(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B for a weight."""
        down = torch.randn(RANK, *weight.shape[1:], generator=self._generator)
        up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=self._generator)
        scale = self._strength / max(1, weight[0].numel()) ** 0.5
        return scale * down, scale * up


def _text_name(name: str) -> str:
    """As files have it, whose makers had transformers before 5.6."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _peft(source: _Source, unet: Iterable[str] = (*ATTENTION, *FEED_FORWARD)) -> tuple[State, dict[str, str]]:
    """What `save_lora_weights` writes."""
    state: State = {}
    for name, weight in source.layers("unet", unet):
        state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"] = source.pair(weight)
    for name, weight in source.layers("text_encoder", TEXT):
        key = f"text_encoder.{_text_name(name)}.lora_linear_layer"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = source.pair(weight)
    return state, {"format": "pt"}


def _unet_only(source: _Source) -> tuple[State, dict[str, str]]:
    state, metadata = _peft(source)
    return {key: tensor for key, tensor in state.items() if key.startswith("unet.")}, metadata


def _with_metadata(source: _Source) -> tuple[State, dict[str, str]]:
    """With peft's configuration in the header, where alpha is not the rank."""
    state, _ = _unet_only(source)
    name = next(key for key in state if "to_q" in key).removeprefix("unet.").partition(".lora_")[0]
    config = {
        "unet.r": RANK,
        "unet.lora_alpha": 2 * RANK,
        "unet.alpha_pattern": {name: 0.5 * RANK},
        "unet.target_modules": sorted({key.removeprefix("unet.").partition(".lora_")[0] for key in state}),
    }
    return state, {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def _dora(source: _Source) -> tuple[State, dict[str, str]]:
    state: State = {}
    for name, weight in source.layers("unet", (*ATTENTION, *CONVOLUTIONS)):
        state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"] = source.pair(weight)
        lengths = weight.detach().flatten(1).norm(dim=1) * 1.3
        is_convolution = weight.ndim > 2
        state[f"unet.{name}.lora_magnitude_vector"] = lengths.view(1, -1, 1, 1) if is_convolution else lengths
    return state, {"format": "pt"}


def _diffusers(source: _Source) -> tuple[State, dict[str, str]]:
    """`.lora.down`, as training scripts wrote them in 2023."""
    state: State = {}
    for name, weight in source.layers("unet", ATTENTION):
        key = f"unet.{name}.lora"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = source.pair(weight)
    return state, {"format": "pt"}


def _old_diffusers(source: _Source) -> tuple[State, dict[str, str]]:
    """Attention processors: `.processor.to_q_lora.down`."""
    state: State = {}
    for name, weight in source.layers("unet", ATTENTION):
        block, _, layer = name.removesuffix(".0").rpartition(".")
        key = f"unet.{block}.processor.{layer}_lora"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = source.pair(weight)
    for name, weight in source.layers("text_encoder", TEXT):
        block, _, layer = _text_name(name).rpartition(".")
        key = f"text_encoder.{block}.to_{layer.removesuffix('_proj')}_lora"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = source.pair(weight)
    return state, {"format": "pt"}


def _kohya(
    source: _Source, unet: Iterable[str] = (*ATTENTION, *FEED_FORWARD), alpha: float = 2.0
) -> tuple[State, dict[str, str]]:
    """kohya-ss' scripts: underscores, and an alpha for each layer."""
    state: State = {}
    named = [("lora_unet_", name, weight) for name, weight in source.layers("unet", unet)]
    named += [
        ("lora_te_", _text_name(name), weight) for name, weight in source.layers("text_encoder", (*TEXT, *TEXT_MLP))
    ]
    for prefix, name, weight in named:
        key = prefix + name.replace(".", "_")
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = source.pair(weight)
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state, {"ss_network_module": "networks.lora"}


def _locon(source: _Source) -> tuple[State, dict[str, str]]:
    """Kohya's with convolutions, whose alpha is another."""
    state, metadata = _kohya(source, unet=(*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS))
    for key in state:
        if key.endswith(".alpha") and ("_conv" in key or "time_emb_proj" in key):
            state[key] = torch.tensor(1.0)
    return state, metadata


def _own_alphas(source: _Source) -> tuple[State, dict[str, str]]:
    """Kohya's with another alpha for each kind of layer: stock takes the commonest for those it cannot name."""
    state, metadata = _kohya(source, unet=(*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS))
    for marks, alpha in ((("conv",), 1.0), (("attn1", "fc1"), 5.0), (("k_proj", "ff_net"), 0.5), (("fc2",), 4.0)):
        for key in state:
            if key.endswith(".alpha") and any(mark in key for mark in marks):
                state[key] = torch.tensor(alpha)
    return state, metadata


def _ranks(source: _Source) -> tuple[State, dict[str, str]]:
    """Of another rank for each kind of layer, and without alphas."""
    state, metadata = _peft(source, unet=(*ATTENTION, *CONVOLUTIONS))
    for key, tensor in state.items():
        rank = 1 if "attn1" in key or "q_proj" in key else 2 if "conv" in key else RANK
        state[key] = tensor[:rank] if "lora_A" in key or ".down." in key else tensor[:, :rank]
    return state, metadata


def _rank_stabilised(source: _Source) -> tuple[State, dict[str, str]]:
    """With a configuration that divides alpha by the root of the rank, and leaves alpha to peft."""
    state, _ = _unet_only(source)
    modules = sorted({key.removeprefix("unet.").partition(".lora_")[0] for key in state})
    config = {"unet.r": RANK, "unet.use_rslora": True, "unet.target_modules": modules}
    return state, {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def _dora_text(source: _Source) -> tuple[State, dict[str, str]]:
    """A DoRA of both parts, its vectors under names that transformers reads, too."""
    state, metadata = _dora(source)
    for name, weight in source.layers("text_encoder", (*TEXT, *TEXT_MLP)):
        key = f"text_encoder.{_text_name(name)}"
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = source.pair(weight)
        state[f"{key}.lora_magnitude_vector.weight"] = weight.detach().norm(dim=1) * 0.8
    return state, metadata


def _float8(source: _Source) -> tuple[State, dict[str, str]]:
    state, metadata = _unet_only(source)
    return {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}, metadata


FORMATS: dict[str, Callable[[_Source], tuple[State, dict[str, str]]]] = {
    "peft": _peft,
    "unet_only": _unet_only,
    "with_metadata": _with_metadata,
    "dora": _dora,
    "diffusers": _diffusers,
    "old_diffusers": _old_diffusers,
    "kohya": _kohya,
    "locon": _locon,
    "own_alphas": _own_alphas,
    "ranks": _ranks,
    "rank_stabilised": _rank_stabilised,
    "dora_text": _dora_text,
    "float8": _float8,
}
"""By name: what writes it."""
