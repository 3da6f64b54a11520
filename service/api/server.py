"""Serving: sockets, signals, and the order in which things end."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from math import ceil

import uvicorn
from starlette.types import ASGIApp

from service import __version__
from service.api.app import create_app
from service.api.ops import metrics_app
from service.api.protocol import HttpProtocol
from service.engine.engine import WORKER_TARGET, Engine
from service.errors import StartupError
from service.logs import log_loop_error
from service.metrics import Metrics
from service.settings import Settings, traces_url
from service.spans import NO_TRACING, Tracing

logger = logging.getLogger(__name__)

# Larger than what the gate lets through, so that the gate gives the answer.
_MAX_HEAD_BYTES = 128 * 1024
_KEEP_ALIVE_SECONDS = 65

# Connections that may wait to be accepted.
_BACKLOG = 2048

# Connections that the event loop accepts before it looks at them: few, so that it sees where there are too many while
# descriptors are left. asyncio, once there are none, tries again at once for each that it might have accepted.
_ACCEPTED_AT_ONCE = 2

# Replicas on one machine that want the same port for their metrics, one that is ending beside each included.
_NEAR_PORTS = 32

# Of the drain time, what is left for sending the last answers once they are there.
_SENDING_SECONDS = 2.0

# What the last spans may take of it.
_FLUSHING_SECONDS = 5.0


def serve(settings: Settings, *, worker_target: str = WORKER_TARGET) -> int:
    """Serve until told to stop.

    Args:
        settings: The operator's settings.
        worker_target: Dotted name of what runs in a worker process.

    Returns:
        The exit status: 0, or 1 when a second signal cut accepted requests off.

    Raises:
        StartupError: A port is taken, a folder cannot be used, or no worker can start.
    """
    tracing = _tracing(settings)
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(listen(settings.host, settings.port))
        metrics_listener = None
        if settings.metrics_port is not None:
            metrics_listener = sockets.enter_context(listen(settings.host, settings.metrics_port))
        return asyncio.run(_serve(settings, worker_target, listener, metrics_listener, tracing))


def _tracing(settings: Settings) -> Tracing:
    """Tracing, where it is asked for: only then is OpenTelemetry's SDK loaded.

    Raises:
        StartupError: Its packages are missing, or its variables do not fit.
    """
    url = traces_url(settings)
    return NO_TRACING if url is None else require_tracing()(url)


def require_tracing() -> Callable[[str], Tracing]:
    """What opens tracing to a collector's URL.

    Raises:
        StartupError: Its packages are missing.
    """
    try:
        from service.tracing import open_tracing  # noqa: PLC0415 - OpenTelemetry's SDK is loaded with it
    except ImportError:
        raise StartupError(
            "an OTLP endpoint is set, and the packages for tracing are missing: pip install 'inpaint-service[tracing]'"
        ) from None
    return open_tracing


def server_config(app: ASGIApp, *, has_lifespan: bool = True) -> uvicorn.Config:
    """How uvicorn is to serve an application of ours."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="on" if has_lifespan else "off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )


class HttpServer(uvicorn.Server):
    """uvicorn's server, with a long line of connections from which few are accepted at a time."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, for which both numbers are one."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_BACKLOG)


class Server(HttpServer):
    """The server with our way to stop.

    The first SIGTERM or SIGINT drains: new work is refused, which takes that
    the server still listens, and accepted work is answered. Then connections
    end. A second signal ends everything at once.

    Args:
        config: See `server_config`.
        engine: What to drain.
        drain_seconds: How long all of it may take.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self.is_forced = False
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._stopping: list[asyncio.Task[None]] = []
        self._end_at: float | None = None

    def seconds_left(self, most: float) -> float:
        """Of the drain time, but no more than `most`; that, where nothing was drained."""
        if self.is_forced:
            return 0.0
        return most if self._end_at is None else max(0.0, min(most, self._end_at - time.monotonic()))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Called by uvicorn around serving; its own would end the process by the signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        stop = self._end_at_once if self._stopping else self._drain
        self._stopping.append(asyncio.ensure_future(stop()))

    async def _drain(self) -> None:
        end_at = self._end_at = time.monotonic() + self._drain_seconds
        await self._engine.drain(self._drain_seconds - min(_SENDING_SECONDS, self._drain_seconds / 2))
        self.config.timeout_graceful_shutdown = max(1, ceil(end_at - time.monotonic() - 1))
        self.should_exit = True

    async def _end_at_once(self) -> None:
        self.is_forced = True
        await self._engine.stop()
        self.should_exit = self.force_exit = True


class _MetricsServer(HttpServer):
    """A second server in the same loop; signals are the first one's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


@contextlib.asynccontextmanager
async def serving_metrics(metrics: Metrics, listener: socket.socket) -> AsyncIterator[None]:
    """Serve `/metrics` on a socket of its own until the block ends."""
    server = _MetricsServer(server_config(metrics_app(metrics), has_lifespan=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    logger.info("metrics are on %s/metrics", _url(listener))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await serving


async def _serve(
    settings: Settings,
    worker_target: str,
    listener: socket.socket,
    metrics_listener: socket.socket | None,
    tracing: Tracing,
) -> int:
    asyncio.get_running_loop().set_exception_handler(log_loop_error)
    metrics = Metrics()
    engine = Engine(settings, metrics, worker_target=worker_target)
    engine.adapters.prepare()
    server = Server(server_config(create_app(settings, engine, metrics, tracing)), engine, settings.drain_timeout)
    logger.info(
        "inpaint-service %s listens on %s and loads %s",
        __version__,
        _url(listener),
        "the bundled demo model" if settings.is_bundled_model else settings.model_name,
    )
    startup = asyncio.create_task(_watch_startup(settings, engine, server, _url(listener)))
    async with contextlib.AsyncExitStack() as side:
        if metrics_listener is not None:
            await side.enter_async_context(serving_metrics(metrics, metrics_listener))
        await server.serve(sockets=[listener])
        await tracing.close(server.seconds_left(_FLUSHING_SECONDS))
    if startup.done():
        startup.result()  # Raises why there was nothing to serve.
    startup.cancel()
    return 1 if server.is_forced else 0


async def _watch_startup(settings: Settings, engine: Engine, server: Server, url: str) -> None:
    """Say when the service is ready; end it when it never can be.

    Raises:
        StartupError: No worker can start.
    """
    try:
        await engine.wait_ready()
    except StartupError:
        server.should_exit = True
        raise
    model = engine.model
    assert model is not None  # noqa: S101 - for the type checker: a worker is ready
    logger.info("ready: %s on %s, served at %s", model.id, ", ".join(_devices(engine)), url)
    if settings.is_bundled_model:
        logger.warning(
            "this is a demo model that paints simple drawn scenes; for photographs, serve a checkpoint with --model, "
            "e.g. --model stable-diffusion-v1-5/stable-diffusion-inpainting"
        )


def _devices(engine: Engine) -> Iterator[str]:
    return (worker.device for worker in engine.workers())


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; made before anything is loaded, so that a taken port is known at once.

    Raises:
        StartupError: The port is taken, or the address is none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name like localhost the IPv4 address, which is what people type; "::" serves both.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        is_dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def listen_near(host: str, port: int) -> socket.socket:
    """A listening socket on this port or, for others on the same machine with the same wish, one of the next ones.

    Raises:
        StartupError: All of them are taken, or the address is none of this machine's.
    """
    last = min(port + _NEAR_PORTS, 65536) - 1 if port else 0
    for candidate in range(port, last):
        with contextlib.suppress(StartupError):
            return listen(host, candidate)
    return listen(host, last)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
