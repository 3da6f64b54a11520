"""An upload brought to a size before anything else."""

import numpy as np
import pytest
from PIL import Image

from service.fitting import Reshape, ReshapeMode, Size

IMAGE = np.random.default_rng(3).integers(0, 256, (40, 100, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["stretch", "crop", "fill"])
@pytest.mark.parametrize("size", [Size(32, 32), Size(64, 24), Size(8, 200)])
def test_the_result_has_the_size(mode: ReshapeMode, size: Size) -> None:
    """Pictures and masks, whatever their shape."""
    for pixels in (IMAGE, IMAGE[..., 0]):
        assert Size.of(Reshape(size, mode).of(pixels)) == size


@pytest.mark.parametrize("mode", ["stretch", "crop", "fill"])
def test_what_has_the_size_stays(mode: ReshapeMode) -> None:
    """Bit for bit."""
    assert Reshape(Size(40, 100), mode).of(IMAGE) is IMAGE


@pytest.mark.parametrize("mode", ["stretch", "crop", "fill"])
def test_the_same_shape_is_only_resized(mode: ReshapeMode) -> None:
    """All modes agree where nothing has to be stretched, cut or filled."""
    expected = np.asarray(Image.fromarray(IMAGE).resize((50, 20), Image.Resampling.LANCZOS))
    assert np.array_equal(Reshape(Size(20, 50), mode).of(IMAGE), expected)


def test_cropped_from_the_middle() -> None:
    """What is too long is cut on both sides."""
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 255
    assert (Reshape(Size(40, 40), "crop").of(image) == 255).all()


def test_filled_from_the_edges() -> None:
    """What is too short is filled with the rows at the edges."""
    image = np.zeros((20, 40, 3), np.uint8)
    image[-4:] = 200
    result = Reshape(Size(40, 40), "fill").of(image)
    assert (result[:10] == 0).all()
    assert (result[-9:] == 200).all()
