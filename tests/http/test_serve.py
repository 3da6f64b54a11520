"""`inpaint-service serve` as a process: what it says, how it stops, how it fails."""

import re
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.http.serve_process import process
from tests.http.serving import (
    CLOSING,
    LiveServer,
    assert_problem,
    check_problem,
    eventually,
    head,
    large_form,
    multipart_head,
    read_answer,
    usual_parts,
)


def held_request(live: LiveServer) -> socket.socket:
    """A connection whose request the worker holds."""
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    connection = live.raw(multipart_head(f"Content-Length: {len(body)}"), body)
    eventually(lambda: live.metric("inpaint_in_flight") == 1)
    return connection


def test_start_says_where_what_and_that_it_is_a_demo() -> None:
    """The log names the address, the model and, for the bundled model, that it is a demo; SIGTERM exits with 0."""
    with process() as serve:
        live = serve.live()
        assert live.inpaint().status_code == 200
        serve.process.send_signal(signal.SIGTERM)
        assert serve.exit_status() == 0
        live.client.close()
    assert f"listens on http://127.0.0.1:{live.port} and loads the bundled demo model" in serve.output
    assert f"served at http://127.0.0.1:{live.port}" in serve.output
    assert "this is a demo model" in serve.output
    assert len(re.findall(r"request request_id=req_\w+ method=POST route=/v1/inpaint status=200", serve.output)) == 1
    assert "Traceback" not in serve.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_under_load_answers_what_was_accepted(tmp_path: Path, number: signal.Signals) -> None:
    """After the first signal: new work and a stalled upload 503, accepted work its picture, then exit with 0."""
    gate = tmp_path / "gate"
    with process("--model", f"fake?gate={gate}") as serve:
        live = serve.live()
        held = held_request(live)
        stalled = live.raw(multipart_head("Content-Length: 1000"), b"--frontier\r\n")

        serve.process.send_signal(number)

        eventually(lambda: live.client.get("/readyz").status_code == 503)
        assert live.client.get("/healthz").status_code == 200
        assert_problem(live.inpaint(), 503, "draining")
        status, headers, body = read_answer(stalled)
        check_problem(headers, body, status, "draining")
        gate.touch()
        with held:
            assert read_answer(held)[0] == 200
        assert serve.exit_status() == 0
        stalled.close()
        live.client.close()
    assert "Traceback" not in serve.output


def test_drain_time_is_a_bound(tmp_path: Path) -> None:
    """Work that does not end in the drain time is answered 503, and the process still exits with 0."""
    with process("--model", f"fake?gate={tmp_path / 'gate'}", "--drain-timeout", "1") as serve:
        live = serve.live()
        held = held_request(live)

        serve.process.send_signal(signal.SIGTERM)

        with held:
            status, headers, body = read_answer(held)
        check_problem(headers, body, status, "draining")
        assert serve.exit_status() == 0
        live.client.close()


def test_clients_that_stall_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """SIGTERM with half a head, half a body, half a LoRA and an answer that nobody takes: the end comes."""
    flags = ("--drain-timeout", "3", "--lora-dir", str(tmp_path / "loras"), "--admin-keys", "admin")
    with process(*flags) as serve:
        live = serve.live()
        body = large_form()
        unread = socket.socket()
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", live.port))
        unread.sendall(multipart_head(f"Content-Length: {len(body)}") + body)
        eventually(lambda: live.metric("inpaint_images_total") == 1)
        lines = ("Host: localhost", "Authorization: Bearer admin", "Content-Length: 1000")
        stalled = [
            live.raw(b"POST /v1/inpaint HTTP/1.1\r\nHost: local"),
            live.raw(multipart_head("Content-Length: 1000"), b"--frontier\r\n"),
            live.raw(head(*lines, path="/v1/adapters/mine", method="PUT"), b"12345"),
            live.raw(head("Host: localhost", method="GET", path="/healthz"), b"GET /hea"),
        ]
        eventually(lambda: len(list((tmp_path / "loras").iterdir())) == 1)

        serve.process.send_signal(signal.SIGTERM)

        assert serve.exit_status() == 0
        for connection in (unread, *stalled):
            connection.close()
        live.client.close()
    assert list((tmp_path / "loras").iterdir()) == []
    assert "Traceback" not in serve.output


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    """A second signal does not wait for the drain time; accepted work is told so, and the status is not 0."""
    with process("--model", f"fake?gate={tmp_path / 'gate'}", "--drain-timeout", "3600") as serve:
        live = serve.live()
        held = held_request(live)
        serve.process.send_signal(signal.SIGTERM)
        eventually(lambda: live.client.get("/readyz").status_code == 503)

        serve.process.send_signal(signal.SIGINT)

        assert serve.exit_status() == 1
        held.close()
        live.client.close()


def test_signal_while_loading_exits(tmp_path: Path) -> None:
    """A service that is told to stop before it is ready stops."""
    with process("--model", f"fake?startup_gate={tmp_path / 'never'}") as serve:
        eventually(lambda: "listens on" in serve.output, 30)
        port = int(re.search(r"listens on http://127\.0\.0\.1:(\d+)", serve.output)[1])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            eventually(lambda: client.get("/readyz").json()["workers"] != [])
        serve.process.send_signal(signal.SIGTERM)
        assert serve.exit_status() == 0


def test_model_that_cannot_load_is_one_line_and_status_1() -> None:
    """When no worker can start, the process exits with one line that says why."""
    with process("--model", "fake?cannot_start=no+model+at+/models/x", "--log-level", "error") as serve:
        assert serve.exit_status() == 1
    lines = [line for line in serve.output.splitlines() if line.startswith("inpaint-service: ")]
    assert len(lines) == 1
    assert "no model at /models/x" in lines[0]
    assert "Traceback" not in serve.output


def test_metrics_port_serves_metrics_alone() -> None:
    """With `--metrics-port`, metrics are on that port and nothing else is."""
    with process("--metrics-port", "0") as serve:
        live = serve.live()
        port = int(re.search(r"metrics are on http://127\.0\.0\.1:(\d+)/metrics", serve.output)[1])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            metrics, models = client.get("/metrics"), client.get("/v1/models")
            assert "inpaint_worker_up" in metrics.text
            assert models.status_code == 404
            assert metrics.headers["X-Request-Id"] != models.headers["X-Request-Id"]
        assert live.client.get("/metrics").status_code == 404
        serve.process.send_signal(signal.SIGTERM)
        assert serve.exit_status() == 0
        live.client.close()
