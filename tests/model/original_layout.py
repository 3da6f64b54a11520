"""Tiny random checkpoints in the original Stable Diffusion layout, beside the models they were made of."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from service.worker.single_file import CONFIGS_FOLDER

Weights = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class Original:
    """One file, what it was made of, and the tiny configurations that go with it."""

    path: Path
    configs: Path
    weights: Weights
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


def make_original(folder: Path, *, is_second: bool, in_channels: int = 9, step: int | None = None) -> Original:
    """Write a tiny checkpoint of Stable Diffusion 1 or 2 as one file.

    Args:
        folder: Where to.
        is_second: Whether it is like Stable Diffusion 2.
        in_channels: Of the UNet.
        step: The training step in the file, None for a file without.
    """
    state = torch.get_rng_state()
    torch.manual_seed(int(is_second))
    unet = _unet(in_channels, is_second=is_second)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=3,
            hidden_act="gelu" if is_second else "quick_gelu",
        )
    )
    # As initialised, biases and norms are all alike: a swap of two would go unseen.
    for model in (unet, vae, text_encoder):
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.data.add_(torch.randn_like(weight), alpha=0.1)
    torch.set_rng_state(state)

    configs = Path(shutil.copytree(CONFIGS_FOLDER, folder / "configs"))
    for kind in ("sd2_512", "sd2_768") if is_second else ("sd1",):
        unet.save_config(configs / kind / "unet")
        vae.save_config(configs / kind / "vae")
        text_encoder.config.save_pretrained(configs / kind / "text_encoder")
    weights = {
        **_prefixed("model.diffusion_model.", _unet_weights(unet)),
        **_prefixed("first_stage_model.", _vae_weights(vae)),
        **_prefixed("cond_stage_model.", (_open_clip_weights if is_second else _clip_weights)(text_encoder)),
        "model_ema.decay": torch.tensor(0.9999),
        "alphas_cumprod": torch.rand(1000),
        **({} if step is None else {"global_step": torch.tensor(step)}),
    }
    path = folder / "original.safetensors"
    save_file(weights, path)
    return Original(path, configs, weights, unet.eval(), vae.eval(), text_encoder.eval())


def _unet(in_channels: int, *, is_second: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=[2, 2, 4] if is_second else 8,
        use_linear_projection=is_second,
        cross_attention_dim=32,
    )


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: weight.contiguous() for key, weight in weights.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        key = key.replace(new, old)
    return key


def _unet_weights(unet: UNet2DConditionModel) -> Weights:
    layers = unet.config.layers_per_block
    weights: Weights = {}
    for key, weight in unet.state_dict().items():
        words = key.split(".")
        if words[0] == "down_blocks":
            first = 1 + int(words[1]) * (layers + 1)
            if words[2] == "downsamplers":
                place = f"input_blocks.{first + layers}.0.op"
            else:
                place = f"input_blocks.{first + int(words[3])}.{int(words[2] == 'attentions')}"
        elif words[0] == "up_blocks":
            first = int(words[1]) * (layers + 1)
            if words[2] == "upsamplers":
                has_attention = "CrossAttn" in unet.config.up_block_types[int(words[1])]
                place = f"output_blocks.{first + layers}.{1 + has_attention}.conv"
            else:
                place = f"output_blocks.{first + int(words[3])}.{int(words[2] == 'attentions')}"
        elif words[0] == "mid_block":
            place = f"middle_block.{1 if words[1] == 'attentions' else 2 * int(words[2])}"
            words = ["", *words]
        else:
            weights[_renamed(key, _UNET_ENDS)] = weight
            continue
        rest = ".".join(words[-1:] if "samplers" in words[2] else words[4:])
        weights[f"{place}.{_renamed(rest, _RESNET) if words[2] == 'resnets' else rest}"] = weight
    return weights


def _vae_weights(vae: AutoencoderKL) -> Weights:
    last = len(vae.config.block_out_channels) - 1
    weights: Weights = {}
    for key, weight in vae.state_dict().items():
        words = key.split(".")
        if len(words) > 4 and words[1] in {"down_blocks", "up_blocks"}:
            is_down = words[1] == "down_blocks"
            block = int(words[2]) if is_down else last - int(words[2])
            place = f"{words[0]}.{'down' if is_down else 'up'}.{block}"
            if words[3] == "resnets":
                rest = _renamed(".".join(words[4:]), {"conv_shortcut": "nin_shortcut"})
                weights[f"{place}.block.{rest}"] = weight
            else:
                weights[f"{place}.{'downsample' if is_down else 'upsample'}.conv.{words[-1]}"] = weight
        elif "mid_block.resnets" in key:
            weights[f"{words[0]}.mid.block_{int(words[3]) + 1}.{'.'.join(words[4:])}"] = weight
        elif "mid_block.attentions" in key:
            rest = _renamed(".".join(words[4:]), _VAE_ATTENTION)
            # The original attends with convolutions of one pixel.
            weights[f"{words[0]}.mid.attn_1.{rest}"] = weight[:, :, None, None] if weight.ndim == 2 else weight
        else:
            weights[key.replace("conv_norm_out", "norm_out")] = weight
    return weights


def _clip_weights(text_encoder: CLIPTextModel) -> Weights:
    weights = _prefixed("transformer.text_model.", text_encoder.state_dict())
    weights["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return weights


def _open_clip_weights(text_encoder: CLIPTextModel) -> Weights:
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    weights: Weights = {}
    state = text_encoder.state_dict()
    for key, weight in state.items():
        if not key.startswith("encoder.layers."):
            weights[_renamed(key, ends)] = weight
        elif "_proj" not in key or "out_proj" in key:
            rest = _renamed(key.removeprefix("encoder.layers."), _CLIP_LAYER)
            weights[f"transformer.resblocks.{rest}"] = weight
    count = text_encoder.config.num_hidden_layers
    for layer in range(count):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            weights[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    # OpenCLIP has a layer more than Stable Diffusion 2 uses, a projection and a temperature.
    for key in [key for key in weights if key.startswith("transformer.resblocks.0.")]:
        weights[key.replace(".0.", f".{count}.", 1)] = torch.zeros_like(weights[key])
    width = text_encoder.config.hidden_size
    return _prefixed("model.", weights | {"text_projection": torch.eye(width), "logit_scale": torch.tensor(100.0)})
