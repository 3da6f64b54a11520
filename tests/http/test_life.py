"""Requests and the server over time: full queue, hanging up, not ready, draining."""

import asyncio
import socket
from pathlib import Path

import httpx
import pytest

from tests.http.serving import (
    CLOSING,
    LiveServer,
    assert_problem,
    check_problem,
    eventually,
    form,
    multipart_head,
    part,
    read_answer,
    serving,
    usual_parts,
)


def send_held(server: LiveServer, *accept: str) -> socket.socket:
    """A connection whose request is admitted and held by the worker."""
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    return server.raw(multipart_head(f"Content-Length: {len(body)}", *accept), body)


def in_flight(server: LiveServer) -> float:
    """Requests in the worker."""
    return server.metric("inpaint_in_flight")


def waiting(server: LiveServer) -> float:
    """Requests in the queue."""
    return server.metric("inpaint_queue_depth")


def test_full_queue_is_429_with_a_time_to_come_back(tmp_path: Path) -> None:
    """When the queue is full a request is refused before its upload, and what was accepted is answered."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as server:
        held = []
        for count in range(1, 4):  # Two in the worker, one running and one ready to follow; one in the queue.
            held.append(send_held(server))
            eventually(lambda count=count: in_flight(server) + waiting(server) == count)
        assert waiting(server) == 1

        with server.raw(multipart_head("Content-Length: 1000")) as early:
            status, headers, body = read_answer(early)
        check_problem(headers, body, status, "overloaded")
        response = server.inpaint()
        assert_problem(response, 429, "overloaded")
        assert int(response.headers["Retry-After"]) >= 1
        assert "X-Should-Retry" not in response.headers

        gate.touch()
        assert [read_answer(connection)[0] for connection in held] == [200, 200, 200]
        assert server.metric('inpaint_rejected_total{reason="overloaded"}') == 2


def test_uploads_at_once_are_bounded() -> None:
    """No more bodies are held in memory at once than may wait; the next one is told to come back."""
    with serving(queue_size=1) as server:
        with server.raw(multipart_head("Content-Length: 100000"), part("prompt", b"a")) as slow:
            eventually(lambda: server.inpaint().status_code == 429)
            response = server.inpaint()
            assert_problem(response, 429, "overloaded")
            assert response.headers["Retry-After"] == "1"
            slow.close()
        eventually(lambda: server.inpaint().status_code == 200)


@pytest.mark.parametrize("accept", ["Accept: image/png", "Accept: text/event-stream"])
def test_hanging_up_cancels(tmp_path: Path, accept: str) -> None:
    """A client that goes away while its picture is painted has it dropped from the batch, in any answer shape."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as server:
        connection = send_held(server, accept)
        eventually(lambda: in_flight(server) == 1)

        connection.close()

        eventually(lambda: in_flight(server) == 0)
        assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == 1
        assert server.inpaint().status_code == 200


def test_hanging_up_in_the_queue_never_starts(tmp_path: Path) -> None:
    """A client that goes away while queued leaves the queue, and those in front are untouched."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1) as server:
        held = []
        for count in range(1, 4):
            held.append(send_held(server))
            eventually(lambda count=count: in_flight(server) + waiting(server) == count)

        held.pop().close()

        eventually(lambda: waiting(server) == 0)
        gate.touch()
        assert [read_answer(connection)[0] for connection in held] == [200, 200]


def test_hanging_up_during_the_upload(server: LiveServer) -> None:
    """A client that goes away in the middle of its upload is no error: it is counted as 499, and nothing starts."""
    sample = 'inpaint_requests_total{code="499",endpoint="/v1/inpaint"}'
    before = server.metric(sample)

    server.raw(multipart_head("Content-Length: 100000"), usual_parts()[:500]).close()

    eventually(lambda: server.metric(sample) == before + 1)
    assert server.metric('inpaint_requests_total{code="500",endpoint="/v1/inpaint"}') == 0


def test_client_deadline(tmp_path: Path) -> None:
    """A request that is not done within the client's `timeout` is 504, and out of the batch."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as server:
        assert_problem(server.inpaint(prompt="hold", timeout="0.2"), 504, "deadline")
        eventually(lambda: in_flight(server) == 0)


def test_client_deadline_is_never_beyond_the_servers(tmp_path: Path) -> None:
    """A client cannot ask for more time than the operator gives."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}", timeout=0.2) as server:
        assert_problem(server.inpaint(prompt="hold", timeout="1e9"), 504, "deadline")


def test_not_ready_while_loading(tmp_path: Path) -> None:
    """Before a worker is ready the process lives, says what it waits for, and refuses work with a time to retry."""
    gate = tmp_path / "loaded"
    with serving(model=f"fake?startup_gate={gate}", wait_ready=False) as server:
        assert server.client.get("/healthz").json() == {"status": "ok"}
        response = server.client.get("/readyz")
        problem = assert_problem(response, 503, "not_ready")
        assert problem["workers"][0]["state"].startswith("loading")
        assert int(response.headers["Retry-After"]) >= 1
        assert_problem(server.client.get("/v1/models"), 503, "not_ready")
        refused = server.inpaint()
        assert_problem(refused, 503, "not_ready")
        assert int(refused.headers["Retry-After"]) >= 1

        gate.touch()

        eventually(lambda: server.client.get("/readyz").status_code == 200)
        assert server.inpaint().status_code == 200


def test_draining_refuses_new_work_and_answers_accepted(tmp_path: Path) -> None:
    """While the engine drains: new work and unfinished uploads 503, probes say so, accepted work is answered."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        held = send_held(server)
        eventually(lambda: in_flight(server) == 1)
        stalled = server.raw(multipart_head("Content-Length: 1000"), b"--frontier\r\n")
        draining = asyncio.run_coroutine_threadsafe(server.engine.drain(20.0), server.loop)
        eventually(lambda: server.client.get("/readyz").status_code == 503)

        assert server.client.get("/readyz").json()["code"] == "draining"
        assert server.client.get("/healthz").status_code == 200
        refused = server.inpaint()
        assert_problem(refused, 503, "draining")
        assert int(refused.headers["Retry-After"]) >= 1
        status, headers, body = read_answer(stalled)
        check_problem(headers, body, status, "draining")
        stalled.close()

        gate.touch()
        with held:
            assert read_answer(held)[0] == 200
        assert draining.result(timeout=20) is True


def test_requests_of_many_clients_get_their_own_pictures(server: LiveServer) -> None:
    """Concurrent requests never get each other's answer: each equals what its seed paints alone."""

    async def ask(seed: int) -> tuple[str, bytes]:
        files, data = form(seed=str(seed))
        async with httpx.AsyncClient(base_url=server.client.base_url, trust_env=False, timeout=30) as client:
            response = await client.post("/v1/inpaint", files=files, data=data)
        assert response.status_code == 200
        return response.headers["X-Seed"], response.content

    async def ask_all() -> list[tuple[str, bytes]]:
        return await asyncio.gather(*(ask(seed) for seed in range(16)))

    answers = asyncio.run(ask_all())

    assert [seed for seed, _ in answers] == [str(seed) for seed in range(16)]
    for seed, content in answers[:4]:
        assert server.inpaint(seed=seed).content == content
