"""What was not to be repainted comes back bit-identical, at the upload's own size."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from service.fitting import (
    Fitted,
    Placement,
    Size,
    black_picture,
    fit,
    opaque_where_painted,
    overlay,
    paste_back,
    paste_back_floats,
    result_size,
)
from service.fitting.placement import Box
from service.imaging import decode_upload, encode_image, shape_mask
from tests.unit.picture_files import Pixels, circle_mask, noise, saved

WISHES = [
    {},
    {"height": 64, "width": 200},
    {"width": 128},
    {"padding_mask_crop": 16},
    {"padding_mask_crop": 0, "height": 64, "width": 96},
]


def fitted(image: Pixels, mask: Pixels, **options: int | None) -> Fitted:
    """Fit for a model of 256 with no wishes but the named ones."""
    wishes: dict[str, int | None] = {"height": None, "width": None, "padding_mask_crop": None, **options}
    return fit(image, mask, native_size=256, size_multiple=8, **wishes)  # type: ignore[arg-type]


def painted_for(placement: Placement) -> Pixels:
    """What a model might paint: noise at working size."""
    return noise(placement.working.height, placement.working.width, seed=99)


@pytest.mark.parametrize("wishes", WISHES, ids=str)
@pytest.mark.parametrize("size", [(427, 640), (640, 427), (100, 90), (650, 900), (8, 900), (1, 1)])
def test_outside_the_mask_nothing_changes(size: tuple[int, int], wishes: dict[str, int]) -> None:
    """From file to file: pixels whose mask is black are bit-identical to the upload, whatever is painted."""
    height, width = size
    mask = circle_mask(height, width, (height // 3, width // 2), max(1, min(size) // 5))
    rgb = noise(height, width)
    upload = decode_upload(saved(rgb), saved(mask), max_pixels=16_777_216)
    result = fitted(upload.image, upload.mask, **wishes)
    pasted = paste_back(upload.image, upload.mask, result.placement, painted_for(result.placement))
    returned = np.asarray(Image.open(BytesIO(encode_image(pasted, "png"))))
    kept = mask < 128
    assert returned.shape == rgb.shape
    assert np.array_equal(returned[kept], rgb[kept])
    # Noise meets noise: nearly every painted pixel differs.
    assert np.mean(np.any(returned != rgb, axis=-1)[~kept]) > 0.9


@settings(max_examples=40)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 999), wishes=st.sampled_from(WISHES))
def test_any_grey_mask_is_cut_at_half(height: int, width: int, seed: int, wishes: dict[str, int]) -> None:
    """Without feathering every pixel below 128 is the upload's own, the greys too."""
    image, mask = noise(height, width, seed=seed), noise(height, width, 1, seed + 1)
    placement = fitted(image, np.maximum(mask, 1), **wishes).placement
    pasted = paste_back(image, mask, placement, painted_for(placement))
    assert np.array_equal(pasted[mask < 128], image[mask < 128])


@settings(max_examples=40)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 999), wishes=st.sampled_from(WISHES))
def test_a_feathered_mask_keeps_black_exactly(height: int, width: int, seed: int, wishes: dict[str, int]) -> None:
    """With feathering every pixel of mask 0 is the upload's own, and none leaves the range of the two pictures."""
    image = noise(height, width, seed=seed)
    mask = np.where(noise(height, width, 1, seed + 1) < 100, 0, noise(height, width, 1, seed + 2)).astype(np.uint8)
    mask[0, 0] = 255
    placement = fitted(image, mask, **wishes).placement
    painted = painted_for(placement)
    pasted = paste_back(image, mask, placement, painted, feather=True)
    assert np.array_equal(pasted[mask == 0], image[mask == 0])
    whole = paste_back(image, np.full_like(mask, 255), placement, painted)
    assert np.all(pasted >= np.minimum(image, whole))
    assert np.all(pasted <= np.maximum(image, whole))
    assert np.array_equal(pasted[mask == 255], whole[mask == 255])


def test_feathering_blends_by_the_masks_grey() -> None:
    """A grey of the mask is the painted picture's share of the pixel."""
    image, mask = np.full((256, 256, 3), 100, np.uint8), np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    placement = fitted(image, mask).placement
    pasted = paste_back(image, mask, placement, np.full((256, 256, 3), 200, np.uint8), feather=True)
    assert np.abs(pasted[0, :, 0] - (100 + 100 * np.arange(256) / 255)).max() <= 0.51


def test_where_nothing_was_scaled_the_painted_pixels_are_the_models() -> None:
    """At 1:1 the painted pixels come back bit-identical too."""
    image, mask = noise(1500, 2000), circle_mask(1500, 2000, (700, 700), 40)
    placement = fitted(image, mask).placement
    painted = painted_for(placement)
    pasted = paste_back(image, mask, placement, painted)
    inside = placement.window.cut(mask) >= 128
    assert np.array_equal(placement.window.cut(pasted)[inside], painted[inside])


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_paint_lands_where_it_belongs(wishes: dict[str, int]) -> None:
    """Painting the fitted picture itself back gives nearly the upload: no shift, no wrong scale."""
    rows, columns = np.mgrid[0:427, 0:640]
    image = np.dstack([rows // 2, columns // 3, (rows + columns) // 6]).astype(np.uint8)
    mask = circle_mask(427, 640, (200, 300), 90)
    result = fitted(image, mask, **wishes)
    pasted = paste_back(image, mask, result.placement, result.image)
    assert np.abs(pasted.astype(int) - image).max() <= 3


def test_paste_back_after_mask_shaping() -> None:
    """A grown and blurred mask feathers within its reach, and beyond it the upload is untouched."""
    image, mask = noise(400, 500), circle_mask(400, 500, (200, 250), 40)
    shaped = shape_mask(mask, invert=False, grow=10, blur=6)
    placement = fitted(image, shaped).placement
    pasted = paste_back(image, shaped, placement, painted_for(placement), feather=True)
    assert np.array_equal(pasted[shaped == 0], image[shaped == 0])
    partly = (shaped > 60) & (shaped < 200) & np.isin(np.arange(500), range(150, 350))
    assert np.mean(np.any(pasted[partly] != image[partly], axis=-1)) > 0.9


@pytest.mark.parametrize("size", [(427, 640), (9, 700), (1, 1)])
def test_the_overlay_keeps_black_exactly(size: tuple[int, int]) -> None:
    """Stock's overlay too leaves pixels of mask 0 as they were, and has the upload's size."""
    height, width = size
    image, mask = noise(height, width), circle_mask(height, width, (height // 2, width // 2), 30)
    placement = fitted(image, mask, padding_mask_crop=8).placement
    result = overlay(image, mask, placement, painted_for(placement))
    assert result.shape == image.shape
    assert np.array_equal(result[mask == 0], image[mask == 0])
    assert np.any(result[mask > 0] != image[mask > 0])


def test_long_thin_crops_need_no_more_memory_than_the_upload() -> None:
    """A 60000x1 crop is pasted back without being blown up to 60000x60000 first."""
    image, mask = noise(1, 60_000), np.full((1, 60_000), 255, np.uint8)
    placement = fitted(image, mask, padding_mask_crop=8).placement
    assert paste_back(image, mask, placement, painted_for(placement)).shape == image.shape


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_where_nothing_was_scaled_every_pixel_is_one_or_the_other(height: int, width: int, seed: int) -> None:
    """The painted pixel from half white on, and else the upload's own; however the arrays lie in memory."""
    upload = noise(2 * height, 3 * width, seed=seed)[::2, ::3]
    painted = np.ascontiguousarray(noise(height, width, seed=seed + 1).transpose(2, 0, 1)).transpose(1, 2, 0)
    mask = noise(height, width, channels=1, seed=seed + 2)
    whole = Box(0, 0, width, height)
    placement = Placement(upload=whole.size, working=whole.size, window=whole, is_padded_crop=False)
    expected = np.where(mask[..., None] >= 128, painted, upload)
    assert np.array_equal(paste_back(upload, mask, placement, painted), expected)


def test_the_upload_is_not_written_to() -> None:
    """Pasting works on a copy."""
    image, mask = noise(300, 300), circle_mask(300, 300, (150, 150), 50)
    image.flags.writeable = mask.flags.writeable = False
    before = image.copy()
    for wishes in WISHES:
        result = fitted(image, mask, **wishes)
        paste_back(image, mask, result.placement, painted_for(result.placement), feather=True)
    assert np.array_equal(image, before)


def test_what_was_painted_is_opaque() -> None:
    """The alpha that goes with a pasted picture is the upload's outside the mask and opaque inside."""
    alpha, mask = noise(20, 30, 1), noise(20, 30, 1, 1)
    hard = opaque_where_painted(alpha, mask)
    assert np.array_equal(hard[mask < 128], alpha[mask < 128])
    assert np.all(hard[mask >= 128] == 255)
    soft = opaque_where_painted(alpha, mask, feather=True)
    assert np.array_equal(soft[mask == 0], alpha[mask == 0])
    assert np.all(soft[mask == 255] == 255)
    assert np.all(soft >= alpha)


def test_black_pictures_have_the_size_of_the_result() -> None:
    """A flagged picture is black at the size that the client would have got."""
    image, mask = noise(427, 640), circle_mask(427, 640, (200, 300), 40)
    plain = fitted(image, mask, height=128, width=192).placement
    cropped = fitted(image, mask, padding_mask_crop=4).placement
    assert result_size(plain, composite=True) == Size(427, 640)
    assert result_size(plain, composite=False) == Size(128, 192)
    assert result_size(cropped, composite=False) == Size(427, 640)
    black = black_picture(plain, composite=False)
    assert (black.shape, black.dtype, black.max()) == ((128, 192, 3), np.uint8, 0)


# --- floats ---------------------------------------------------------------------------


@pytest.mark.parametrize("feather", [False, True])
@pytest.mark.parametrize("size", [(256, 256), (427, 640), (100, 90)])
def test_floats_are_pasted_as_pixels_are(size: tuple[int, int], feather: bool) -> None:
    """Outside the mask exactly the upload's levels over 255; inside what `paste_back` gives, but for its rounding."""
    height, width = size
    image = noise(height, width)
    mask = shape_mask(
        circle_mask(height, width, (height // 2, width // 2), min(size) // 4), invert=False, grow=0, blur=4 * feather
    )
    placement = fitted(image, mask).placement
    # Smooth, as pictures are: of noise, a resize in levels cuts off what goes beyond black and white half-way.
    painted = np.asarray(Image.fromarray(painted_for(placement)).filter(ImageFilter.GaussianBlur(6)))
    pixels = paste_back(image, mask, placement, painted, feather=feather)
    floats = paste_back_floats(image, mask, placement, painted.astype(np.float32) / 255, feather=feather)
    assert floats.dtype == np.float32
    assert np.array_equal(floats[mask == 0], (image.astype(np.float32) / np.float32(255))[mask == 0])
    assert np.abs(floats * 255 - pixels).max() <= 2  # Pillow rounds after each direction of a resize, and in a blend.
    assert 0 <= floats.min() <= floats.max() <= 1
