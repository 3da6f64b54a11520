"""One HTTP request on a connection of its own, to the byte.

A client library decides by itself when to send, read and close. Here the sender does, so that it can tell
when the last byte of a request went out, hang up wherever it likes, and see what comes after an answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11
import httpx

Address = tuple[str, int]

TIMEOUT = "timeout"
NO_ANSWER = "no answer"
ANSWERED_TWICE = "answered twice"

READ_BYTES = 64 * 1024
EOF_SECONDS = 5.0
"""How long a server may take to close a connection after its answer, as it was asked to."""


@dataclass(frozen=True, slots=True)
class Wire:
    """A request as it is sent.

    Attributes:
        head: Request line and headers, with the empty line that ends them.
        body: What follows.
    """

    head: bytes
    body: bytes = field(default=b"", repr=False)

    @property
    def data(self) -> bytes:
        """All of it."""
        return self.head + self.body


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and what came back. Moments are `time.perf_counter()`.

    Attributes:
        status: Of the one complete answer; None without one.
        headers: Of the answer, names in lower case.
        body: Of the answer.
        started_at: When the connection was asked for.
        sent_at: When the last byte was handed to the kernel; None when the answer came before.
        ended_at: When the last byte of the answer was there, or hope was given up.
        fault: None for exactly one answer, else `TIMEOUT`, `NO_ANSWER` or `ANSWERED_TWICE` and why.
    """

    status: int | None
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    started_at: float
    sent_at: float | None
    ended_at: float
    fault: str | None = None

    @property
    def seconds_after_sending(self) -> float:
        """From the request's last byte, or from the start where the answer did not wait for it, to the answer's."""
        return self.ended_at - (self.started_at if self.sent_at is None else self.sent_at)


def address_of(url: str) -> Address:
    """Host and port of a URL that names both."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"no host and port in {url}")
    return parts.hostname, parts.port


def post_form(
    path: str, fields: Mapping[str, str], files: Mapping[str, tuple[str, bytes, str]], headers: Mapping[str, str]
) -> Wire:
    """A multipart form whose connection ends with the answer.

    Args:
        path: Where to.
        fields: Texts by name.
        files: File name, content and media type by name.
        headers: Beside those that a form needs.
    """
    request = httpx.Request("POST", f"http://127.0.0.1{path}", data=dict(fields), files=dict(files))
    return with_body(path, request.read(), {"Content-Type": request.headers["Content-Type"], **headers})


def with_body(path: str, body: bytes, headers: Mapping[str, str], *, method: str = "POST") -> Wire:
    """Any request with a body whose length is stated, unless `headers` say otherwise."""
    named = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(body)), **headers}
    if "Transfer-Encoding" in named:
        del named["Content-Length"]
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return Wire("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n", body)


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that hands to the kernel at once what is written; closed in the end.

    Raises:
        OSError: Nobody listens.
    """
    reader, writer = await asyncio.open_connection(*address)
    writer.transport.set_write_buffer_limits(high=0)  # `drain` returns when nothing is left to send.
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # `close` would first wait until the server has read what was left to send.
        with suppress(OSError):
            await writer.wait_closed()


async def exchange(address: Address, wire: Wire, timeout_seconds: float) -> Exchange:
    """Send a request, read while sending, and wait for the end of the connection.

    Args:
        address: Where to.
        wire: The request; it asks for the connection to be closed.
        timeout_seconds: Until the answer is complete.
    """
    parser = AnswerParser()
    started_at = time.perf_counter()
    sent_at: float | None = None
    ended_at: float | None = None
    fault: str | None = None
    try:
        async with asyncio.timeout(timeout_seconds) as limit, connected(address) as (reader, writer):
            sending = asyncio.create_task(_send(writer, wire.data))
            try:
                await parser.read(reader)
                ended_at = time.perf_counter()
                limit.reschedule(None)
                if sending.done():
                    fault = await parser.read_rest(reader)
            finally:
                sending.cancel()
                (sent,) = await asyncio.gather(sending, return_exceptions=True)
                sent_at = sent if isinstance(sent, float) else None
    except TimeoutError:
        fault = f"{TIMEOUT}: no answer within {timeout_seconds:g} s"
    except (OSError, h11.RemoteProtocolError) as error:
        fault = f"{NO_ANSWER}: {type(error).__name__}: {error}"
    if ended_at is None:
        return Exchange(None, {}, b"", started_at, sent_at, time.perf_counter(), fault)
    return Exchange(parser.status, parser.headers, bytes(parser.body), started_at, sent_at, ended_at, fault)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> float:
    """When the last byte was handed over."""
    writer.write(data)
    await writer.drain()
    return time.perf_counter()


class AnswerParser:
    """Reads one answer."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self._parser = h11.Connection(h11.CLIENT)
        # h11 reads an answer once it knows of a request; the real one may be something that it would not send.
        for event in (h11.Request(method="POST", target="/", headers=[("Host", "a")]), h11.EndOfMessage()):
            self._parser.send(event)

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Up to the end of the answer.

        Raises:
            OSError: The connection was lost, or closed before.
            h11.RemoteProtocolError: It is no HTTP, or ends too early.
        """
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                self._parser.receive_data(await reader.read(READ_BYTES))
            elif isinstance(event, h11.Response):
                self.status = event.status_code
                self.headers = {name.decode().lower(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                self.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("closed without an answer")

    async def read_rest(self, reader: asyncio.StreamReader) -> str | None:
        """Up to the end of the connection; a fault when anything comes, or it does not end."""
        rest = bytes(self._parser.trailing_data[0])
        try:
            async with asyncio.timeout(EOF_SECONDS):
                while data := await reader.read(READ_BYTES):
                    rest += data
        except TimeoutError:
            return f"{ANSWERED_TWICE}: the connection was kept open"
        except OSError:
            pass  # A reset is an end, too.
        return f"{ANSWERED_TWICE}: {len(rest)} bytes after the answer" if rest else None
