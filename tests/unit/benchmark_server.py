"""A made-up server with our wire form, for the load generator and the measurement."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

Reply = tuple[int, bytes]
"""Status and body."""


@dataclass(frozen=True, slots=True)
class Request:
    """What came in: method and path in one line, and the body."""

    line: str
    body: bytes

    def field(self, name: str) -> str:
        """A field of the form."""
        return self.body.split(b'name="%s"\r\n\r\n' % name.encode())[1].split(b"\r\n")[0].decode()

    @property
    def upload(self) -> bytes:
        """The picture as it was sent."""
        return self.body.split(b"Content-Type: image/png\r\n\r\n")[1].split(b"\r\n--")[0]


def png(size: int) -> bytes:
    """A black picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def serving(reply: Callable[[Request], Reply | None]) -> Iterator[str]:
    """Serve from a thread until the end of the block; yields the base URL.

    Args:
        reply: Called with each request; None leaves it without an answer.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(lines.get("content-length", 0)))
                if (answer := reply(Request(head.split("\r\n")[0], body))) is None:
                    await reader.read()  # Until the client hangs up.
                    break
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (answer[0], len(answer[1])) + answer[1])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(talk, "127.0.0.1", 0), loop).result()

    async def stop() -> None:
        server.close()
        talks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
