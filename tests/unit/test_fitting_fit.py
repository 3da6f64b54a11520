"""Any picture and mask get a working size that the model takes and a window that holds the mask."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.errors import ErrorCode, InpaintError
from service.fitting import Box, Fitted, Size, fit
from service.fitting.buckets import buckets
from tests.unit.picture_files import Pixels, circle_mask, noise, scene

NATIVE_SIZES = (64, 256, 512)


def fitted(image: Pixels, mask: Pixels, native_size: int = 512, **options: int | None) -> Fitted:
    """Fit with no wishes but the named ones."""
    wishes: dict[str, int | None] = {"height": None, "width": None, "padding_mask_crop": None, **options}
    return fit(image, mask, native_size=native_size, size_multiple=8, **wishes)  # type: ignore[arg-type]


def box_mask(height: int, width: int, box: Box) -> Pixels:
    """(H, W) mask with a white box."""
    mask = np.zeros((height, width), np.uint8)
    box.cut(mask)[:] = 255
    return mask


@st.composite
def masks(draw: st.DrawFn, max_side: int = 3000) -> Pixels:
    """Masks of any shape with a white box anywhere, perhaps of one pixel, perhaps of all."""
    sides = st.one_of(st.integers(1, 40), st.integers(1, max_side))
    height, width = draw(sides), draw(sides)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    extents = (st.one_of(st.just(1), st.just(limit), st.integers(1, limit)) for limit in (height - top, width - left))
    tall, wide = (draw(extent) for extent in extents)
    return box_mask(height, width, Box(left, top, left + wide, top + tall))


def assert_valid(mask: Pixels, result: Fitted) -> None:
    """Every promise about a fit that holds whatever was asked for."""
    window, working = result.placement.window, result.placement.working
    height, width = mask.shape
    assert result.placement.upload == Size(height, width)
    assert 0 <= window.left < window.right <= width
    assert 0 <= window.top < window.bottom <= height
    assert np.count_nonzero(window.cut(mask) >= 128) == np.count_nonzero(mask >= 128)
    assert working.height % 8 == working.width % 8 == 0
    assert result.image.shape == (working.height, working.width, 3)
    assert result.mask.shape == (working.height, working.width)
    assert result.image.dtype == result.mask.dtype == np.uint8
    assert result.mask.max() >= 128 or mask.max() < 128


@settings(max_examples=80)
@given(mask=masks(), native_size=st.sampled_from(NATIVE_SIZES))
@example(mask=np.full((1, 1), 255, np.uint8), native_size=512)
@example(mask=box_mask(8, 2000, Box(1000, 4, 1001, 5)), native_size=512)
@example(mask=box_mask(2000, 8, Box(0, 0, 8, 2000)), native_size=512)
@example(mask=np.zeros((700, 900), np.uint8), native_size=512)
def test_any_picture_gets_a_bucket_and_a_window_around_the_mask(mask: Pixels, native_size: int) -> None:
    """The window lies inside the picture and holds the mask; the working size is a bucket; the mask survives."""
    result = fitted(np.zeros((*mask.shape, 3), np.uint8), mask, native_size)
    assert_valid(mask, result)
    assert result.placement.working in buckets(native_size, 8)
    assert not result.placement.is_padded_crop


@settings(max_examples=40)
@given(mask=masks(600), height=st.sampled_from([None, 64, 200, 512]), width=st.sampled_from([None, 64, 328, 512]))
def test_named_sizes_are_kept_for_any_picture(mask: Pixels, height: int | None, width: int | None) -> None:
    """A named side is the working side; the window is then the whole picture."""
    result = fitted(np.zeros((*mask.shape, 3), np.uint8), mask, height=height, width=width)
    assert_valid(mask, result)
    assert height in (None, result.placement.working.height)
    assert width in (None, result.placement.working.width)
    if height or width:
        assert result.placement.window.size == result.placement.upload


@settings(max_examples=40)
@given(mask=masks(600), padding=st.integers(0, 200), height=st.sampled_from([None, 64, 512]))
def test_padded_crops_are_valid_for_any_picture(mask: Pixels, padding: int, height: int | None) -> None:
    """`padding_mask_crop` works for any shape, thin ones too; sides that are not named are native."""
    result = fitted(np.zeros((*mask.shape, 3), np.uint8), mask, 256, height=height, padding_mask_crop=padding)
    assert_valid(mask, result)
    assert result.placement.is_padded_crop
    assert result.placement.working == Size(height or 256, 256)


@pytest.mark.parametrize("native_size", [32, 64, 96, 256, 320, 512, 768, 1024])
@pytest.mark.parametrize("size_multiple", [8, 16, 32])
def test_buckets_are_what_the_model_takes(native_size: int, size_multiple: int) -> None:
    """Buckets have about the native area, aspects from 1:2 to 2:1, and come upright as well as lying."""
    sizes = buckets(native_size, size_multiple)
    assert sizes[0] == Size(native_size, native_size)
    assert len(set(sizes)) == len(sizes)
    for size in sizes:
        assert size.height % size_multiple == size.width % size_multiple == 0
        assert 0.5 <= size.aspect <= 2
        assert 0.9 <= size.height * size.width / native_size**2 <= 1.11
        assert Size(size.width, size.height) in sizes


def test_buckets_of_512() -> None:
    """The buckets of a 512 model, as documented."""
    landscape = {Size(448, 576), Size(384, 640), Size(384, 704)}
    portrait = {Size(size.width, size.height) for size in landscape}
    assert set(buckets(512, 8)) == {Size(512, 512), *landscape, *portrait}


@pytest.mark.parametrize("bucket", buckets(512, 8), ids=str)
def test_a_picture_of_a_buckets_size_is_used_byte_for_byte(bucket: Size) -> None:
    """Nothing is resampled when the picture already has a bucket's size."""
    image, mask = noise(bucket.height, bucket.width), noise(bucket.height, bucket.width, 1)
    result = fitted(image, mask)
    assert result.placement.working == bucket
    assert np.array_equal(result.image, image)
    assert np.array_equal(result.mask, mask)


def test_a_slightly_odd_shape_is_cut_not_stretched() -> None:
    """427x640 gives a 384x640 window around the mask, pixel for pixel, when the mask fits into it."""
    image = noise(427, 640)
    result = fitted(image, circle_mask(427, 640, (250, 300), 80))
    window = result.placement.window
    assert result.placement.working == window.size == Size(384, 640)
    assert np.array_equal(result.image, window.cut(image))


def test_a_mask_across_an_odd_shape_takes_the_whole_picture() -> None:
    """When the mask needs all of a 427x640 picture, all of it is used, a little stretched."""
    image, mask = noise(427, 640), np.full((427, 640), 255, np.uint8)
    result = fitted(image, mask)
    assert result.placement.window == Box(0, 0, 640, 427)
    expected = Image.fromarray(image).resize((640, 384), resample=Image.Resampling.LANCZOS)
    assert np.array_equal(result.image, np.asarray(expected))


def test_a_small_mask_in_a_large_picture_is_painted_at_full_resolution() -> None:
    """Of 2000x1500 the window around a small mask has the bucket's own pixels: 1:1, centred, undistorted."""
    image, mask = noise(1500, 2000), circle_mask(1500, 2000, (600, 900), 50)
    result = fitted(image, mask)
    window = result.placement.window
    assert window.size == result.placement.working == Size(448, 576)
    assert np.array_equal(result.image, window.cut(image))
    assert abs((window.left + window.right) / 2 - 900.5) <= 1
    assert abs((window.top + window.bottom) / 2 - 600.5) <= 1


def test_a_large_mask_keeps_context_and_shape() -> None:
    """A large mask in a large picture gets half its size of context on each side, in the bucket's aspect."""
    mask = box_mask(3000, 4000, Box(1500, 1000, 2300, 1700))
    result = fitted(np.zeros((3000, 4000, 3), np.uint8), mask)
    window = result.placement.window
    assert window.size.width >= 2 * 800
    assert window.size.height >= 2 * 700
    assert window.size.aspect == pytest.approx(result.placement.working.aspect, rel=0.01)


@settings(max_examples=40)
@given(mask=masks())
def test_the_window_is_stretched_only_where_the_mask_or_the_buckets_need_it(mask: Pixels) -> None:
    """Beyond what neighbouring buckets differ by, a window leaves the bucket's aspect only along the mask."""
    placement = fitted(np.zeros((*mask.shape, 3), np.uint8), mask).placement
    window, working = placement.window.size, placement.working
    rows, columns = np.nonzero(mask)
    mask_size = Size(int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)
    if window.width > round(window.height * working.aspect * 1.26) + 1:
        assert window.width == mask_size.width
    if window.height > round(window.width / working.aspect * 1.26) + 1:
        assert window.height == mask_size.height


@pytest.mark.parametrize("size", [Size(1500, 2000), Size(427, 640), Size(100, 100)])
def test_greys_below_half_do_not_widen_the_window(size: Size) -> None:
    """The faint noise that lossy masks carry has no say in the window."""
    mask = circle_mask(size.height, size.width, (40, 50), 20)
    image = np.zeros((size.height, size.width, 3), np.uint8)
    noisy = np.maximum(mask, noise(size.height, size.width, 1) % 16)
    assert fitted(image, noisy).placement == fitted(image, mask).placement


@pytest.mark.parametrize("options", [{}, {"height": 64, "width": 64}, {"padding_mask_crop": 4000}])
@pytest.mark.parametrize("centre", [(0, 0), (777, 1333), (1499, 1999)])
def test_a_one_pixel_mask_survives_scaling_down(options: dict[str, int], centre: tuple[int, int]) -> None:
    """A single masked pixel is still masked at working size, at its place, where the filter would lose it."""
    mask = np.zeros((1500, 2000), np.uint8)
    mask[centre] = 255
    result = fitted(scene(1500, 2000), mask, 64, **options)
    ((row, column),) = np.argwhere(result.mask >= 128)
    window, working = result.placement.window, result.placement.working
    scale = max(window.size.width / working.width, window.size.height / working.height)
    inner_top = (working.height - window.size.height / scale) / 2 if "padding_mask_crop" in options else 0
    scale_down = scale if "padding_mask_crop" in options else window.size.height / working.height
    assert abs(row + 0.5 - inner_top - (centre[0] + 0.5 - window.top) / scale_down) <= 1
    assert abs(column + 0.5 - (centre[1] + 0.5 - window.left) * working.width / window.size.width) <= 1


def test_a_mask_that_survives_is_left_to_the_filter() -> None:
    """Only a mask that was lost altogether is mended; any other is Pillow's result unchanged."""
    mask = circle_mask(900, 900, (300, 300), 200)
    mask[800, 800] = 255
    result = fitted(np.zeros((900, 900, 3), np.uint8), mask, height=64, width=64)
    expected = Image.fromarray(mask).resize((64, 64), resample=Image.Resampling.LANCZOS)
    assert np.array_equal(result.mask, np.asarray(expected))


@pytest.mark.parametrize(
    ("picture", "options", "working"),
    [
        (Size(427, 640), {"height": 512}, Size(512, 768)),
        (Size(427, 640), {"width": 512}, Size(344, 512)),
        (Size(640, 427), {"height": 256}, Size(256, 168)),
        (Size(1, 2000), {"height": 64}, Size(64, 256)),
        (Size(1, 2000), {"width": 64}, Size(16, 64)),
        (Size(2000, 1), {"height": 8}, Size(8, 8)),
    ],
)
def test_a_missing_side_follows_the_picture(picture: Size, options: dict[str, int], working: Size) -> None:
    """With one side named the other keeps the picture's shape, within 1:4, as a multiple of 8."""
    mask = np.full((picture.height, picture.width), 255, np.uint8)
    assert fitted(noise(picture.height, picture.width), mask, **options).placement.working == working


@pytest.mark.parametrize("options", [{"height": 0}, {"width": 12}, {"height": -8}, {"width": 511, "height": 512}])
def test_sides_that_the_model_does_not_take_are_refused(options: dict[str, int]) -> None:
    """A side that is no positive multiple of 8 is `out_of_range`, on the field that is wrong."""
    with pytest.raises(InpaintError) as caught:
        fitted(noise(16, 16), noise(16, 16, 1), **options)
    assert caught.value.code is ErrorCode.OUT_OF_RANGE
    assert caught.value.field == next(name for name, side in options.items() if side < 8 or side % 8)


def test_a_black_mask_cannot_be_cropped_around() -> None:
    """A crop around nothing is `empty_mask`, not a division by zero."""
    with pytest.raises(InpaintError) as caught:
        fitted(noise(16, 16), np.zeros((16, 16), np.uint8), padding_mask_crop=8)
    assert caught.value.code is ErrorCode.EMPTY_MASK
