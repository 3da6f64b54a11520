"""Tiny random checkpoints of true architecture, made on the spot in diffusers format."""

import json
from pathlib import Path

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

NATIVE_SIZE = 64
"""Side in pixels of the tiny models' working square."""


def make_checkpoint(
    folder: Path,
    *,
    in_channels: int = 9,
    flags_everything: bool = False,
    has_safety_checker: bool = True,
    prediction_type: str = "epsilon",
    time_cond_proj_dim: int | None = None,
    has_asymmetric_vae: bool = False,
    is_sd2: bool = False,
    text_width: int = 32,
    seed: int = 0,
) -> Path:
    """Write a tiny Stable Diffusion checkpoint with random weights.

    Args:
        folder: Where to; created.
        in_channels: 9 for an inpainting UNet, 4 for a plain one.
        flags_everything: Whether the safety checker flags every picture or none.
        has_safety_checker: Whether there is one.
        prediction_type: What the UNet is taken to predict.
        time_cond_proj_dim: Width of a UNet's input for the guidance scale, as LCM-distilled ones have it.
        has_asymmetric_vae: Whether the decoder looks at the picture and its mask.
        is_sd2: Architecture of Stable Diffusion 2 instead of 1: another UNet attention, an OpenCLIP text encoder,
            and "!" as the padding token.
        text_width: Of the prompt embeddings.
        seed: Of the weights.
    """
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    checker = _safety_checker(flags_everything=flags_everything) if has_safety_checker else None
    pipeline = StableDiffusionInpaintPipeline(
        vae=_asymmetric_vae() if has_asymmetric_vae else _vae(),
        text_encoder=_text_encoder(text_width, is_sd2=is_sd2),
        tokenizer=_tokenizer(folder, pad_token="!" if is_sd2 else "<|endoftext|>"),
        unet=UNet2DConditionModel(
            sample_size=NATIVE_SIZE // 8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=(2, 4) if is_sd2 else 8,
            use_linear_projection=is_sd2,
            cross_attention_dim=text_width,
            time_cond_proj_dim=time_cond_proj_dim,
        ),
        # As in the published SD 1.5 checkpoints, with what other schedulers need of it.
        scheduler=PNDMScheduler.from_config(
            {
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "clip_sample": False,
                "prediction_type": prediction_type,
            }
        ),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        requires_safety_checker=has_safety_checker,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    torch.set_rng_state(state)
    return folder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=NATIVE_SIZE,
    )


def _asymmetric_vae() -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        down_block_out_channels=(8, 8, 16, 16),
        layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4,
        up_block_out_channels=(16, 16, 24, 24),
        layers_per_up_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=NATIVE_SIZE,
    )


def _text_encoder(width: int, *, is_sd2: bool) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=3,
            hidden_act="gelu" if is_sd2 else "quick_gelu",
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=0 if is_sd2 else 513,
        )
    )


def _tokenizer(folder: Path, *, pad_token: str) -> CLIPTokenizer:
    """Every byte is a token, and so is every byte that ends a word; no merges."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = [*alphabet, *(token + "</w>" for token in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), pad_token=pad_token, model_max_length=77)
    vocabulary.unlink()
    merges.unlink()
    return tokenizer


def _safety_checker(*, flags_everything: bool) -> StableDiffusionSafetyChecker:
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            projection_dim=16,
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_attention_heads=2,
                num_hidden_layers=2,
                image_size=30,
                patch_size=6,
            ).to_dict(),
            text_config=CLIPTextConfig(hidden_size=16, num_attention_heads=2).to_dict(),
        )
    )
    # A cosine is never under -1 nor over 1, so these thresholds decide.
    threshold = -2.0 if flags_everything else 2.0
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker
