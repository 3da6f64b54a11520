"""The `Prefer` header (RFC 7240): whether a client would rather not wait for its answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.requests import Request

HEADER = "Prefer"
APPLIED_HEADER = "Preference-Applied"

_MAX_WAIT_DIGITS = 9

# A preference and its parameters, up to the next comma that is not in a quoted string.
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')


@dataclass(frozen=True, slots=True)
class Preference:
    """What a client prefers.

    Attributes:
        respond_async: To be answered 202, and to fetch the result later.
        wait_seconds: For how long it would wait for the result itself nevertheless; 0 where it did not say.
    """

    respond_async: bool
    wait_seconds: int

    @property
    def applied(self) -> str:
        """The header that says so in an answer of 202."""
        return f"respond-async, wait={self.wait_seconds}" if self.wait_seconds else "respond-async"


def preference_of(request: Request) -> Preference:
    """What a request prefers; as the RFC has it, unknown and strange preferences are as if they were not there."""
    found: dict[str, str] = {}
    for name, value in _preferences(",".join(request.headers.getlist(HEADER))):
        found.setdefault(name, value)  # The first one counts.
    wait = found.get("wait", "")
    is_number = wait.isascii() and wait.isdecimal() and len(wait) <= _MAX_WAIT_DIGITS
    return Preference(found.get("respond-async") == "", int(wait) if is_number else 0)


def _preferences(header: str) -> Iterator[tuple[str, str]]:
    """Names in lower case with their values; parameters are left out."""
    for match in _PREFERENCE.finditer(header):
        name, _, value = match[0].partition(";")[0].partition("=")
        yield name.strip().lower(), value.strip().removeprefix('"').removesuffix('"')
