"""Health, readiness, models, metrics, documentation."""

import logging
import re
import socket
from typing import Any

import pytest

from tests.http.serving import LiveServer, assert_problem, eventually, png, scene, serving, square_mask


def test_health_and_readiness(server: LiveServer) -> None:
    """`/healthz` says that the process lives, `/readyz` that a worker takes requests, and each one's state."""
    assert server.client.get("/healthz").json() == {"status": "ok"}
    ready = server.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "workers": [{"name": "0", "device": "cpu", "state": "ready", "restarts": 0}],
    }


def test_probes_may_ask_for_the_head_alone() -> None:
    """As `curl -I` and many monitors do: what GET would answer, without the body."""
    with serving() as server:
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/docs", "/openapi.json", "/"):
            asked, head = server.client.get(path), server.client.head(path)
            assert (asked.status_code, head.status_code) == (200, 200)
            assert head.headers["Content-Type"] == asked.headers["Content-Type"]
            assert head.content == b""


def test_models_is_openais_list_with_our_fields(server: LiveServer) -> None:
    """`/v1/models` lists the one model, says that it is a demo, and states what requests may ask for."""
    listed = server.client.get("/v1/models").json()

    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "inpaint-service")
    assert isinstance(model["created"], int)
    assert model["kind"] == "demo"
    assert "demo model" in model["description"]
    assert model["schedulers"] == ["ddim", "euler"]
    assert (model["native_size"], model["default_scheduler"], model["default_steps"]) == (64, "ddim", 4)
    assert model["working_sizes"][0] == {"height": 64, "width": 64}
    assert model["limits"]["max_side"] == 256
    assert model["limits"]["max_pixels"] == 1_000_000
    (worker,) = model["workers"]
    assert (worker["device"], worker["dtype"], worker["max_images"]) == ("cpu", "float32", 4)
    assert worker["step_seconds"]["1"] > 0


def test_metrics_count_answers_by_template_and_never_by_what_clients_chose(server: LiveServer) -> None:
    """Labels are bounded: unknown paths share one, refused requests have their route's, ids and prompts none."""
    server.inpaint({"X-Request-Id": "xyzzyid"}, prompt="xyzzyprompt")
    server.inpaint(seed="-1")
    for number in range(3):
        server.client.get(f"/xyzzypath/{number}")
    server.client.request("XYZZY", "/v1/inpaint")

    text = server.client.get("/metrics").text

    assert "xyzzy" not in text.lower()
    endpoints = set(re.findall(r'endpoint="([^"]*)"', text))
    assert endpoints <= {"/v1/inpaint", "/v1/models", "/healthz", "/readyz", "/metrics", "unmatched"}
    assert server.metric('inpaint_requests_total{code="200",endpoint="/v1/inpaint"}') >= 1
    assert server.metric('inpaint_requests_total{code="422",endpoint="/v1/inpaint"}') >= 1
    assert server.metric('inpaint_requests_total{code="404",endpoint="unmatched"}') >= 3
    assert server.metric('inpaint_requests_total{code="405",endpoint="/v1/inpaint"}') >= 1
    for stage in ("decode", "fit", "denoise", "render"):
        assert server.metric(f'inpaint_stage_seconds_count{{stage="{stage}"}}') >= 1
    assert server.metric("inpaint_images_total") >= 1


def test_the_root_names_the_documentation(server: LiveServer) -> None:
    """Who asks for `/` learns where the API is described."""
    root = server.client.get("/", headers={"Accept": "application/json"}).json()
    assert (root["docs"], root["openapi"]) == ("/docs", "/openapi.json")
    assert server.client.get(root["docs"]).status_code == server.client.get(root["openapi"]).status_code == 200


def test_metrics_on_a_port_of_their_own_are_not_on_the_first() -> None:
    """With `metrics_port` set, the service's own port has no `/metrics`."""
    with serving(metrics_port=0) as server:
        assert_problem(server.client.get("/metrics"), 404, "not_found")


def test_log_has_one_line_per_request_and_nothing_of_its_content(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A request's log line has id, route, status, stages and batch; prompts and pictures are never logged."""

    def lines() -> list[dict[str, Any]]:
        fields = [record.fields for record in caplog.records if record.name == "service.api.access_log"]
        return [line for line in fields if line["route"] == "/v1/inpaint"]

    with caplog.at_level(logging.DEBUG):
        response = server.inpaint(prompt="xyzzy prompt", image=png(scene()), mask=png(square_mask()))
        server.inpaint(prompt="xyzzy\0")
        eventually(lambda: len(lines()) == 2)  # A line is written once the client has its answer.

    good, bad = lines()
    assert good["request_id"] == response.headers["X-Request-Id"]
    assert (good["method"], good["status"]) == ("POST", 200)
    assert good["seconds"] >= good["denoise_seconds"] > 0
    assert good["mean_images"] == 1
    assert (bad["status"], bad["code"]) == (422, "invalid_prompt")
    everything = " ".join(record.getMessage() + repr(record.__dict__) for record in caplog.records)
    assert "xyzzy" not in everything


def test_unexpected_failure_is_a_500_that_tells_nothing(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of ours is 500 `internal` with an id to find it in the log by; the client sees none of it."""
    monkeypatch.setattr("service.imaging.require_nonempty", lambda _mask: 1 / 0)

    problem = assert_problem(server.inpaint(), 500, "internal")

    assert "ZeroDivision" not in str(problem)
    (logged,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert problem["request_id"] in logged.getMessage()
    assert "ZeroDivisionError" in caplog.text


def test_idle_connections_do_not_keep_the_server_from_stopping() -> None:
    """Stopping does not wait for clients that merely keep a connection open."""
    with serving() as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        assert server.inpaint().status_code == 200
    assert [connection.recv(1) for connection in idle] == [b""] * 20
    for connection in idle:
        connection.close()
