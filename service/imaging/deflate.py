"""The zlib streams and checksums inside PNG files, by ISA-L where it is installed and by zlib elsewhere.

ISA-L takes a third of zlib's time for streams as small. Which of the two wrote a
file changes its bytes and never its pixels.
"""

import struct
import zlib
from importlib import import_module
from types import ModuleType

_isal: ModuleType | None
try:
    _isal = import_module("isal.isal_zlib")
except ImportError:  # There is no wheel for this machine.
    _isal = None

_Bytes = bytes | memoryview

_FASTEST = 1
_MAX_STORED_BLOCK = 0xFFFF


def deflate(data: _Bytes) -> bytes:
    """A zlib stream of data in which small values are frequent and long repetitions rare, as in filtered pixels."""
    if _isal is None:
        writer = zlib.compressobj(level=_FASTEST, strategy=zlib.Z_RLE)
        return writer.compress(data) + writer.flush()
    stream: bytes = _isal.compress(data, _FASTEST)
    return stream


def inflate_exactly(stream: bytes, num_bytes: int) -> bytes | None:
    """What a zlib stream holds, if ISA-L is there to be quick about it and finds nothing unusual.

    No more memory is used than `num_bytes` take. ISA-L also takes streams with codes that are incomplete where they
    are not used, which zlib refuses; what it gives has passed the stream's checksum.

    Args:
        stream: A zlib stream from anywhere.
        num_bytes: What it should hold.

    Returns:
        None when the stream is corrupt or cut off, holds another number of bytes, or is followed by others.
    """
    if _isal is None:
        return None
    reader = _isal.decompressobj()
    try:
        data: bytes = reader.decompress(stream, num_bytes + 1)
    except _isal.error:
        return None
    is_whole = reader.eof and not reader.unused_data and len(data) == num_bytes
    return data if is_whole else None


def stored(data: bytes) -> list[_Bytes]:
    """The pieces of a zlib stream that holds data as it is: reading it takes next to no time."""
    view = memoryview(data)
    pieces: list[_Bytes] = [b"\x78\x01"]
    for start in range(0, len(data), _MAX_STORED_BLOCK):
        block = view[start : start + _MAX_STORED_BLOCK]
        is_last = start + len(block) == len(data)
        pieces += [struct.pack("<B2H", is_last, len(block), len(block) ^ 0xFFFF), block]
    return [*pieces, struct.pack(">I", adler32(data))]


def crc32(data: _Bytes, start: int = 0) -> int:
    """CRC-32 of data, or of what `start` is the checksum of with the data behind it."""
    return int((zlib if _isal is None else _isal).crc32(data, start))


def adler32(data: _Bytes) -> int:
    """Adler-32 of data."""
    return int((zlib if _isal is None else _isal).adler32(data))
