"""Webhooks: the end of an asynchronous request is told to who was named, signed, and to nobody else."""

import asyncio
import base64
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import openai
import pytest

from service.api import deliveries
from service.api.app import create_app
from service.engine.engine import Engine
from service.errors import StartupError
from service.metrics import Metrics
from service.settings import load_settings
from tests.http.async_clients import ASYNC, begin, checked, ended, is_idle
from tests.http.receiver import Received, Receiver, receiving
from tests.http.serve_process import process
from tests.http.serving import LiveServer, assert_problem, eventually, serving

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are short."""
    monkeypatch.setattr(deliveries, "PAUSES_SECONDS", (0.01, 0.02))


@contextmanager
def told(receiver: Receiver, **settings: Any) -> Iterator[LiveServer]:
    """A service that may call the receiver."""
    with serving(webhook_hosts=receiver.host, webhook_secret=SECRET, **settings) as server:
        yield server


def outcomes(server: LiveServer, outcome: str) -> float:
    """How many ended so."""
    return server.metric(f'inpaint_webhooks_total{{outcome="{outcome}"}}')


def verified(call: Received) -> dict[str, Any]:
    """The state that a call brought, once a receiver of Standard Webhooks has taken its signature."""
    openai.OpenAI(api_key="none").webhooks.verify_signature(call.body.decode(), call.headers, secret=SECRET)
    return checked(json.loads(call.body))


def test_the_end_is_told_as_the_state_has_it(tmp_path: Path) -> None:
    """Completed, failed and given up: one signed call each, with the state and without the images' bytes."""
    with receiving() as receiver, told(receiver, model=f"fake?gate={tmp_path / 'gate'}") as server:
        done = begin(server, receiver.url())
        eventually(lambda: outcomes(server, "delivered") == 1)
        failed = begin(server, receiver.url("/failed"), prompt="please fail")
        eventually(lambda: outcomes(server, "delivered") == 2)
        cancelled = begin(server, receiver.url(""), prompt="hold")
        server.client.delete(cancelled)
        eventually(lambda: outcomes(server, "delivered") == 3)

        assert [call.method for call in receiver.calls] == ["POST"] * 3
        assert [call.path for call in receiver.calls] == ["/done?token=xyzzy", "/failed", "/"]
        states = [verified(call) for call in receiver.calls]
        assert states[0] == ended(server, done)
        assert states[0]["result"]["images"][0]["b64_json"] is None
        assert states[1] == ended(server, failed)
        assert (states[2]["status"], states[2]["links"]["self"]) == ("cancelled", cancelled)
        assert len({call.headers["webhook-id"] for call in receiver.calls}) == 3
        assert all(call.headers["Content-Type"] == "application/json" for call in receiver.calls)
        assert all(call.headers["User-Agent"].startswith("inpaint-service/") for call in receiver.calls)


def test_it_is_tried_three_times_under_one_id() -> None:
    """A receiver that fails is called again, signed anew, and knows by the id that it is the same message."""
    with receiving(statuses=[500, 404, 200]) as receiver, told(receiver) as server:
        begin(server, receiver.url())
        eventually(lambda: outcomes(server, "delivered") == 1)
        assert len(receiver.calls) == 3
        assert len({call.headers["webhook-id"] for call in receiver.calls}) == 1
        assert all(verified(call)["status"] == "completed" for call in receiver.calls)


@pytest.mark.parametrize(("status", "num_calls", "outcome"), [(500, 3, "failed"), (410, 1, "refused")])
def test_then_it_is_given_up(status: int, num_calls: int, outcome: str) -> None:
    """After three failures, or at once where the receiver wants no more; the request is none the worse for it."""
    with receiving(statuses=[status]) as receiver, told(receiver) as server:
        url = begin(server, receiver.url())
        eventually(lambda: outcomes(server, outcome) == 1)
        assert len(receiver.calls) == num_calls
        assert ended(server, url)["status"] == "completed"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    """A receiver cannot send the service on to somewhere else, not even to itself."""
    with receiving(statuses=[status]) as receiver, told(receiver) as server:
        begin(server, receiver.url())
        eventually(lambda: outcomes(server, "failed") == 1)
        assert {call.path for call in receiver.calls} == {"/done?token=xyzzy"}


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where calls go is decided by the operator's list alone."""
    with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.host)
        with told(receiver) as server:
            begin(server, receiver.url())
            eventually(lambda: outcomes(server, "delivered") == 1)
        assert (len(receiver.calls), len(proxy.calls)) == (1, 0)


def test_nobody_is_there(tmp_path: Path) -> None:
    """A receiver that does not listen costs three tries, and nothing else."""
    with receiving() as receiver:
        pass
    with told(receiver, model=f"fake?gate={tmp_path / 'gate'}") as server:
        url = begin(server, receiver.url())
        eventually(lambda: outcomes(server, "failed") == 1)
        assert ended(server, url)["status"] == "completed"


@pytest.mark.parametrize("kind", ["silent", "drips"])
def test_a_slow_receiver_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A receiver that says nothing, or a byte now and then, is given up; few calls are open; others are told."""
    monkeypatch.setattr(deliveries, "ATTEMPT_SECONDS", 1.0)
    monkeypatch.setattr(deliveries, "PAUSES_SECONDS", ())
    release = threading.Event()

    def behave(handler: BaseHTTPRequestHandler) -> None:
        while not release.wait(0.02):
            if kind == "drips":
                handler.wfile.write(b"H")
                handler.wfile.flush()

    with receiving(behave=behave) as slow, receiving() as quick:
        hosts = f"{slow.host},{quick.host}"
        with serving(webhook_hosts=hosts, webhook_secret=SECRET) as server:
            for _ in range(8):
                begin(server, slow.url())
            begin(server, quick.url())
            eventually(lambda: outcomes(server, "delivered") == 1)
            eventually(lambda: outcomes(server, "failed") == 8)
            assert len(quick.calls) == 1
            assert 0 < len(slow.calls) <= 8  # On a busy machine some time out before it has read what it was sent.
            eventually(lambda: server.state.async_requests._deliveries.num_pending == 0)
        release.set()
    assert slow.most_at_once <= deliveries.MAX_AT_ONCE + 4  # Those that it has not noticed are over.


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More messages than may wait for a receiver are dropped and counted, and memory does not grow with them."""
    monkeypatch.setattr(deliveries, "MAX_PENDING", 3)
    release = threading.Event()
    with receiving(behave=lambda _: release.wait(20)) as receiver, told(receiver) as server:
        for number in range(1, 6):
            ended(server, begin(server, receiver.url()))
            eventually(
                lambda number=number: (
                    server.state.async_requests._deliveries.num_pending + outcomes(server, "dropped") == number
                )
            )
        assert outcomes(server, "dropped") == 2
        release.set()
        eventually(lambda: outcomes(server, "delivered") == 3)


# --- what is refused --------------------------------------------------------------------------------


def test_addresses_are_checked_before_the_upload() -> None:
    """Another host is 403, what is no address and an address without `respond-async` 422; nothing is begun."""
    with receiving() as receiver, told(receiver) as server:
        other = {"X-Webhook-URL": f"http://127.0.0.1:{receiver.port + 1}/"}
        problem = assert_problem(server.inpaint({**ASYNC, **other}), 403, "forbidden")
        assert problem["errors"][0]["field"] == "X-Webhook-URL"
        for url in ("https://user@127.0.0.1/", "gopher://127.0.0.1/", "x" * 3000):
            problem = assert_problem(server.inpaint({**ASYNC, "X-Webhook-URL": url}), 422, "invalid_field")
            assert problem["errors"][0]["field"] == "X-Webhook-URL"
        assert_problem(server.inpaint(receiver.url()), 422, "invalid_field")
        assert server.metric("inpaint_images_total") == 0
        assert receiver.calls == []


def test_without_a_list_nobody_is_called(server: LiveServer) -> None:
    """By default every address is refused."""
    assert_problem(server.inpaint({**ASYNC, "X-Webhook-URL": "https://127.0.0.1/"}), 403, "forbidden")


def test_hosts_without_a_secret_end_the_start() -> None:
    """Nothing is sent unsigned."""
    settings, metrics = load_settings({"webhook_hosts": "a.example"}, environ={}), Metrics()
    with pytest.raises(StartupError, match="INPAINT_WEBHOOK_SECRET"):
        create_app(settings, Engine(settings, metrics), metrics)


# --- when it is told, and when not ----------------------------------------------------------------------


def test_who_was_answered_needs_no_call() -> None:
    """Of a request that was done while its client waited nobody is told: the client has the answer."""
    with receiving() as receiver, told(receiver) as server:
        response = server.inpaint({**receiver.url(), "Prefer": "respond-async, wait=20"})
        assert response.status_code == 200
        url = begin(server, receiver.url())
        eventually(lambda: outcomes(server, "delivered") == 1)
        assert [verified(call)["links"]["self"] for call in receiver.calls] == [url]


def test_a_repetition_is_told_once() -> None:
    """The same key and form is the same request, with the first one's address."""
    with receiving() as receiver, told(receiver) as server:
        key = {"Idempotency-Key": "k"}
        assert begin(server, receiver.url() | key) == begin(server, receiver.url("/other") | key)
        eventually(lambda: outcomes(server, "delivered") == 1)
        assert len(receiver.calls) == 1
        eventually(lambda: is_idle(server))


def test_the_end_of_the_service_waits_a_little(tmp_path: Path) -> None:
    """What ended during the drain is told before the service is gone."""
    gate = tmp_path / "gate"
    with receiving(behave=lambda _: time.sleep(0.3)) as receiver:
        with told(receiver, model=f"fake?gate={gate}") as server:
            begin(server, receiver.url(), prompt="hold")
            eventually(lambda: server.metric("inpaint_in_flight") == 1)
            draining = asyncio.run_coroutine_threadsafe(server.engine.drain(20.0), server.loop)
            gate.touch()
            draining.result(timeout=20)
        assert [verified(call)["status"] for call in receiver.calls] == ["completed"]


def test_the_end_of_the_service_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A receiver that does not answer holds up no shutdown."""
    monkeypatch.setattr("service.api.app._MAX_GRACE_SECONDS", 0.1)
    monkeypatch.setattr("service.api.app._MIN_GRACE_SECONDS", 0.1)
    release = threading.Event()
    with receiving(behave=lambda _: release.wait(20)) as receiver:
        with told(receiver) as server:
            begin(server, receiver.url())
            eventually(lambda: len(receiver.calls) == 1)
        release.set()
    assert server.state.async_requests._deliveries.num_pending == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "1 webhooks were not delivered before the end" in caplog.text


def test_sigterm_answers_and_tells_what_was_accepted(tmp_path: Path) -> None:
    """The whole process: what was accepted is painted and told, though nobody waits, before the exit with status 0."""
    gate, secret = tmp_path / "gate", tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    with receiving() as receiver:
        flags = ["--model", f"fake?gate={gate}", "--webhook-hosts", receiver.host, "--webhook-secret-file", str(secret)]
        with process(*flags) as started:
            server = started.live()
            begin(server, receiver.url(), prompt="hold")
            eventually(lambda: server.metric("inpaint_in_flight") == 1)
            started.process.send_signal(signal.SIGTERM)
            eventually(lambda: server.client.get("/readyz").json().get("code") == "draining")
            assert_problem(server.inpaint(ASYNC), 503, "draining")
            gate.touch()
            assert started.exit_status() == 0
            server.client.close()
        assert [verified(call)["status"] for call in receiver.calls] == ["completed"]
