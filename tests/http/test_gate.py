"""What is decided from a request's head, before its body: keys, origins, sizes, headers."""

from base64 import b64encode
from collections.abc import Iterator

import httpx
import pytest

from service.api import body as body_module
from service.api import protocol
from tests.http.serving import (
    CLOSING,
    LiveServer,
    assert_problem,
    check_problem,
    head,
    multipart_head,
    part,
    read_answer,
    serving,
    usual_parts,
)

KEY, OTHER_KEY = "first-key", "zweiter-schlüssel"
SITE = "https://shop.example"


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    """A server with keys and one allowed web origin."""
    with serving(api_keys=f"{KEY},{OTHER_KEY}", cors_origins=SITE, max_body_mib=1.0) as live:
        yield live


def bearer(key: str) -> dict[str, str]:
    """The usual header."""
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    """A user's name and password, of which the password is the key."""
    return {"Authorization": f"Basic {b64encode(f'anyone:{key}'.encode()).decode()}"}


# --- keys ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(KEY + "x"),
        bearer(KEY[:-1]),
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Basic"},
        basic("wrong"),
        basic(""),
        {"X-API-Key": "wrong"},
        {"X-API-Key": ""},
    ],
)
def test_no_key_or_a_wrong_key(guarded: LiveServer, headers: dict[str, str]) -> None:
    """Without a valid key there is nothing to be had but 401."""
    response = guarded.client.get("/v1/models", headers=headers)
    assert_problem(response, 401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_each_key_is_taken_in_either_header(guarded: LiveServer) -> None:
    """Every configured key works, as a bearer token, as X-API-Key and as a password, whatever its alphabet."""
    for key in (KEY, OTHER_KEY):
        for name, value in (("Authorization", f"Bearer {key}"), ("X-API-Key", key), *basic(key).items()):
            response = guarded.client.get("/v1/models", headers=[(name.encode(), value.encode())])
            assert response.status_code == 200


def test_probes_need_no_key_and_metrics_do(guarded: LiveServer) -> None:
    """Load balancers hold no keys; metrics are for those who do."""
    assert guarded.client.get("/healthz").status_code == 200
    assert guarded.client.get("/readyz").status_code == 200
    assert_problem(guarded.client.get("/metrics"), 401, "unauthorized")


def test_unauthorized_before_the_body(guarded: LiveServer) -> None:
    """A wrong key is answered from the head alone, whatever length of body is announced."""
    connection = guarded.raw(multipart_head("Content-Length: 60000000", "Authorization: Bearer wrong"))
    with connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "unauthorized")
    assert status == 401


def test_large_body_behind_a_wrong_key_still_gets_its_answer(guarded: LiveServer) -> None:
    """A client that sends its 60 MB regardless reads 401 at the end of it, not a reset connection."""
    response = guarded.client.post("/v1/inpaint", content=bytes(60_000_000), headers=bearer("wrong"))
    assert_problem(response, 401, "unauthorized")


# --- size ---------------------------------------------------------------------------


def test_declared_body_over_the_limit(server: LiveServer) -> None:
    """A body announced as too large is 413 before any of it is sent."""
    with server.raw(multipart_head("Content-Length: 1048577")) as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "body_too_large")
    assert status == 413


def test_chunked_body_over_the_limit(server: LiveServer) -> None:
    """A body of no announced length is counted while it arrives."""

    def endless() -> Iterator[bytes]:
        yield usual_parts()
        yield part("image", b"")[:-2]
        for _ in range(64):
            yield bytes(65536)

    headers = {"Content-Type": "multipart/form-data; boundary=frontier"}
    response = server.client.post("/v1/inpaint", content=endless(), headers=headers)
    assert_problem(response, 413, "body_too_large")


def test_chunked_body_within_the_limit(server: LiveServer) -> None:
    """A body of no announced length is fine."""
    headers = {"Content-Type": "multipart/form-data; boundary=frontier"}
    response = server.client.post("/v1/inpaint", content=iter([usual_parts(), CLOSING]), headers=headers)
    assert response.status_code == 200


# --- origins --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        ({"Origin": "null"}, True),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": "https://sub.shop.example", "Sec-Fetch-Site": "same-site"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": "https://evil.example"}, True),
        ({"Origin": "http://[broken"}, True),
        ({"Origin": f"{SITE}.evil.example", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": SITE, "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": SITE.upper() + "/"}, False),
        ({"Origin": "http://localhost:1234", "Sec-Fetch-Site": "same-origin"}, False),
        ({"Origin": "http://service.test", "Host": "service.test"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({}, False),
    ],
)
def test_pages_of_other_sites_cannot_make_browsers_send_work(
    guarded: LiveServer, headers: dict[str, str], is_refused: bool
) -> None:
    """An unsafe request from an origin that is not allowed is 403; own pages, allowed ones and programs pass."""
    response = guarded.inpaint({**headers, **bearer(KEY)})
    if is_refused:
        assert_problem(response, 403, "cross_origin")
    else:
        assert response.status_code == 200


def test_bodies_that_need_no_preflight_are_no_way_around(guarded: LiveServer) -> None:
    """A page may post text or a form without asking; from another site that is 403, and text is no request anyway."""
    foreign = {"Origin": "https://evil.example", **bearer(KEY)}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=frontier"):
        body = usual_parts() + CLOSING
        response = guarded.client.post("/v1/inpaint", content=body, headers={"Content-Type": kind, **foreign})
        assert_problem(response, 403, "cross_origin")
    response = guarded.client.post("/v1/inpaint", content=body, headers={"Content-Type": "text/plain", **bearer(KEY)})
    assert_problem(response, 415, "unsupported_media")


def test_allowed_origin_may_read_answers_also_refusals(guarded: LiveServer) -> None:
    """CORS headers are on every answer to an allowed origin, and on none to others."""
    allowed = guarded.client.get("/v1/models", headers={"Origin": SITE})
    other = guarded.client.get("/v1/models", headers={"Origin": "https://evil.example", **bearer(KEY)})

    assert allowed.status_code == 401
    assert allowed.headers["Access-Control-Allow-Origin"] == SITE
    assert "X-Seed" in allowed.headers["Access-Control-Expose-Headers"]
    assert other.status_code == 200
    assert "Access-Control-Allow-Origin" not in other.headers
    assert "Origin" in other.headers["Vary"]


def test_preflight(guarded: LiveServer, server: LiveServer) -> None:
    """Browsers ask before they send a key: an allowed origin gets leave without one, another does not."""
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    leave = guarded.client.options("/v1/inpaint", headers={"Origin": SITE, **ask})
    other = guarded.client.options("/v1/inpaint", headers={"Origin": "https://evil.example", **ask})
    without_cors = server.client.options("/v1/inpaint", headers={"Origin": SITE, **ask})

    assert leave.status_code == 204
    assert leave.headers["Access-Control-Allow-Origin"] == SITE
    assert "Authorization" in leave.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Origin" not in other.headers
    assert other.status_code == 401
    assert not [name for name in without_cors.headers if name.startswith("access-control")]


# --- heads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ["Host: a", "Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Host: a", "Content-Length: 5", "Content-Length: 6"],
        ["Host: a", "Content-Length: 5", "content-length: 5"],
        ["Host: a", "Content-Length: -5"],
        ["Content-Length: 0"],
        ["Host: a", "Host: b", "Content-Length: 0"],
        ["Host: a", "no colon"],
        ["Host: a", "Transfer-Encoding: gzip, chunked"],
    ],
)
def test_ambiguous_or_broken_head(server: LiveServer, lines: list[str]) -> None:
    """A head that two servers could read differently is 400, as a problem document."""
    with server.raw(head(*lines)) as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "bad_request")
    assert status == 400


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["GET /healthz HTTP/1.0"], 200),
        (["HEAD /readyz HTTP/1.0"], 200),
        (["GET /v1/models HTTP/1.0"], 400),
        (["GET /healthz HTTP/1.1"], 400),
        (["POST /healthz HTTP/1.0", "Origin: http://evil.example", "Content-Length: 0"], 400),
    ],
)
def test_probes_in_http_1_0_need_no_host(lines: list[str], expected: int) -> None:
    """Load balancers that speak it send none; also where only some hosts' names are taken."""
    request = "\r\n".join([*lines, "", ""]).encode()
    with serving(allowed_hosts="paint.example") as server, server.raw(request) as connection:
        assert connection.recv(1000).split(b" ")[1] == str(expected).encode()


@pytest.mark.parametrize(
    "lines",
    [
        [f"X-{number}: 1" for number in range(101)],
        [f"X-{number}: {'a' * 9000}" for number in range(8)],
        [f"X-Long: {'a' * 300_000}"],
    ],
    ids=["many", "large", "huge"],
)
def test_too_many_or_too_large_headers(server: LiveServer, lines: list[str]) -> None:
    """More than 100 headers or 64 KiB of them is 431."""
    with server.raw(head("Host: localhost", *lines, method="GET", path="/healthz")) as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "headers_too_large")
    assert status == 431


def test_head_just_within_the_limits(server: LiveServer) -> None:
    """Sixty thousand bytes of headers are no reason to refuse."""
    lines = [f"X-{number}: {'a' * 10_000}" for number in range(6)]
    with server.raw(head("Host: localhost", *lines, method="GET", path="/healthz")) as connection:
        assert read_answer(connection)[0] == 200


# --- ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["abc-123", "0" * 128, "A.b_c"])
def test_harmless_request_id_of_the_client_is_kept(server: LiveServer, sent: str) -> None:
    """A client's own request id names the request in the answer."""
    assert server.client.get("/nope", headers={"X-Request-Id": sent}).json()["request_id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "a" * 129, "a;b", "{}"])
def test_other_request_ids_are_replaced(server: LiveServer, sent: str) -> None:
    """What could spoil a header or a log is replaced by a random id."""
    ids = {server.client.get("/healthz", headers={"X-Request-Id": sent}).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(request_id.startswith("req_") for request_id in ids)


# --- slow clients ---------------------------------------------------------------------------


def test_body_that_stalls(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that makes no progress is 408."""
    monkeypatch.setattr(body_module, "STALL_SECONDS", 0.2)
    with server.raw(multipart_head("Content-Length: 1000"), b"--frontier\r\n") as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "request_timeout")
    assert status == 408


def test_body_that_trickles(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that keeps moving, but never ends, is 408 as well."""
    monkeypatch.setattr(body_module, "MAX_BODY_SECONDS", 0.3)
    with server.raw(multipart_head("Content-Length: 1000"), b"--frontier\r\n") as connection:
        connection.settimeout(0.02)
        answer = b""
        while not answer:
            connection.sendall(b"x")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_half_a_head(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that never ends is 408, and a connection that says nothing is closed."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    with server.raw(b"POST /v1/inpaint HTTP/1.1\r\nHost: local") as connection:
        status, headers, body = read_answer(connection)
        assert connection.recv(1) == b""
    check_problem(headers, body, status, "request_timeout")
    with server.raw() as silent:
        assert silent.recv(1) == b""


def test_connection_serves_one_request_after_another(server: LiveServer) -> None:
    """Deadlines for heads do not cut a connection that is used again, nor one whose requests are pipelined."""
    request = head("Host: localhost", method="GET", path="/healthz")
    with server.raw(request, request) as connection:
        assert read_answer(connection)[0] == 200
    with httpx.Client(base_url=server.client.base_url, trust_env=False) as client:
        assert [client.get("/healthz").status_code for _ in range(3)] == [200, 200, 200]
