"""`/v1/adapters`: adding, listing and removing LoRAs while the service runs."""

import asyncio
import json
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from service.api import app as app_module
from service.api import body as body_module
from service.engine import adapters
from tests.http.serving import LiveServer, assert_problem, check_problem, eventually, head, read_answer, serving
from tests.http.test_serve import process

CLIENT, ADMIN = "client-key", "admin-key"
ROUTE = "/v1/adapters/{name}"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


AS_ADMIN, AS_CLIENT = bearer(ADMIN), bearer(CLIENT)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all tests here; made by the server."""
    return tmp_path_factory.mktemp("adapters") / "loras"


@pytest.fixture(scope="module")
def shared_server(shared_folder: Path) -> Iterator[LiveServer]:
    with serving(**settings(shared_folder)) as live:
        yield live


@pytest.fixture
def folder(shared_folder: Path) -> Path:
    """The folder, empty."""
    if shared_folder.exists():
        for path in shared_folder.iterdir():
            path.unlink()
    return shared_folder


@pytest.fixture
def server(shared_server: LiveServer, folder: Path) -> LiveServer:  # noqa: ARG001 - emptied
    """A server with both kinds of key, for tests that leave it as it was; bodies other than adapters are kept small."""
    return shared_server


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    keys = {"api_keys": CLIENT, "admin_keys": ADMIN}
    return {"lora_dir": folder, "max_body_mib": 0.125, "max_adapter_mib": 1.0, **keys, **changes}


def lora(num_rows: int = 4, **words: str) -> bytes:
    """A file that the fake worker takes, or else with words that make it misbehave."""
    tensors = {"unet.a": np.zeros((num_rows, 64), np.float32), "text_encoder.a": np.zeros((2, 64), np.float32)}
    return save(tensors, words or None)


def put(server: LiveServer, name: str, data: Any, headers: dict[str, str] = AS_ADMIN) -> httpx.Response:
    return server.client.put(f"/v1/adapters/{name}", content=data, headers=headers)


def listed(server: LiveServer) -> list[str]:
    response = server.client.get("/v1/adapters", headers=AS_CLIENT)
    assert response.status_code == 200
    return [entry["name"] for entry in response.json()["data"]]


def files(folder: Path) -> list[str]:
    """Everything in the folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def metric(server: LiveServer, sample: str) -> float:
    lines = server.client.get("/metrics", headers=AS_CLIENT).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(sample)), 0.0)


def put_head(*lines: str, name: str = "pencil", key: str = ADMIN) -> bytes:
    authorization = f"Authorization: Bearer {key}"
    return head("Host: localhost", authorization, *lines, path=f"/v1/adapters/{name}", method="PUT")


# --- a LoRA's life ----------------------------------------------------------------------


def test_upload_list_replace_remove(server: LiveServer, folder: Path) -> None:
    """An upload is there at once, in the list and among the model's adapters; it can be replaced and removed."""
    data = lora()
    added = put(server, "pencil", data)

    assert added.status_code == 201, added.text
    stored = added.json()
    status = (folder / "pencil.safetensors").stat()
    assert stored == {
        "name": "pencil",
        "kind": "lora",
        "num_bytes": len(data),
        "modified": int(status.st_mtime),
        "rank": 4,
        "num_unet_layers": 1,
        "num_text_encoder_layers": 1,
    }
    assert (folder / "pencil.safetensors").read_bytes() == data
    entry = {name: stored[name] for name in ("name", "kind", "num_bytes", "modified")} | {"is_writable": True}
    listing = server.client.get("/v1/adapters", headers=AS_CLIENT).json()
    assert listing == {"object": "list", "data": [entry]}
    assert server.client.get("/v1/adapters/pencil", headers=AS_ADMIN).json() == entry
    (model,) = server.client.get("/v1/models", headers=AS_CLIENT).json()["data"]
    assert model["adapters"] == [{"name": "pencil", "kind": "lora"}]

    larger = lora(16)
    replaced = put(server, "pencil", larger, {**AS_ADMIN, "Content-Type": "application/x-tar"})
    assert (replaced.status_code, replaced.json()["rank"]) == (200, 16)
    assert (folder / "pencil.safetensors").read_bytes() == larger
    assert files(folder) == ["pencil.safetensors"]

    removed = server.client.delete("/v1/adapters/pencil", headers=AS_ADMIN)
    assert (removed.status_code, removed.content) == (204, b"")
    assert files(folder) == listed(server) == []
    for method in ("GET", "DELETE"):
        response = server.client.request(method, "/v1/adapters/pencil", headers=AS_ADMIN)
        assert_problem(response, 404, "not_found")


def test_files_dropped_in_are_listed_at_once(server: LiveServer, folder: Path) -> None:
    """What an operator copies into the folder needs no upload and no restart."""
    (folder / "b.safetensors").write_bytes(lora())
    (folder / "a.safetensors").write_bytes(lora())
    (folder / "c.pt").write_bytes(b"pickle")
    (folder / ".d.safetensors").write_bytes(lora())
    assert listed(server) == ["a", "b"]
    (folder / "a.safetensors").unlink()
    assert listed(server) == ["b"]


def test_uploads_survive_a_restart(folder: Path) -> None:
    """Uploads are files: the next service has them."""
    with serving(**settings(folder)) as server:
        assert put(server, "pencil", lora()).status_code == 201
    with serving(**settings(folder)) as server:
        assert listed(server) == ["pencil"]
        assert put(server, "pencil", lora()).status_code == 200


def test_upload_in_pieces_of_no_announced_length(server: LiveServer, folder: Path) -> None:
    """A body may be chunked, and larger than what other routes take."""
    data = lora(1000)
    assert len(data) > 0.125 * 1024 * 1024
    response = put(server, "pencil", (data[start : start + 1000] for start in range(0, len(data), 1000)))
    assert response.status_code == 201
    assert (folder / "pencil.safetensors").read_bytes() == data


def test_curl_asks_before_it_sends(server: LiveServer) -> None:
    """`curl -T` waits for leave to send a large file: it gets leave, or its refusal without sending."""
    data = lora()
    lines = (f"Content-Length: {len(data)}", "Expect: 100-continue")
    with server.raw(put_head(*lines)) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(data)
        assert read_answer(connection)[0] == 201
    with server.raw(put_head(*lines, key="wrong")) as connection:
        assert read_answer(connection)[0] == 401


def test_two_uploads_of_one_name_at_once(tmp_path: Path, folder: Path) -> None:
    """Of uploads that overlap the last one to end stays, whole, and nothing of the other."""
    gate = tmp_path / "gate"
    with (
        serving(**settings(folder, model=f"fake?gate={gate}", devices="cpu,cpu")) as server,
        ThreadPoolExecutor() as pool,
    ):
        eventually(lambda: all(worker.state == "ready" for worker in server.engine.workers()))
        bodies = [lora(rows, hold="1") for rows in (4, 8)]
        puts = [pool.submit(put, server, "pencil", data) for data in bodies]
        eventually(lambda: len(server.engine._inspections._pending) == 2)
        assert listed(server) == []
        gate.touch()
        assert sorted(one.result().status_code for one in puts) in ([200, 201], [201, 201])
        assert (folder / "pencil.safetensors").read_bytes() in bodies
        assert files(folder) == ["pencil.safetensors"]


# --- keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET", "HEAD", "POST", "PATCH", "OPTIONS"])
def test_one_adapter_is_for_administrators(server: LiveServer, folder: Path, method: str) -> None:
    """Without a key, with an unknown one and with a client's, nothing can be seen or changed."""
    (folder / "pencil.safetensors").write_bytes(b"mine")
    for headers, status in (({}, 401), (bearer("wrong"), 401), (AS_CLIENT, 403), ({"X-API-Key": CLIENT}, 403)):
        response = server.client.request(method, "/v1/adapters/pencil", headers=headers)
        assert response.status_code == status
        if method != "HEAD":
            assert_problem(response, status, "unauthorized" if status == 401 else "forbidden")
    assert (folder / "pencil.safetensors").read_bytes() == b"mine"


def test_administrators_may_do_what_clients_may(server: LiveServer) -> None:
    """An administrator's key is a key, in either header; a client's key is none of an administrator."""
    for headers in (AS_ADMIN, {"X-API-Key": ADMIN}):
        assert server.client.get("/v1/models", headers=headers).status_code == 200
        assert server.client.get("/v1/adapters", headers=headers).status_code == 200
        assert_problem(server.client.get("/v1/adapters/pencil", headers=headers), 404, "not_found")
    assert server.client.get("/v1/adapters", headers=AS_CLIENT).status_code == 200
    assert_problem(server.client.get("/v1/adapters"), 401, "unauthorized")


def test_with_administrators_alone_other_routes_stay_open(folder: Path) -> None:
    """Without client keys clients need none, and administrators still do."""
    with serving(lora_dir=folder, admin_keys=f"{ADMIN},zweiter-schlüssel") as server:
        assert server.inpaint().status_code == 200
        assert server.client.get("/v1/adapters").json()["data"] == []
        assert_problem(put(server, "pencil", lora(), {}), 401, "unauthorized")
        assert_problem(put(server, "pencil", lora(), AS_CLIENT), 401, "unauthorized")
        second = [(b"Authorization", "Bearer zweiter-schlüssel".encode())]
        assert server.client.put("/v1/adapters/pencil", content=lora(), headers=second).status_code == 201


@pytest.mark.parametrize("api_keys", ["", CLIENT])
def test_without_administrators_nothing_changes(folder: Path, api_keys: str) -> None:
    """With no administrator's key set, nobody may change adapters, whatever key is sent."""
    with serving(lora_dir=folder, api_keys=api_keys) as server:
        for headers in ({}, AS_CLIENT, AS_ADMIN, {"Authorization": "Bearer"}, {"X-API-Key": ""}):
            problem = assert_problem(put(server, "pencil", lora(), headers), 403, "forbidden")
            assert problem["detail"] == "No administrator key is set."
        assert files(folder) == []


@pytest.mark.parametrize(("key", "status"), [("wrong", 401), (CLIENT, 403)])
def test_refused_before_the_body(server: LiveServer, folder: Path, key: str, status: int) -> None:
    """Who may not upload is told so from the head alone."""
    with server.raw(put_head("Content-Length: 1000000", key=key)) as connection:
        answered, headers, body = read_answer(connection)
    check_problem(headers, body, answered, "unauthorized" if status == 401 else "forbidden")
    assert answered == status
    assert files(folder) == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1/adapters%2Fpencil",
        "/v1/adapters/%70encil",
        "/v1/%61dapters/pencil",
        "/%76%31/adapters/pencil",
        "/v1%2fadapters%2fpencil",
        "/v1/adapters//pencil",
        "//v1/adapters/pencil",
        "/v1//adapters/pencil",
        "/v1/./adapters/pencil",
        "/v1/x/../adapters/pencil",
        "/v1/adapters/pencil/",
        "/v1/adapters/../adapters/pencil",
        "/v1/adapters/pencil%0A",
        "/v1/adapters%0A",
        "/v1/adapters/",
        "/v1/adapters",
        "/V1/adapters/pencil",
        "/v1/adapters;/pencil",
        "/v1/adapters/pencil?key=x",
        "/v1/adapters/pencil#x",
        "http://localhost/v1/adapters/pencil",
    ],
)
def test_no_spelling_of_the_path_gets_past_the_keys(server: LiveServer, folder: Path, path: str) -> None:
    """However the path is written, a client's key changes nothing, and a large body is not taken."""
    (folder / "pencil.safetensors").write_bytes(b"mine")
    data = lora()
    for method in ("PUT", "DELETE"):
        lines = ("Host: localhost", f"Authorization: Bearer {CLIENT}", f"Content-Length: {len(data)}")
        with server.raw(head(*lines, path=path, method=method), data) as connection:
            status, headers, body = read_answer(connection)
        assert status in {400, 403, 404, 405}
        check_problem(headers, body, status, json.loads(body)["code"])
    lines = ("Host: localhost", f"Authorization: Bearer {CLIENT}", "Content-Length: 1000000")
    with server.raw(head(*lines, path=path, method="PUT")) as connection:
        assert read_answer(connection)[0] in {400, 403, 413}
    assert (folder / "pencil.safetensors").read_bytes() == b"mine"
    assert files(folder) == ["pencil.safetensors"]


def test_pages_of_allowed_origins_may_upload(folder: Path) -> None:
    """A browser is told that PUT is allowed; pages of other origins cannot upload even with the key."""
    site = "https://shop.example"
    with serving(**settings(folder, cors_origins=site)) as server:
        ask = {"Origin": site, "Access-Control-Request-Method": "PUT"}
        leave = server.client.options("/v1/adapters/pencil", headers=ask)
        assert "PUT" in leave.headers["Access-Control-Allow-Methods"]
        assert put(server, "pencil", lora(), {**AS_ADMIN, "Origin": site}).status_code == 201
        refused = put(server, "pencil", lora(), {**AS_ADMIN, "Origin": "https://evil.example"})
        assert_problem(refused, 403, "cross_origin")


# --- names and folders ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["%2e%2e", ".hidden", "a%00b", "a%0A", "a..b", "-a", "%C3%A9", "a%20b", "a%5Cb", "x" * 129, "%FF"]
)
def test_names_that_no_file_may_have(server: LiveServer, folder: Path, name: str) -> None:
    """A name that could lead elsewhere, or that no form could name, is a fault of the field `name`."""
    for method in ("PUT", "GET", "DELETE"):
        lines = ("Host: localhost", f"Authorization: Bearer {ADMIN}", "Content-Length: 0")
        with server.raw(head(*lines, path=f"/v1/adapters/{name}", method=method)) as connection:
            status, headers, body = read_answer(connection)
        problem = check_problem(headers, body, 422, "invalid_field")
        assert status == 422
        assert [error["field"] for error in problem["errors"]] == ["name"]
    assert files(folder) == []


def test_without_a_folder_nothing_can_be_stored() -> None:
    """No folder set: uploads and removals are forbidden, and say why."""
    with serving(admin_keys=ADMIN) as server:
        for method in ("PUT", "DELETE"):
            response = server.client.request(method, "/v1/adapters/pencil", content=lora(), headers=AS_ADMIN)
            problem = assert_problem(response, 403, "forbidden")
            assert problem["detail"] == "No folder for adapters is set."
        assert server.client.get("/v1/adapters").json()["data"] == []


def test_what_ships_can_be_used_and_not_removed(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model's LoRAs are listed, cannot be removed, and give way to an upload of the same name."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "pencil.safetensors").write_bytes(lora())
    monkeypatch.setattr(adapters, "BUNDLED_LORAS", shipped)
    with serving(**settings(folder, model="demo")) as server:

        def is_writable() -> bool:
            return server.client.get("/v1/adapters/pencil", headers=AS_ADMIN).json()["is_writable"]

        assert is_writable() is False
        assert_problem(server.client.delete("/v1/adapters/pencil", headers=AS_ADMIN), 403, "forbidden")
        assert put(server, "pencil", lora()).status_code == 201
        assert is_writable() is True
        assert listed(server) == ["pencil"]
        assert server.client.delete("/v1/adapters/pencil", headers=AS_ADMIN).status_code == 204
        assert is_writable() is False


def test_read_only_folder(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the service may not write to refuses uploads before their bodies."""

    def refuse(*_: object) -> None:
        raise PermissionError(adapters.errno.EACCES, "Permission denied")

    monkeypatch.setattr(adapters, "Upload", refuse)
    with server.raw(put_head("Content-Length: 1000")) as connection:
        status, headers, body = read_answer(connection)
    assert status == 403
    assert check_problem(headers, body, status, "forbidden")["detail"] == "The folder for adapters is read-only."


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A folder that cannot be used ends the start with status 1 and a line that names it."""
    (tmp_path / "file").touch()
    with process("--lora-dir", str(tmp_path / "file")) as serve:
        assert serve.exit_status() == 1
    assert f"inpaint-service: cannot use the folder for LoRAs {tmp_path / 'file'}: " in serve.output
    assert "Traceback" not in serve.output


def test_service_that_is_killed_mid_upload_leaves_nothing_for_long(folder: Path) -> None:
    """What kill -9 of the whole service leaves is gone after the next start."""
    flags = ("--lora-dir", str(folder), "--admin-keys", ADMIN)
    with process(*flags) as serve:
        live = serve.live()
        with live.raw(put_head("Content-Length: 1000"), b"half"):
            eventually(lambda: len(files(folder)) == 1)
            serve.process.kill()
            serve.exit_status()
        live.client.close()
    assert files(folder)[0].startswith(".upload-")
    with process(*flags) as serve:
        serve.live().client.close()
        assert files(folder) == []


# --- uploads that fail ------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        bytes(100),
        pickle.dumps([1.0] * 1000),
        b"PK\x03\x04" + bytes(100),
        lora()[:-1],
        lora() + b"x",
        lora().replace(b"F32", b"F99"),
        lora(refuse="1"),
    ],
    ids=["empty", "gif", "zeros", "pickle", "zip", "cut", "tail", "dtype", "worker"],
)
def test_what_is_no_lora_is_refused(server: LiveServer, folder: Path, data: bytes) -> None:
    """Anything but a LoRA of the model is 422, leaves nothing, and leaves what had the name."""
    (folder / "pencil.safetensors").write_bytes(b"mine")
    problem = assert_problem(put(server, "pencil", data), 422, "invalid_lora")
    assert [error["field"] for error in problem["errors"]] == ["adapter"]
    assert str(folder) not in str(problem)
    assert (folder / "pencil.safetensors").read_bytes() == b"mine"
    assert files(folder) == ["pencil.safetensors"]
    assert all(worker.restarts == 0 for worker in server.engine.workers())


def test_upload_over_the_limit(server: LiveServer, folder: Path) -> None:
    """More than the limit for adapters is 413, announced or not; the limit of other bodies is their own."""
    with server.raw(put_head("Content-Length: 1048577")) as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "body_too_large")
    assert status == 413
    assert_problem(put(server, "pencil", iter([bytes(65536)] * 20)), 413, "body_too_large")
    assert files(folder) == []
    inpaint = server.client.post("/v1/inpaint", content=bytes(200_000), headers=AS_ADMIN)
    assert_problem(inpaint, 413, "body_too_large")


def test_upload_that_is_cut_leaves_nothing(server: LiveServer, folder: Path) -> None:
    """A client that goes away in the middle is counted, and its file is gone."""
    sample = f'inpaint_requests_total{{code="499",endpoint="{ROUTE}"}}'
    before = metric(server, sample)
    connection = server.raw(put_head("Content-Length: 100000"), lora()[:500])
    eventually(lambda: len(files(folder)) == 1)
    assert listed(server) == []
    connection.close()
    eventually(lambda: files(folder) == [])
    eventually(lambda: metric(server, sample) == before + 1)
    assert "pencil" not in server.client.get("/metrics", headers=AS_CLIENT).text


def test_upload_that_stalls_leaves_nothing(server: LiveServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that makes no progress is 408."""
    monkeypatch.setattr(body_module, "STALL_SECONDS", 0.2)
    with server.raw(put_head("Content-Length: 100000"), lora()[:500]) as connection:
        status, headers, body = read_answer(connection)
    check_problem(headers, body, status, "request_timeout")
    assert status == 408
    assert files(folder) == []


def test_few_uploads_at_once(server: LiveServer, folder: Path) -> None:
    """Only so many uploads may be under way; more are 429, and a place is free again when one ends."""
    data = lora()
    under_way: list[socket.socket] = []
    for count in range(1, app_module.MAX_ADAPTER_UPLOADS + 1):
        under_way.append(server.raw(put_head(f"Content-Length: {len(data)}", name=f"n{count}"), data[:100]))
        eventually(lambda count=count: len(files(folder)) == count)
    refused = put(server, "pencil", data)
    assert_problem(refused, 429, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    for connection in under_way:
        with connection:
            connection.sendall(data[100:])
            assert read_answer(connection)[0] == 201
    assert put(server, "pencil", data).status_code == 201
    assert len(listed(server)) == app_module.MAX_ADAPTER_UPLOADS + 1


# --- workers ----------------------------------------------------------------------------


def test_worker_lost_over_a_file_and_another_takes_it(tmp_path: Path, folder: Path) -> None:
    """When the worker that looks at a file dies, another one is asked."""
    with serving(**settings(folder, devices="cpu,cpu")) as server:
        eventually(lambda: all(worker.state == "ready" for worker in server.engine.workers()))
        response = put(server, "pencil", lora(crash=str(tmp_path / "crashed")))
        assert response.status_code == 201
        assert (tmp_path / "crashed").exists()
        assert listed(server) == ["pencil"]


def test_file_that_kills_its_worker(folder: Path) -> None:
    """With nobody else to ask, it is 503, nothing is left, and the service recovers."""
    with serving(**settings(folder)) as server:
        response = put(server, "pencil", lora(crash=""))
        assert_problem(response, 503, "worker_lost")
        assert int(response.headers["Retry-After"]) >= 1
        assert files(folder) == []
        eventually(lambda: server.client.get("/readyz").status_code == 200)
        assert put(server, "pencil", lora()).status_code == 201


def test_kill_of_the_worker_that_looks_at_it(folder: Path) -> None:
    """Kill -9 in the middle of an inspection: one definite answer, and no file."""
    with serving(**settings(folder)) as server, ThreadPoolExecutor() as pool:
        upload = pool.submit(put, server, "pencil", lora(hang="1"))
        eventually(lambda: bool(server.engine._inspections._pending))
        os.kill(server.engine.workers()[0].pid, signal.SIGKILL)
        assert_problem(upload.result(), 503, "worker_lost")
    assert files(folder) == []


def test_worker_that_does_not_answer(tmp_path: Path, folder: Path) -> None:
    """An inspection takes no longer than a request may; nothing is left."""
    with serving(**settings(folder, model=f"fake?gate={tmp_path / 'gate'}", timeout=0.3)) as server:
        assert_problem(put(server, "pencil", lora(hold="1")), 504, "deadline")
        assert files(folder) == []
        (tmp_path / "gate").touch()
        assert put(server, "pencil", lora()).status_code == 201


def test_not_ready_is_refused_before_the_body(tmp_path: Path, folder: Path) -> None:
    """While nobody can look at a file none is taken; the list is there already."""
    with serving(wait_ready=False, **settings(folder, model=f"fake?startup_gate={tmp_path / 'gate'}")) as server:
        with server.raw(put_head("Content-Length: 1000")) as connection:
            status, headers, body = read_answer(connection)
        check_problem(headers, body, status, "not_ready")
        assert int(headers["retry-after"]) >= 1
        assert files(folder) == listed(server) == []
        assert_problem(server.client.delete("/v1/adapters/pencil", headers=AS_ADMIN), 404, "not_found")
        (tmp_path / "gate").touch()
        eventually(lambda: server.client.get("/readyz").status_code == 200)


def test_draining_refuses_changes(tmp_path: Path, folder: Path) -> None:
    """While the service drains: changes and unfinished uploads 503, and nothing is left of those."""
    gate = tmp_path / "gate"
    with serving(**settings(folder, model=f"fake?gate={gate}")) as server:
        (folder / "pencil.safetensors").write_bytes(lora())
        with ThreadPoolExecutor() as pool:
            held = pool.submit(server.inpaint, AS_CLIENT, prompt="hold", seed=1)
            eventually(lambda: metric(server, "inpaint_in_flight") == 1)
            stalled = server.raw(put_head("Content-Length: 1000"), b"half")
            eventually(lambda: len(files(folder)) == 2)
            draining = asyncio.run_coroutine_threadsafe(server.engine.drain(20.0), server.loop)
            eventually(lambda: server.client.get("/readyz").status_code == 503)

            assert_problem(put(server, "crayon", lora()), 503, "draining")
            assert_problem(server.client.delete("/v1/adapters/pencil", headers=AS_ADMIN), 503, "draining")
            assert listed(server) == ["pencil"]
            with stalled:
                status, headers, body = read_answer(stalled)
            check_problem(headers, body, status, "draining")
            assert files(folder) == ["pencil.safetensors"]

            gate.touch()
            assert held.result().status_code == 200
            assert draining.result(timeout=20) is True
