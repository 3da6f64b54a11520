"""JSON bodies and the files in them are read strictly, and nothing of them is repeated in an error."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.json_body import decode_file, parse_json_object
from service.errors import ErrorCode, InpaintError


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"secret"',
        b'{"secret": NaN}',
        b'{"secret": Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"secret": 1, "secret": 2}}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b"\x00",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    """Anything but one JSON object without repeated names is a bad request, and its text is not echoed."""
    with pytest.raises(InpaintError) as caught:
        parse_json_object(body)
    assert caught.value.code is ErrorCode.BAD_REQUEST
    assert "secret" not in caught.value.message


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none() | st.lists(st.integers())))
def test_objects_are_read_as_they_were_written(value: dict[str, object]) -> None:
    """What a client's JSON library writes is what is read; integers of more digits than any bound become floats."""
    read = parse_json_object(json.dumps(value).encode())
    assert read.keys() == value.keys()
    for name, item in value.items():
        assert read[name] == item or isinstance(item, int)


@given(st.binary(max_size=200), st.sampled_from(["", "data:image/png;base64,", "DATA:;base64,"]))
def test_files_in_base64_come_back(data: bytes, prefix: str) -> None:
    """Bare Base64, data URLs of any type, and lines as MIME breaks them, are the file's bytes."""
    encoded = base64.encodebytes(data).decode()
    assert decode_file(prefix + encoded, "image") == data


@pytest.mark.parametrize(
    "text", [None, 5, [], "https://example.org/a.png", "file:///etc/passwd", "data:,x", "a", "é=="]
)
def test_what_is_no_file_is_refused_by_the_name_of_its_field(text: object) -> None:
    """URLs are never fetched, and what is not Base64 is an invalid field."""
    with pytest.raises(InpaintError) as caught:
        decode_file(text, "mask")
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "mask")
