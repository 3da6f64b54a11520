"""The playground at `/`: a page on which people try the service with a browser. Its files are read once, at start."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api import ops
from service.api.accept import choose_media_type
from service.errors import ErrorCode, InpaintError

PAGE_PATH = "/"
FILES_PATH = "/playground/"

_FOLDER = Path(__file__).parent / "playground"
_PAGE = "index.html"

_FILES = (
    "style.css",
    "theme.js",
    "main.js",
    "api.js",
    "compare.js",
    "curl.js",
    "elements.js",
    "events.js",
    "faults.js",
    "history.js",
    "intake.js",
    "loras.js",
    "mask.js",
    "orientation.js",
    "painter.js",
    "picture.js",
    "readiness.js",
    "results.js",
    "settings.js",
    "icon.svg",
    "example/scene.png",
    "example/mask.png",
)
"""All that is served below `/playground/`; what is asked for is looked up among these names, never on the disk."""

OPEN_PATHS = frozenset({PAGE_PATH, *(FILES_PATH + name for name in _FILES)})
"""They hold no secret, and a browser has no key before the page has asked for it."""

_HTML = "text/html"
_JSON = "application/json"
_MEDIA_TYPES: Mapping[str, str] = {
    ".html": f"{_HTML}; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Names stay the same from one version to the next, so a browser asks each time; the answer is a short 304.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it is sent.

    Attributes:
        data: Its bytes.
        media_type: What they are.
        etag: Changes with the bytes.
    """

    data: bytes
    media_type: str
    etag: str

    def response(self, request: Request, headers: Mapping[str, str] | None = None) -> Response:
        """The answer: the file, or 304 for a client that has it."""
        headers = {**_HEADERS, "ETag": self.etag, **(headers or {})}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
        if known & {self.etag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers=headers, media_type=self.media_type)


def add_routes(app: FastAPI) -> None:
    """The page, which answers JSON instead to programs that ask for it, and its files."""
    page = _read(_PAGE)
    files = {name: _read(name) for name in _FILES}

    async def playground(request: Request) -> Response:
        """The page for people, the index for programs."""
        vary = {"Vary": "Accept"}
        if not _wants_page(", ".join(request.headers.getlist("Accept"))):
            return JSONResponse(await ops.index(request), headers=vary)
        return page.response(request, vary)

    async def playground_file(request: Request) -> Response:
        """One of its files.

        Raises:
            InpaintError: `NOT_FOUND`.
        """
        file = files.get(request.path_params["path"])
        if file is None:
            raise InpaintError(ErrorCode.NOT_FOUND, "Not Found.")
        return file.response(request)

    for path, route in ((PAGE_PATH, playground), (FILES_PATH + "{path:path}", playground_file)):
        app.add_api_route(
            path, route, methods=["GET", "HEAD"], include_in_schema=False, response_class=Response, response_model=None
        )


def _wants_page(accept: str) -> bool:
    """Whether a client takes HTML rather than JSON; one that takes neither gets the index."""
    try:
        return choose_media_type(accept, (_HTML, _JSON)) == _HTML
    except InpaintError:
        return False


def _read(name: str) -> _File:
    data = (_FOLDER / name).read_bytes()
    return _File(data, _MEDIA_TYPES[Path(name).suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
