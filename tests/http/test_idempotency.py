"""`Idempotency-Key`: a client that repeats its request gets the first answer, and the work is done once."""

import asyncio
import json
import logging
import socket
import time
from pathlib import Path

import httpx
import pytest

from service.api import inpaint
from tests.http.serving import (
    BOUNDARY,
    CLOSING,
    LiveServer,
    assert_problem,
    check_problem,
    eventually,
    form,
    multipart_head,
    part,
    png,
    read_answer,
    scene,
    serving,
    square_mask,
)


def keyed(key: str, **headers: str) -> dict[str, str]:
    """Headers with a key."""
    return {"Idempotency-Key": key, **headers}


def painted(server: LiveServer) -> float:
    """Images that workers have painted."""
    return server.metric("inpaint_images_total")


def hold_parts(prompt: bytes = b"hold") -> list[bytes]:
    """Parts of a request that the worker holds until its gate opens."""
    return [
        part("image", png(scene()), "a.png"),
        part("mask", png(square_mask()), "m.png"),
        part("prompt", prompt),
    ]


def send_held(server: LiveServer, key: str, *lines: str, prompt: bytes = b"hold") -> socket.socket:
    """A connection whose keyed request is sent."""
    body = b"".join(hold_parts(prompt)) + CLOSING
    return server.raw(multipart_head(f"Content-Length: {len(body)}", f"Idempotency-Key: {key}", *lines), body)


def post_held(server: LiveServer, key: str, prompt: bytes = b"hold", **headers: str) -> httpx.Response:
    """The same request over a connection of its own."""
    return server.post_body(b"".join(hold_parts(prompt)) + CLOSING, **keyed(key, **headers))


def is_idle(server: LiveServer) -> bool:
    """Whether nothing runs, waits or holds a key."""
    state = server.state
    return not state.unfinished and state.kept_answers.num_claimed == 0 and server.metric("inpaint_in_flight") == 0


# --- repetitions ----------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["image/png", "image/webp", "application/json"])
def test_a_repetition_gets_the_first_answer_and_paints_nothing(accept: str) -> None:
    """Same key, same form: the same bytes and facts, a made-up seed included, from one run of the worker."""
    with serving() as server:
        first = server.inpaint(keyed("k", Accept=accept), seed=None)
        second = server.inpaint(keyed("k", Accept=accept), seed=None)
        third = server.inpaint(keyed("k", Accept="*/*"), seed=None)

        assert first.status_code == second.status_code == third.status_code == 200
        assert first.content == second.content == third.content
        assert painted(server) == 1
        assert server.metric("inpaint_replayed_total") == 2
        for name in ("Content-Type", "X-Seed", "X-NSFW-Content-Detected", "Server-Timing"):
            assert first.headers.get(name) == second.headers.get(name)
        assert "Idempotent-Replayed" not in first.headers
        assert "Original-Request" not in first.headers
        assert second.headers["Idempotent-Replayed"] == "true"
        assert second.headers["Original-Request"] == first.headers["X-Request-Id"]
        assert second.headers["X-Request-Id"] not in ("", first.headers["X-Request-Id"])
        if accept == "application/json":
            assert second.json()["id"] == first.headers["X-Request-Id"]


def test_events_are_repeated_by_their_last_one(server: LiveServer) -> None:
    """The repetition of an event stream is its `completed` event, as it was."""
    headers = keyed("events", Accept="text/event-stream")
    first = server.inpaint(headers, seed=None)
    second = server.inpaint(headers, seed=None)

    assert first.text.startswith("event: queued\n")
    assert second.headers["Content-Type"] == first.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert second.headers["Cache-Control"] == "no-store"
    assert second.text.startswith("event: completed\n")
    assert first.text.endswith("\n\n" + second.text)


def test_boundary_order_and_file_names_do_not_matter(server: LiveServer) -> None:
    """A client that puts its form together anew for the retry still repeats its request."""
    before = painted(server)
    pieces = [*hold_parts(b"a tree"), part("seed", b"3")]
    first = server.post_body(b"".join(pieces) + CLOSING, **keyed("form"))
    body = (b"".join(reversed(pieces)) + CLOSING).replace(BOUNDARY.encode(), b"another").replace(b'"a.png"', b'"b.png"')
    second = server.post_body(body, **keyed("form", **{"Content-Type": "multipart/form-data; boundary=another"}))

    assert first.status_code == second.status_code == 200
    assert second.headers["Idempotent-Replayed"] == "true"
    assert first.content == second.content
    assert painted(server) == before + 1


def test_another_form_with_the_key_is_refused_for_good(server: LiveServer) -> None:
    """A key stands for one form: another field, or one pixel, is 422 and not to be tried again."""
    first = server.inpaint(keyed("reused"))
    other_scene = scene()
    other_scene[0, 0, 0] ^= 1

    for changes in ({"prompt": "a green tree"}, {"image": png(other_scene)}, {"seed": None}, {"eta": "0"}):
        response = server.inpaint(keyed("reused"), **changes)
        problem = assert_problem(response, 422, "key_reuse")
        assert response.headers["X-Should-Retry"] == "false"
        assert "reused" not in problem["detail"]
    assert server.inpaint(keyed("reused")).content == first.content


def test_another_shape_than_the_first_is_406(server: LiveServer) -> None:
    """The first answer is given as it was: a client that takes only another shape is told which one there is."""
    server.inpaint(keyed("shape", Accept="application/json"))

    problem = assert_problem(server.inpaint(keyed("shape", Accept="image/png")), 406, "not_acceptable")
    assert "application/json" in problem["detail"]


def test_without_a_key_every_request_is_painted(server: LiveServer) -> None:
    """Equal requests without a key have nothing to do with each other, nor with those that have one."""
    before = painted(server)
    server.inpaint(keyed("with"))
    for _ in range(2):
        assert "Idempotent-Replayed" not in server.inpaint().headers
    assert painted(server) == before + 3


# --- while the first one runs -----------------------------------------------------------


def test_while_the_first_runs_others_are_told_to_wait(tmp_path: Path) -> None:
    """409 with a time to come back while it runs; then both have the answer, from one run."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        first = send_held(server, "k")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)

        response = post_held(server, "k")
        assert_problem(response, 409, "in_progress")
        assert int(response.headers["Retry-After"]) >= 1
        assert "X-Should-Retry" not in response.headers
        assert_problem(post_held(server, "k", b"hold still"), 422, "key_reuse")

        gate.touch()
        with first:
            status, headers, body = read_answer(first)
        again = post_held(server, "k")
        assert status == again.status_code == 200
        assert again.content == body
        assert again.headers["Original-Request"] == headers["x-request-id"]
        assert painted(server) == 1
        eventually(lambda: is_idle(server))


def test_of_many_at_once_one_is_painted() -> None:
    """Retries that cross each other never make the work be done twice."""
    files, data = form(seed="5")

    async def ask_all(url: httpx.URL) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
            posts = [client.post("/v1/inpaint", files=files, data=data, headers=keyed("k")) for _ in range(12)]
            return await asyncio.gather(*posts)

    with serving() as server:
        responses = asyncio.run(ask_all(server.client.base_url))

        assert {response.status_code for response in responses} <= {200, 409}
        assert len({response.content for response in responses if response.status_code == 200}) == 1
        assert sum("Idempotent-Replayed" not in one.headers for one in responses if one.status_code == 200) == 1
        assert painted(server) == 1


def test_a_kept_answer_needs_no_place_in_the_queue(tmp_path: Path) -> None:
    """Where the queue is full a repetition is still answered; what would have to be painted is refused."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as server:
        first = server.inpaint(keyed("k"))
        held = []
        for count in range(1, 4):
            held.append(send_held(server, f"held {count}"))
            eventually(
                lambda count=count: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == count
            )

        assert server.inpaint(keyed("k")).content == first.content
        assert_problem(server.inpaint(keyed("new")), 429, "overloaded")
        assert_problem(post_held(server, "held 3"), 409, "in_progress")

        gate.touch()
        assert [read_answer(connection)[0] for connection in held] == [200, 200, 200]
        for connection in held:
            connection.close()
        assert server.inpaint(keyed("new")).status_code == 200


# --- hanging up ---------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["image/png", "application/json", "text/event-stream"])
def test_what_a_client_hung_up_on_waits_for_its_retry(tmp_path: Path, accept: str) -> None:
    """With a key the work goes on when the connection is lost: 409 while it runs, then the answer, from one run."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        connection = send_held(server, "k", f"Accept: {accept}")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
        connection.close()
        if accept != "text/event-stream":  # Streams have sent their status; others are known to have nobody to answer.
            gone = 'inpaint_requests_total{code="499",endpoint="/v1/inpaint"}'
            eventually(lambda: server.metric(gone) == 1)

        assert_problem(post_held(server, "k", Accept=accept), 409, "in_progress")
        assert server.metric("inpaint_in_flight") == 1
        gate.touch()
        eventually(lambda: server.state.kept_answers.num_kept == 1)
        response = post_held(server, "k", Accept=accept)

        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith(accept)
        assert response.headers["Idempotent-Replayed"] == "true"
        assert painted(server) == 1
        assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == 0
        assert is_idle(server)


def test_hanging_up_in_the_queue_keeps_the_place(tmp_path: Path) -> None:
    """A keyed request whose client went away while it waited is painted in its turn."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1) as server:
        held = []
        for count in range(1, 4):
            held.append(send_held(server, f"k{count}"))
            eventually(
                lambda count=count: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == count
            )
        held.pop().close()
        eventually(lambda: server.metric('inpaint_requests_total{code="499",endpoint="/v1/inpaint"}') == 1)
        gate.touch()

        assert [read_answer(connection)[0] for connection in held] == [200, 200]
        eventually(lambda: server.state.kept_answers.num_kept == 3)
        assert post_held(server, "k3").headers["Idempotent-Replayed"] == "true"
        for connection in held:
            connection.close()


def test_what_nobody_waits_for_ends_with_its_deadline(tmp_path: Path) -> None:
    """Work that goes on without its client goes on no longer than its deadline, and then leaves its key free."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", timeout=0.5) as server:
        connection = send_held(server, "k")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
        connection.close()

        eventually(lambda: server.metric('inpaint_failed_total{reason="deadline"}') == 1)
        eventually(lambda: is_idle(server))
        gate.touch()
        assert "Idempotent-Replayed" not in post_held(server, "k").headers
        assert painted(server) == 1


def test_what_nobody_waits_for_holds_up_no_shutdown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that stops gives such work its drain time like any other, then ends it, and itself, in good order."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}", drain_timeout=0.3) as server:
        connection = send_held(server, "k")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
        connection.close()
        eventually(lambda: server.metric('inpaint_requests_total{code="499",endpoint="/v1/inpaint"}') == 1)

    assert not server.state.unfinished
    assert server.state.kept_answers.num_claimed == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_hanging_up_during_the_upload_starts_nothing(server: LiveServer) -> None:
    """A keyed request counts from when its body is there: one that broke off is free to be sent anew."""
    sample = 'inpaint_requests_total{code="499",endpoint="/v1/inpaint"}'
    before, images = server.metric(sample), painted(server)

    server.raw(multipart_head("Content-Length: 100000", "Idempotency-Key: broken"), hold_parts()[0]).close()

    eventually(lambda: server.metric(sample) == before + 1)
    assert is_idle(server)
    assert server.inpaint(keyed("broken")).status_code == 200
    assert painted(server) == images + 1


# --- failures -------------------------------------------------------------------------------


def test_a_failure_is_not_kept(server: LiveServer) -> None:
    """What failed in the worker runs again, and its key is free for another form."""
    sample = 'inpaint_failed_total{reason="internal"}'
    before = server.metric(sample)
    for _ in range(2):
        response = server.inpaint(keyed("failing"), prompt="please fail")
        assert_problem(response, 500, "internal")
        assert "Idempotent-Replayed" not in response.headers
    assert server.metric(sample) == before + 2
    assert server.inpaint(keyed("failing")).status_code == 200


def test_a_failed_stream_is_not_kept(server: LiveServer) -> None:
    """A stream that ended with `failed` runs again as well."""
    headers = keyed("failing stream", Accept="text/event-stream")
    texts = [server.inpaint(headers, prompt="please fail").text for _ in range(2)]
    assert all(text.startswith("event: queued\n") and "event: failed\n" in text for text in texts)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"num_inference_steps": "0"}, 422, "out_of_range"),
        ({"image": b"no picture"}, 422, "invalid_image"),
        ({"output_format": "jpeg"}, 406, "not_acceptable"),
    ],
)
def test_what_is_refused_leaves_the_key_free(server: LiveServer, changes: dict, status: int, code: str) -> None:
    """A form that was never admitted can be corrected and sent with the same key."""
    key = f"corrected {code}"
    for _ in range(2):
        assert_problem(server.inpaint(keyed(key, Accept="image/png"), **changes), status, code)
    assert is_idle(server)
    assert server.inpaint(keyed(key, Accept="image/png")).status_code == 200


def test_a_fault_of_ours_leaves_the_key_free(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where making the answer fails unexpectedly, the client gets a 500, the log the reason, and the key is free."""
    with monkeypatch.context() as patch:
        patch.setattr(inpaint, "image_answer", lambda _: 1 / 0)
        assert_problem(server.inpaint(keyed("fault")), 500, "internal")

    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    assert is_idle(server)
    assert server.inpaint(keyed("fault")).status_code == 200


# --- time and room ----------------------------------------------------------------------------


def test_answers_are_kept_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `idempotency_ttl` a key is unknown again: the request runs, and another form may have the key."""
    with serving(idempotency_ttl=3600.0) as server:
        first = server.inpaint(keyed("k"), seed=None)
        monkeypatch.setattr(server.state.kept_answers, "_now", lambda: time.monotonic() + 3590)
        assert server.inpaint(keyed("k"), seed=None).content == first.content

        monkeypatch.setattr(server.state.kept_answers, "_now", lambda: time.monotonic() + 3601)
        second = server.inpaint(keyed("k"), seed=None)

        assert "Idempotent-Replayed" not in second.headers
        assert second.headers["X-Seed"] != first.headers["X-Seed"]
        assert painted(server) == 2


def test_old_answers_leave_the_memory_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are too old are dropped even where nobody asks for anything any more."""
    monkeypatch.setattr("service.api.app._SWEEP_SECONDS", 0.02)
    with serving() as server:
        server.inpaint(keyed("k"))
        kept = server.state.kept_answers
        assert kept.num_bytes > 0
        monkeypatch.setattr(kept, "_now", lambda: time.monotonic() + 3601)
        eventually(lambda: (kept.num_kept, kept.num_bytes) == (0, 0))


def test_memory_stays_within_its_bound(server: LiveServer) -> None:
    """However many requests have a key, answers take no more than `idempotency_mib`; the oldest make room."""
    size = len(server.inpaint().content)
    with serving(idempotency_mib=5 * size / 2**20) as bounded:
        kept = bounded.state.kept_answers
        for number in range(40):
            assert bounded.inpaint(keyed(f"k{number}"), seed=number).status_code == 200
            assert kept.num_bytes <= 5 * size
        assert 3 <= kept.num_kept <= 5
        assert is_idle(bounded)

        assert "Idempotent-Replayed" in bounded.inpaint(keyed("k39"), seed=39).headers
        assert "Idempotent-Replayed" not in bounded.inpaint(keyed("k0"), seed=0).headers
        assert painted(bounded) == 41


def test_without_room_nothing_is_kept(tmp_path: Path) -> None:
    """`idempotency_mib=0` keeps no answer; a key still guards against doing the work twice at once."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", idempotency_mib=0.0) as server:
        with send_held(server, "k") as connection:
            eventually(lambda: server.metric("inpaint_in_flight") == 1)
            assert_problem(post_held(server, "k"), 409, "in_progress")
            gate.touch()
            assert read_answer(connection)[0] == 200
        assert "Idempotent-Replayed" not in post_held(server, "k").headers
        assert painted(server) == 2


# --- clients and keys ----------------------------------------------------------------------------


def test_clients_do_not_share_keys() -> None:
    """One client's answer is never another's, even for the same key and form; nor is its key known to others."""
    with serving(api_keys="alice,bob") as server:
        alice = server.inpaint(keyed("k", Authorization="Bearer alice"), seed=None)
        bob = server.inpaint(keyed("k", Authorization="Bearer bob"), seed=None)
        assert "Idempotent-Replayed" not in bob.headers
        assert bob.headers["X-Seed"] != alice.headers["X-Seed"]

        again = server.inpaint(keyed("k", **{"X-API-Key": "alice"}), seed=None)
        assert again.content == alice.content
        assert_problem(server.inpaint(keyed("k", Authorization="Bearer bob"), seed=1), 422, "key_reuse")
        assert_problem(server.inpaint(keyed("k", Authorization="Bearer eve"), seed=None), 401, "unauthorized")


@pytest.mark.parametrize("key", [b"", b"a" * 256, "é".encode(), b"a\tb"])
def test_a_key_that_is_none_is_refused_before_the_upload(server: LiveServer, key: bytes) -> None:
    """Keys have 1 to 255 printable ASCII characters; anything else is 422, naming the header, before the body."""
    head = multipart_head("Content-Length: 1000").removesuffix(b"\r\n") + b"Idempotency-Key: " + key + b"\r\n\r\n"
    with server.raw(head) as connection:
        status, headers, body = read_answer(connection)
    problem = check_problem(headers, body, status, "invalid_field")
    assert status == 422
    assert problem["errors"][0]["field"] == "Idempotency-Key"


def test_two_keys_are_refused(server: LiveServer) -> None:
    """Which of two keys would count is nobody's guess."""
    lines = ["Content-Length: 1000", "Idempotency-Key: a", "Idempotency-Key: a"]
    with server.raw(multipart_head(*lines)) as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "invalid_field")


def test_keys_show_up_nowhere(
    server: LiveServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither logs, metrics nor errors hold a client's key; of a repetition the log has the first request's id."""
    caplog.set_level(logging.DEBUG)
    first = server.inpaint(keyed("sesame"))
    again = server.inpaint(keyed("sesame"))
    refused = server.inpaint(keyed("sesame"), prompt="a tree")
    with monkeypatch.context() as patch:
        patch.setattr(inpaint, "image_answer", lambda _: 1 / 0)
        failed = server.inpaint(keyed("sesame!"))

    assert [first.status_code, again.status_code, refused.status_code, failed.status_code] == [200, 200, 422, 500]
    ids = (again.headers["X-Request-Id"], failed.headers["X-Request-Id"])
    eventually(lambda: all(any(one in str(record.__dict__) for record in caplog.records) for one in ids))
    assert "sesame" not in caplog.text
    assert "sesame" not in str([record.__dict__ for record in caplog.records])
    assert "sesame" not in server.client.get("/metrics").text
    assert "sesame" not in refused.text + failed.text
    assert "sesame" not in json.dumps([dict(one.headers) for one in (first, again, refused, failed)])
    noted = [getattr(record, "fields", {}) for record in caplog.records]
    (entry,) = [fields for fields in noted if fields.get("request_id") == again.headers["X-Request-Id"]]
    assert entry["replay_of"] == first.headers["X-Request-Id"]


def test_pages_of_other_origins_can_tell_a_repetition() -> None:
    """Scripts may send the key, and read what says that an answer was repeated."""
    with serving(cors_origins="https://paint.example") as server:
        origin = {"Origin": "https://paint.example"}
        preflight = server.client.options(
            "/v1/inpaint", headers={**origin, "Access-Control-Request-Method": "POST"}
        ).headers["Access-Control-Allow-Headers"]
        exposed = server.inpaint(keyed("k", **origin)).headers["Access-Control-Expose-Headers"]
    assert "Idempotency-Key" in preflight
    assert {"Idempotent-Replayed", "Original-Request"} <= set(exposed.split(", "))


def test_the_documentation_has_the_header(server: LiveServer) -> None:
    """The OpenAPI document and the page made of it name the header, its length, and the codes that come of it."""
    operation = server.client.get("/openapi.json").json()["paths"]["/v1/inpaint"]["post"]
    (parameter,) = [one for one in operation["parameters"] if one["name"] == "Idempotency-Key"]
    assert (parameter["name"], parameter["in"], parameter["schema"]["maxLength"]) == ("Idempotency-Key", "header", 255)
    assert "in_progress" in operation["responses"]["409"]["description"]
    assert "key_reuse" in operation["responses"]["422"]["description"]
    page = server.client.get("/docs").text
    assert "<td><code>Idempotency-Key</code>" in page
