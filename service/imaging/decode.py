"""From uploaded bytes to arrays: everything that a hostile or merely odd file can do is met here.

Pillow's file classes are used directly: `Image.open` would try other formats
and warn at a size limit of its own, whereas ours comes with each call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import ErrorCode, InpaintError
from service.imaging import colour, formats
from service.imaging.png import with_stored_pixels
from service.request import Pixels

MaskChannel = Literal["luminance", "alpha", "opacity"]
"""What of a mask's file says where to repaint: white; "alpha", transparent; "opacity", opaque, or white where the file
has no transparent pixel, and everything where there is no file."""

# The most that a JPEG can state. A PNG row of millions of pixels would cost seconds in every resize.
MAX_SIDE = 65_535

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = 1
_TRANSPOSING = (5, 6, 7, 8)  # orientations that swap height and width
_OPAQUE = 255


@dataclass(frozen=True, slots=True)
class Upload:
    """A decoded picture and its mask, both upright.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 grey; ≥ 128 is to be repainted.
        alpha: (H, W) uint8 opacity of the picture; None when it is opaque or when its alpha is the mask.
        icc_profile: The picture's colour profile, where it still describes `image`.
    """

    image: Pixels
    mask: Pixels
    alpha: Pixels | None
    icc_profile: bytes | None


def decode_upload(
    image: bytes | None, mask: bytes | None, *, max_pixels: int, mask_channel: MaskChannel = "luminance"
) -> Upload:
    """Decode a picture and its mask.

    PNG, JPEG and WebP, told by their bytes. EXIF orientation is applied to each file by its own tag. A mask
    file counts by its luminance, flattened over black where it is transparent. Without a mask file the
    picture's alpha is the mask: what is transparent is to be repainted.

    Args:
        image: The picture's file; None for a black picture of the mask's size.
        mask: The mask's file, of the picture's size; not None where the picture is.
        max_pixels: Largest height times width; read from the headers, before pixels are decoded. No side may
            be longer than `MAX_SIDE`.
        mask_channel: "alpha" takes the mask file's alpha instead, transparent = repaint, as OpenAI's wire format does;
            "opacity" takes it the other way round where it is not opaque everywhere, as AUTOMATIC1111's does, and
            without a mask's file the whole picture is to be repainted.

    Raises:
        InpaintError: `UNSUPPORTED_MEDIA`, `INVALID_IMAGE`, `TOO_MANY_PIXELS`, `ANIMATED`, `MASK_MISMATCH`, or
            `INVALID_FIELD` when alpha is to be the mask and there is none; `field` names the file at fault.
    """
    if image is None:
        assert mask is not None  # noqa: S101 - for the type checker: see above
        grey = _grey(_open(mask, "mask", max_pixels))
        return Upload(np.zeros((*grey.shape, 3), np.uint8), grey, alpha=None, icc_profile=None)
    picture = _open(image, "image", max_pixels)
    mask_picture = None if mask is None else _open(mask, "mask", max_pixels)
    if mask_picture is not None and mask_picture.size != picture.size:
        raise InpaintError(
            ErrorCode.MASK_MISMATCH,
            f"The mask is {_size_text(mask_picture.size)} pixels, but the image is {_size_text(picture.size)}.",
            field="mask",
        )

    rgb, alpha = _rgb_and_alpha(picture)
    if mask_picture is None and mask_channel == "opacity":
        grey = np.full(rgb.shape[:2], _OPAQUE, np.uint8)
    elif mask_picture is None:
        grey, alpha = _mask_of_alpha(alpha, "Send a mask file, or an image with an alpha channel."), None
    elif mask_channel == "luminance":
        grey = _grey(mask_picture)
    else:
        mask_alpha = _rgb_and_alpha(mask_picture)[1]
        if mask_channel == "alpha":
            grey = _mask_of_alpha(mask_alpha, "The mask needs an alpha channel.")
        elif mask_alpha is None or mask_alpha.min() == _OPAQUE:
            grey = _grey(mask_picture)
        else:
            grey = mask_alpha
    if alpha is not None and alpha.min() == _OPAQUE:
        alpha = None
    return Upload(image=rgb, mask=grey, alpha=alpha, icc_profile=colour.rgb_profile(picture.image))


def decode_picture(data: bytes, field: str, *, max_pixels: int) -> Pixels:
    """(H, W, 3) uint8 RGB of a picture that needs no mask, upright and without its alpha.

    Args:
        data: The file, as in `decode_upload`.
        field: The form field that it came in.
        max_pixels: Largest height times width.

    Raises:
        InpaintError: As in `decode_upload`.
    """
    return _rgb_and_alpha(_open(data, field, max_pixels))[0]


def picture_size(data: bytes, field: str, *, max_pixels: int) -> tuple[int, int]:
    """Height and width of a picture once upright; its pixels are not decoded.

    Args:
        data: The file, as in `decode_upload`.
        field: The form field that it came in.
        max_pixels: Largest height times width.

    Raises:
        InpaintError: As in `decode_upload`.
    """
    return _open(data, field, max_pixels).size


@dataclass(frozen=True, slots=True)
class _Picture:
    """An opened file: the header is read, the pixels are not.

    Attributes:
        image: Pillow's picture, as stored.
        field: The form field that it came in.
        orientation: The EXIF orientation, 1 to 8.
        bit_depth: Bits per sample in the file.
    """

    image: Image.Image
    field: str
    orientation: int
    bit_depth: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width once upright."""
        width, height = self.image.size
        return (width, height) if self.orientation in _TRANSPOSING else (height, width)


@contextmanager
def _parsing(field: str) -> Iterator[None]:
    """Turn whatever parsing hostile bytes raises into one answer.

    Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, MemoryError and more, with texts
    that leak addresses: nothing of them is passed on.
    """
    try:
        yield
    except InpaintError:
        raise
    except Exception:  # noqa: BLE001 - see above
        raise InpaintError(
            ErrorCode.INVALID_IMAGE, f"The {field} is truncated or corrupt and cannot be decoded.", field=field
        ) from None


def _open(data: bytes, field: str, max_pixels: int) -> _Picture:
    container = formats.identify(data, field)
    bit_depth = 8
    with _parsing(field):
        image: Image.Image
        if container == "PNG":
            formats.check_png(data)
            bit_depth = formats.png_bit_depth(data)
            image = PngImageFile(BytesIO(data))
        elif container == "JPEG":
            formats.check_jpeg(data)
            image = JpegImageFile(BytesIO(data))
        else:
            _check_pixels(formats.webp_canvas(data), field, max_pixels)
            image = WebPImageFile(BytesIO(data))
        _check_pixels((image.height, image.width), field, max_pixels)
        if getattr(image, "is_animated", False):
            raise InpaintError(ErrorCode.ANIMATED, f"The {field} is animated; send a still picture.", field=field)
        if container == "PNG":
            image = PngImageFile(BytesIO(with_stored_pixels(data)))
        return _Picture(image, field, _orientation(image), bit_depth)


def _check_pixels(size: tuple[int, int], field: str, max_pixels: int) -> None:
    height, width = size
    if max(height, width) > MAX_SIDE:
        raise InpaintError(
            ErrorCode.TOO_MANY_PIXELS,
            f"The {field} is {_size_text(size)} pixels, more than {MAX_SIDE} on one side.",
            field=field,
        )
    if height * width > max_pixels:
        raise InpaintError(
            ErrorCode.TOO_MANY_PIXELS,
            f"The {field} is {_size_text(size)} pixels, more than {max_pixels} in all.",
            field=field,
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; broken EXIF is no reason to refuse a picture."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # noqa: BLE001 - parses hostile bytes, as above
        return _UPRIGHT
    return orientation if isinstance(orientation, int) and orientation in range(1, 9) else _UPRIGHT


def _rgb_and_alpha(picture: _Picture) -> tuple[Pixels, Pixels | None]:
    """Upright RGB and alpha."""
    with _parsing(picture.field):
        picture.image.load()
        rgb, alpha = colour.rgb_and_alpha(picture.image, bit_depth=picture.bit_depth)
        return _upright(rgb, picture.orientation), None if alpha is None else _upright(alpha, picture.orientation)


def _grey(picture: _Picture) -> Pixels:
    """Upright luminance."""
    with _parsing(picture.field):
        picture.image.load()
        return _upright(colour.grey(picture.image, bit_depth=picture.bit_depth), picture.orientation)


def _mask_of_alpha(alpha: Pixels | None, complaint: str) -> Pixels:
    if alpha is None:
        raise InpaintError(ErrorCode.INVALID_FIELD, complaint, field="mask")
    return _OPAQUE - alpha


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """(H, W, ...) pixels turned and flipped as the EXIF orientation asks."""
    if orientation in _TRANSPOSING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _size_text(size: tuple[int, int]) -> str:
    """Width x height, as people say it."""
    height, width = size
    return f"{width}x{height}"
