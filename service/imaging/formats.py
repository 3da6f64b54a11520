"""Which container an upload is, found from its bytes, never from its name.

Also the checks that Pillow leaves out: checksums of PNG, animation and size
before anything is allocated, scans of progressive JPEG.
"""

import struct
from collections.abc import Iterator
from typing import Literal

from service.errors import ErrorCode, InpaintError
from service.imaging.deflate import crc32

Container = Literal["PNG", "JPEG", "WEBP"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Far above what encoders write, far below what keeps a parser busy for seconds.
MAX_PNG_CHUNKS = 65_536
MAX_JPEG_SEGMENTS = 4096

# Encoders write some ten scans, and a phone's file may hold three pictures; each scan
# of a large picture costs a pass over all its coefficients.
MAX_JPEG_SCANS = 100

_MARKER = 0xFF
_START_OF_SCAN = 0xDA
_JPEG_FILL = (0x00, 0xFF)
_JPEG_BARE_MARKERS = (0x01, *range(0xD0, 0xDA))  # no length follows: TEM, RST0-7, SOI, EOI

_OTHER_MAGIC = (
    b"GIF8",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"II+\0",  # BigTIFF
    b"MM\0+",
    b"%!PS",
    b"\xc5\xd0\xd3\xc6",  # EPS with a preview
    b"%PDF",
    b"8BPS",  # PSD
    b"BM",
    b"\0\0\1\0",  # ICO
    b"\0\0\2\0",  # CUR
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",  # JPEG 2000 code stream
    b"\0\0\0\x0cJXL ",
    b"\xff\x0a",  # JPEG XL code stream
    b"\x8aMNG",
    b"\x8bJNG",
    b"qoif",
    b"DDS ",
    b"gimp xcf",
    b"\x76\x2f\x31\x01",  # OpenEXR
    b"#?RADIANCE",
    b"PK\3\4",
    b"\x1f\x8b",  # gzip, also .svgz
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def identify(data: bytes, field: str) -> Container:
    """The container of an upload.

    Args:
        data: The file's bytes.
        field: The form field that it came in.

    Raises:
        InpaintError: `UNSUPPORTED_MEDIA` for a file of a known other kind, `INVALID_IMAGE` for anything else.
    """
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if _is_other_kind(data):
        raise InpaintError(
            ErrorCode.UNSUPPORTED_MEDIA, f"The {field} must be a PNG, JPEG or WebP picture.", field=field
        )
    if not data:
        raise InpaintError(ErrorCode.INVALID_IMAGE, f"The {field} is empty.", field=field)
    raise InpaintError(ErrorCode.INVALID_IMAGE, f"The {field} is not a PNG, JPEG or WebP picture.", field=field)


def _is_other_kind(data: bytes) -> bool:
    if data.startswith(_OTHER_MAGIC):
        return True
    if data[4:8] == b"ftyp":  # AVIF, HEIC, MP4
        return True
    if data.startswith(b"RIFF") and len(data) >= 12:  # noqa: PLR2004 - AVI, WAV; shorter is a cut-off WebP
        return True
    if data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():  # PNM
        return True
    text = data[:512].removeprefix(_BYTE_ORDER_MARK).lstrip()
    return text.startswith(b"<") and (text[1:2].isalpha() or text[1:2] in (b"!", b"?"))  # SVG, HTML, XML


def check_png(data: bytes) -> None:
    """Refuse a PNG that is cut off or whose chunks fail their checksums: Pillow skips those of the pixels.

    Raises:
        ValueError: The file is corrupt, or built to be slow: no end of chunks, or a colour profile
            to decompress in each of many.
        struct.error: The file is truncated.
    """
    num_profiles = 0
    for number, (kind, body, checksum) in enumerate(png_chunks(data)):
        num_profiles += kind == b"iCCP"
        if number >= MAX_PNG_CHUNKS or num_profiles > 1:
            raise ValueError("chunks")
        if crc32(body, crc32(kind)) != checksum:
            raise ValueError("checksum")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Type, body and checksum of each chunk up to IEND.

    Raises:
        struct.error: The file is truncated.
    """
    view, position = memoryview(data), len(PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", data, end)
        yield kind, view[position + 8 : end], checksum
        position = end + 4


def png_bit_depth(data: bytes) -> int:
    """Bits per sample of a PNG that `check_png` accepted."""
    return data[24]


def check_jpeg(data: bytes) -> None:
    """Refuse a JPEG with so many header segments or scans that decoding it is the attack.

    Raises:
        ValueError: More than `MAX_JPEG_SEGMENTS` segments or `MAX_JPEG_SCANS` scans.
        IndexError: The header is truncated.
    """
    position = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = data[position + 1]
        if data[position] != _MARKER or marker == _START_OF_SCAN:
            break
        if marker in _JPEG_FILL:
            position += 1
        elif marker in _JPEG_BARE_MARKERS:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    else:
        raise ValueError("segments")
    # Inside compressed data 0xFF is always escaped, so that counting markers is counting scans.
    if data.count(bytes([_MARKER, _START_OF_SCAN])) > MAX_JPEG_SCANS:
        raise ValueError("scans")


def webp_canvas(data: bytes) -> tuple[int, int]:
    """Height and width of a WebP: its decoder allocates the canvas before Pillow tells the size.

    Raises:
        ValueError: The first chunk is not one that a picture starts with.
        struct.error: The header is cut off.
    """
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<2H", data, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise ValueError("first chunk")
    return height, width
