"""`/docs`: the API as a page on which it can be tried out. All it loads comes from here, so it works offline.

The page is Swagger UI (`docs_page/swagger_ui/SOURCE.md` says which) over `/openapi.json`; without scripts the same
document is shown as plain HTML. How a route gets there is told in `service.api.openapi`.
"""

from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from service.api.plain_docs import plain_html

DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"

# No script or style within the page, nothing from another site, and no site may frame it and have its visitors click.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_FILE_HEADERS = MappingProxyType({"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"})

_FOLDER = Path(__file__).parent / "docs_page"
_FRAME = (_FOLDER / "index.html").read_text("utf-8")
_FILES = MappingProxyType(
    {
        f"{DOCS_PATH}/page.js": (_FOLDER / "page.js", "text/javascript"),
        f"{DOCS_PATH}/page.css": (_FOLDER / "page.css", "text/css"),
        f"{DOCS_PATH}/swagger-ui-bundle.js": (_FOLDER / "swagger_ui" / "swagger-ui-bundle.js", "text/javascript"),
        f"{DOCS_PATH}/swagger-ui.css": (_FOLDER / "swagger_ui" / "swagger-ui.css", "text/css"),
    }
)

DOCS_PATHS = (DOCS_PATH, *_FILES, OPENAPI_PATH)
"""All that the page is made of: who may read one of them may read all."""


def add_routes(app: FastAPI) -> None:
    """The page and its files."""
    app.add_api_route(DOCS_PATH, page, include_in_schema=False, response_class=HTMLResponse, response_model=None)
    for path in _FILES:
        app.add_api_route(path, file, include_in_schema=False, response_class=Response, response_model=None)


async def page(request: Request) -> HTMLResponse:
    """The page, with the document in it for readers without scripts."""
    plain = plain_html(request.app.openapi())
    return HTMLResponse(_FRAME.replace("<!-- plain -->", plain), headers={"Content-Security-Policy": _POLICY})


async def file(request: Request) -> Response:
    """One of the page's files; browsers that have it already ask whether it is still the same."""
    path, media_type = _FILES[request.url.path]
    response = FileResponse(path, media_type=media_type, stat_result=path.stat(), headers=dict(_FILE_HEADERS))
    tag = response.headers["ETag"]
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={**_FILE_HEADERS, "ETag": tag})
    return response
