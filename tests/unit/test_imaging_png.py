"""PNG files are written and read in ways of our own, which nobody sees in the pixels."""

import struct
import sys
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.errors import InpaintError
from service.imaging import Upload, decode_upload, deflate, encode_image
from service.imaging import png as png_files
from service.imaging.formats import check_png, png_chunks
from service.imaging.png import encode_png, png_with_text, with_stored_pixels
from tests.unit.picture_files import GREY, PALETTE, RGB, RGBA, SIGNATURE, Pixels, chunk, noise, png, saved, scene

needs_isal = pytest.mark.skipif(deflate._isal is None, reason="ISA-L is not installed")


@pytest.fixture(params=[pytest.param("isal", marks=needs_isal), "zlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What deflates: ISA-L, or zlib as where there is no ISA-L."""
    if request.param == "zlib":
        monkeypatch.setattr(deflate, "_isal", None)
    return str(request.param)


def test_without_isal_zlib_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ISA-L is not installed, the module falls back to zlib when it is imported."""
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.delitem(sys.modules, "isal.isal_zlib", raising=False)
    spec = spec_from_file_location("deflate_without_isal", deflate.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._isal is None
    assert zlib.decompress(module.deflate(b"abc" * 1000)) == b"abc" * 1000
    assert module.inflate_exactly(zlib.compress(b"abc"), 3) is None
    assert module.crc32(b"abc", 7) == zlib.crc32(b"abc", 7)


# --- writing ------------------------------------------------------------------


def kinds_of_pictures() -> dict[str, Pixels]:
    """From a single pixel to a large one, from plain to noise."""
    rows, columns = np.mgrid[0:301, 0:203]
    grainy = (np.dstack([rows, columns, rows + columns]) // 2 + noise(301, 203) // 16).astype(np.uint8)
    return {
        "one pixel": noise(1, 1),
        "one row": noise(1, 999),
        "one column": noise(999, 1),
        "plain": np.full((257, 511, 3), 77, np.uint8),
        "shades": scene(301, 203),
        "bands": np.repeat(noise(1, 203), 301, axis=0),
        "stripes": np.repeat(noise(301, 1), 203, axis=1),
        "grainy": grainy,
        "noise": noise(301, 203),
        "large": np.tile(noise(64, 64), (40, 33, 1)),
    }


@pytest.mark.parametrize("name", kinds_of_pictures())
@pytest.mark.parametrize("has_alpha", [False, True])
def test_every_kind_of_picture_survives(name: str, has_alpha: bool, library: str) -> None:
    """Pillow, and zlib alone, read back what was written, alpha included; the file passes a strict check."""
    pixels = kinds_of_pictures()[name]
    alpha = noise(*pixels.shape[:2], 1, seed=5) if has_alpha else None
    expected = pixels if alpha is None else np.dstack([pixels, alpha])
    data = encode_image(pixels, "png", alpha=alpha, icc_profile=b"profile" * 99)
    check_png(data)
    with Image.open(BytesIO(data)) as image:
        assert image.mode == ("RGBA" if has_alpha else "RGB"), library
        assert np.array_equal(np.asarray(image), expected)
        assert image.info["icc_profile"] == b"profile" * 99
    (stream,) = [body for kind, body, _ in png_chunks(data) if kind == b"IDAT"]
    assert len(zlib.decompress(stream)) == expected.size + len(expected)


@pytest.mark.parametrize("name", ["shades", "bands"])
@needs_isal
def test_flat_pictures_stay_small(name: str) -> None:
    """Drawings get the filter that suits them, and take no more than twice what Pillow makes of them."""
    pixels = kinds_of_pictures()[name]
    assert len(encode_image(pixels, "png")) < 2 * len(saved(pixels)) + 500


@needs_isal
def test_photographs_stay_as_small_as_zlib_makes_them() -> None:
    """Speed is not paid for in bytes: within a tenth of zlib's file, and of Pillow's."""
    grainy = kinds_of_pictures()["grainy"]
    assert len(encode_image(grainy, "png")) < 1.1 * len(saved(grainy))


# --- reading ------------------------------------------------------------------


def decoded(data: bytes) -> Pixels:
    """As Pillow reads it, whatever its mode."""
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image)


def stream_of(data: bytes) -> bytes:
    """The pixels' zlib stream."""
    return b"".join(body for kind, body, _ in png_chunks(data) if kind == b"IDAT")


def is_stored(data: bytes) -> bool:
    """Whether the pixels are not compressed."""
    stream = stream_of(data)
    return len(stream) > len(zlib.decompress(stream))


def all_filters(height: int, width: int, bit_depth: int, colour_type: int, *extra: bytes) -> bytes:
    """A PNG of random samples whose rows take all five filters in turn."""
    row_bytes = (width * {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, RGBA: 4}[colour_type] * bit_depth + 7) // 8
    samples = noise(height, row_bytes, 1, seed=bit_depth)
    stream = zlib.compress(b"".join(bytes([row % 5]) + samples[row].tobytes() for row in range(height)))
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, bit_depth, colour_type, 0, 0, 0))
    return SIGNATURE + header + b"".join(extra) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


PALETTE_CHUNK = chunk(b"PLTE", noise(1, 256).tobytes())
USUAL = {
    "truecolour": all_filters(37, 23, 8, RGB),
    "truecolour, 16 bits": all_filters(37, 23, 16, RGB),
    "alpha": all_filters(37, 23, 8, RGBA),
    "alpha, 16 bits": all_filters(37, 23, 16, RGBA),
    "grey": all_filters(37, 23, 8, GREY),
    "grey, 1 bit": all_filters(37, 23, 1, GREY),
    "grey, 2 bits": all_filters(37, 23, 2, GREY),
    "grey, 4 bits": all_filters(37, 23, 4, GREY),
    "grey, 16 bits": all_filters(37, 23, 16, GREY),
    "grey and alpha": all_filters(37, 23, 8, 4),
    "palette": all_filters(37, 23, 8, PALETTE, PALETTE_CHUNK),
    "palette, 4 bits": all_filters(37, 23, 4, PALETTE, PALETTE_CHUNK),
    "transparent colour": all_filters(37, 23, 8, RGB, chunk(b"tRNS", bytes(6))),
    "one pixel": all_filters(1, 1, 8, RGB),
    "more than a block": saved(noise(300, 301)),
    "exactly a block": saved(noise(255, 256, 1)),  # 255 rows of 257 bytes
    "many chunks": saved(noise(300, 301), compress_level=0),
}


@pytest.mark.parametrize("name", USUAL)
@needs_isal
def test_storing_the_pixels_changes_none(name: str) -> None:
    """Every colour type, bit depth and filter reads the same, before and after, and is a good PNG both times."""
    data = USUAL[name]
    ready = with_stored_pixels(data)
    check_png(ready)
    assert is_stored(ready)
    assert zlib.decompress(stream_of(ready)) == zlib.decompress(stream_of(data))
    assert np.array_equal(decoded(ready), decoded(data))


@needs_isal
def test_other_chunks_stay_where_they_are() -> None:
    """Texts, profile and EXIF before and behind the pixels are kept, several chunks of pixels become one."""
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise(9, 7)))
    before, behind = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"tEXt", b"Comment\0hello")
    parts = [chunk(b"IDAT", stream[start : start + 50]) for start in range(0, len(stream), 50)]
    head = png(9, 7, 8, RGB, [])[:33]
    end = chunk(b"IEND", b"") + b"trailing"
    ready = with_stored_pixels(head + before + b"".join([*parts, chunk(b"IDAT", b"")]) + behind + end)
    assert [kind for kind, _, _ in png_chunks(ready)] == [b"IHDR", b"gAMA", b"IDAT", b"tEXt", b"IEND"]
    assert ready.startswith(head + before)
    assert ready.endswith(behind + end)


def rows_of(height: int, row_bytes: int) -> bytes:
    return b"".join(b"\0" + bytes([row]) * row_bytes for row in range(height))


def with_stream(stream: bytes, *, head: bytes = png(4, 4, 8, RGB, [])[:33], behind: bytes = b"") -> bytes:
    """A 4x4 PNG with this zlib stream."""
    return head + chunk(b"IDAT", stream) + behind + chunk(b"IEND", b"")


GOOD = zlib.compress(rows_of(4, 12))
RAW = zlib.compressobj(wbits=-15)
HEADERLESS = RAW.compress(rows_of(4, 12)) + RAW.flush()
UNUSUAL = {
    "interlaced": with_stream(GOOD, head=SIGNATURE + chunk(b"IHDR", struct.pack(">2I5B", 4, 4, 8, RGB, 0, 0, 1))),
    "unknown colour type": with_stream(
        GOOD, head=SIGNATURE + chunk(b"IHDR", struct.pack(">2I5B", 4, 4, 8, 5, 0, 0, 0))
    ),
    "short header": with_stream(GOOD, head=SIGNATURE + chunk(b"IHDR", struct.pack(">2I", 4, 4))),
    "two headers": with_stream(GOOD, head=png(4, 4, 8, RGB, [])[:33] + png(4, 4, 8, RGB, [])[8:33]),
    "header not first": with_stream(GOOD, head=SIGNATURE + chunk(b"gAMA", bytes(4)) + png(4, 4, 8, RGB, [])[8:33]),
    "no pixels": png(4, 4, 8, RGB, [])[:33] + chunk(b"IEND", b""),
    "animation": with_stream(GOOD, head=png(4, 4, 8, RGB, [])[:33] + chunk(b"acTL", struct.pack(">2I", 1, 0))),
    "pixels apart": with_stream(GOOD[:9], behind=chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", GOOD[9:])),
    "a row too few": with_stream(zlib.compress(rows_of(3, 12))),
    "a row too many": with_stream(zlib.compress(rows_of(5, 12))),
    "much too many": with_stream(zlib.compress(bytes(10_000_000))),
    "cut off": with_stream(GOOD[:-5]),
    "checksum missing": with_stream(GOOD[:-4]),
    "checksum wrong": with_stream(GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    "bytes behind": with_stream(GOOD + b"x"),
    "no zlib header": with_stream(HEADERLESS),
    "gzip": with_stream(zlib.compressobj(wbits=31).compress(rows_of(4, 12))),
    "preset dictionary": with_stream(b"\x78\xbb\0\0\0\1" + GOOD[2:]),
    "nonsense": with_stream(b"\x78\x9c" + bytes(range(99))),
    "nothing": with_stream(b""),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_pillow(name: str, library: str) -> None:
    """Corrupt, short, long, interlaced or odd files are handed on untouched, so that the answer is what it was."""
    assert with_stored_pixels(UNUSUAL[name]) is UNUSUAL[name], library


@needs_isal
def test_large_pictures_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on what is held twice is exact."""
    data = saved(noise(20, 20))
    monkeypatch.setattr(png_files, "MAX_STORED_BYTES", 20 * 61)
    assert is_stored(with_stored_pixels(data))
    monkeypatch.setattr(png_files, "MAX_STORED_BYTES", 20 * 61 - 1)
    assert with_stored_pixels(data) is data


def outcome(data: bytes) -> tuple[bytes, bytes, bytes | None] | tuple[str, str]:
    """What becomes of a picture that is its own mask: its pixels, or how it is refused."""
    try:
        upload: Upload = decode_upload(data, data, max_pixels=100_000)
    except InpaintError as error:
        return error.code, error.message
    alpha = None if upload.alpha is None else upload.alpha.tobytes()
    return upload.image.tobytes(), upload.mask.tobytes(), alpha


@pytest.mark.parametrize("name", [*USUAL, *UNUSUAL])
@pytest.mark.filterwarnings("ignore:Invalid APNG")
@needs_isal
def test_both_libraries_decode_and_refuse_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ISA-L and without, a file gives the same pixels or the same refusal."""
    data = (USUAL | UNUSUAL)[name]
    with_isal = outcome(data)
    monkeypatch.setattr(deflate, "_isal", None)
    assert outcome(data) == with_isal


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from([name for name in USUAL if "block" not in name and "many" not in name]), data=st.data())
@needs_isal
def test_damaged_streams_are_judged_alike(name: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream with bytes changed, its chunk's checksum made good again, gives the same with ISA-L and without.

    But for damage that no pixel is read from, e.g. to the code of a distance that never occurs: zlib refuses it,
    and ISA-L may give the whole picture, whose checksum is right.
    """
    stream = bytearray(stream_of(USUAL[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    head = USUAL[name][: USUAL[name].index(b"IDAT") - 4]
    damaged = head + chunk(b"IDAT", bytes(stream)) + chunk(b"IEND", b"")
    with monkeypatch.context() as patch:
        with_isal, undamaged = outcome(damaged), outcome(USUAL[name])
        patch.setattr(deflate, "_isal", None)
        assert with_isal in (outcome(damaged), undamaged)


@pytest.mark.parametrize("text", ["", "a red house\nSteps: 4", "Häuschen", "赤い家", "a\0b", "\ud800"])
def test_a_text_beside_the_pixels(text: str) -> None:
    """A text in any alphabet is read back by Pillow, and pixels and profile are what they were."""
    pixels = np.random.default_rng(2).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    plain = encode_png(pixels, b"profile")
    image = Image.open(BytesIO(png_with_text(plain, "parameters", text)))
    assert image.info["parameters"] == text.replace("\0", "?").replace("\ud800", "?")
    assert image.info["icc_profile"] == b"profile"
    assert np.array_equal(np.asarray(image), pixels)
    check_png(png_with_text(plain, "parameters", text))
