"""multipart/form-data, read strictly and into memory.

Frameworks' own parsers spool files to the temporary directory, take a body that
stops in the middle for a whole one, and read broken UTF-8 as Latin-1. This one
drives the same tokenizer and does none of that. The body's size is bounded
before it gets here.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import ErrorCode, InpaintError

MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the body.

    Attributes:
        name: Its form field's name.
        data: Its content.
        is_file: Whether it came with a file name.
        is_json: Whether its content type is JSON. Browsers can send such a part only as a file.
    """

    name: str
    data: bytes
    is_file: bool
    is_json: bool = False

    @classmethod
    def of_text(cls, name: str, value: str) -> Self:
        """A text field; what is no Unicode text stays to be found by whoever reads the form."""
        return cls(name, value.encode("utf-8", "surrogatepass"), is_file=False)

    @classmethod
    def of_file(cls, name: str, data: bytes) -> Self:
        """A file."""
        return cls(name, data, is_file=True)


async def read_parts(content_type: str, chunks: AsyncIterator[bytes]) -> list[Part]:
    """Read a body to its end.

    Args:
        content_type: The request's `Content-Type`.
        chunks: The body.

    Raises:
        InpaintError: `UNSUPPORTED_MEDIA` for any other content type, `MALFORMED_MULTIPART` for a body that is none.
    """
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        raise InpaintError(ErrorCode.UNSUPPORTED_MEDIA, "Send the request as multipart/form-data.")
    collector = _Collector()
    try:
        parser = collector.parser(options.get(b"boundary", b""))
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError:
        raise _malformed("The multipart body cannot be parsed.") from None
    if not collector.is_complete:
        raise _malformed("The multipart body ends before its closing boundary.")
    return collector.parts


def _malformed(message: str) -> InpaintError:
    return InpaintError(ErrorCode.MALFORMED_MULTIPART, message)


@dataclass(slots=True)
class _Collector:
    """Turns the tokenizer's callbacks into parts."""

    parts: list[Part] = field(default_factory=list)
    is_complete: bool = False
    _header_name: bytearray = field(default_factory=bytearray)
    _header_value: bytearray = field(default_factory=bytearray)
    _disposition: bytes | None = None
    _name: str = ""
    _is_file: bool = False
    _is_json: bool = False
    _data: bytearray = field(default_factory=bytearray)

    def parser(self, boundary: bytes) -> MultipartParser:
        """The tokenizer that fills this."""
        if not boundary:
            raise _malformed("The Content-Type names no boundary.")
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def _on_part_begin(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise _malformed(f"The multipart body has more than {MAX_PARTS} parts.")
        self._disposition = None
        self._is_json = False
        self._data = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        header_name = self._header_name.lower()
        if header_name == b"content-type":
            self._is_json = parse_options_header(bytes(self._header_value))[0] == b"application/json"
        elif header_name == b"content-disposition":
            if self._disposition is not None:
                raise _malformed("A part has two Content-Disposition headers.")
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        disposition, options = parse_options_header(self._disposition)
        if disposition != b"form-data" or not options.get(b"name"):
            raise _malformed("A part has no name.")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._is_file = b"filename" in options

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def _on_part_end(self) -> None:
        self.parts.append(Part(self._name, bytes(self._data), self._is_file, self._is_json))

    def _on_end(self) -> None:
        self.is_complete = True
