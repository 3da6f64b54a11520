"""HTTP/1.1 on a connection: uvicorn's h11 protocol, with deadlines and with errors in our own form.

uvicorn waits for ever for the rest of a request's head, and answers what h11
refuses with plain text.
"""

import asyncio
import json
import re
import socket
import sys
from collections.abc import Callable

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

# h11 merges equal ones, so that they cannot be told from one.
_CONTENT_LENGTH = re.compile(rb"^content-length[ \t]*:", re.IGNORECASE | re.MULTILINE)
_END_OF_HEAD = b"\r\n\r\n"


class HttpProtocol(H11Protocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _head = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start waiting for a request."""
        super().connection_made(transport)
        # asyncio leaves Nagle's algorithm on where the listening socket does not name its protocol: the end of an
        # answer then waits for the client to acknowledge its head, which kernels put off by 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._restart_timer(HEAD_SECONDS, self._on_head_timeout)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived: of a head, or of a body."""
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
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer was sent, maybe before the request's body was read."""
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
        self.transport.close()

    def _restart_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
