"""HTTP/1.1 on a connection: uvicorn's h11 protocol, with deadlines, a limit and errors in our own form.

uvicorn waits for ever for the rest of a request's head, and for a client to
take its answer; it accepts connections until the process has no descriptor
left for anything else; it answers what h11 refuses with plain text.
"""

import asyncio
import fcntl
import json
import logging
import re
import resource
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from service.api.problems import PROBLEM_MEDIA_TYPE, STATUS, problem_body, problem_headers
from service.api.records import new_request_id
from service.errors import ErrorCode, InpaintError

HEAD_SECONDS = 10.0
"""How long a request's head may take from its first byte, or from the opening of the connection."""

LINGER_SECONDS = 30.0
"""How long the rest of a body is read and thrown away after its request was refused.

Closing at once would reset the connection, and the client, still sending, might never see the answer.
"""

WRITE_STALL_SECONDS = 30.0
"""How long a client may take nothing of what waits to be sent to it."""

MAX_WRITE_SECONDS = 300.0
"""How long it may take all that waits, or one byte every now and then would hold an answer in memory for ever."""

RESERVED_DESCRIPTORS = 32
"""Of the process's limit, what connections leave: for pipes to workers, files and listening sockets."""

SURPLUS_SECONDS = 1.0
"""How long one connection too many waits for its request: closing before it has come would reset the connection."""

_PIECE_BYTES = 64 * 1024
"""Of what has arrived, how much h11 gets to see at once."""

# h11 merges equal ones, so that they cannot be told from one.
_CONTENT_LENGTH = re.compile(rb"^content-length[ \t]*:", re.IGNORECASE | re.MULTILINE)
_END_OF_HEAD = b"\r\n\r\n"

logger = logging.getLogger(__name__)


def max_connections() -> int:
    """As many as the process's limit of descriptors allows, as it is now."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit - RESERVED_DESCRIPTORS)


class HttpProtocol(H11Protocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _head = b""
    _is_surplus = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start waiting for a request."""
        super().connection_made(transport)
        self.idle_since = time.monotonic()
        # Every byte that the client has not taken yet counts as waiting; see `pause_writing`.
        transport.set_write_buffer_limits(high=0)
        # asyncio leaves Nagle's algorithm on where the listening socket does not name its protocol: the end of an
        # answer then waits for the client to acknowledge its head, which kernels put off by 40 ms.
        self._socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > max_connections():
            self._make_room()
        if self._is_surplus:
            self._restart_timer(SURPLUS_SECONDS, self._refuse_surplus)
        else:
            self._restart_timer(HEAD_SECONDS, self._on_head_timeout)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived: of a head, or of a body."""
        # h11 bounds what is incomplete: of what arrives all at once it would take any size.
        for begin in range(0, len(data), _PIECE_BYTES):
            if begin and self.transport.is_closing():
                return  # It was refused.
            self._take(data[begin : begin + _PIECE_BYTES])

    def _take(self, data: bytes) -> None:
        if self._is_surplus:
            self._refuse_surplus()
            return
        if self.conn.their_state is h11.IDLE:
            self._head += data
            head, end, _ = self._head.partition(_END_OF_HEAD)
            if end and len(_CONTENT_LENGTH.findall(head)) > 1:
                self._refuse(InpaintError(ErrorCode.BAD_REQUEST, "The length of the body is stated twice."))
                return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = b""
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._restart_timer(HEAD_SECONDS, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    # --- answers that nobody takes ----------------------------------------------

    def pause_writing(self) -> None:
        """The client has not taken all that was sent: it has some time to do so."""
        super().pause_writing()
        self._give_up_at = self.loop.time() + MAX_WRITE_SECONDS
        self._watch_writing(self._num_unsent())

    def resume_writing(self) -> None:
        """It has taken all."""
        self._stop_write_timer()
        super().resume_writing()

    def _watch_writing(self, num_unsent: int) -> None:
        self._stop_write_timer()
        seconds = min(WRITE_STALL_SECONDS, self._give_up_at - self.loop.time())
        self._write_timer = self.loop.call_later(max(0.0, seconds), self._check_writing, num_unsent)

    def _check_writing(self, num_unsent: int) -> None:
        still_unsent = self._num_unsent()
        if still_unsent < num_unsent and self.loop.time() < self._give_up_at:
            self._watch_writing(still_unsent)
            return
        # A reset: the kernel's copy of the answer goes with ours, and the client does not take it for a whole one.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _num_unsent(self) -> int:
        """Bytes that the client has not acknowledged, here and in the kernel, which may hold megabytes."""
        num_bytes = self.transport.get_write_buffer_size()
        with suppress(OSError):  # Not every system tells of its own.
            num_bytes += struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0]
        return num_bytes

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # --- more connections than descriptors ----------------------------------------

    def _make_room(self) -> None:
        """There are too many: the one that has been without a request for longest ends, or else this one."""
        idle = [one for one in self.connections if isinstance(one, HttpProtocol) and one.is_idle]
        oldest = min(idle, key=lambda one: one.idle_since)
        if oldest is self:
            logger.warning("all %d connections are in use: a further one is refused", len(self.connections) - 1)
            self._is_surplus = True
        else:
            oldest.transport.abort()

    def _refuse_surplus(self) -> None:
        self._refuse(InpaintError(ErrorCode.OVERLOADED, "There are too many connections.", retry_after_seconds=1))

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self.conn.our_state is h11.IDLE and not self.transport.is_closing()

    # --- answers of its own ---------------------------------------------------------

    def on_response_complete(self) -> None:
        """An answer was sent, maybe before the request's body was read."""
        self.idle_since = time.monotonic()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._restart_timer(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's one text for everything
        """Refuse what h11 cannot parse; called while its error is handled."""
        refused = sys.exception()
        is_too_large = isinstance(refused, h11.RemoteProtocolError) and refused.error_status_hint == 431  # noqa: PLR2004
        code = ErrorCode.HEADERS_TOO_LARGE if is_too_large else ErrorCode.BAD_REQUEST
        self._refuse(InpaintError(code, "The request is not valid HTTP/1.1, or its headers are too large."))

    def _on_head_timeout(self) -> None:
        if self._head:
            self._refuse(InpaintError(ErrorCode.REQUEST_TIMEOUT, "The request's headers did not arrive in time."))
        else:
            self.transport.close()

    def _refuse(self, error: InpaintError) -> None:
        """Answer without an application, and close."""
        self._stop_timer()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            status, request_id = STATUS[error.code], new_request_id()
            body = json.dumps(problem_body(error, request_id)).encode()
            headers = {
                **problem_headers(error),
                "Content-Type": PROBLEM_MEDIA_TYPE,
                "Content-Length": str(len(body)),
                "X-Request-Id": request_id,
                "Connection": "close",
            }
            response = h11.Response(status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:
                # What the application may still say has nowhere to go.
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()

    def _restart_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
