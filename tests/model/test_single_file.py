"""One file in the original layout gives the very models it was made of, or is refused by what it is."""

import functools
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from service.errors import StartupError
from service.settings import Settings
from service.worker import checkpoint, single_file
from service.worker.single_file import CONFIGS_FOLDER, load_single_file
from tests.model.original_layout import Original, make_original

NEEDED = "Stable Diffusion 1.x or 2.x"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Like Stable Diffusion 1's inpainting model."""
    return make_original(tmp_path_factory.mktemp("first"), is_second=False, in_channels=9)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Like Stable Diffusion 2's model of 768 pixels."""
    return make_original(tmp_path_factory.mktemp("second"), is_second=True, in_channels=4)


def load(original: Original, path: Path | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    path = path or original.path
    return load_single_file(path, dtype=dtype, name=path.name, configs=original.configs)


def refusal(original: Original, path: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load(original, path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert str(path) not in message
    return message


def written(folder: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "x.safetensors"
    save_file(weights, path, metadata=metadata)
    return path


@pytest.mark.parametrize("which", ["first", "second"])
@torch.no_grad()
def test_parts_are_those_the_file_was_made_of(which: str, request: pytest.FixtureRequest) -> None:
    """Every weight is bit-identical, and so is what the parts compute."""
    original: Original = request.getfixturevalue(which)
    parts = load(original)
    assert set(parts) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    for part in ("unet", "vae", "text_encoder"):
        model, made_of = parts[part].eval(), getattr(original, part)
        assert type(model) is type(made_of)
        expected = made_of.state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[key]) for key, weight in model.state_dict().items())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    tokens = parts["tokenizer"]("a photo of a cat!", padding="max_length", return_tensors="pt").input_ids
    texts = parts["text_encoder"](tokens)[0]
    assert torch.equal(texts, original.text_encoder(tokens)[0])
    latents = torch.randn(1, original.unet.config.in_channels, 8, 8)
    assert torch.equal(parts["unet"](latents, 5, texts).sample, original.unet(latents, 5, texts).sample)
    picture = torch.randn(1, 3, 64, 64)
    moments = parts["vae"].encode(picture).latent_dist.parameters
    assert torch.equal(moments, original.vae.encode(picture).latent_dist.parameters)
    assert torch.equal(parts["vae"].decode(moments[:, :4]).sample, original.vae.decode(moments[:, :4]).sample)


@pytest.mark.parametrize(("which", "kind"), [("first", "sd1"), ("second", "sd2_768")])
def test_parts_are_those_that_diffusers_loads(which: str, kind: str, request: pytest.FixtureRequest) -> None:
    """`from_single_file` of stock gives the same weights under the same names."""
    original: Original = request.getfixturevalue(which)
    parts = load(original)
    source = {"config": str(original.configs / kind), "local_files_only": True}
    stock = {
        "unet": UNet2DConditionModel.from_single_file(str(original.path), subfolder="unet", **source),
        "vae": AutoencoderKL.from_single_file(str(original.path), subfolder="vae", **source),
        "text_encoder": create_diffusers_clip_model_from_ldm(
            CLIPTextModel, original.weights, subfolder="text_encoder", **source
        ),
    }
    for part, model in stock.items():
        expected = model.state_dict()
        assert parts[part].state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[key]) for key, weight in parts[part].state_dict().items())


def test_weights_take_the_asked_type(second: Original) -> None:
    """Half files become float32 and the other way around; the UNet's channels are the file's."""
    parts = load(second, dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(second, part).state_dict()
        assert all(torch.equal(value, expected[key].half()) for key, value in parts[part].state_dict().items())
    assert parts["unet"].config.in_channels == 4


def test_what_the_unet_predicts(first: Original, second: Original, tmp_path: Path) -> None:
    """As diffusers infers it, unless the file says it; a wrong guess would give noise."""

    def prediction(original: Original, weights: dict[str, torch.Tensor], **metadata: str) -> tuple[str, str]:
        scheduler = load(original, written(tmp_path, weights, metadata))["scheduler"]
        return scheduler.config.prediction_type, type(scheduler).__name__

    noise, velocity = ("epsilon", "PNDMScheduler"), ("v_prediction", "DDIMScheduler")
    assert prediction(first, first.weights) == noise
    assert prediction(second, second.weights) == velocity
    assert prediction(second, second.weights | {"global_step": torch.tensor(875_000)}) == noise
    assert prediction(second, second.weights | {"global_step": torch.tensor(140_000)}) == velocity
    assert prediction(second, second.weights, **{"modelspec.prediction_type": "epsilon"}) == noise
    inpainting = make_original(tmp_path / "inpainting", is_second=True, in_channels=9)
    assert prediction(inpainting, inpainting.weights) == noise
    declared = prediction(first, first.weights, **{"modelspec.prediction_type": "v"})
    assert declared == ("v_prediction", "PNDMScheduler")


def test_what_the_unet_predicts_is_seen_in_published_weights() -> None:
    """Of Stable Diffusion 2, the 512-pixel models predict noise: a weight tells, whatever step they were saved at."""
    telltale = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    file = MagicMock(metadata=dict)
    for scale, expected in ((0.05, "epsilon"), (0.15, "v_prediction")):
        file.get_tensor.return_value = scale * torch.tensor([-1.0, 1.0] * 160)
        assert single_file._prediction(file, [telltale], 4, is_second=True) == expected
        assert single_file._prediction(file, [telltale], 9, is_second=True) == "epsilon"
        assert single_file._prediction(file, [telltale], 4, is_second=False) == "epsilon"


def test_operator_has_the_last_word_on_what_the_unet_predicts(second: Original, tmp_path: Path) -> None:
    """Neither weights nor metadata are always right."""
    path = written(tmp_path, second.weights, {"modelspec.prediction_type": "V"})
    for said, scheduler in (("epsilon", "PNDMScheduler"), ("v_prediction", "DDIMScheduler"), (None, "DDIMScheduler")):
        parts = load_single_file(
            path, dtype=torch.float32, name=path.name, prediction_type=said, configs=second.configs
        )
        assert type(parts["scheduler"]).__name__ == scheduler
        assert parts["scheduler"].config.prediction_type == (said or "v_prediction")


def test_wrapped_names_do_not_matter(second: Original, tmp_path: Path) -> None:
    """A training loop's checkpoint has every name behind a prefix."""
    wrapped = written(tmp_path, {f"state_dict.{name}": weight for name, weight in second.weights.items()})
    parts = load(second, wrapped)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(second, part).state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in parts[part].state_dict().items())


def test_vocabulary_is_clips(first: Original, second: Original, tmp_path: Path) -> None:
    """The tokenizer is the one that checkpoints in diffusers format carry, with Stable Diffusion 2's padding."""
    tokenizer = load(first)["tokenizer"]
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (77, 49407)
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((CONFIGS_FOLDER / "bpe" / "merges.txt").read_bytes())
    text = "Two dogs, it's 1€ naïve 日本 👍! <|endoftext|>"
    for original, padding in ((first, "<|endoftext|>"), (second, "!")):
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": padding}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        stock, ours = CLIPTokenizer.from_pretrained(tmp_path), load(original)["tokenizer"]
        assert ours(text, padding="max_length").input_ids == stock(text, padding="max_length").input_ids
    assert (ours.pad_token_id, ours("", padding="max_length").input_ids[2:]) == (0, [0] * 75)


@pytest.mark.parametrize(
    ("kind", "unet", "text"),
    [("sd1", 859_520_964, 123_060_480), ("sd2_512", 865_910_724, 340_387_840), ("sd2_768", 865_910_724, 340_387_840)],
)
def test_shipped_configurations_are_of_the_published_sizes(kind: str, unet: int, text: int) -> None:
    """As many weights as the published models have."""
    folder = CONFIGS_FOLDER / kind
    with torch.device("meta"):
        models = (
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
        )
    counts = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert counts == [unet, 83_653_863, text]


@pytest.mark.parametrize(
    ("which", "victim", "part"),
    [
        ("first", "model.diffusion_model.output_blocks.3.1.norm.weight", "unet"),
        ("first", "first_stage_model.decoder.mid.attn_1.q.bias", "vae"),
        ("first", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text_encoder"),
        ("second", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight", "text_encoder"),
        ("second", "cond_stage_model.model.token_embedding.weight", "text_encoder"),
    ],
)
def test_missing_weights_are_refused_not_invented(
    which: str, victim: str, part: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A weight that the file lacks would silently become random numbers."""
    original: Original = request.getfixturevalue(which)
    path = written(tmp_path, {key: weight for key, weight in original.weights.items() if key != victim})
    assert f"{part} lacks {3 if 'in_proj' in victim else 1} of its weights" in refusal(original, path)


def test_weights_of_other_architectures_are_refused(first: Original, tmp_path: Path) -> None:
    """Other shapes, and weights that nothing would use."""
    key = "model.diffusion_model.time_embed.0.bias"
    message = refusal(first, written(tmp_path, first.weights | {key: torch.zeros(3)}))
    assert "unet is of other dimensions" in message
    assert "(3,), not (64,)" in message
    for key, part in (
        ("model.diffusion_model.label_emb.0.0.weight", "unet"),
        ("model.diffusion_model.input_blocks.9.0.in_layers.0.weight", "unet"),
        ("first_stage_model.encoder.down.0.block.2.conv1.weight", "vae"),
    ):
        message = refusal(first, written(tmp_path, first.weights | {key: torch.zeros(3)}))
        assert f"{part} has weights that" in message


@pytest.mark.parametrize("in_channels", [3, 7, 8])
def test_unets_of_other_input_channels_are_refused(in_channels: int, first: Original, tmp_path: Path) -> None:
    """Upscalers and instruction models take other inputs."""
    weight = torch.zeros(16, in_channels, 3, 3)
    path = written(tmp_path, first.weights | {"model.diffusion_model.input_blocks.0.0.weight": weight})
    message = refusal(first, path)
    assert f"{in_channels} input channels" in message
    assert NEEDED in message


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "first_stage_model.encoder.conv_in.weight",
                "conditioner.embedders.1.model.positional_embedding",
            ],
            "Stable Diffusion XL",
        ),
        (["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "Stable Diffusion 3"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "a LoRA alone"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA alone"),
        (["unet.mid_block.attentions.0.proj_in.lora.down.weight"], "a LoRA alone"),
        (["control_model.time_embed.0.weight"], "a ControlNet"),
        (["first_stage_model.encoder.conv_in.weight"], "a VAE alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet alone"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
        (["emb_params"], "a model of unknown kind"),
    ],
)
def test_other_kinds_of_file_are_named(keys: list[str], kind: str, first: Original, tmp_path: Path) -> None:
    """The operator reads what the file is and what is needed."""
    message = refusal(first, written(tmp_path, {key: torch.zeros(1) for key in keys}))
    assert kind in message
    assert NEEDED in message


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("model.diffusion_model.", "UNet"), ("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder")],
)
def test_files_without_a_part_are_refused(prefix: str, part: str, second: Original, tmp_path: Path) -> None:
    """A file without its VAE cannot be served."""
    path = written(tmp_path, {key: value for key, value in second.weights.items() if not key.startswith(prefix)})
    message = refusal(second, path)
    assert f"has no {part}" in message
    assert NEEDED in message


@pytest.mark.parametrize("is_old", [False, True])
def test_renamed_pickles_are_refused(is_old: bool, first: Original, tmp_path: Path) -> None:
    """A pickle can run code, whatever its name is."""
    path = tmp_path / "x.safetensors"
    torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=not is_old)
    assert "pickles are not loaded" in refusal(first, path)


@pytest.mark.parametrize("size", [0, 5, 1000, -10])
def test_truncated_files_are_refused(size: int, first: Original, tmp_path: Path) -> None:
    """Half a download is no model."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(first.path.read_bytes()[:size])
    assert "truncated" in refusal(first, path)


def test_a_file_is_a_model(first: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting `model` takes a file; it has no safety checker, so the operator has to agree."""
    monkeypatch.setattr(checkpoint, "load_single_file", functools.partial(load_single_file, configs=first.configs))
    cpu = torch.device("cpu")
    with pytest.raises(StartupError, match="INPAINT_ALLOW_UNCHECKED"):
        checkpoint.load(Settings(model=str(first.path)), cpu)
    components = checkpoint.load(Settings(model=str(first.path), allow_unchecked=True), cpu)
    info = components.info
    assert (info.id, info.kind, info.native_size, info.unet_in_channels) == (
        "original.safetensors",
        "checkpoint",
        64,
        9,
    )
    assert (info.default_scheduler, info.default_steps, info.has_safety_checker) == ("pndm", 50, False)
    for part in (components.unet, components.vae, components.text_encoder):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())


def test_other_files_are_no_models(tmp_path: Path) -> None:
    """Only safetensors are read."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"")
    with pytest.raises(StartupError, match=r"neither a folder in diffusers format nor a \.safetensors file"):
        checkpoint.load(Settings(model=str(path)), torch.device("cpu"))
