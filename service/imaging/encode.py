"""From arrays to the bytes that clients get."""

from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from service.errors import ErrorCode, InpaintError
from service.imaging.png import encode_png
from service.request import Floats, Pixels

ImageFormat = Literal["png", "jpeg", "webp"]
ArrayFormat = Literal["npy", "latent"]
OutputFormat = Literal["png", "jpeg", "webp", "npy", "latent"]

MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
ARRAY_MEDIA_TYPE = "application/x-npy"
"""Of both array formats."""

JPEG_QUALITY = 95

# What the file formats themselves can state.
_MAX_SIDE: dict[OutputFormat, int] = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}


def encode_image(
    pixels: Pixels,
    image_format: ImageFormat,
    *,
    alpha: Pixels | None = None,
    icc_profile: bytes | None = None,
    quality: int | None = None,
) -> bytes:
    """Encode a picture: PNG and WebP without loss, JPEG at quality 95 with full colour resolution.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        image_format: What to encode as.
        alpha: (H, W) uint8 opacity; JPEG has none and drops it.
        icc_profile: Colour profile to attach.
        quality: Of JPEG, and of WebP, which then loses a little, too: 0 to 100. PNG has none.

    Raises:
        InpaintError: `INVALID_FIELD` when the format cannot hold a picture of this size.
    """
    height, width = pixels.shape[:2]
    require_encodable(image_format, height, width)
    if alpha is not None and image_format != "jpeg":
        pixels = _with_alpha(pixels, alpha)
    if image_format == "png":
        return encode_png(pixels, icc_profile)
    buffer = BytesIO()
    image = Image.fromarray(pixels)
    if image_format == "jpeg":
        quality = JPEG_QUALITY if quality is None else quality
        image.save(buffer, "JPEG", quality=quality, subsampling=0, icc_profile=icc_profile)
    elif quality is not None:
        image.save(buffer, "WEBP", quality=quality, icc_profile=icc_profile)
    else:
        # "exact" keeps the RGB under a transparent alpha; quality is the effort here.
        image.save(buffer, "WEBP", lossless=True, exact=True, method=0, quality=20, icc_profile=icc_profile)
    return buffer.getvalue()


def encode_array(array: Floats) -> bytes:
    """An array as an `.npy` file, float32 in C order.

    Args:
        array: Of any shape.
    """
    buffer = BytesIO()
    np.save(buffer, np.ascontiguousarray(array, np.float32), allow_pickle=False)
    return buffer.getvalue()


def media_type(output_format: OutputFormat) -> str:
    """What an answer of this format is sent as."""
    match output_format:
        case "npy" | "latent":
            return ARRAY_MEDIA_TYPE
        case _:
            return MEDIA_TYPES[output_format]


def require_encodable(output_format: OutputFormat, height: int, width: int) -> None:
    """Refuse early what `encode_image` would refuse after the work is done; an array holds any size.

    Raises:
        InpaintError: `INVALID_FIELD` when the format cannot hold a picture of this size.
    """
    max_side = _MAX_SIDE.get(output_format)
    if max_side is not None and max(height, width) > max_side:
        raise InpaintError(
            ErrorCode.INVALID_FIELD,
            f"A {output_format} picture has at most {max_side} pixels a side; ask for png.",
            field="output_format",
        )


def blur_flagged(pixels: Pixels) -> Pixels:
    """A flagged picture blurred until nothing in it can be made out, by a Gaussian of a twelfth of its longer side.

    Args:
        pixels: (H, W, 3) uint8 RGB.
    """
    radius = max(8, max(pixels.shape[:2]) / 12)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _with_alpha(pixels: Pixels, alpha: Pixels) -> Pixels:
    """(H, W, 4) of RGB and opacity. Plane by plane, which NumPy copies in a fifth of the time."""
    rgba = np.empty((*alpha.shape, 4), np.uint8)
    for channel in range(3):
        rgba[..., channel] = pixels[..., channel]
    rgba[..., 3] = alpha
    return rgba
