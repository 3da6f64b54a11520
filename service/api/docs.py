"""`/docs`: the API as a page on which it can be tried out. All it loads comes from here, so it works offline.

The page is Swagger UI (`docs_page/swagger_ui/SOURCE.md` says which) over `/openapi.json`; without scripts the same
document is shown as plain HTML. How a route gets there is told in `service.api.openapi`.
"""

from pathlib import Path
from types import MappingProxyType

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.api.plain_docs import plain_html
from service.api.static_files import StaticFile

DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"

_FOLDER = Path(__file__).parent / "docs_page"
_FILES = MappingProxyType(
    {
        f"{DOCS_PATH}/page.js": _FOLDER / "page.js",
        f"{DOCS_PATH}/page.css": _FOLDER / "page.css",
        f"{DOCS_PATH}/swagger-ui-bundle.js": _FOLDER / "swagger_ui" / "swagger-ui-bundle.js",
        f"{DOCS_PATH}/swagger-ui.css": _FOLDER / "swagger_ui" / "swagger-ui.css",
    }
)

DOCS_PATHS = (DOCS_PATH, *_FILES, OPENAPI_PATH)
"""All that the page is made of: who may read one of them may read all."""


def add_routes(app: FastAPI) -> None:
    """The page and its files."""
    frame = (_FOLDER / "index.html").read_text("utf-8")
    files = {path: StaticFile.read(file) for path, file in _FILES.items()}

    async def docs(request: Request) -> Response:
        """The page, with the document in it for readers without scripts."""
        plain = plain_html(request.app.openapi())
        return StaticFile.of(frame.replace("<!-- plain -->", plain).encode(), ".html").response(request)

    async def docs_file(request: Request) -> Response:
        """One of the page's files."""
        return files[request.url.path].response(request)

    for path, route in ((DOCS_PATH, docs), *((path, docs_file) for path in _FILES)):
        app.add_api_route(
            path,
            route,
            methods=["GET", "HEAD"],
            include_in_schema=False,
            response_class=Response,
            response_model=None,
        )
