"""Reading server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

On bytes: text would be split at every line separator of Unicode, and prompts are echoed in the events' data.
"""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        name: Its type; "message" where it has none.
        data: Its lines of data, joined.
    """

    name: str
    data: bytes


async def read_events(chunks: AsyncIterable[bytes]) -> AsyncIterator[Event]:
    """The events of a stream; one that is not complete at its end is none.

    Args:
        chunks: The stream, cut anywhere.
    """
    name, data = "", list[bytes]()
    async for line in _lines(chunks):
        if not line:
            if data:
                yield Event(name or "message", b"\n".join(data))
            name, data = "", []
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value.decode(errors="replace")
        elif field == b"data":
            data.append(value)


async def _lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Lines without their ends, which are LF or CR LF; the service sends no lone CR."""
    buffer = bytearray()
    async for chunk in chunks:
        searched = len(buffer)
        buffer += chunk
        begin = 0
        while (end := buffer.find(b"\n", max(begin, searched))) >= 0:
            yield bytes(buffer[begin:end]).removesuffix(b"\r")
            begin = end + 1
        del buffer[:begin]
