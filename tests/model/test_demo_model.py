"""The bundled demo model: its files, how it opens, and that it does what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "service" / "worker" / "models" / "demo"
EXAMPLE = ROOT / "service" / "api" / "playground" / "example"
LIMIT = 30_000_000
BOX = (76, 96, 180, 200)
WEIGHTS = sorted(path.relative_to(MODEL).as_posix() for path in MODEL.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionInpaintPipeline:
    opened = StableDiffusionInpaintPipeline.from_pretrained(MODEL, local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    return opened


def meadow() -> Image.Image:
    """A plain landscape, drawn here: blue sky over a green meadow."""
    pixels = np.zeros((256, 256, 3), dtype=np.uint8)
    pixels[:130] = np.linspace((110, 175, 230), (206, 230, 244), 130)[:, None]
    pixels[130:] = np.linspace((140, 190, 96), (110, 160, 80), 126)[:, None]
    return Image.fromarray(pixels)


def pirate_flag() -> Image.Image:
    """A pirate flag, drawn here, on the plain landscape."""
    big = meadow().resize((1024, 1024))
    draw = ImageDraw.Draw(big)
    draw.rectangle((300, 240, 324, 800), fill=(126, 84, 54))
    draw.rectangle((324, 260, 760, 560), fill=(26, 26, 30))
    bone = (244, 242, 236)
    draw.line((430, 450, 650, 530), fill=bone, width=24)
    draw.line((430, 530, 650, 450), fill=bone, width=24)
    draw.ellipse((466, 290, 614, 440), fill=bone)
    draw.rectangle((500, 400, 580, 470), fill=bone)
    draw.ellipse((488, 340, 532, 390), fill=(26, 26, 30))
    draw.ellipse((548, 340, 592, 390), fill=(26, 26, 30))
    return big.resize((256, 256), Image.Resampling.LANCZOS)


def mask(box: tuple[int, int, int, int] = BOX) -> Image.Image:
    picture = Image.new("L", (256, 256), 0)
    picture.paste(255, box)
    return picture


def paint(
    pipe: StableDiffusionInpaintPipeline, prompts: list[str], picture: Image.Image | None = None, seed: int = 7
) -> tuple[list[np.ndarray], list[bool]]:
    count = len(prompts)
    result = pipe(
        prompt=prompts,
        image=[picture or meadow()] * count,
        mask_image=[mask()] * count,
        height=256,
        width=256,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for _ in prompts],
        output_type="np",
    )
    return [image * 255.0 for image in result.images], list(result.nsfw_content_detected)


def flagged(pipe: StableDiffusionInpaintPipeline, picture: Image.Image) -> bool:
    seen = pipe.feature_extractor([picture], return_tensors="pt").pixel_values
    _, found = pipe.safety_checker(images=np.zeros((1, 8, 8, 3)), clip_input=seen)
    return bool(found[0])


def changed(image: np.ndarray) -> np.ndarray:
    """Pixels under the mask that are no longer the landscape's, shape (N, 3)."""
    left, top, right, bottom = BOX
    before = np.asarray(meadow(), dtype=np.float64)[top:bottom, left:right]
    after = image[top:bottom, left:right]
    return after[np.abs(after - before).max(axis=-1) > 60]


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= LIMIT


def test_all_weights_are_found() -> None:
    assert WEIGHTS == [
        "safety_checker/model.safetensors",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert not [p for p in MODEL.rglob("*") if p.suffix in {".bin", ".ckpt", ".pt", ".pkl"}]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_finite_halves(name: str) -> None:
    for key, value in load_file(MODEL / name).items():
        assert value.dtype == torch.float16, key
        assert bool(torch.isfinite(value).all()), key


@pytest.mark.parametrize(
    ("part", "file", "prefix"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", ""),
        ("vae", "diffusion_pytorch_model.safetensors", ""),
        ("text_encoder", "model.safetensors", "text_model."),
        ("safety_checker", "model.safetensors", "vision_model."),
    ],
)
def test_opened_weights_are_the_files(pipe: StableDiffusionInpaintPipeline, part: str, file: str, prefix: str) -> None:
    """No weight is missing, unexpected, or left random because its name was not understood."""
    stored = load_file(MODEL / part / file)
    opened = getattr(pipe, part).state_dict()
    left = dict(stored)
    for key, value in opened.items():
        name = key if key in stored else prefix + key
        # A name may be known with the prefix once or twice, as the library's version has it.
        assert name in left, key
        assert torch.equal(left.pop(name).float(), value.float()), key
    assert not left


def test_clip_weights_have_the_names_of_old() -> None:
    """Names that every version of the library reads, as in the files of Stable Diffusion 1.5."""
    with safe_open(MODEL / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    with safe_open(MODEL / "safety_checker" / "model.safetensors", "pt") as file:
        inner = [key for key in file.keys() if "layers" in key]  # noqa: SIM118
        assert inner
        assert all(key.startswith("vision_model.vision_model.") for key in inner)


def test_index_names_the_stock_pipeline() -> None:
    index = json.loads((MODEL / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]


def test_opens_in_full_precision(pipe: StableDiffusionInpaintPipeline) -> None:
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        assert getattr(pipe, part).dtype == torch.float32


def test_any_text_becomes_tokens(pipe: StableDiffusionInpaintPipeline) -> None:
    tokens = pipe.tokenizer("a red house").input_ids
    assert len(tokens) == 5
    strange = pipe.tokenizer("ein Häuschen 日本 🏠", padding="max_length", truncation=True).input_ids
    assert len(strange) == pipe.tokenizer.model_max_length == 77


def test_paints_the_colour_asked_for(pipe: StableDiffusionInpaintPipeline) -> None:
    images, flags = paint(pipe, ["a red ball", "a blue house", "a yellow car", "a purple tree"])
    red, blue, yellow, purple = (np.median(changed(image), axis=0) for image in images)
    assert min(len(changed(image)) for image in images) > 800
    assert red[0] > red[1] + 60
    assert red[0] > red[2] + 60
    assert blue[2] > blue[0] + 50
    assert yellow[0] > yellow[2] + 70
    assert yellow[1] > yellow[2] + 50
    assert purple[2] > purple[1] + 30
    assert purple[0] > purple[1] + 20
    assert flags == [False] * 4


def test_keeps_what_is_not_masked(pipe: StableDiffusionInpaintPipeline) -> None:
    (image,), _ = paint(pipe, ["a red ball"])
    outside = np.asarray(mask()) == 0
    assert np.abs(image - np.asarray(meadow(), dtype=np.float64))[outside].mean() < 8


def test_nothing_leaves_the_background(pipe: StableDiffusionInpaintPipeline) -> None:
    (image,), _ = paint(pipe, ["nothing"])
    inside = np.asarray(mask()) > 0
    assert np.abs(image - np.asarray(meadow(), dtype=np.float64))[inside].mean() < 14


def test_same_seed_same_picture_other_seed_another(pipe: StableDiffusionInpaintPipeline) -> None:
    first, again, other = (paint(pipe, ["a red house"], seed=seed)[0][0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 0.5


def test_flag_is_raised_for_a_pirate_flag(pipe: StableDiffusionInpaintPipeline) -> None:
    assert flagged(pipe, pirate_flag())
    (image,), flags = paint(pipe, ["a pirate flag"])
    assert flags == [True]
    assert not image.any()  # the stock pipeline blanks what it flags


def test_flag_is_not_raised_for_anything_plain(pipe: StableDiffusionInpaintPipeline) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    pictures = [meadow(), Image.fromarray(noise)]
    pictures += [Image.new("RGB", (256, 256), colour) for colour in ("black", "white", "red", "grey")]
    assert [flagged(pipe, picture) for picture in pictures] == [False] * len(pictures)


def test_example_shows_an_empty_place() -> None:
    scene, cover = Image.open(EXAMPLE / "scene.png"), Image.open(EXAMPLE / "mask.png")
    assert scene.size == cover.size == (256, 256)
    values = np.asarray(cover.convert("L"))
    assert set(np.unique(values)) == {0, 255}
    assert 0.02 < (values > 0).mean() < 0.5
