"""Picture files made in memory, the odd ones byte by byte."""

import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6

PICTURE_HEADERS = {
    "PSD": b"8BPS\0\1" + bytes(64),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "HTML": b"<!DOCTYPE html><html>",
    "PDF": b"%PDF-1.7" + bytes(64),
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(64),
}
"""How files of kinds begin that are not served, and that Pillow cannot write."""


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    """(H, W, channels) random pixels, or (H, W) for one channel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def scene(height: int, width: int) -> Pixels:
    """(H, W, 3) smooth shades, which lossy formats keep nearly as they are."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.dstack([rows * 200 // height, columns * 200 // width, np.full((height, width), 90)]).astype(np.uint8)


def circle_mask(height: int, width: int, centre: tuple[int, int], radius: int) -> Pixels:
    """(H, W) mask of 0 and 255 with a white disc."""
    rows, columns = np.mgrid[0:height, 0:width]
    inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
    return np.where(inside, np.uint8(255), np.uint8(0))


def saved(image: Image.Image | Pixels, image_format: str = "PNG", **options: object) -> bytes:
    """A file as Pillow writes it."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(  # noqa: D417 - the header's fields
    height: int, width: int, bit_depth: int, colour_type: int, rows: list[bytes], *extra: bytes
) -> bytes:
    """A PNG of unfiltered rows.

    Args:
        rows: The samples of each row, packed.
        extra: Chunks between header and pixels.
    """
    header = struct.pack(">2I5B", width, height, bit_depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def small_png(*extra: bytes) -> bytes:
    """A 4x4 RGB PNG with extra chunks."""
    return png(4, 4, 8, RGB, [bytes(12)] * 4, *extra)


def exif(orientation: int) -> bytes:
    """An EXIF block with an orientation."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


SMALL_PICTURES = {
    "png": saved(noise(9, 7)),
    "palette png": saved(Image.fromarray(noise(9, 7)).quantize(8)),
    "alpha png": saved(noise(9, 7, 4), exif=exif(6)),
    "jpeg": saved(scene(24, 24), "JPEG", exif=exif(3)),
    "progressive jpeg": saved(scene(24, 24), "JPEG", progressive=True),
    "cmyk jpeg": saved(Image.fromarray(scene(24, 24)).convert("CMYK"), "JPEG"),
    "webp": saved(scene(24, 24), "WEBP"),
    "lossless webp": saved(noise(9, 7, 4), "WEBP", lossless=True, exif=exif(8)),
}
"""One of each kind that is served."""
