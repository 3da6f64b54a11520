"""The playground's page and files: who gets them, as what, and what they may do in a browser."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import playground_page
from tests.http.serving import LiveServer, assert_problem, serving

FOLDER = Path(playground_page.__file__).parent / "playground"
PAGE = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}
PATHS = ["/", *(f"/playground/{name}" for name in playground_page._FILES)]
KEY = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    """A server that asks for keys."""
    with serving(api_keys=KEY) as live:
        yield live


@pytest.mark.parametrize("headers", [PAGE, {"Accept": "*/*"}, {"Accept": "text/html"}, {"Accept": ""}])
def test_people_get_the_page(server: LiveServer, headers: dict[str, str]) -> None:
    """`GET /` is the page for browsers and for whoever takes anything."""
    answer = server.client.get("/", headers=headers)

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.content == (FOLDER / "index.html").read_bytes()
    assert answer.headers["Vary"] == "Accept"


@pytest.mark.parametrize(
    "accept",
    ["application/json", "application/json, text/plain, */*", "text/html;q=0.5, application/json", "image/png"],
)
def test_programs_keep_the_index(server: LiveServer, accept: str) -> None:
    """A client that asks `/` for JSON, or for nothing that a page could be, gets the index of the service."""
    answer = server.client.get("/", headers={"Accept": accept})

    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Vary"] == "Accept"
    assert answer.json()["inpaint"] == "POST /v1/inpaint"
    assert answer.json()["docs"] == "/docs"


def test_all_files_are_served_as_what_they_are(server: LiveServer) -> None:
    """Each file of the folder is served byte for byte with its media type; the README's picture is not."""
    kinds = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".png": "image/png"}
    kinds |= {".svg": "image/svg+xml"}
    names = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}

    served = {name: server.client.get(f"/playground/{name}") for name in names}

    assert {name for name, answer in served.items() if answer.status_code != 200} == {
        "index.html",
        "example/playground.png",
    }
    for name in names - {"index.html", "example/playground.png"}:
        assert served[name].content == (FOLDER / name).read_bytes()
        assert served[name].headers["Content-Type"] == kinds[Path(name).suffix]


@pytest.mark.parametrize("path", PATHS)
def test_headers_bind_the_browser(server: LiveServer, path: str) -> None:
    """Page and files may load and call nothing but the service itself, be framed by nobody, and are not sniffed."""
    headers = server.client.get(path, headers=PAGE).headers

    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/playground/main.js"])
def test_unchanged_files_are_not_sent_again(server: LiveServer, path: str) -> None:
    """A browser asks each time, and gets 304 without a body for what it has, and the file for anything else."""
    first = server.client.get(path)
    assert first.headers["Cache-Control"] == "private, no-cache"
    tag = first.headers["ETag"]

    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = server.client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert server.client.get(path, headers={"If-None-Match": '"other"'}).content == first.content


@pytest.mark.parametrize("path", ["/", "/playground/main.js", "/playground/example/scene.png"])
def test_head_answers_as_get_without_a_body(server: LiveServer, path: str) -> None:
    """HEAD has GET's headers and no body."""
    head, get = server.client.head(path), server.client.get(path)

    assert (head.status_code, head.content) == (200, b"")
    changing = {"date", "x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in changing} == {
        k: v for k, v in get.headers.items() if k not in changing
    }


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/nope.js",
        "/playground/index.html",
        "/playground/example",
        "/playground/example/playground.png",
        "/playground/main.js/",
        "/playground//main.js",
        "/playground/../app.py",
        "/playground/%2e%2e/app.py",
        "/playground/..%2fapp.py",
        "/playground/%2fetc%2fpasswd",
        "/playground/main.js%00",
        "/playground/MAIN.JS",
    ],
)
def test_nothing_else_is_there(server: LiveServer, path: str) -> None:
    """Whatever else is asked for, by whatever way out of the folder, is 404 in the service's form."""
    with server.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b'"code": "not_found"' in answer


def test_other_methods_are_refused(server: LiveServer) -> None:
    """The page takes no posts."""
    assert_problem(server.client.post("/"), 405, "method_not_allowed")
    assert_problem(server.client.post("/playground/main.js"), 405, "method_not_allowed")


@pytest.mark.parametrize("path", PATHS)
def test_page_is_open_where_keys_are_set(locked: LiveServer, path: str) -> None:
    """A browser can load the page, which holds no secret, before it has a key."""
    assert locked.client.get(path, headers=PAGE).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/adapters", "/playground/nope.js", "/playground/index.html", "/docs"]
)
def test_what_the_page_calls_takes_the_key(locked: LiveServer, path: str) -> None:
    """Only the page's own files are open; all else takes the key as before."""
    assert_problem(locked.client.get(path), 401, "unauthorized")
    assert locked.client.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code in (200, 404)
    assert_problem(locked.inpaint(), 401, "unauthorized")


def test_switched_off_there_is_only_the_index() -> None:
    """With `playground` off, `/` is the JSON index for everybody, takes a key again, and there are no files."""
    with serving(playground=False) as server:
        for headers in (PAGE, {"Accept": "*/*"}):
            answer = server.client.get("/", headers=headers)
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.json()["inpaint"] == "POST /v1/inpaint"
        for path in PATHS[1:]:
            assert_problem(server.client.get(path), 404, "not_found")
    with serving(playground=False, api_keys=KEY) as server:
        assert_problem(server.client.get("/", headers=PAGE), 401, "unauthorized")


def test_page_is_there_before_the_model() -> None:
    """The page does not wait for a worker: it is what tells people that the service is not ready yet."""
    with serving(wait_ready=False, model="fake?load_forever=1") as server:
        assert server.client.get("/", headers=PAGE).status_code == 200
        assert_problem(server.client.get("/v1/models"), 503, "not_ready")


def test_no_file_names_another_site() -> None:
    """Nothing is loaded from elsewhere, and no script or style stands in the page itself, which the policy forbids."""
    page, kinds = (FOLDER / "index.html").read_text(), {".html", ".js", ".css", ".svg"}
    texts = {path.name: path.read_text() for path in FOLDER.rglob("*") if path.suffix in kinds}

    for name, text in texts.items():
        found = re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", text)
        assert set(found) <= {"http://www.w3.org"}, name  # A namespace, which nobody loads.
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", page) == []


def test_page_names_only_files_that_exist(server: LiveServer) -> None:
    """Everything that page and scripts refer to is served."""
    texts = "".join(path.read_text() for path in FOLDER.rglob("*") if path.suffix in {".html", ".js"})
    named: set[str] = set(re.findall(r'(?:src|href)="(playground/[^"]+)"', texts))
    named |= {f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', texts)}
    assert len(named) > 15

    answers: dict[str, httpx.Response] = {name: server.client.get(f"/{name}") for name in named}

    assert [name for name, answer in answers.items() if answer.status_code != 200] == []


def test_page_and_files_are_counted_under_bounded_names(server: LiveServer) -> None:
    """Metrics have one label for all files, whatever clients ask for."""
    for path in ("/playground/main.js", "/playground/xyzzy.js", "/playground/xyzzy/xyzzy"):
        server.client.get(path)
    text: Any = server.client.get("/metrics").text
    assert "xyzzy" not in text
    assert 'endpoint="/playground/{path:path}"' in text
