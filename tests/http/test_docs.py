"""`/docs`: whole, its own, under a strict policy, for whom the operator says."""

import hashlib
import re
from pathlib import Path
from typing import Any

from service.api.docs import DOCS_PATHS
from service.api.plain_docs import plain_html
from tests.http.serving import LiveServer, assert_problem, serving

PAGE = Path(__file__).parents[2] / "service" / "api" / "docs_page"
VENDORED = PAGE / "swagger_ui"
VERSION = "5.35.0"
MAX_BYTES = 2_000_000

FILES = {
    "/docs/page.js": "text/javascript",
    "/docs/page.css": "text/css",
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
}


def test_the_page_loads_its_own_files_and_no_others(server: LiveServer) -> None:
    """`/docs` names no other site and has no script or style within; every file that it names is there."""
    page = server.client.get("/docs")

    assert page.status_code == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r'<script>|<style|<iframe|\sstyle="|\son[a-z]+="', page.text)
    named = re.findall(r'(?:src|href|action|data)="([^"]*)"', page.text)
    assert {f"/{name}" for name in named if name != "data:,"} == set(FILES)
    for path, media_type in FILES.items():
        file = server.client.get(path)
        assert file.status_code == 200
        assert file.headers["Content-Type"].startswith(media_type)
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert file.text


def test_policy_lets_nothing_in_from_elsewhere(server: LiveServer) -> None:
    """Scripts and styles come from files of the service, requests go to it, and no site can frame the page."""
    policy = server.client.get("/docs").headers["Content-Security-Policy"]
    directives = dict(directive.split(" ", 1) for directive in policy.split("; "))

    assert directives == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_files_are_sent_once(server: LiveServer) -> None:
    """A browser that has a file is told so, and gets it again only when it changed."""
    path = "/docs/swagger-ui-bundle.js"
    first = server.client.get(path)
    again = server.client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    other = server.client.get(path, headers={"If-None-Match": '"another"'})

    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    assert (other.status_code, other.content) == (200, first.content)
    assert first.headers["Cache-Control"] == again.headers["Cache-Control"] == "private, no-cache"


def test_nothing_else_of_the_folder_is_served(server: LiveServer) -> None:
    """Below `/docs` there are the page's files and nothing that a path could be bent to."""
    for path in ("/docs/", "/docs/index.html", "/docs/SHA256SUMS", "/docs/..%2fdocs.py", "/docs/%2e%2e/docs.py"):
        assert_problem(server.client.get(path), 404, "not_found")


def test_all_of_the_page_is_for_whom_the_operator_says() -> None:
    """`docs_access` holds for the page, its files and the document alike."""
    keys = {"api_keys": "a-key-of-a-client", "admin_keys": "a-key-of-an-administrator"}
    expected = {"open": (200, 200, 200), "clients": (401, 200, 200), "admins": (401, 403, 200), "off": (401, 404, 404)}
    senders: list[dict[str, str]] = [{}, *({"X-API-Key": key} for key in keys.values())]
    assert set(DOCS_PATHS) == {"/docs", "/openapi.json", *FILES}
    for access, statuses in expected.items():
        with serving(wait_ready=False, docs_access=access, **keys) as server:
            for path in DOCS_PATHS:
                answers = tuple(server.client.get(path, headers=headers).status_code for headers in senders)
                assert answers == statuses, (access, path)


def test_vendored_files_are_as_published() -> None:
    """Swagger UI's files are those of the named version, byte for byte, with their licences, and not too large."""
    sums = dict(reversed(line.split()) for line in (VENDORED / "SHA256SUMS").read_text().splitlines())

    assert f"`swagger-ui-dist` {VERSION}" in (VENDORED / "SOURCE.md").read_text()
    assert {"LICENSE", "NOTICE", "swagger-ui-bundle.js", "swagger-ui.css"} < set(sums)
    assert {path.name for path in VENDORED.iterdir()} == {*sums, "SHA256SUMS", "SOURCE.md"}
    for name, digest in sums.items():
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in VENDORED.iterdir()) < MAX_BYTES


# --- without scripts -----------------------------------------------------------------


def test_without_scripts_the_page_is_whole(server: LiveServer) -> None:
    """Every field and route stands in the page itself, with the content types that are really sent."""
    page = server.client.get("/docs").text
    plain = page[page.index("<noscript>") : page.index("</noscript>")]

    for expected in ("POST /v1/inpaint", "guidance_scale", "multipart/form-data", "image/webp", "problem+json"):
        assert expected in plain
    for path in server.client.get("/openapi.json").json()["paths"]:
        assert path in plain


def test_plain_page_of_any_document() -> None:
    """Bodies that are only referred to are shown, and nothing in a document becomes markup."""
    document: dict[str, Any] = {
        "info": {"title": "<b>", "version": "1", "description": "One `<i>`.\n\nTwo."},
        "paths": {
            "/a": {
                "post": {
                    "requestBody": {
                        "content": {
                            "application/json": {"schema": {"$ref": "#/components/schemas/Body"}},
                            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                        }
                    },
                    "responses": {"200": {"description": "Done."}},
                }
            }
        },
        "components": {
            "schemas": {
                "Body": {"required": ["size"], "properties": {"size": {"$ref": "#/components/schemas/Size"}}},
                "Size": {"type": "integer", "minimum": 8},
            }
        },
    }
    html = plain_html(document)

    assert "<tr><td><code>size</code><td>integer, ≥ 8<td>required" in html
    assert "<h3>Send <code>application/octet-stream</code></h3>" in html
    assert "<b>" not in html
    assert "<code>&lt;i&gt;</code>" in html
