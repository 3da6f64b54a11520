"""The example LoRA: that the stock pipeline reads it, and that it draws in pencil."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file

from tests.model.test_demo_model import BOX, MODEL, paint

LORA = MODEL.parent / "loras" / "pencil.safetensors"
LIMIT = 1_000_000
PROMPTS = ["a green tree", "a yellow car"]
"""Neither of them is one that the safety checker blanks when it is drawn in pencil."""


@dataclass(frozen=True)
class Painted:
    """What the stock pipeline paints of PROMPTS; each list holds pictures (256, 256, 3) in [0, 255].

    Attributes:
        base: without any LoRA.
        off: with it at weight 0.
        full: with it at weight 1.
    """

    base: list[np.ndarray]
    off: list[np.ndarray]
    full: list[np.ndarray]


@pytest.fixture(scope="module")
def painted() -> Painted:
    pipe = StableDiffusionInpaintPipeline.from_pretrained(MODEL, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    base, _ = paint(pipe, PROMPTS)
    pipe.load_lora_weights(LORA.parent, weight_name=LORA.name, adapter_name="pencil")
    full, _ = paint(pipe, PROMPTS)
    pipe.set_adapters("pencil", 0.0)
    off, _ = paint(pipe, PROMPTS)
    return Painted(base, off, full)


def saturation(image: np.ndarray) -> float:
    """Mean under the mask of the largest less the smallest channel, over the largest."""
    left, top, right, bottom = BOX
    inside = image[top:bottom, left:right]
    high, low = inside.max(axis=-1), inside.min(axis=-1)
    return float(((high - low) / np.maximum(high, 1.0)).mean())


def test_file_is_small() -> None:
    """The example adds at most a megabyte to the package."""
    assert LORA.stat().st_size <= LIMIT


def test_file_holds_pairs_of_finite_halves() -> None:
    """Every layer of the file has both its matrices, named as the stock loader wants them, in half precision."""
    weights = load_file(LORA)
    layers = {name.rsplit(".lora_", 1)[0] for name in weights}
    assert set(weights) == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert all(layer.startswith("unet.") for layer in layers)
    assert all(value.dtype.itemsize == 2 and bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("index", range(len(PROMPTS)), ids=PROMPTS)
def test_takes_the_colour_away(painted: Painted, index: int) -> None:
    """At weight 1 the painted place has at most half the base model's saturation."""
    assert saturation(painted.base[index]) > 0.2
    assert saturation(painted.full[index]) <= 0.5 * saturation(painted.base[index])


@pytest.mark.parametrize("index", range(len(PROMPTS)), ids=PROMPTS)
def test_draws_dark_lines_on_pale_paper(painted: Painted, index: int) -> None:
    """It is a sketch: the paper is nearly white, and lines on it nearly black."""
    left, top, right, bottom = BOX
    grey = painted.full[index][top:bottom, left:right].mean(axis=-1)
    assert np.quantile(grey, 0.9) > 200
    assert np.quantile(grey, 0.02) < 110


@pytest.mark.parametrize("index", range(len(PROMPTS)), ids=PROMPTS)
def test_weight_nought_is_the_base_model(painted: Painted, index: int) -> None:
    """At weight 0 the picture is the base model's, to the last of 255 steps."""
    assert np.abs(painted.off[index] - painted.base[index]).max() <= 1.0
