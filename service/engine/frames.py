"""The frames of `multiprocessing.connection`, without its detours: a length, then a pickled message.

`Connection.recv` allocates all that is missing of a frame for each piece of it that arrives, and pickling into one
string lets that grow under pictures of a megabyte. Either costs most of a millisecond in page faults alone.
"""

import os
import pickle
import struct

_PICKLE_PROTOCOL = 5

_LENGTH = struct.Struct("!i")
_LONG_LENGTH = struct.Struct("!Q")
_MAX_LENGTH = 0x7FFFFFFF
_IS_LONG = -1  # In the place of the length, which follows in eight bytes.


def read_message(descriptor: int) -> object:
    """The next message; waits for it. For pipes to processes of one's own: unpickling runs what it is told to.

    Raises:
        EOFError: The other end is closed.
        OSError: The pipe is broken.
    """
    (length,) = _LENGTH.unpack(_read_exactly(descriptor, _LENGTH.size))
    if length == _IS_LONG:
        (length,) = _LONG_LENGTH.unpack(_read_exactly(descriptor, _LONG_LENGTH.size))
    return pickle.loads(_read_exactly(descriptor, length))  # noqa: S301 - see above


def write_message(descriptor: int, message: object) -> None:
    """Send a message; waits until the pipe has taken it.

    Raises:
        OSError: The pipe is broken.
    """
    pieces = _Pieces()
    pickle.Pickler(pieces, _PICKLE_PROTOCOL).dump(message)
    length = sum(map(len, pieces))
    if length <= _MAX_LENGTH:
        _write_all(descriptor, _LENGTH.pack(length))
    else:
        _write_all(descriptor, _LENGTH.pack(_IS_LONG) + _LONG_LENGTH.pack(length))
    for piece in pieces:
        _write_all(descriptor, piece)


class _Pieces(list[memoryview]):
    """What a pickler writes: large arrays by themselves, and not copied."""

    def write(self, piece: bytes | pickle.PickleBuffer) -> None:
        self.append(piece.raw() if isinstance(piece, pickle.PickleBuffer) else memoryview(piece))


def _read_exactly(descriptor: int, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    missing = memoryview(data)
    while missing:
        num_read = os.readv(descriptor, [missing])
        if num_read == 0:
            raise EOFError
        missing = missing[num_read:]
    return data


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
