"""A checkpoint is served whole or not at all, and the operator is told why in one line."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from service.errors import StartupError
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.weight_files import check_whole
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(inpainting_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(inpainting_checkpoint, tmp_path / "broken-model"))


def refusal(folder: Path | str, **changes: object) -> str:
    with pytest.raises(StartupError) as caught:
        load(Settings(model=str(folder), **changes), CPU)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_clients_learn_of_a_model(inpainting_checkpoint: Path, plain_checkpoint: Path) -> None:
    """Native size, channels, schedulers and defaults come from the checkpoint; no path is told."""
    info = load(Settings(model=str(inpainting_checkpoint)), CPU).info
    assert (info.id, info.kind) == (inpainting_checkpoint.name, "checkpoint")
    assert (info.native_size, info.size_multiple, info.unet_in_channels) == (NATIVE_SIZE, 8, 9)
    assert (info.default_scheduler, info.default_steps) == ("pndm", 50)
    assert info.has_safety_checker
    assert {"ddim", "pndm", "euler_a", "dpmpp_2m_karras", "unipc"} <= set(info.schedulers)
    plain = load(Settings(model=str(plain_checkpoint), default_steps=7), CPU).info
    assert (plain.unet_in_channels, plain.default_steps) == (4, 7)


def test_weights_are_float32_on_a_cpu_and_frozen(inpainting_checkpoint: Path) -> None:
    """Unless told otherwise, weights are float32 on a CPU, where float16 is many times slower."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    for part in (components.unet, components.vae, components.text_encoder, components.safety_checker):
        assert part is not None
        assert not part.training
        assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in part.parameters())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "safety_checker"])
def test_missing_weights_are_refused_not_invented(checkpoint: Path, part: str) -> None:
    """A weight that the checkpoint lacks would silently become random numbers."""
    (path,) = (checkpoint / part).glob("*.safetensors")
    weights = load_file(path)
    victim = sorted(weights)[len(weights) // 2]
    del weights[victim]
    save_file(weights, path, metadata={"format": "pt"})
    message = refusal(checkpoint)
    assert part in message
    assert "lacks 1 of its weights" in message


def test_mis_keyed_weights_are_refused(checkpoint: Path) -> None:
    """Weights under other names are missing weights."""
    (path,) = (checkpoint / "text_encoder").glob("*.safetensors")
    save_file({f"model.{key}": value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert "text_encoder" in refusal(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    """A pickle can run code: it is not loaded, and the message says so."""
    (path,) = (checkpoint / "unet").glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "pickles are not loaded" in refusal(checkpoint)


def test_pickle_under_another_name_is_refused(checkpoint: Path) -> None:
    """Calling itself safetensors does not make a pickle one."""
    (path,) = (checkpoint / "unet").glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.with_suffix(".bin").replace(path)
    assert "unet: diffusion_pytorch_model.safetensors is a pickle under another name" in refusal(checkpoint)


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_corrupt_weights_are_refused(checkpoint: Path, size: int) -> None:
    """A part of a file is no model."""
    (path,) = (checkpoint / "vae").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:size])
    assert "vae: diffusion_pytorch_model.safetensors is truncated" in refusal(checkpoint)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_of_another_shape_are_refused(checkpoint: Path, part: str) -> None:
    """Weights of a model of another size."""
    (path,) = (checkpoint / part).glob("*.safetensors")
    weights = load_file(path)
    victim = min(weights)
    save_file(weights | {victim: torch.zeros(3)}, path, metadata={"format": "pt"})
    assert f"{part} has 1 weights of another shape, the first is {victim}" in refusal(checkpoint)


def test_parts_that_do_not_fit_one_another_are_refused(checkpoint: Path) -> None:
    """A UNet that reads wider embeddings than the text encoder gives."""
    other = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(checkpoint / "unet"), cross_attention_dim=24
    )
    other.save_pretrained(checkpoint / "unet")
    assert "the text encoder's width, 32, is not the UNet's, 24" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"in_channels": 8}, "8 input channels (InstructPix2Pix); 9 or 4 are needed"),
        ({"in_channels": 5}, "5 input channels (a depth-to-image model)"),
        ({"class_embed_type": "timestep"}, "a UNet with class_embed_type"),
        ({"num_class_embeds": 10}, "a UNet with num_class_embeds"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 32,
            },
            "a UNet with addition_embed_type",
        ),
    ],
)
def test_unets_of_other_kinds_are_refused(checkpoint: Path, change: dict[str, object], expected: str) -> None:
    """A UNet that wants more, or other things, than the service gives it."""
    config = UNet2DConditionModel.load_config(checkpoint / "unet")
    UNet2DConditionModel.from_config({**config, **change}).save_pretrained(checkpoint / "unet")
    assert expected in refusal(checkpoint)


def test_old_scheduler_settings_are_corrected_as_stock_does(checkpoint: Path) -> None:
    """An old checkpoint's `steps_offset` of 0 shifts every timestep; stock corrects it, and so does the service."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"steps_offset": 0, "skip_prk_steps": False}), encoding="utf-8")
    corrected = load(Settings(model=str(checkpoint)), CPU).scheduler.config
    assert (corrected.steps_offset, corrected.skip_prk_steps) == (1, True)


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusion3Pipeline",
        "FluxFillPipeline",
        "PixArtAlphaPipeline",
        "KandinskyV22InpaintPipeline",
    ],
)
def test_other_kinds_of_model_are_named(checkpoint: Path, kind: str) -> None:
    """SDXL and others are refused by what they are, and the operator learns what is needed."""
    index = checkpoint / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps(content | {"_class_name": kind}), encoding="utf-8")
    message = refusal(checkpoint)
    assert kind in message
    assert "Stable Diffusion 1.x or 2.x is needed" in message


def test_latent_consistency_pipeline_is_stable_diffusion(checkpoint: Path) -> None:
    """LCM-distilled checkpoints name a pipeline of their own; their parts are the same."""
    index = checkpoint / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps(content | {"_class_name": "LatentConsistencyModelPipeline"}), encoding="utf-8")
    assert load(Settings(model=str(checkpoint)), CPU).info.kind == "checkpoint"


def test_folder_that_is_no_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """One part of a checkpoint, a LoRA, or a folder of single files."""
    assert "one part alone, a UNet2DConditionModel" in refusal(checkpoint / "unet")
    assert "one part alone, a CLIPTextModel" in refusal(checkpoint / "text_encoder")
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"a": torch.zeros(1)}, lora / "pytorch_lora_weights.safetensors")
    assert "but a LoRA" in refusal(lora)
    files = tmp_path / "files"
    files.mkdir()
    save_file({"a": torch.zeros(1)}, files / "house.safetensors")
    assert "name house.safetensors itself" in refusal(files)
    (checkpoint / "model_index.json").write_text("[]", encoding="utf-8")
    assert "its model_index.json is not readable" in refusal(checkpoint)


def test_missing_model_is_named(tmp_path: Path) -> None:
    """A path that is not there, and a hub id that the cache does not hold."""
    assert "does not exist" in refusal(tmp_path / "nowhere")
    message = refusal("nobody/no-such-model", offline=True)
    assert "nobody/no-such-model" in message
    assert "offline" in message


def test_checkpoint_without_safety_checker_needs_consent(tmp_path: Path) -> None:
    """A model that cannot flag is served only where the operator says so, and says so itself."""
    folder = make_checkpoint(tmp_path / "unchecked", has_safety_checker=False)
    assert "INPAINT_ALLOW_UNCHECKED" in refusal(folder)
    assert not load(Settings(model=str(folder), allow_unchecked=True), CPU).info.has_safety_checker


def test_safety_checker_of_the_operator_is_used(checkpoint: Path, tmp_path: Path) -> None:
    """A checker from another checkpoint, or from a folder of its own, for a checkpoint that has none."""
    folder = make_checkpoint(tmp_path / "unchecked", has_safety_checker=False)
    alone = Path(shutil.copytree(checkpoint / "safety_checker", tmp_path / "checker"))
    shutil.copy(checkpoint / "feature_extractor" / "preprocessor_config.json", alone)
    expected = load_file(alone / "model.safetensors")["concept_embeds"]
    for named in (checkpoint, alone):
        components = load(Settings(model=str(folder), safety_checker=named), CPU)
        assert components.info.has_safety_checker
        assert components.safety_checker is not None
        assert torch.equal(components.safety_checker.concept_embeds, expected)
        assert components.feature_extractor.crop_size["height"] == 30
    path = alone / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "safety checker 'checker': model.safetensors is truncated" in refusal(folder, safety_checker=alone)
    (alone / "preprocessor_config.json").unlink()
    assert "lacks its config.json or preprocessor_config.json" in refusal(folder, safety_checker=alone)


@pytest.mark.parametrize("header_length", [640, 896, 1152, 1408])
def test_length_that_looks_like_a_pickle(header_length: int, tmp_path: Path) -> None:
    """A whole file is taken, though the length of its header begins like a pickle: 640 is 80 02."""
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode().ljust(header_length)
    path.write_bytes(header_length.to_bytes(8, "little") + header + b"abc")
    check_whole(path, "a part")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StartupError):
        check_whole(path, "a part")


# --- variants and the hub ----------------------------------------------------------------


def with_variant(folder: Path, variant: str, factor: float) -> None:
    """Beside the weights of each part, others of a variant: here multiples, so that one can tell them."""
    for path in list(folder.glob("*/*.safetensors")):
        state = {key: factor * tensor for key, tensor in load_file(path).items()}
        save_file(state, path.with_name(f"{path.stem}.{variant}.safetensors"), metadata={"format": "pt"})


def first_weight(folder: Path | str, **changes: object) -> torch.Tensor:
    return load(Settings(model=str(folder), **changes), CPU).unet.conv_in.weight  # type: ignore[arg-type]


def test_variant_of_the_weights(checkpoint: Path) -> None:
    """`variant` takes the files of that name; a variant that is not there is told, not replaced by another."""
    with_variant(checkpoint, "fp16", 2.0)
    plain = first_weight(checkpoint)
    torch.testing.assert_close(first_weight(checkpoint, variant="fp16"), 2 * plain)
    message = refusal(checkpoint, variant="bf16")
    assert message == f"model {checkpoint.name!r} has no variant 'bf16' of its weights; variants there: fp16"


def test_variant_of_some_parts(checkpoint: Path) -> None:
    """Parts that lack the variant have their plain weights, as in stock; plain weights are not replaced unasked."""
    path = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    expected = StableDiffusionInpaintPipeline.from_pretrained(checkpoint, variant="fp16")
    ours = load(Settings(model=str(checkpoint), variant="fp16"), CPU)
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, part).state_dict()
        assert all(torch.equal(weight, theirs[key]) for key, weight in getattr(ours, part).state_dict().items()), part
    assert "unet has its weights only as variants: set INPAINT_VARIANT to fp16" in refusal(checkpoint)


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the model hub that holds one model in two revisions, as if both had been downloaded."""
    cache = tmp_path / "hub"
    repository = cache / "models--somebody--a-model"
    for revision, commit, factor in (("main", "a" * 40, 1.0), ("v2", "b" * 40, 3.0)):
        snapshot = Path(shutil.copytree(checkpoint, repository / "snapshots" / commit))
        path = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
        state = {key: factor * tensor for key, tensor in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(cache), raising=False)
    return cache


@pytest.mark.usefixtures("hub")
def test_hub_id_and_revision(checkpoint: Path) -> None:
    """A hub id is taken from the cache where the hub may not be asked; `revision` chooses among what is there."""
    plain = first_weight(checkpoint)
    assert torch.equal(first_weight("somebody/a-model", offline=True), plain)
    torch.testing.assert_close(first_weight("somebody/a-model", offline=True, revision="v2"), 3 * plain)
    assert load(Settings(model="somebody/a-model", offline=True), CPU).info.id == "somebody/a-model"
    assert refusal("somebody/a-model", offline=True, revision="v3") == (
        "cannot get model 'somebody/a-model' at revision 'v3' from the local cache (offline): it is not there, or not "
        "whole"
    )
    assert "has no variant 'fp16'" in refusal("somebody/a-model", offline=True, variant="fp16")


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (RepositoryNotFoundError, "there is no such model, or it is private"),
        (GatedRepoError, "its licence has to be accepted there, and HF_TOKEN set"),
        (RevisionNotFoundError, "there is no such revision"),
        (httpx.ConnectError, "it does not answer, and the local cache does not have the model"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    cause: type[Exception], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client explains at length, with addresses; the operator gets what to do."""

    def refuse(*_: object, **__: object) -> None:
        error = cause.__new__(cause)
        Exception.__init__(error, "404 Client Error.\n\nhttps://huggingface.co/api/models/somebody")
        raise error

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", refuse)
    message = refusal("somebody/another-model", revision="v2")
    assert message.startswith("cannot get model 'somebody/another-model' at revision 'v2' from the model hub: ")
    assert expected in message
    assert "http" not in message


def test_operator_says_what_the_unet_predicts(tmp_path: Path) -> None:
    """What the checkpoint says is what the UNet predicts, unless the operator knows better."""
    folder = make_checkpoint(tmp_path / "v", prediction_type="v_prediction")
    assert load(Settings(model=str(folder)), CPU).info.prediction_type == "v_prediction"
    changed = load(Settings(model=str(folder), prediction_type="epsilon"), CPU)
    assert (changed.info.prediction_type, changed.scheduler.config.prediction_type) == ("epsilon", "epsilon")


def test_loading_tells_what_it_does(checkpoint: Path) -> None:
    """Each part is announced, for the log and `/readyz`."""
    stages: list[str] = []
    load(Settings(model=str(checkpoint)), CPU, stages.append)
    assert [stage for stage in stages if stage.startswith("loading")] == [
        "loading unet (1 of 4)",
        "loading vae (2 of 4)",
        "loading text_encoder (3 of 4)",
        "loading safety_checker (4 of 4)",
    ]
    assert str(checkpoint.parent) not in " ".join(stages)


def test_what_the_model_info_tells_of_special_kinds(tmp_path: Path) -> None:
    """Prediction type, embedded guidance, the VAE's class and the shapes of tensors, for whoever sends them."""
    folder = make_checkpoint(
        tmp_path / "special",
        in_channels=4,
        prediction_type="v_prediction",
        time_cond_proj_dim=16,
        has_asymmetric_vae=True,
        text_width=48,
    )
    info = load(Settings(model=str(folder)), CPU).info
    assert (info.prediction_type, info.embeds_guidance, info.vae) == ("v_prediction", True, "AsymmetricAutoencoderKL")
    assert (info.embeds_width, info.max_tokens, info.max_clip_skip) == (48, 77, 3)
    assert (info.latent_channels, info.latent_multiple, info.num_train_timesteps) == (4, 8, 1000)
    assert {"euler", "heun"} <= set(info.timesteps_schedulers)
    assert {"euler", "euler_karras"} <= set(info.sigmas_schedulers)
    assert "ddim" not in {*info.timesteps_schedulers, *info.sigmas_schedulers}
