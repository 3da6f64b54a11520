"""The servers under measurement, as real processes on 127.0.0.1.

Each function is a context manager: it waits until its server is loaded and warm,
and in the end ends it with all that it started. Several can be started at once,
each from a thread.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx

from benchmarks.peers.wire import PATH

ROOT = Path(__file__).parent.parent
START_SECONDS = 900.0
"""Compiling takes minutes."""
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
LOOK_SECONDS = 30.0

CPU_ENVIRONMENT: Mapping[str, str] = MappingProxyType({"GOMP_SPINCOUNT": "1000"})
"""As the service sets it for its workers: libgomp's threads otherwise spin at every barrier, and a peer takes ten times
as long as soon as another process needs a core. It is read when torch is loaded, so it cannot be set later."""

NO_CHANGES: Mapping[str, str] = MappingProxyType({})


class ServerFailedError(Exception):
    """A server did not start; the message ends with the last lines of its log, where there is one."""


@dataclass(frozen=True, slots=True)
class Where:
    """What a server computes on.

    Attributes:
        device: "cpu", or "cuda:0".
        dtype: Of the weights; None is float16 on CUDA and float32 on a CPU.
        threads: Of torch.
    """

    device: str
    dtype: str | None
    threads: int


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        name: How the report calls it.
        url: Its inpainting endpoint.
        start_seconds: From the process's start to readiness.
        pid: Of the process that was started; others may be its children.
    """

    name: str
    url: str
    start_seconds: float
    pid: int

    @property
    def base_url(self) -> str:
        """Where the server's other paths begin, without a slash at the end."""
        return self.url.removesuffix(PATH)


def inpaint_service(
    model: str | Path,
    where: Where,
    *,
    environment: Mapping[str, str] = NO_CHANGES,
    entry: Sequence[str] = ("service",),
    log: Path | None = None,
) -> AbstractContextManager[Server]:
    """This service with one worker, as `inpaint-service serve` starts it.

    Args:
        model: As in `INPAINT_MODEL`.
        where: Device and type.
        environment: On top of the process's own, of which no `INPAINT_*` is kept.
        entry: The module to run, with what it takes before `serve`.
        log: Where to keep what it says; by default nowhere.

    Raises:
        ServerFailedError: It did not start.
    """
    port = free_port()
    settings = {
        "INPAINT_HOST": "127.0.0.1",
        "INPAINT_PORT": str(port),
        "INPAINT_MODEL": str(model),
        "INPAINT_DEVICES": where.device,
        "INPAINT_CPU_THREADS": str(where.threads),
        "INPAINT_OFFLINE": "true",
        "INPAINT_LOG_LEVEL": "warning",
    }
    if where.dtype is not None:
        settings["INPAINT_DTYPE"] = where.dtype
    return _running("this service", [*entry, "serve"], port, settings | dict(environment), log)


def stock_lock(
    model: str | Path,
    where: Where,
    compiled: bool = False,
    *,
    sizes: Sequence[int] = (),
    environment: Mapping[str, str] = NO_CHANGES,
) -> AbstractContextManager[Server]:
    """The stock pipeline behind a lock.

    Args:
        model: Folder in diffusers format.
        where: Device and type.
        compiled: By `torch.compile`.
        sizes: Sides of pictures to be warm for, with guidance; by default the model's own. Compiled, every other
            size costs its first request a minute.
        environment: On top of the process's own.

    Raises:
        ServerFailedError: It did not start.
    """
    options = [*(["--compile"] if compiled else []), *(["--sizes", *map(str, sizes)] if sizes else [])]
    name = f"stock behind a lock{', compiled' if compiled else ''}"
    return _peer(name, "stock_lock", model, where, environment, options)


def litserve_stock(
    model: str | Path, where: Where, max_batch: int, *, environment: Mapping[str, str] = NO_CHANGES
) -> AbstractContextManager[Server]:
    """LitServe with its own batching over the stock pipeline.

    Args:
        model: Folder in diffusers format.
        where: Device and type.
        max_batch: Requests of a full batch, at least 2.
        environment: On top of the process's own.

    Raises:
        ServerFailedError: The package litserve is not installed, or it did not start.
    """
    if importlib.util.find_spec("litserve") is None:
        raise ServerFailedError("LitServe is left out: the package litserve is not installed (extra: bench)")
    return _peer("LitServe, stock", "litserve_stock", model, where, environment, ["--max-batch", str(max_batch)])


def static_batching(
    model: str | Path, where: Where, environment: Mapping[str, str] = NO_CHANGES
) -> AbstractContextManager[Server]:
    """Static micro-batching of this service's own pipeline.

    Args:
        model: As in `INPAINT_MODEL`.
        where: Device and type.
        environment: On top of the process's own, of which no `INPAINT_*` is kept; settings of the model's are heeded.

    Raises:
        ServerFailedError: It did not start.
    """
    return _peer("static batches", "static_batching", model, where, environment)


def _peer(  # noqa: PLR0917 - what a command is made of
    name: str,
    module: str,
    model: str | Path,
    where: Where,
    environment: Mapping[str, str],
    options: Sequence[str] = (),
) -> AbstractContextManager[Server]:
    port = free_port()
    command = [f"benchmarks.peers.{module}", "--model", str(model), "--port", str(port), "--device", where.device]
    command += ["--threads", str(where.threads), *(["--dtype", where.dtype] if where.dtype else []), *options]
    common = CPU_ENVIRONMENT if where.device == "cpu" else NO_CHANGES
    return _running(name, command, port, {**common, **environment})


def wait_for_all_workers(server: Server, give_up_at: float) -> None:
    """Until all workers of this service are ready; it calls itself ready with its first one.

    Args:
        server: From `inpaint_service`.
        give_up_at: By `time.monotonic()`.

    Raises:
        ServerFailedError: They are not, by then.
    """
    states: list[str] = []
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=LOOK_SECONDS) as client:
        while time.monotonic() < give_up_at:
            states = [worker["state"] for worker in client.get("/readyz").json()["workers"]]
            if all(state == "ready" for state in states):
                return
            time.sleep(POLL_SECONDS)
    raise ServerFailedError(f"only some workers became ready: {', '.join(states)}")


@contextmanager
def _running(
    name: str, module: Sequence[str], port: int, changes: Mapping[str, str], log_path: Path | None = None
) -> Iterator[Server]:
    """Start a module, wait until it is ready, and end it in the end, with all that it started."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INPAINT_")}
    started_at = time.perf_counter()
    with tempfile.TemporaryFile() if log_path is None else log_path.open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT,
            env=environment | dict(changes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not _is_ready(process, f"http://127.0.0.1:{port}/readyz"):
                log.seek(0)
                raise ServerFailedError(f"{name} did not start:\n{log.read()[-2000:].decode(errors='replace')}")
            yield Server(name, f"http://127.0.0.1:{port}{PATH}", time.perf_counter() - started_at, process.pid)
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
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    # Its session holds only what it started. LitServe's processes outlive the one that started them.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_given_out: set[int] = set()
_given_out_lock = threading.Lock()


def free_port() -> int:
    """A port that nobody listens on, and that no other call got: servers that start at once take theirs late."""
    with _given_out_lock:
        while True:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = int(listener.getsockname()[1])
            if port not in _given_out:
                _given_out.add(port)
                return port
