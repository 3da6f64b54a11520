"""Errors of the routes for OpenAI's clients: the exception that each becomes, and what is tried again."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Receive, Scope, Send

from tests.http.openai_pictures import KEY, connected, edit, file_of, hole, native_file
from tests.http.serving import BOUNDARY, LiveServer, eventually, multipart_head, png, read_answer, scene, serving
from tests.http.test_clients import bearer

RECORDED = json.loads((Path(__file__).parent / "recorded" / "openai" / "errors.json").read_text())


def members(response: httpx.Response, status: int) -> dict[str, Any]:
    """The four members of an error, checked as OpenAI's own."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-Id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == set(RECORDED["401"]["error"])
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    return error


def seen(server: LiveServer, status: int) -> float:
    """Requests for edits that were answered with this status."""
    return server.metric(f'inpaint_requests_total{{code="{status}",endpoint="/v1/images/edits"}}')


# --- refused before a body is read -------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "headers", "status", "code"),
    [
        ("GET /v1/images/edits", {}, 405, "method_not_allowed"),
        ("POST /v1/images/generations", {}, 404, "not_found"),
        ("POST /v1/images/variations", {}, 404, "not_found"),
        ("POST /v1/images/edits", {"Origin": "https://elsewhere.example"}, 403, "cross_origin"),
        ("POST /v1/images/edits", {"Content-Length": "99999999"}, 413, "body_too_large"),
        ("POST /v1/images/edits", {"Content-Encoding": "gzip"}, 400, "unsupported_media"),
        ("POST /v1/images/edits", {"Content-Type": "text/plain"}, 400, "unsupported_media"),
        ("POST /v1/images/edits", {"Content-Type": "multipart/form-data"}, 400, "malformed_multipart"),
        ("POST /v1/images/edits", {f"X-{number}": "1" for number in range(100)}, 431, "headers_too_large"),
        ("POST /v1/images/edits", {"Idempotency-Key": "é"}, 400, "invalid_value"),
        ("DELETE /v1/models/fake", {}, 405, "method_not_allowed"),
        ("GET /v1/models/other", {}, 404, "model_not_found"),
    ],
)
def test_whatever_refuses_a_request_says_it_in_openais_form(
    server: LiveServer, line: str, headers: dict[str, str], status: int, code: str
) -> None:
    """Also what is refused before any route is known: all four keys, always."""
    head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    sent = headers if "Content-Length" in headers else {**headers, "Content-Length": "0"}
    head += "".join(f"{name}: {value}\r\n" for name, value in sent.items()) + "\r\n"
    with server.raw(head.encode()) as connection:
        answered, answer_headers, body = read_answer(connection)
    error = members(httpx.Response(answered, headers=answer_headers, content=body), status)
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"


def test_native_routes_keep_their_own_form(server: LiveServer) -> None:
    """Only the paths of OpenAI's format answer in it."""
    for path in ("/v1/inpaint", "/v1/image", "/v1/nothing"):
        assert server.client.get(path).headers["Content-Type"] == "application/problem+json"


def test_keys() -> None:
    """`AuthenticationError` without the right key, with OpenAI's own type and code; with it, a picture."""
    with serving(api_keys=KEY, metrics_access="open") as server:
        for key in ("sk-wrong", "x"):
            with connected(server, api_key=key) as client, pytest.raises(openai.AuthenticationError) as caught:
                edit(client)
            recorded = RECORDED["401"]["error"]
            assert (caught.value.type, caught.value.param, caught.value.code) == (
                recorded["type"],
                recorded["param"],
                recorded["code"],
            )
            assert key not in str(caught.value.body)
            with connected(server, api_key=key) as client, pytest.raises(openai.AuthenticationError):
                client.models.retrieve("fake")
        assert server.client.post("/v1/images/edits").status_code == 401
        with connected(server) as client:
            assert edit(client).data
            assert client.models.retrieve("fake").id == "fake"


def test_browsers_let_openais_library_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All headers that the library adds pass a preflight from an allowed origin, and no header of any other kind."""
    sent: list[str] = []
    with serving(cors_origins="https://shop.example") as server:
        with connected(server, organization="org-1", project="p-1") as client:
            send = client._client.send

            def noting(request: Any, **options: Any) -> Any:
                sent.extend(request.headers.keys())
                return send(request, **options)

            monkeypatch.setattr(client._client, "send", noting)
            edit(client)
        added = [name for name in sent if name.startswith(("x-stainless-", "openai-"))]
        assert len(added) >= 8
        ask = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        asked = ", ".join(
            ["authorization", "content-type", "cookie", "x-stainless-é", "X-Stainless-Helper-Method", *added]
        )
        leave = server.client.options(
            "/v1/images/edits", headers={**ask, "Access-Control-Request-Headers": asked.encode("latin-1")}
        )
    allowed = {name.strip().lower() for name in leave.headers["Access-Control-Allow-Headers"].split(",")}
    assert allowed >= {"authorization", "content-type", "x-stainless-helper-method", *added}
    assert not allowed & {"cookie", "x-stainless-é"}


# --- what kind an error is ------------------------------------------------------------------------


def test_wrong_requests_are_one_kind_of_error(server: LiveServer) -> None:
    """`BadRequestError` with `invalid_request_error`, the field in `param` and the request's id."""
    recorded = RECORDED["400"]["error"]
    with connected(server) as client, pytest.raises(openai.BadRequestError) as caught:
        edit(client, image=("a.png", b"GIF89a"))
    assert (caught.value.type, caught.value.param) == (recorded["type"], recorded["param"])
    assert caught.value.request_id is not None
    assert caught.value.request_id.startswith("req_")
    assert caught.value.response.headers["X-Should-Retry"] == "false"


def test_unknown_models(server: LiveServer) -> None:
    """`NotFoundError` with OpenAI's type and code."""
    recorded = RECORDED["404"]["error"]
    with connected(server) as client, pytest.raises(openai.NotFoundError) as caught:
        edit(client, model="other")
    assert (caught.value.type, caught.value.code) == (recorded["type"], recorded["code"])


def test_unexpected_failure_tells_nothing(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours is a `server_error` that says nothing of it."""
    monkeypatch.setattr("service.imaging.require_nonempty", lambda _mask: 1 / 0)
    with connected(server) as client, pytest.raises(openai.InternalServerError) as caught:
        edit(client)
    assert (caught.value.status_code, caught.value.type, caught.value.param) == (500, "server_error", None)
    assert "ZeroDivision" not in str(caught.value.body)


def test_failure_outside_the_routes_has_the_form_too(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody else caught is told by the outermost middleware, in the same form."""

    async def broken(_self: object, _scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    monkeypatch.setattr("service.api.gate.Gate.__call__", broken)
    error = members(server.client.post("/v1/images/edits"), 500)
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "internal")


def test_not_ready_yet() -> None:
    """503 `server_error` while the model loads, for edits and models."""
    with serving(wait_ready=False, model="fake?load_forever=1") as server, connected(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            edit(client)
        assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
        assert "X-Should-Retry" not in caught.value.response.headers
        with pytest.raises(openai.InternalServerError) as caught:
            client.models.retrieve("fake")
        assert caught.value.status_code == 503


# --- what is tried again ----------------------------------------------------------------------------


def test_request_id_is_the_clients_own(server: LiveServer) -> None:
    """`with_raw_response` shows the id that the log has; a client can choose it."""
    with connected(server) as client:
        arguments: dict[str, Any] = {"image": ("a.png", png(scene())), "mask": ("m.png", hole()), "prompt": "a"}
        raw = client.images.with_raw_response.edit(**arguments)
        assert raw.request_id is not None
        assert raw.request_id.startswith("req_")
        assert raw.parse()._request_id == raw.request_id
        chosen = client.images.with_raw_response.edit(**arguments, extra_headers={"X-Request-Id": "mine-1"})
        assert chosen.request_id == "mine-1"


def test_full_queue_is_tried_again_after_the_wait(tmp_path: Path) -> None:
    """`RateLimitError` with OpenAI's type and code and a Retry-After; the client comes back, and gets its picture."""
    gate = tmp_path / "gate"
    key = bearer(KEY)["Authorization"]
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as server:
        held = []
        files = {"image": ("a.png", png(scene())), "mask": ("m.png", hole()), "prompt": (None, b"hold")}
        body = httpx.Request(
            "POST", "http://a", files=files, headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        ).read()
        for count in range(1, 4):
            lines = multipart_head(f"Content-Length: {len(body)}", f"Authorization: {key}")
            held.append(server.raw(lines.replace(b"/v1/inpaint", b"/v1/images/edits"), body))
            eventually(
                lambda count=count: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == count
            )
        recorded = RECORDED["429"]["error"]
        with connected(server) as client, pytest.raises(openai.RateLimitError) as caught:
            edit(client)
        assert (caught.value.type, caught.value.param, caught.value.code) == (
            recorded["type"],
            recorded["param"],
            recorded["code"],
        )
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert seen(server, 429) == 1

        async def patient() -> tuple[int, Any]:
            url = f"http://127.0.0.1:{server.port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=5, timeout=20) as client:
                asked = asyncio.create_task(
                    client.images.with_raw_response.edit(
                        image=("a.png", png(scene())),
                        mask=("m.png", hole()),
                        prompt="a red house",
                        extra_body={"seed": 7},
                    )
                )
                await asyncio.to_thread(eventually, lambda: seen(server, 429) >= 2)
                gate.touch()
                raw = await asked
                return raw.retries_taken, raw.parse()

        retries, answer = asyncio.run(patient())
        assert retries >= 1
        assert file_of(answer.data[0]) == native_file(server)
        for connection in held:
            assert read_answer(connection)[0] == 200
            connection.close()


def test_failures_that_would_repeat_themselves_are_not_tried_again(server: LiveServer) -> None:
    """`InternalServerError` at once where the same request must fail again; other 5xx are worth another try."""
    with connected(server, max_retries=1) as client:
        before = seen(server, 500)
        with pytest.raises(openai.InternalServerError) as caught:
            edit(client, prompt="nan")
        assert (caught.value.code, caught.value.type) == ("nan_output", "server_error")
        eventually(lambda: seen(server, 500) == before + 1)
        with pytest.raises(openai.InternalServerError) as caught:
            edit(client, prompt="fail")
        assert caught.value.code == "internal"
        eventually(lambda: seen(server, 500) == before + 3)


def test_deadline_is_an_error_of_the_server(server: LiveServer) -> None:
    """504 in the same form when the time that the client gave is over."""
    with connected(server) as client, pytest.raises(openai.InternalServerError) as caught:
        edit(client, prompt="a slow house", extra_body={"timeout": 0.01, "num_inference_steps": 150})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline")
