"""`serve` on a machine that runs out: of disk, of descriptors, of a clock that can be trusted."""

import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.http.serve_process import Process, process
from tests.http.serving import (
    CLOSING,
    LiveServer,
    assert_problem,
    check_problem,
    eventually,
    multipart_head,
    part,
    read_answer,
    usual_parts,
)

ADMIN = {"Authorization": "Bearer admin"}


def held_request(live: LiveServer, *fields: bytes) -> object:
    """A connection whose request the worker holds."""
    body = usual_parts().replace(b"a red house", b"hold") + b"".join(fields) + CLOSING
    connection = live.raw(multipart_head(f"Content-Length: {len(body)}"), body)
    eventually(lambda: live.metric("inpaint_in_flight") == 1)
    return connection


# --- the disk ---------------------------------------------------------------------------------


def lora() -> bytes:
    """A LoRA of a few hundred kilobytes that the fake worker takes."""
    header = json.dumps({"unet.a": {"dtype": "F32", "shape": [4, 20_000], "data_offsets": [0, 320_000]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(320_000)


Fill = Callable[[Process, Path], Callable[[], None]]
"""Makes the disk full; what it returns makes room again."""


def no_bytes_allowed(serve: Process, _folder: Path) -> Callable[[], None]:
    """The process may not write a byte to any file, wherever."""
    running = psutil.Process(serve.process.pid)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    running.rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return lambda: running.rlimit(psutil.RLIMIT_FSIZE, unlimited)


def full_file_system(_serve: Process, folder: Path) -> Callable[[], None]:
    """What is on the small file system takes all of it."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast.unlink


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of one megabyte."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mounted], capture_output=True, check=False, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def check_full_disk(folder: Path, fill: Fill) -> None:
    loras = folder / "loras"
    flags = ("--lora-dir", str(loras), "--admin-keys", "admin")
    with process(*flags, environment={"TMPDIR": str(folder)}) as serve:
        live = serve.live()
        make_room = fill(serve, folder)

        for seed in range(3):
            assert live.inpaint(seed=str(seed)).status_code == 200
        refused = live.client.put("/v1/adapters/mine", content=lora(), headers=ADMIN)
        assert_problem(refused, 500, "internal")
        assert str(folder) not in refused.text
        assert list(loras.iterdir()) == []
        assert live.client.get("/v1/adapters").status_code == 200
        assert live.client.get("/readyz").status_code == 200

        make_room()
        assert live.client.put("/v1/adapters/mine", content=lora(), headers=ADMIN).status_code == 201
        assert live.inpaint(loras='[{"name": "mine"}]').status_code == 200
        serve.process.send_signal(signal.SIGTERM)
        assert serve.exit_status() == 0
        live.client.close()
    assert "Traceback" not in serve.output


def test_no_file_can_be_written(tmp_path: Path) -> None:
    """Pictures need no disk. An upload that does gets an answer, leaves nothing, and is taken once there is room."""
    check_full_disk(tmp_path, no_bytes_allowed)


def test_file_system_is_full(small_file_system: Path) -> None:
    """The same where temporary files and LoRAs are on a file system that is full."""
    check_full_disk(small_file_system, full_file_system)


# --- descriptors -----------------------------------------------------------------------------------


def test_sixty_four_descriptors() -> None:
    """`ulimit -n 64`: idle clients keep nobody out, none too many is left waiting, a lost worker comes back."""
    with process(limits={resource.RLIMIT_NOFILE: 64}) as serve:
        live = serve.live()
        live.client.close()  # Each request from here on has a connection of its own.
        base_url = f"http://127.0.0.1:{live.port}"

        def get(path: str) -> int:
            return httpx.get(base_url + path, timeout=20, trust_env=False).status_code

        idle = [live.raw() for _ in range(150)]
        assert [get(path) for path in ("/healthz", "/readyz", "/v1/models") * 3] == [200] * 9

        busy = [live.raw(multipart_head("Content-Length: 100"), b"--frontier\r\n") for _ in range(60)]
        eventually(lambda: sum(map(_is_waiting, busy)) == 32)

        os.kill(serve.worker_pids()[0], signal.SIGKILL)
        eventually(lambda: len(serve.worker_pids()) == 2)
        for connection in (*idle, *busy):
            connection.close()
        eventually(lambda: _status(base_url + "/readyz") == 200)
        body = usual_parts() + CLOSING
        with live.raw(multipart_head(f"Content-Length: {len(body)}"), body) as connection:
            assert read_answer(connection)[0] == 200
        serve.process.send_signal(signal.SIGTERM)
        assert serve.exit_status() == 0


def _is_waiting(connection: socket.socket) -> bool:
    """Whether it is neither answered nor closed nor reset."""
    connection.settimeout(0.0)
    with suppress(ConnectionResetError):
        try:
            connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
    return False


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=20, trust_env=False).status_code
    except httpx.HTTPError:
        return None


# --- the clock -------------------------------------------------------------------------------------

CLOCK = """
import os, time

_time, _time_ns, _gettime = time.time, time.time_ns, time.clock_gettime

def _offset():
    with open(os.environ["CLOCK_OFFSET"]) as file:
        return int(file.read())

time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + _offset() * 10**9
time.clock_gettime = lambda clock: _gettime(clock) + (_offset() if clock == time.CLOCK_REALTIME else 0)
"""
"""Read by every Python that starts with it on its path: the service's processes have a clock that can be set."""


def test_clock_jumps(tmp_path: Path) -> None:
    """The clock goes an hour forth, or back: no deadline fires that should not, and those that should still do."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    offset, gate = tmp_path / "offset", tmp_path / "gate"

    def set_clock(seconds: int) -> None:
        offset.with_suffix(".new").write_text(str(seconds))
        offset.with_suffix(".new").replace(offset)

    set_clock(0)
    environment = {"PYTHONPATH": str(tmp_path), "CLOCK_OFFSET": str(offset)}
    flags = ("--model", f"fake?gate={gate}", "--timeout", "60", "--hang-timeout", "3")
    with process(*flags, environment=environment) as serve:
        live = serve.live()
        created = live.client.get("/v1/models").json()["data"][0]["created"]
        held = held_request(live)
        for hours in (1, -1, 1, 0):
            set_clock(3600 * hours)
            answer = live.client.post(
                "/v1/inpaint",
                headers={"Accept": "application/json", "Content-Type": "multipart/form-data; boundary=frontier"},
                content=usual_parts() + part("num_inference_steps", b"20") + CLOSING,
            )
            assert answer.status_code == 200
            # The processes see the jump.
            assert round((answer.json()["created"] - created) / 3600) == hours
            # A deadline of a moment is still one of a moment.
            assert_problem(live.inpaint(prompt="hold", timeout="0.3"), 504, "deadline")
            assert live.metric("inpaint_in_flight") >= 1
            assert live.client.get("/readyz").status_code == 200
        eventually(lambda: live.metric("inpaint_in_flight") == 1)
        gate.touch()
        with held:
            assert read_answer(held)[0] == 200
        assert live.metric('inpaint_worker_restarts_total{worker="0"}') == 0
        assert live.metric('inpaint_failed_total{reason="deadline"}') == 4

        set_clock(3600)
        stalled = live.raw(multipart_head("Content-Length: 1000"), b"--frontier\r\n")
        serve.process.send_signal(signal.SIGTERM)
        status, headers, body = read_answer(stalled)
        check_problem(headers, body, status, "draining")
        stalled.close()
        set_clock(-3600)
        assert serve.exit_status() == 0
        live.client.close()
    assert "Traceback" not in serve.output
