"""PNG files written, and made ready to be read, with a fraction of the work that Pillow takes."""

import struct
import zlib

import numpy as np

from service.imaging import deflate
from service.imaging.formats import PNG_SIGNATURE, png_chunks
from service.request import Pixels

MAX_STORED_BYTES = 64 * 1024 * 1024
"""Up to this, what is held of a picture here is less than what Pillow holds of it later."""

_COLOUR_TYPES = {3: 2, 4: 6}  # channels: truecolour, truecolour with alpha
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type: samples of a pixel
_SUB_FILTER, _UP_FILTER = 1, 2

# The signature, then IHDR's length, kind, 13 bytes and checksum.
_HEADER_END = len(PNG_SIGNATURE) + 25

# Of drawings with plain areas, far less is left than of any photograph.
_MAX_FLAT_SHARE = 1 / 16

_UNUSUAL_CHUNKS = frozenset({b"acTL", b"fcTL", b"fdAT", b"DDAT"})


def encode_png(pixels: Pixels, icc_profile: bytes | None) -> bytes:
    """A PNG with one filter for all of its rows.

    Photographs become up to a sixth larger than Pillow makes them, which tries five filters on each row, in a
    twentieth of its time. Flat pictures compress so quickly that there is time for a better filter and more effort.

    Args:
        pixels: (H, W, 3 or 4) uint8.
        icc_profile: Colour profile to attach.
    """
    height, width, channels = pixels.shape
    rows = _minus_above(pixels)
    stream = deflate.deflate(rows.data)
    if len(stream) < rows.size * _MAX_FLAT_SHARE:
        rows = min(rows, _minus_left(pixels), key=lambda rows: len(deflate.deflate(rows.data)))
        stream = zlib.compress(rows.data)
    header = struct.pack(">2I5B", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    pieces = [PNG_SIGNATURE, *_chunk(b"IHDR", header)]
    if icc_profile is not None:
        pieces += _chunk(b"iCCP", b"ICC Profile\0\0", zlib.compress(icc_profile))
    return b"".join([*pieces, *_chunk(b"IDAT", stream), *_chunk(b"IEND")])


def png_with_text(data: bytes, keyword: str, text: str) -> bytes:
    """The same PNG with a text beside its pixels: `tEXt` where Latin-1 can say it, else `iTXt`, which is UTF-8.

    Args:
        data: A PNG that `encode_png` made.
        keyword: What the text is, 1 to 79 characters of Latin-1.
        text: Any text; of what is no Unicode, or NUL, question marks are left.
    """
    text = text.replace("\0", "?")
    name = keyword.encode("latin-1")
    try:
        chunk = _chunk(b"tEXt", name, b"\0", text.encode("latin-1"))
    except UnicodeEncodeError:
        chunk = _chunk(b"iTXt", name, b"\0\0\0\0\0", text.encode("utf-8", "replace"))
    view = memoryview(data)
    return b"".join([view[:_HEADER_END], *chunk, view[_HEADER_END:]])


def _minus_above(pixels: Pixels) -> Pixels:
    """(H, 1 + W * channels) rows, each after its filter's number, of the differences to the pixels above."""
    samples, rows = _rows(pixels, _UP_FILTER)
    rows[0, 1:] = samples[0]  # the row above the first counts as zero
    np.subtract(samples[1:], samples[:-1], out=rows[1:, 1:])
    return rows


def _minus_left(pixels: Pixels) -> Pixels:
    """As `_minus_above`, of the differences to the pixels on the left."""
    samples, rows = _rows(pixels, _SUB_FILTER)
    channels = pixels.shape[2]
    rows[:, 1 : 1 + channels] = samples[:, :channels]
    np.subtract(samples[:, channels:], samples[:, :-channels], out=rows[:, 1 + channels :])
    return rows


def _rows(pixels: Pixels, filter_type: int) -> tuple[Pixels, Pixels]:
    """(H, W * channels) samples, and rows to be filled that begin with the filter's number."""
    height, width, channels = pixels.shape
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = filter_type
    return pixels.reshape(height, width * channels), rows


def _chunk(kind: bytes, *body: bytes | memoryview) -> list[bytes | memoryview]:
    """The pieces of a chunk, from those of its body."""
    checksum = deflate.crc32(kind)
    for piece in body:
        checksum = deflate.crc32(piece, checksum)
    return [struct.pack(">I", sum(map(len, body))), kind, *body, struct.pack(">I", checksum)]


def with_stored_pixels(data: bytes) -> bytes:
    """The same PNG with its pixels no longer compressed, for Pillow, which inflates them row by row.

    Args:
        data: A PNG that `check_png` accepted, of a size that may be decoded.

    Returns:
        `data` itself when it is interlaced, very large or in any way unusual or wrong: what is to be said of it,
        Pillow says.
    """
    chunks = list(png_chunks(data))
    kinds = [kind for kind, _, _ in chunks]
    pixels = [body for kind, body, _ in chunks if kind == b"IDAT"]
    first = kinds.index(b"IDAT") if pixels else 0
    are_usual = (
        kinds[0] == b"IHDR"
        and kinds.count(b"IHDR") == 1
        and kinds[first : first + len(pixels)] == [b"IDAT"] * len(pixels)
        and _UNUSUAL_CHUNKS.isdisjoint(kinds)
    )
    num_bytes = _num_filtered_bytes(chunks[0][1]) if are_usual and pixels else None
    if num_bytes is None or num_bytes > MAX_STORED_BYTES:
        return data
    rows = deflate.inflate_exactly(b"".join(pixels), num_bytes)
    if rows is None:
        return data
    start = len(PNG_SIGNATURE) + sum(12 + len(body) for _, body, _ in chunks[:first])
    end = start + sum(12 + len(body) for body in pixels)
    view = memoryview(data)
    return b"".join([view[:start], *_chunk(b"IDAT", *deflate.stored(rows)), view[end:]])


def _num_filtered_bytes(header: memoryview) -> int | None:
    """How many bytes the rows take with their filters' numbers; None for an interlaced picture or a wrong header."""
    if len(header) != struct.calcsize(">2I5B"):
        return None
    width, height, bit_depth, colour_type, _, _, interlace = struct.unpack(">2I5B", header)
    num_samples = _SAMPLES.get(colour_type)
    if num_samples is None or interlace:
        return None
    num_bytes: int = height * (1 + (width * num_samples * bit_depth + 7) // 8)
    return num_bytes
