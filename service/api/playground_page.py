"""The playground at `/`: a page on which people try the service with a browser. Its files are read once, at start."""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api import ops
from service.api.accept import choose_media_type
from service.api.static_files import StaticFile
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


def add_routes(app: FastAPI) -> None:
    """The page, which answers JSON instead to programs that ask for it, and its files."""
    page = StaticFile.read(_FOLDER / _PAGE)
    files = {name: StaticFile.read(_FOLDER / name) for name in _FILES}

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
