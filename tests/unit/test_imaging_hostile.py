"""Whatever is uploaded gives pictures or one of the documented errors, nothing else."""

import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.errors import ErrorCode, InpaintError
from service.imaging import Upload, decode_upload
from tests.unit.picture_files import GREY, RGB, SIGNATURE, SMALL_PICTURES, chunk, noise, png, saved, scene, small_png

MAX_PIXELS = 100_000

BAD_INPUT = {
    ErrorCode.INVALID_IMAGE,
    ErrorCode.UNSUPPORTED_MEDIA,
    ErrorCode.TOO_MANY_PIXELS,
    ErrorCode.ANIMATED,
}


def decoded(image: bytes, *, max_pixels: int = MAX_PIXELS) -> Upload | InpaintError:
    """What becomes of a picture that is its own mask."""
    try:
        return decode_upload(image, image, max_pixels=max_pixels)
    except InpaintError as error:
        return error


def code_of(image: bytes, *, max_pixels: int = MAX_PIXELS) -> ErrorCode | None:
    """The code that a picture is refused with, or None; the field is named and the message leaks nothing."""
    outcome = decoded(image, max_pixels=max_pixels)
    if isinstance(outcome, Upload):
        return None
    assert outcome.field == "image"
    assert not re.search(r"\b0x|object at", outcome.message)
    return outcome.code


@pytest.mark.parametrize("name", SMALL_PICTURES)
def test_truncated_files_are_refused(name: str) -> None:
    """A file cut at any byte is `invalid_image`, unless everything but an end mark was there and it decodes in full."""
    data = SMALL_PICTURES[name]
    whole = decoded(data)
    assert isinstance(whole, Upload)
    step = max(1, len(data) // 150)
    for length in [*range(0, len(data), step), *range(len(data) - 12, len(data))]:
        outcome = decoded(data[:length])
        if isinstance(outcome, Upload):
            assert length >= len(data) - 2, length
            assert np.array_equal(outcome.image, whole.image)
        else:
            assert outcome.code is ErrorCode.INVALID_IMAGE, length


@pytest.mark.parametrize("name", [name for name in SMALL_PICTURES if "png" in name])
def test_a_png_with_any_byte_changed_is_refused(name: str) -> None:
    """Checksums are verified, those of the pixels too: no corrupt PNG is taken for a picture."""
    data = bytearray(SMALL_PICTURES[name])
    for position in range(len(data)):
        data[position] ^= 0x10
        assert code_of(bytes(data)) in BAD_INPUT, position
        data[position] ^= 0x10


@settings(max_examples=150)
@given(data=st.binary(max_size=300), prefix=st.sampled_from([b"", SIGNATURE, b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X"]))
def test_garbage_never_raises_anything_else(data: bytes, prefix: bytes) -> None:
    """Random bytes, bare or behind a real signature, are refused with a documented code."""
    assert code_of(prefix + data) in BAD_INPUT


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(SMALL_PICTURES)), data=st.data())
def test_damaged_files_never_raise_anything_else(name: str, data: st.DataObject) -> None:
    """Real files with bytes changed decode or are refused with a documented code."""
    damaged = bytearray(SMALL_PICTURES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert code_of(bytes(damaged)) in {None, *BAD_INPUT}


@settings(max_examples=100)
@given(
    kind=st.sampled_from(
        [
            b"IHDR",
            b"PLTE",
            b"tRNS",
            b"iCCP",
            b"zTXt",
            b"iTXt",
            b"tEXt",
            b"acTL",
            b"fcTL",
            b"pHYs",
            b"gAMA",
            b"cHRM",
            b"sRGB",
            b"abcd",
        ]
    ),
    body=st.binary(max_size=40),
)
@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_any_chunk_content_is_survived(kind: bytes, body: bytes) -> None:
    """A well-formed chunk of any content decodes or is refused with a documented code."""
    assert code_of(small_png(chunk(kind, body))) in {None, *BAD_INPUT}


@settings(max_examples=200)
@given(body=st.binary(max_size=120), order=st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]))
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_never_costs_the_request(body: bytes, order: bytes) -> None:
    """EXIF of any content, in any format, is at worst ignored."""
    block = b"Exif\0\0" + order + body
    jpeg = SMALL_PICTURES["progressive jpeg"]
    assert code_of(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]) is None
    # Without JFIF header Pillow reads the resolution from EXIF while opening.
    assert code_of(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[20:]) is None
    assert code_of(small_png(chunk(b"eXIf", order + body))) is None
    assert code_of(saved(scene(8, 8), "WEBP", exif=block)) is None


@pytest.mark.parametrize(
    "head",
    [
        b"GIF89a",
        b"GIF87a",
        b"II*\0\x08\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"\xc5\xd0\xd3\xc6",
        b"%PDF-1.7",
        b"8BPS\0\1",
        b"BM\x36\0\0\0",
        b"\0\0\0\x20ftypavif",
        b"\0\0\0\x18ftypheic",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"P6\n2 2\n255\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?><svg/>",
        b"\xef\xbb\xbf\n <!DOCTYPE html><html>",
        b"<HTML>",
        b"<!-- comment --><svg/>",
        b"PK\3\4",
        b"\x1f\x8b\x08",
    ],
)
def test_files_of_other_kinds_are_unsupported(head: bytes) -> None:
    """GIF, TIFF, EPS, PSD, SVG, HTML and other known kinds are told apart from broken pictures."""
    assert code_of(head + bytes(64)) is ErrorCode.UNSUPPORTED_MEDIA


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "BMP", "ICO", "PPM", "JPEG2000", "EPS", "PDF"])
def test_real_files_of_other_formats_are_unsupported(image_format: str) -> None:
    """What Pillow could decode, but the contract does not name, is not decoded."""
    assert code_of(saved(scene(16, 16), image_format)) is ErrorCode.UNSUPPORTED_MEDIA


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"hello", b"< 3", SIGNATURE, b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
def test_empty_and_meaningless_files_are_invalid(data: bytes) -> None:
    """Nothing, noise, or a bare signature is `invalid_image`."""
    assert code_of(data) is ErrorCode.INVALID_IMAGE


def test_faults_of_the_mask_name_the_mask() -> None:
    """The field at fault is the file at fault."""
    with pytest.raises(InpaintError) as caught:
        decode_upload(SMALL_PICTURES["png"], b"", max_pixels=MAX_PIXELS)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_IMAGE, "mask")


def huge_png(side: int) -> bytes:
    """A PNG that states a large size and holds no pixels."""
    return png(side, side, 8, RGB, [])


def huge_jpeg() -> bytes:
    """A JPEG whose header states 60000x60000."""
    data = SMALL_PICTURES["progressive jpeg"]
    frame = data.index(b"\xff\xc2")
    return data[: frame + 5] + struct.pack(">2H", 60000, 60000) + data[frame + 9 :]


def huge_webp(kind: bytes) -> bytes:
    """A WebP whose header states 16383x16383."""
    header = {
        b"VP8X": struct.pack("<I", 0) + (16382).to_bytes(3, "little") * 2,
        b"VP8L": b"\x2f" + struct.pack("<I", 16382 | 16382 << 14),
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + struct.pack("<2H", 16383, 16383),
    }[kind]
    return b"RIFF" + struct.pack("<I", 20 + len(header)) + b"WEBP" + kind + struct.pack("<I", len(header)) + header


@pytest.mark.parametrize(
    "data",
    [
        huge_png(9400),
        huge_png(14000),
        huge_png(2**31 - 1),
        huge_jpeg(),
        huge_webp(b"VP8X"),
        huge_webp(b"VP8L"),
        huge_webp(b"VP8 "),
    ],
)
@pytest.mark.filterwarnings("error")
def test_too_many_pixels_is_told_from_the_header(data: bytes) -> None:
    """The size is judged before a pixel is decoded, in every format, without Pillow's own warnings."""
    assert code_of(data, max_pixels=16_777_216) is ErrorCode.TOO_MANY_PIXELS


@pytest.mark.filterwarnings("error")
def test_the_pixel_limit_is_the_callers() -> None:
    """The limit is exact, and Pillow's own limit for all callers is left alone."""
    before = Image.MAX_IMAGE_PIXELS
    data = SMALL_PICTURES["png"]
    assert code_of(data, max_pixels=63) is None
    assert code_of(data, max_pixels=62) is ErrorCode.TOO_MANY_PIXELS
    # Within our limit but beyond Pillow's: only the missing pixels are at fault.
    assert code_of(huge_png(14000), max_pixels=2**40) is ErrorCode.INVALID_IMAGE
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_longest_side_is_limited() -> None:
    """A row of more pixels than any JPEG has is `too_many_pixels` however few they are; one that long decodes."""
    row = bytes(65_536)
    assert code_of(png(1, 65_535, 8, GREY, [row[1:]])) is None
    assert code_of(png(1, 65_536, 8, GREY, [row])) is ErrorCode.TOO_MANY_PIXELS


def animated(image_format: str) -> bytes:
    """Two frames."""
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(2)]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_animations_are_refused(image_format: str) -> None:
    """Animated PNG and WebP are `animated`, not their first frame."""
    assert code_of(animated(image_format)) is ErrorCode.ANIMATED


BOMB = zlib.compress(bytes(8 * 2**20))


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"key\0\0" + BOMB),
        chunk(b"iTXt", b"key\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"name\0\0" + BOMB),
        chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**20 - 1))) * 70,
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**20 - 1))) * 2,
        chunk(b"abcd", b"") * 70_000,
    ],
    ids=["zTXt", "iTXt", "iCCP", "many zTXt", "many iCCP", "many chunks"],
)
def test_bombs_in_a_pngs_chunks_are_refused(bomb: bytes) -> None:
    """Small chunks that expand to megabytes, one or in crowds, are `invalid_image`."""
    assert code_of(small_png(bomb)) is ErrorCode.INVALID_IMAGE


def test_bombs_in_a_jpegs_header_are_refused() -> None:
    """Segments, fill bytes or scans without end are `invalid_image`."""
    jpeg = SMALL_PICTURES["progressive jpeg"]
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    assert code_of(jpeg[:2] + b"\xff\xe5\0\2" * 5000 + jpeg[2:]) is ErrorCode.INVALID_IMAGE
    assert code_of(jpeg[:2] + b"\xff" * 5000 + jpeg[2:]) is ErrorCode.INVALID_IMAGE
    assert code_of(jpeg[:-2] + scan * 100 + jpeg[-2:]) is ErrorCode.INVALID_IMAGE
    assert code_of(jpeg[:2] + b"\xff\xe5\0\2" * 50 + b"\xff" * 50 + jpeg[2:]) is None
