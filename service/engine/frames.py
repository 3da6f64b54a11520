"""The pipe to a worker and what goes through it: frames of `multiprocessing.connection`, without its detours.

A frame is a length, then a pickled message. `Connection.recv` allocates all that is missing of it for each piece that
arrives, and pickling into one string lets that grow under a picture: either costs most of a millisecond in page
faults. And whatever waits for a busy interpreter's lock between two pieces makes the worker wait, whose loop sends.
"""

import pickle
import socket
import struct
from multiprocessing.connection import Connection

_PICKLE_PROTOCOL = 5

# A picture in one go, so that neither side waits for the other. Systems may grant less.
_BUFFER_BYTES = 4 * 1024 * 1024

_LENGTH = struct.Struct("!i")
_LONG_LENGTH = struct.Struct("!Q")
_MAX_LENGTH = 0x7FFFFFFF
_IS_LONG = -1  # In the place of the length, which follows in eight bytes.


def make_pipe() -> tuple[socket.socket, Connection]:
    """A pipe in both directions: our end, and a worker's.

    Raises:
        OSError: There are no descriptors left.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(True)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return ours, Connection(theirs.detach())


def read_message(pipe: socket.socket) -> object:
    """The next message; waits for it. For pipes to processes of one's own: unpickling runs what it is told to.

    Raises:
        EOFError: The other end is closed.
        OSError: The pipe is broken.
    """
    (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    if length == _IS_LONG:
        (length,) = _LONG_LENGTH.unpack(_read_exactly(pipe, _LONG_LENGTH.size))
    return pickle.loads(_read_exactly(pipe, length))  # noqa: S301 - see above


def write_message(pipe: socket.socket, message: object) -> None:
    """Send a message; waits until the pipe has taken it.

    Raises:
        OSError: The pipe is broken.
    """
    pieces = _Pieces()
    pickle.Pickler(pieces, _PICKLE_PROTOCOL).dump(message)
    length = sum(map(len, pieces))
    if length <= _MAX_LENGTH:
        pipe.sendall(_LENGTH.pack(length))
    else:
        pipe.sendall(_LENGTH.pack(_IS_LONG) + _LONG_LENGTH.pack(length))
    for piece in pieces:
        pipe.sendall(piece)


class _Pieces(list[memoryview]):
    """What a pickler writes: large arrays by themselves, and not copied."""

    def write(self, piece: bytes | pickle.PickleBuffer) -> None:
        self.append(piece.raw() if isinstance(piece, pickle.PickleBuffer) else memoryview(piece))


def _read_exactly(pipe: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    missing = memoryview(data)
    while missing:
        num_read = pipe.recv_into(missing, 0, socket.MSG_WAITALL)
        if num_read == 0:
            raise EOFError
        missing = missing[num_read:]
    return data
