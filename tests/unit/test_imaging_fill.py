"""Masked content "fill": the surroundings' colours in the place of what is under the mask."""

import numpy as np
import pytest

from service.imaging import filled

RNG = np.random.default_rng(5)


def square(height: int = 48, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[12:36, 20:50] = 255
    return mask


def test_what_is_kept_stays_bit_for_bit() -> None:
    """Where the mask is black, no pixel changes."""
    image = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    result = filled(image, square())
    assert result.shape == image.shape
    assert result.flags.c_contiguous
    assert np.array_equal(result[square() == 0], image[square() == 0])


def test_nothing_of_what_was_under_the_mask_is_left() -> None:
    """Two pictures that differ only under the mask become the same."""
    image = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    other = np.where((square() == 255)[..., None], 255 - image, image).astype(np.uint8)
    assert np.array_equal(filled(image, square()), filled(other, square()))


@pytest.mark.parametrize("colour", [(200, 30, 90), (0, 0, 0), (255, 255, 255)])
def test_one_colour_runs_in_everywhere(colour: tuple[int, int, int]) -> None:
    """Around a mask on one colour, the mask is filled with it, within rounding."""
    image = np.full((48, 64, 3), colour, np.uint8)
    image[20:30, 30:40] = 123
    assert np.abs(filled(image, square()).astype(int) - colour).max() <= 6


def test_near_colours_count_most() -> None:
    """Each side of the mask takes the colour that is next to it."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 35:] = 255
    result = filled(image, square())
    assert result[24, 21].mean() < 60
    assert result[24, 48].mean() > 195


def test_a_mask_of_everything_leaves_black() -> None:
    """There are no colours around it."""
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert not filled(image, np.full((8, 8), 255, np.uint8)).any()
