"""The `Prefer` header as RFC 7240 has it."""

import pytest
from starlette.requests import Request

from service.api.prefer import Preference, preference_of


def preference(*headers: str) -> Preference:
    raw = [(b"prefer", header.encode("latin-1")) for header in headers]
    return preference_of(Request({"type": "http", "headers": raw}))


@pytest.mark.parametrize(
    ("headers", "respond_async", "wait_seconds"),
    [
        ((), False, 0),
        (("",), False, 0),
        (("respond-async",), True, 0),
        (("Respond-Async",), True, 0),
        (("respond-async, wait=10",), True, 10),
        (("wait=10,respond-async",), True, 10),
        (("respond-async", "wait=10"), True, 10),
        (('respond-async; foo="a, b", wait="7"',), True, 7),
        (("respond-async,wait = 3 ; x",), True, 3),
        (("respond-async; foo",), True, 0),
        (('respond-async=""',), True, 0),  # An empty value is none.
        (('foo="respond-async, wait=9", wait=2',), False, 2),
        (("wait=1, wait=2, respond-async",), True, 1),  # The first one counts.
        (("respond-async, return=minimal, handling=lenient",), True, 0),
        (("wait=10",), False, 10),
    ],
)
def test_what_is_preferred(headers: tuple[str, ...], respond_async: bool, wait_seconds: int) -> None:
    """Any spelling that the RFC allows means the same, over one header or several."""
    assert preference(*headers) == Preference(respond_async, wait_seconds)


@pytest.mark.parametrize(
    "header",
    [
        "respond-async=1",
        "respond_async",
        "async",
        "wait=-1",
        "wait=1.5",
        "wait=",
        "wait=²",
        f"wait={'9' * 5000}",
        '"',
        ";;,=,",
    ],
)
def test_what_makes_no_sense_is_as_if_it_was_not_there(header: str) -> None:
    """Preferences are no demands: what cannot be understood is no error."""
    assert preference(header) == Preference(respond_async=False, wait_seconds=0)
