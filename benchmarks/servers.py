"""The servers under measurement, as real processes on 127.0.0.1."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 300.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2


class ServerFailedError(Exception):
    """A server did not start; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        name: How the report calls it.
        url: Its inpainting endpoint.
        start_seconds: From the process's start to readiness.
    """

    name: str
    url: str
    start_seconds: float


@contextmanager
def inpaint_service(model: str, threads: int) -> Iterator[Server]:
    """This service with one CPU worker, as `inpaint-service serve` starts it."""
    port = _free_port()
    settings = {
        "INPAINT_HOST": "127.0.0.1",
        "INPAINT_PORT": str(port),
        "INPAINT_MODEL": model,
        "INPAINT_DEVICES": "cpu",
        "INPAINT_CPU_THREADS": str(threads),
        "INPAINT_OFFLINE": "true",
        "INPAINT_LOG_LEVEL": "warning",
    }
    with _running("this service", [sys.executable, "-m", "service", "serve"], port, settings) as server:
        yield server


@contextmanager
def stock_lock(model_folder: Path, threads: int) -> Iterator[Server]:
    """The stock pipeline behind a lock."""
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.peers.stock_lock"]
    options = ["--model", str(model_folder), "--port", str(port), "--threads", str(threads)]
    with _running("stock behind a lock", [*command, *options], port, {}) as server:
        yield server


@contextmanager
def _running(name: str, command: Sequence[str], port: int, settings: dict[str, str]) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it in the end, with all that it started."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INPAINT_")}
    started_at = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not _is_ready(process, f"http://127.0.0.1:{port}/readyz"):
                log.seek(0)
                raise ServerFailedError(f"{name} did not start:\n{log.read()[-2000:].decode(errors='replace')}")
            yield Server(name, f"http://127.0.0.1:{port}/v1/inpaint", time.perf_counter() - started_at)
        finally:
            _stop(process)


def _is_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(url).status_code == httpx.codes.OK:
                    return True
            except httpx.TransportError:
                pass  # The port is not open yet.
            time.sleep(POLL_SECONDS)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # Its session holds only what it started.
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
