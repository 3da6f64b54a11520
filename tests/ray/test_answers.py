"""Answers through Ray's proxies are those of the service itself."""

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest

from tests.http.serving import assert_problem, eventually, large_form, multipart_head, part, read_answer, usual_parts
from tests.ray.cluster import Deployed, RayNodes, deployed, free_port, sample

pytestmark = pytest.mark.ray

KEY = "a-key-of-some-length"
QUEUE_SIZE = 4
MAX_IMAGES = 2
MAX_ACCEPTED = QUEUE_SIZE + 2 * MAX_IMAGES
"""Waiting, running, and those that a worker has for when the running ones are done."""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lets go of requests with "hold" in their prompt while it exists."""
    return tmp_path_factory.mktemp("gate") / "gate"


@pytest.fixture(scope="module")
def metrics_port() -> int:
    """Of the only replica."""
    return free_port()


@pytest.fixture(scope="module")
def app(nodes: RayNodes, gate: Path, metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """One replica with a key, a small queue, and small bodies."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"shop={KEY}\n")
    settings = {
        "model": f"fake?{urlencode({'gate': str(gate), 'max_images': MAX_IMAGES})}",
        "metrics_port": metrics_port,
        "api_keys_file": str(keys),
        "queue_size": QUEUE_SIZE,
        "max_body_mib": 8,
    }
    with deployed(nodes, settings) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture(autouse=True)
def _open_gate(gate: Path) -> Iterator[None]:
    gate.unlink(missing_ok=True)
    yield
    gate.touch()


def test_pictures_are_the_same(app: Deployed, expected: dict[int, bytes]) -> None:
    """The same seed gives the same bytes as without Ray: as a picture, as JSON, and at the end of a stream."""
    for seed in (0, 7, 23):
        picture = app.inpaint(seed=str(seed))
        assert picture.content == expected[seed]
        assert (picture.headers["X-Seed"], picture.headers["Content-Type"]) == (str(seed), "image/png")
        document = app.inpaint({"Accept": "application/json"}, seed=str(seed)).json()
        assert base64.b64decode(document["images"][0]["b64_json"]) == expected[seed]
        with app.stream(seed=str(seed)) as response:
            last = "".join(response.iter_text()).rstrip().rpartition("\n\n")[2]
        name, _, data = last.partition("\ndata: ")
        assert name == "event: completed"
        assert base64.b64decode(json.loads(data)["images"][0]["b64_json"]) == expected[seed]


def test_events_come_while_it_paints(app: Deployed, gate: Path) -> None:
    """A stream's events are passed on one by one, not at the end."""
    with app.stream(prompt="hold") as response:
        lines = response.iter_lines()
        names = [next(line for line in lines if line.startswith("event: ")) for _ in range(3)]
        assert names == ["event: queued", "event: progress", "event: progress"]
        gate.touch()
        assert [line for line in lines if line.startswith("event: ")][-1] == "event: completed"


def test_refusals_are_the_service_s_own(app: Deployed) -> None:
    """Keys, sizes, headers, fields and routes are judged as without Ray, in the API's own words."""
    without_key = httpx.post(f"{app.url}/v1/inpaint", content=b"x" * 100_000, trust_env=False)
    assert_problem(without_key, 401, "unauthorized")
    assert_problem(app.client.post("/v1/inpaint", content=b"x" * 9_000_000), 413, "body_too_large")
    whole = part("image", b"x" * 9_000_000, "a.png")
    chunks = (whole[start : start + 100_000] for start in range(0, len(whole), 100_000))
    assert_problem(app.client.post("/v1/inpaint", content=chunks, headers=_FORM), 413, "body_too_large")
    many = {f"x-{number}": "y" for number in range(100)}
    assert_problem(app.client.get("/v1/models", headers=many), 431, "headers_too_large")
    problem = assert_problem(app.inpaint(strength="2"), 422, "out_of_range")
    assert problem["errors"][0]["field"] == "strength"
    assert_problem(app.client.get("/nowhere"), 404, "not_found")
    assert_problem(app.client.get("/metrics"), 404, "not_found")
    assert app.client.post("/v1/images/edits", json={}).json()["error"]["type"] == "invalid_request_error"


def test_an_answer_has_one_request_id(app: Deployed) -> None:
    """It is the client's where it is harmless, and there is but one header of it, although Ray adds its own."""
    named = app.client.get("/healthz", headers={"X-Request-Id": "mine-1"})
    assert named.headers.get_list("X-Request-Id") == ["mine-1"]
    (made_up,) = app.client.get("/healthz", headers={"X-Request-Id": "a b"}).headers.get_list("X-Request-Id")
    assert made_up.startswith("req_")
    assert not [name for name in named.headers if "replica" in name]


def test_too_many_requests_are_refused_by_the_replica(app: Deployed, gate: Path, metrics_port: int) -> None:
    """Overload is 429 with the replica's own problem and `Retry-After`, never 5xx; what was accepted is painted."""
    refused_before = sample([metrics_port], 'inpaint_rejected_total{reason="overloaded"}')
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(app.inpaint, prompt="hold", seed=str(seed % 24)) for seed in range(40)]
        eventually(lambda: sum(one.done() for one in asked) >= 40 - MAX_ACCEPTED, seconds=45)
        gate.touch()
        answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 40 - MAX_ACCEPTED <= len(refused) <= 40 - QUEUE_SIZE
    for answer in refused:
        assert_problem(answer, 429, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
    painted = [answer for answer in answers if answer.status_code == 200]
    assert len(painted) + len(refused) == len(answers)
    assert sample([metrics_port], 'inpaint_rejected_total{reason="overloaded"}') - refused_before == len(refused)


@pytest.mark.parametrize("header", [{}, {"x-request-disconnect-disabled": "?1"}, {"x-request-timeout-seconds": "0"}])
def test_hanging_up_cancels(app: Deployed, metrics_port: int, header: dict[str, str]) -> None:
    """A client that goes away frees the batch, and cannot have it otherwise by Ray's own headers."""
    name = 'inpaint_cancelled_total{reason="disconnect"}'
    before = sample([metrics_port], name)
    connection = _ask_and_leave(app, "hold", header)
    eventually(lambda: sample([metrics_port], "inpaint_in_flight") == 1)
    connection.close()
    eventually(lambda: sample([metrics_port], name) == before + 1)
    eventually(lambda: sample([metrics_port], "inpaint_in_flight") == 0)


def test_hanging_up_does_not_cancel_a_request_with_a_key(app: Deployed, gate: Path, metrics_port: int) -> None:
    """A client that comes back with its `Idempotency-Key` gets the picture of the request that it left."""
    before = sample([metrics_port], 'inpaint_cancelled_total{reason="disconnect"}')
    key = {"Idempotency-Key": "left-and-back"}
    connection = _ask_and_leave(app, "hold", key)
    eventually(lambda: sample([metrics_port], "inpaint_in_flight") == 1)
    connection.close()
    eventually(lambda: sample([metrics_port], "inpaint_requests_total" + '{code="499",endpoint="/v1/inpaint"}') >= 1)
    assert sample([metrics_port], "inpaint_in_flight") == 1
    gate.touch()
    eventually(lambda: sample([metrics_port], "inpaint_in_flight") == 0)
    again = app.client.post("/v1/inpaint", content=_body("hold"), headers={**_FORM, **key})
    assert again.status_code == 200
    assert again.headers["Idempotent-Replayed"] == "true"
    assert sample([metrics_port], 'inpaint_cancelled_total{reason="disconnect"}') == before


def test_large_pictures_pass(app: Deployed) -> None:
    """Bodies and answers of some megabytes pass in pieces."""
    answer = app.client.post("/v1/inpaint", content=large_form(), headers=_FORM)
    assert answer.status_code == 200
    assert len(answer.content) > 3_000_000


@pytest.mark.usefixtures("app")
def test_logs_hold_nothing_of_clients(nodes: RayNodes) -> None:
    """Neither the service nor Ray writes a prompt, a key or a client's port into any file of the cluster."""
    with socket.create_connection(("127.0.0.1", nodes.port)) as connection:
        port = connection.getsockname()[1]
        head = multipart_head(f"Content-Length: {len(_body('unheard-of'))}", f"Authorization: Bearer {KEY}")
        connection.sendall(head + _body("unheard-of"))
        status, headers, _ = read_answer(connection)
    assert status == 200
    eventually(lambda: headers["x-request-id"] in nodes.log())
    log = nodes.log()
    assert "unheard-of" not in log
    assert KEY not in log
    assert f"127.0.0.1:{port}" not in log


_FORM = {"Content-Type": "multipart/form-data; boundary=frontier"}


def _body(prompt: str) -> bytes:
    return usual_parts().replace(b"a red house", prompt.encode()) + b"--frontier--\r\n"


def _ask_and_leave(app: Deployed, prompt: str, headers: dict[str, str]) -> socket.socket:
    """A connection over which a request was sent, and nothing was read."""
    body = _body(prompt)
    more = [f"{name}: {value}" for name, value in headers.items()]
    connection = socket.create_connection(("127.0.0.1", app.nodes.port), timeout=20)
    connection.sendall(multipart_head(f"Content-Length: {len(body)}", f"Authorization: Bearer {KEY}", *more) + body)
    return connection
