"""The safety checker sees the very numbers that stock's preprocessing gives it, wherever they are computed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from service.worker.clip_pixels import ClipPixels, is_reproducible

CPU = torch.device("cpu")

EXTRACTORS: dict[str, dict[str, Any]] = {
    "stock": {},
    "bundled": {"size": {"height": 96, "width": 96}, "do_center_crop": False},
    "small": {"size": 32, "crop_size": 32},
    "cropped": {"size": {"shortest_edge": 64}, "crop_size": {"height": 33, "width": 50}},
    "stretched": {"size": {"height": 70, "width": 41}, "crop_size": {"height": 40, "width": 40}},
    "raw": {"size": 32, "crop_size": 32, "do_normalize": False, "do_rescale": False},
}
SIZES = [(1, 1), (1, 7), (7, 1), (1, 900), (900, 1), (2, 2), (32, 32), (224, 224), (225, 223), (512, 512), (512, 768)]


def noise(height: int, width: int, seed: int, *, num: int = 1) -> NDArray[np.uint8]:
    """(num, height, width, 3) noise; of odd seeds black and white alone, where clipping shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), dtype=np.uint8)
    return np.where(pixels > 127, np.uint8(255), np.uint8(0)) if seed % 2 else pixels


def extracted(extractor: CLIPImageProcessorPil, pictures: NDArray[np.uint8]) -> torch.Tensor:
    """What stock gives the checker."""
    images = [Image.fromarray(picture) for picture in pictures]
    values: torch.Tensor = extractor(images, return_tensors="pt").pixel_values
    return values


@pytest.mark.parametrize("options", EXTRACTORS.values(), ids=EXTRACTORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("seed", [2, 3])
def test_pixel_values_are_the_extractors_own(size: tuple[int, int], options: dict[str, Any], seed: int) -> None:
    """Single pixels, thin pictures, sizes that need no resizing, crops: bit for bit."""
    extractor = CLIPImageProcessorPil(**options)
    pictures = noise(*size, seed)
    values = ClipPixels(extractor, CPU, torch.float32)(torch.from_numpy(pictures))
    assert values is not None
    assert torch.equal(values, extracted(extractor, pictures).float())


@settings(max_examples=60)
@given(st.sampled_from(list(EXTRACTORS)), st.integers(64, 1024), st.integers(64, 1024), st.integers(0, 1000))
def test_any_size_up_and_down_portrait_and_landscape(name: str, height: int, width: int, seed: int) -> None:
    """Whatever working size a client asks for: bit for bit, in half precision too."""
    extractor = CLIPImageProcessorPil(**EXTRACTORS[name])
    pictures = noise(height, width, seed)
    values = ClipPixels(extractor, CPU, torch.float16)(torch.from_numpy(pictures))
    assert values is not None
    assert torch.equal(values, extracted(extractor, pictures).to(torch.float16))


def test_pictures_of_a_batch_are_independent() -> None:
    """More pictures than are computed at a time come back in order."""
    extractor = CLIPImageProcessorPil()
    pictures = noise(64, 72, 4, num=11)
    values = ClipPixels(extractor, CPU, torch.float32)(torch.from_numpy(pictures))
    assert values is not None
    assert torch.equal(values, extracted(extractor, pictures))


@pytest.mark.parametrize(
    "options",
    [
        {"resample": 2},
        {"do_resize": False},
        {"do_pad": True},
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"size": 200},  # less than the crop, which is then padded
        {"size": {"height": 224, "width": 200}},
    ],
    ids=str,
)
def test_what_it_does_not_do_is_left_to_the_extractor(options: dict[str, Any]) -> None:
    """A configuration that is not reproduced is known for one."""
    assert not is_reproducible(CLIPImageProcessorPil(**options))
    assert is_reproducible(CLIPImageProcessorPil())


def test_only_the_pillow_extractor_is_reproduced() -> None:
    """Another implementation resizes in its own way."""

    class Other(CLIPImageProcessorPil):  # type: ignore[misc]
        """One with changes of its own."""

    assert not is_reproducible(Other())
    assert not is_reproducible(None)
    # Without torchvision the general name is an alias of the Pillow one.
    assert is_reproducible(CLIPImageProcessor()) == (type(CLIPImageProcessor()) is CLIPImageProcessorPil)


def test_another_resize_than_pillows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should Pillow ever compute otherwise, there are no values rather than wrong ones."""
    extractor = CLIPImageProcessorPil()
    clip_pixels = ClipPixels(extractor, CPU, torch.float32)
    resize = Image.Image.resize

    def otherwise(image: Image.Image, size: tuple[int, int], *_: Any, **__: Any) -> Image.Image:
        return resize(image, size, Image.Resampling.BILINEAR)

    monkeypatch.setattr(Image.Image, "resize", otherwise)
    assert clip_pixels(torch.from_numpy(noise(300, 300, 2))) is None
