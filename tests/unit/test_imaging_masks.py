"""What `mask_invert`, `mask_grow` and `mask_blur` do, and that an empty mask is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from service.errors import ErrorCode, InpaintError
from service.imaging import require_nonempty, shape_mask
from tests.unit.picture_files import circle_mask, noise


def test_nothing_asked_changes_nothing() -> None:
    """Without inversion, growth and blur the mask is the upload's, greys included."""
    mask = noise(20, 30, 1)
    assert np.array_equal(shape_mask(mask, invert=False, grow=0, blur=0), mask)


def test_invert() -> None:
    """Black becomes white and the reverse."""
    mask = noise(20, 30, 1)
    assert np.array_equal(shape_mask(mask, invert=True, grow=0, blur=0), 255 - mask)


@settings(max_examples=60)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    radius=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_growing_is_the_largest_value_within_reach(height: int, width: int, radius: int, seed: int) -> None:
    """Growing by n equals a square maximum filter of 2n + 1, greys and edges included."""
    mask = np.where(noise(height, width, 1, seed) > 240, noise(height, width, 1, seed + 1), 0).astype(np.uint8)
    padded = np.pad(mask, radius)
    expected = Image.fromarray(padded).filter(ImageFilter.MaxFilter(2 * radius + 1))
    inside = np.asarray(expected)[radius : radius + height, radius : radius + width]
    assert np.array_equal(shape_mask(mask, invert=False, grow=radius, blur=0), inside)


def test_growing_a_large_mask_by_the_most() -> None:
    """64 px on 16 megapixels grows by exactly 64 on each side."""
    mask = np.zeros((4096, 4096), np.uint8)
    mask[2000, 1000] = 255
    grown = shape_mask(mask, invert=False, grow=64, blur=0)
    assert grown[1936:2065, 936:1065].min() == 255
    assert np.count_nonzero(grown) == 129 * 129


def test_blur_leaves_a_feather_and_keeps_the_edge() -> None:
    """A blurred mask is grey around the edge, still white within and black far away."""
    blurred = shape_mask(circle_mask(200, 200, (100, 100), 60), invert=False, grow=0, blur=8)
    assert blurred[100, 100] == 255
    assert blurred[0, 0] == 0
    assert 100 <= blurred[100, 160] <= 155
    assert len(np.unique(blurred)) > 50


def test_inversion_comes_first_then_growth_then_blur() -> None:
    """The three are applied in that order."""
    mask = circle_mask(60, 60, (30, 30), 20)
    step_by_step = shape_mask(mask, invert=True, grow=0, blur=0)
    step_by_step = shape_mask(step_by_step, invert=False, grow=5, blur=0)
    step_by_step = shape_mask(step_by_step, invert=False, grow=0, blur=3)
    assert np.array_equal(shape_mask(mask, invert=True, grow=5, blur=3), step_by_step)


def test_the_upload_is_not_written_to() -> None:
    """Arrays are not changed in place."""
    mask = noise(20, 30, 1)
    mask.flags.writeable = False
    shape_mask(mask, invert=True, grow=3, blur=2)


def test_a_mask_with_nothing_to_repaint_is_refused() -> None:
    """127 everywhere is empty; one pixel of 128 is not."""
    mask = np.full((9, 9), 127, np.uint8)
    with pytest.raises(InpaintError) as caught:
        require_nonempty(mask)
    assert (caught.value.code, caught.value.field) == (ErrorCode.EMPTY_MASK, "mask")
    mask[4, 4] = 128
    require_nonempty(mask)
