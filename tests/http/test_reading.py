"""Reading what arrives: multipart bodies and Accept headers of any shape."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.accept import choose_media_type
from service.api.multipart import Part, read_parts
from service.errors import ErrorCode, InpaintError

CONTENT_TYPE = "multipart/form-data; boundary=frontier"
OFFERS = ("image/png", "application/json")

names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
# Beginnings of boundaries are what tokenizers stumble over.
contents = st.lists(st.sampled_from([b"\r\n", b"--", b"frontie", b"-", b"\r", b"\n", b"\0", b"x" * 50])).map(b"".join)
parts = st.lists(st.builds(Part, names, contents, st.booleans(), st.booleans()), max_size=5)


def encode(form: Sequence[Part]) -> bytes:
    """The body of a form."""
    body = b""
    for part in form:
        filename = '; filename="a"' if part.is_file else ""
        body += f'--frontier\r\nContent-Disposition: form-data; name="{part.name}"{filename}\r\n'.encode()
        body += b"Content-Type: application/json; charset=utf-8\r\n" if part.is_json else b""
        body += b"\r\n" + part.data + b"\r\n"
    return body + b"--frontier--\r\n"


def read(body: bytes, cuts: Sequence[int] = ()) -> list[Part]:
    """Read a body that arrives in pieces."""

    async def chunks() -> AsyncIterator[bytes]:
        places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
        for start, end in pairwise(places):
            yield body[start:end]

    return asyncio.run(read_parts(CONTENT_TYPE, chunks()))


def outcome_of(work: Callable[[], object]) -> object:
    """What it returns, or the code of the error that it raises; any other exception passes."""
    try:
        return work()
    except InpaintError as error:
        return error.code


@given(parts, st.lists(st.integers(0, 10_000), max_size=8))
def test_any_form_is_read_as_sent_however_it_is_cut(form: list[Part], cuts: list[int]) -> None:
    """What arrives is what was sent, byte for byte, wherever the network cuts it."""
    assert read(encode(form), cuts) == form


@given(parts, st.integers(0, 10_000))
def test_a_form_that_stops_early_is_refused(form: list[Part], length: int) -> None:
    """A body without its closing boundary is never taken for a whole one."""
    body = encode(form)
    with pytest.raises(InpaintError) as raised:
        read(body[: length % (len(body) - len(b"--\r\n"))])
    assert raised.value.code == ErrorCode.MALFORMED_MULTIPART


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_form_or_malformed(noise: bytes, is_after_a_start: bool) -> None:
    """No bytes raise anything but `malformed_multipart`."""
    start = b'--frontier\r\nContent-Disposition: form-data; name="a"' if is_after_a_start else b""
    outcome = outcome_of(lambda: read(start + noise))
    assert outcome == ErrorCode.MALFORMED_MULTIPART or isinstance(outcome, list)


@given(st.text(st.sampled_from("*/;q=0.19, aimgenpjsocl+"), max_size=60))
def test_any_accept_header_has_an_answer_or_none(accept: str) -> None:
    """Any header yields an offer or `not_acceptable`."""
    assert outcome_of(lambda: choose_media_type(accept, OFFERS)) in (*OFFERS, ErrorCode.NOT_ACCEPTABLE)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "image/png"),
        ("  ", "image/png"),
        ("*/*", "image/png"),
        ("application/*", "application/json"),
        ("image/*;q=0.3, application/json;q=0.4", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("*/*;q=0.9, image/png;q=0.1", "application/json"),
        ("application/json, */*", "application/json"),
        ("APPLICATION/JSON ; charset=utf-8", "application/json"),
        ("image/png;q=2, application/json;q=0.1", "application/json"),
    ],
)
def test_weights_and_specificity(accept: str | None, chosen: str) -> None:
    """The most specific range sets an offer's weight; among equals the named one wins, then the first."""
    assert choose_media_type(accept, OFFERS) == chosen
