"""Results are encoded so that what should be bit-identical stays so."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from service.errors import ErrorCode, InpaintError
from service.imaging import MEDIA_TYPES, ImageFormat, blur_flagged, encode_image, require_encodable
from service.imaging.formats import check_png
from tests.unit.picture_files import noise, scene


def opened(data: bytes) -> Image.Image:
    """The encoded picture."""
    return Image.open(BytesIO(data))


@settings(max_examples=40)
@given(height=st.integers(1, 40), width=st.integers(1, 40), channels=st.sampled_from([3, 4]), seed=st.integers(0, 999))
def test_png_and_webp_lose_nothing(height: int, width: int, channels: int, seed: int) -> None:
    """PNG and WebP of any size give back every value, RGB under a transparent alpha included."""
    pixels = noise(height, width, channels, seed)
    alpha = pixels[..., 3] // 2 if channels == 4 else None
    expected = pixels if alpha is None else np.dstack([pixels[..., :3], alpha])
    for image_format in ("png", "webp"):
        data = encode_image(pixels[..., :3], image_format, alpha=alpha)
        assert np.array_equal(np.asarray(opened(data)), expected)


def test_the_png_is_well_formed() -> None:
    """The PNG passes a strict check of its chunks, and Pillow's own."""
    data = encode_image(scene(427, 640), "png", icc_profile=b"x" * 3000)
    check_png(data)
    image = opened(data)
    image.verify()
    assert (image.format, image.size, image.mode) == ("PNG", (640, 427), "RGB")


def test_smooth_pictures_compress() -> None:
    """The fast PNG is a fraction of the pixels for smooth pictures, and hardly larger than them at worst."""
    assert len(encode_image(scene(512, 512), "png")) < 512 * 512 * 3 / 10
    assert len(encode_image(noise(512, 512), "png")) < 512 * 512 * 3 * 1.01


def test_jpeg_is_near_and_opaque() -> None:
    """JPEG is of high quality, keeps colour resolution, and has no alpha."""
    pixels = scene(120, 90)
    image = opened(encode_image(pixels, "jpeg", alpha=np.zeros((120, 90), np.uint8)))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_quality_trades_size_for_loss(image_format: ImageFormat) -> None:
    """A lower quality is smaller and further from the picture; PNG has none and stays exact."""
    pixels = noise(64, 64)
    files = [encode_image(pixels, image_format, quality=quality) for quality in (5, 50, 100)]
    errors = [np.abs(np.asarray(opened(data)).astype(int) - pixels).mean() for data in files]
    assert len(files[0]) < len(files[1]) < len(files[2])
    assert errors[0] > errors[1] > errors[2]
    assert encode_image(pixels, "png", quality=5) == encode_image(pixels, "png")


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_profile_is_attached(image_format: ImageFormat) -> None:
    """A colour profile of the upload is in the result, and none is invented."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert opened(encode_image(scene(8, 8), image_format, icc_profile=profile)).info["icc_profile"] == profile
    assert "icc_profile" not in opened(encode_image(scene(8, 8), image_format)).info


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_media_types_are_those_of_the_files(image_format: ImageFormat) -> None:
    """Each format's media type is what its files are."""
    assert opened(encode_image(scene(8, 8), image_format)).get_format_mimetype() == MEDIA_TYPES[image_format]


@pytest.mark.parametrize(("image_format", "side"), [("webp", 16383), ("jpeg", 65500)])
def test_sizes_that_a_format_cannot_hold_are_refused(image_format: ImageFormat, side: int) -> None:
    """One pixel too many for the format is `invalid_field`, beforehand and when encoding; the limit itself works."""
    assert opened(encode_image(np.zeros((1, side, 3), np.uint8), image_format)).size == (side, 1)
    for refused in (
        lambda: require_encodable(image_format, side + 1, 1),
        lambda: encode_image(np.zeros((1, side + 1, 3), np.uint8), image_format),
    ):
        with pytest.raises(InpaintError) as caught:
            refused()
        assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "output_format")
    require_encodable("png", side + 1, 1)


@pytest.mark.parametrize("size", [(1, 1), (8, 600), (512, 512)])
def test_a_blurred_picture_shows_nothing(size: tuple[int, int]) -> None:
    """Fine detail is gone from a blurred picture, and its size stays."""
    pixels = noise(*size)
    blurred = blur_flagged(pixels)
    assert blurred.shape == pixels.shape
    assert np.abs(np.diff(blurred.astype(int), axis=0)).max(initial=0) <= 4
    assert np.abs(np.diff(blurred.astype(int), axis=1)).max(initial=0) <= 4
