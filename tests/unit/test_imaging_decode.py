"""Pictures of every kind that clients have decode to the pixels that they see."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from service.errors import ErrorCode, InpaintError
from service.imaging import Upload, decode_upload, picture_size
from tests.unit.picture_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    Pixels,
    chunk,
    exif,
    noise,
    png,
    saved,
    scene,
    small_png,
)

MAX_PIXELS = 1_000_000


def decode(image: bytes, mask: bytes | None = None) -> Upload:
    """Decode with a black mask of the picture's size unless one is given."""
    if mask is None:
        upright = ImageOps.exif_transpose(Image.open(BytesIO(image)))
        mask = saved(Image.new("L", upright.size))
    return decode_upload(image, mask, max_pixels=MAX_PIXELS)


def decode_mask(mask: bytes, height: int, width: int) -> Pixels:
    """Decode a mask beside a black picture."""
    return decode_upload(saved(Image.new("RGB", (width, height))), mask, max_pixels=MAX_PIXELS).mask


@pytest.mark.parametrize("options", [("PNG", {}), ("PNG", {"optimize": True}), ("WEBP", {"lossless": True})])
def test_lossless_pictures_keep_every_value(options: tuple[str, dict[str, object]]) -> None:
    """Lossless files, here 427x640, decode to exactly their pixels."""
    pixels = noise(427, 640)
    image_format, arguments = options
    upload = decode(saved(pixels, image_format, **arguments))
    assert np.array_equal(upload.image, pixels)
    assert upload.image.dtype == np.uint8
    assert upload.mask.shape == (427, 640)
    assert upload.alpha is None


@pytest.mark.parametrize(
    ("image_format", "arguments"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WEBP", {"quality": 95}),
    ],
)
def test_lossy_pictures_come_near(image_format: str, arguments: dict[str, object]) -> None:
    """Baseline and progressive JPEG and lossy WebP decode to nearly their pixels."""
    pixels = scene(120, 90)
    image = decode(saved(pixels, image_format, **arguments)).image
    assert np.abs(image.astype(int) - pixels).max() <= 8


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_picture_and_mask(orientation: int, image_format: str) -> None:
    """All eight orientations, in each format, turn picture, mask and the size told ahead as `exif_transpose` does."""
    stored = saved(scene(40, 60), image_format, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(BytesIO(stored)))
    upload = decode(stored, stored)
    assert np.array_equal(upload.image, np.asarray(expected.convert("RGB")))
    assert np.array_equal(upload.mask, np.asarray(expected.convert("L")))
    assert picture_size(stored, "image", max_pixels=MAX_PIXELS) == upload.image.shape[:2]


def test_a_turned_picture_takes_an_upright_mask() -> None:
    """A mask drawn over the upright picture, as browsers show it, fits a JPEG that is stored lying."""
    stored = saved(scene(40, 60), "JPEG", exif=exif(6))
    upload = decode(stored, saved(noise(60, 40, 1)))
    assert upload.image.shape == (60, 40, 3)
    assert np.array_equal(upload.mask, noise(60, 40, 1))


@pytest.mark.parametrize("value", [0, 9, 255])
def test_unknown_orientations_are_ignored(value: int) -> None:
    """An orientation that EXIF does not know leaves the picture as it is."""
    assert decode(saved(noise(8, 12), exif=exif(value))).image.shape == (8, 12, 3)


def test_grey_and_one_bit_pictures() -> None:
    """Grey and black-and-white pictures become RGB of equal channels."""
    grey = noise(20, 30, 1)
    assert np.array_equal(decode(saved(grey)).image, np.dstack([grey] * 3))
    assert np.array_equal(decode(saved(scene(16, 16)[..., 0], "JPEG")).image[..., 0], decode_grey_jpeg())
    bits = Image.fromarray(grey).convert("1")
    expected = np.where(np.asarray(bits), 255, 0)
    assert np.array_equal(decode(saved(bits)).image[..., 1], expected)
    assert np.array_equal(decode_mask(saved(bits), 20, 30), expected)


def decode_grey_jpeg() -> Pixels:
    """What Pillow makes of the grey JPEG above."""
    return np.asarray(Image.open(BytesIO(saved(scene(16, 16)[..., 0], "JPEG"))))


def test_rgb_under_alpha_is_the_files_own() -> None:
    """Nothing is composited onto a background: RGB under a transparent alpha comes through untouched."""
    rgba = noise(20, 30, 4)
    for data in (saved(rgba), saved(rgba, "WEBP", lossless=True, exact=True)):
        upload = decode(data)
        assert np.array_equal(upload.image, rgba[..., :3])
        assert upload.alpha is not None
        assert np.array_equal(upload.alpha, rgba[..., 3])


def test_grey_with_alpha() -> None:
    """Grey with alpha, 8 and 16 bits deep, keeps both."""
    pixels = noise(20, 30, 2)
    shallow = decode(saved(Image.fromarray(pixels, "LA")))
    deep = decode(png(20, 30, 16, GREY_ALPHA, [np.repeat(row, 2).tobytes() for row in pixels.reshape(20, -1)]))
    for upload in (shallow, deep):
        assert np.array_equal(upload.image, np.dstack([pixels[..., 0]] * 3))
        assert upload.alpha is not None
        assert np.array_equal(upload.alpha, pixels[..., 1])


def test_an_opaque_alpha_is_no_alpha() -> None:
    """A picture whose alpha is 255 everywhere counts as opaque."""
    rgba = noise(5, 5, 4)
    rgba[..., 3] = 255
    assert decode(saved(rgba)).alpha is None


def test_palette_pictures() -> None:
    """Palette pictures decode to their colours, with transparency of one entry, of many, or none."""
    palette = Image.fromarray(noise(20, 30)).quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    indices = np.asarray(palette)
    plain, one = decode(saved(palette)), decode(saved(palette, transparency=3))
    many = decode(saved(palette, transparency=bytes(range(0, 160, 10))))
    for upload in (plain, one, many):
        assert np.array_equal(upload.image, colours)
    assert plain.alpha is None
    assert np.array_equal(one.alpha, np.where(indices == 3, 0, 255))
    assert np.array_equal(many.alpha, indices * 10)


def test_sixteen_bit_samples_keep_their_high_byte() -> None:
    """16-bit grey and RGB map 0..65535 onto 0..255 by the high byte, as pictures and as masks: no saturation."""
    deep = np.random.default_rng(1).integers(0, 65536, (20, 30, 3)).astype(">u2")
    deep[0, 0], deep[0, 1], deep[0, 2] = 0, 65535, 256
    grey = png(20, 30, 16, GREY, [row.tobytes() for row in deep[..., 0]])
    colour = png(20, 30, 16, RGB, [row.tobytes() for row in deep])
    expected = (deep >> 8).astype(np.uint8)
    assert np.array_equal(decode(grey).image, np.dstack([expected[..., 0]] * 3))
    assert np.array_equal(decode(colour).image, expected)
    assert np.array_equal(decode_mask(grey, 20, 30), expected[..., 0])


def test_sixteen_bit_alpha() -> None:
    """16-bit RGBA keeps the high byte of all four channels."""
    deep = np.random.default_rng(2).integers(0, 65536, (6, 7, 4)).astype(">u2")
    upload = decode(png(6, 7, 16, RGBA, [row.tobytes() for row in deep]))
    assert np.array_equal(np.dstack([upload.image, upload.alpha]), deep >> 8)


@pytest.mark.parametrize(
    ("bit_depth", "colour_type", "row", "key", "alpha"),
    [
        (1, GREY, b"\x50", (1,), [255, 0, 255, 0]),
        (2, GREY, b"\x1b", (3,), [255, 255, 255, 0]),
        (4, GREY, b"\x01\x2f", (2,), [255, 255, 0, 255]),
        (8, GREY, b"\x00\x07\x08\xff", (7,), [255, 0, 255, 255]),
        (16, GREY, b"\x12\x34\x12\x35\x00\x00\x12\x34", (0x1234,), [0, 255, 255, 0]),
        (8, RGB, b"\1\2\3\1\2\4\0\0\0\1\2\3", (1, 2, 3), [0, 255, 255, 0]),
        (16, RGB, b"\1\0\2\0\3\0" + bytes(12) + b"\1\0\2\0\3\0", (0x100, 0x200, 0x300), [0, 255, 255, 0]),
    ],
)
def test_a_transparent_colour_is_alpha_at_every_bit_depth(
    bit_depth: int, colour_type: int, row: bytes, key: tuple[int, ...], alpha: list[int]
) -> None:
    """A PNG's single transparent colour, stated in the file's own bit depth, marks just its pixels."""
    data = png(1, 4, bit_depth, colour_type, [row], chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    upload = decode(data)
    assert upload.alpha is not None
    assert upload.alpha.tolist() == [alpha]


def test_cmyk_jpeg() -> None:
    """A CMYK JPEG decodes to RGB, not to its negative."""
    pixels = scene(40, 60)
    data = saved(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(data).image.astype(int) - pixels).max() <= 8


def test_phone_files_of_several_pictures_are_their_first() -> None:
    """A JPEG with further pictures behind it (MPO, as phones write) is a still picture: the first."""
    first, second = Image.fromarray(scene(40, 60)), Image.fromarray(255 - scene(40, 60))
    data = saved(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(decode(data).image.astype(int) - scene(40, 60)).max() <= 8


def test_without_a_mask_file_what_is_transparent_is_repainted() -> None:
    """The picture's alpha is the mask, transparent = white, and does not come back as alpha."""
    rgba = noise(20, 30, 4)
    upload = decode_upload(saved(rgba), None, max_pixels=MAX_PIXELS)
    assert np.array_equal(upload.mask, 255 - rgba[..., 3])
    assert np.array_equal(upload.image, rgba[..., :3])
    assert upload.alpha is None


def test_without_mask_and_alpha_the_client_is_told_what_is_missing() -> None:
    """An opaque picture alone is refused on the field `mask`."""
    with pytest.raises(InpaintError, match="mask file") as caught:
        decode_upload(saved(noise(8, 8)), None, max_pixels=MAX_PIXELS)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "mask")


def test_masks_count_by_their_luminance_over_black() -> None:
    """Colour masks count by luminance, and white under a transparent alpha is black."""
    colours = noise(20, 30)
    assert np.array_equal(decode_mask(saved(colours), 20, 30), np.asarray(Image.fromarray(colours).convert("L")))
    strokes = np.full((1, 3, 4), 255, np.uint8)
    strokes[0, :, 3] = [0, 128, 255]
    assert decode_mask(saved(strokes), 1, 3).tolist() == [[0, 128, 255]]


def test_a_masks_alpha_can_be_the_mask() -> None:
    """For wire formats where transparent means repaint, the mask file's alpha counts, and is then required."""
    rgba = noise(20, 30, 4)
    picture = saved(noise(20, 30))
    upload = decode_upload(picture, saved(rgba), max_pixels=MAX_PIXELS, mask_channel="alpha")
    assert np.array_equal(upload.mask, 255 - rgba[..., 3])
    with pytest.raises(InpaintError) as caught:
        decode_upload(picture, picture, max_pixels=MAX_PIXELS, mask_channel="alpha")
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "mask")


def test_a_masks_opacity_can_be_the_mask() -> None:
    """Where opaque means repaint, the alpha counts as it is, but luminance does where the file is opaque throughout."""
    rgba = noise(20, 30, 4)
    rgba[0, 0, 3] = 254
    picture = saved(noise(20, 30))
    upload = decode_upload(picture, saved(rgba), max_pixels=MAX_PIXELS, mask_channel="opacity")
    assert np.array_equal(upload.mask, rgba[..., 3])
    rgba[..., 3] = 255
    for mask in (rgba, rgba[..., :3]):
        upload = decode_upload(picture, saved(mask), max_pixels=MAX_PIXELS, mask_channel="opacity")
        assert np.array_equal(upload.mask, np.asarray(Image.fromarray(rgba[..., :3]).convert("L")))


def test_without_a_mask_opacity_means_everything() -> None:
    """Where opaque means repaint, no mask means the whole picture, and the picture's own alpha stays its own."""
    rgba = noise(20, 30, 4)
    upload = decode_upload(saved(rgba), None, max_pixels=MAX_PIXELS, mask_channel="opacity")
    assert (upload.mask == 255).all()
    assert upload.alpha is not None
    assert np.array_equal(upload.alpha, rgba[..., 3])


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    """A mask must have the picture's size; the answer names both."""
    with pytest.raises(InpaintError, match=r"30x20.*31x20") as caught:
        decode(saved(noise(20, 31)), saved(noise(20, 30, 1)))
    assert (caught.value.code, caught.value.field) == (ErrorCode.MASK_MISMATCH, "mask")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_profile_of_rgb_is_kept(image_format: str) -> None:
    """An RGB profile comes along, so that the result shows the colours that the upload showed."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(saved(scene(8, 8), image_format, icc_profile=profile)).icc_profile == profile


def test_profiles_that_no_longer_fit_are_dropped() -> None:
    """A profile of other samples than RGB, or of absurd size, or no profile at all, is not attached."""
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey_profile = rgb_profile[:16] + b"GRAY" + rgb_profile[20:]
    cmyk = Image.fromarray(scene(8, 8)).convert("CMYK")
    assert decode(saved(scene(8, 8), icc_profile=grey_profile)).icc_profile is None
    assert decode(saved(scene(8, 8)[..., 0], icc_profile=rgb_profile)).icc_profile is None
    assert decode(saved(cmyk, "JPEG", icc_profile=rgb_profile)).icc_profile is None
    assert decode(saved(scene(8, 8), "JPEG", icc_profile=rgb_profile + bytes(2**20))).icc_profile is None
    assert decode(saved(scene(8, 8), icc_profile=b"no profile")).icc_profile is None


def test_text_named_like_a_property_is_only_text() -> None:
    """Text chunks called "transparency" or "icc_profile" mean neither."""
    data = small_png(chunk(b"tEXt", b"transparency\x000"), chunk(b"tEXt", b"icc_profile\0x"))
    upload = decode(data)
    assert upload.alpha is None
    assert upload.icc_profile is None


def test_single_pixels_and_thin_pictures() -> None:
    """1x1 and 8x2000 decode like anything else."""
    for height, width in ((1, 1), (8, 2000), (2000, 8)):
        assert np.array_equal(decode(saved(noise(height, width))).image, noise(height, width))


def test_interlaced_and_low_depth_palettes() -> None:
    """A 2-bit palette PNG decodes to its colours."""
    data = png(1, 4, 2, PALETTE, [b"\x1b"], chunk(b"PLTE", bytes(range(12))))
    assert decode(data).image.tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]]
