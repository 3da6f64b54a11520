"""Files of the pages that the service has: read once, at start, and sent from memory."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Self

from starlette.requests import Request
from starlette.responses import Response

from service.api.etags import is_known

_MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""`Content-Security-Policy` of our pages: no script or style within the page, nothing from another site, and no site
may frame it and have its visitors click."""

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Names stay the same from one version to the next, so a browser asks each time; the answer is a short 304.
    "Cache-Control": "private, no-cache",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        data: Its bytes.
        media_type: What they are.
        etag: Changes with the bytes.
    """

    data: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """A file of the package."""
        return cls.of(path.read_bytes(), path.suffix)

    @classmethod
    def of(cls, data: bytes, suffix: str) -> Self:
        """What was made in the place of a file."""
        return cls(data, _MEDIA_TYPES[suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')

    def response(self, request: Request, headers: Mapping[str, str] | None = None) -> Response:
        """The answer: the file, or 304 for a client that has it.

        Args:
            request: What is answered.
            headers: Further headers.
        """
        headers = {**_HEADERS, "ETag": self.etag, **(headers or {})}
        if is_known(request, self.etag):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(self.data, headers=headers, media_type=self.media_type)
