"""The service on several machines: a Ray Serve application whose replicas are each the whole service.

    serve run service.ray_app:build model=/models/sd15

A replica has the application, an engine, and a worker process for its GPU or CPU. Settings are those of `serve`: the
environment's, with the arguments of `build` on top. `proxy_middlewares` stands in Ray's HTTP proxies; see
`service.api.ray_front`. Only this module knows of Ray.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from service.api.app import create_app
from service.api.ray_front import middlewares as proxy_middlewares
from service.api.ray_replica import ReplicaApp
from service.api.server import listen_near, serving_metrics
from service.engine.engine import WORKER_TARGET, Engine
from service.errors import StartupError
from service.logs import configure_logging, log_loop_error
from service.metrics import Metrics
from service.settings import Settings, load_settings

__all__ = ["application", "build", "proxy_middlewares"]

logger = logging.getLogger(__name__)

DEPLOYMENT = "inpaint"
"""The deployment's name, as `serve status` and the configuration file have it."""

# Arguments of an application are shown by Ray's dashboard and `serve config`.
_SECRETS = ("api_keys", "admin_keys", "webhook_secret")

# The engine's own limits answer 429 with a computed Retry-After, so Ray's have to lie above them: beside the queue as
# many uploads as it has places, the largest batch that there is twice over, and what asks for no picture.
_MAX_BATCH_IMAGES = 64
_OTHER_REQUESTS = 32

# Beyond the drain time, for what Ray does around it and for workers to exit.
_SHUTDOWN_SECONDS = 15.0

# A replica without a ready worker for longer is replaced, and with it maybe the machine. Replacing workers is the
# engine's business, which takes as long as loading does.
_MIN_UNREADY_SECONDS = 60.0
_UNREADY_LOADS = 3.0


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, as `serve run` and `serve deploy` ask for it.

    Args:
        arguments: Settings by name, over those of the environment.

    Raises:
        StartupError: A setting is wrong, or would show a secret.
    """
    return application(arguments)


def application(
    arguments: Mapping[str, Any], *, num_replicas: int = 1, worker_target: str = WORKER_TARGET
) -> serve.Application:
    """The application.

    Args:
        arguments: As of `build`.
        num_replicas: How many, where the configuration file says nothing else.
        worker_target: Dotted name of what runs in a worker process.

    Raises:
        StartupError: As `build`.
    """
    settings = replica_settings(arguments)
    max_requests = 2 * settings.queue_size + 2 * _MAX_BATCH_IMAGES + _OTHER_REQUESTS
    deployment = serve.deployment(serve.ingress()(Replica), name=DEPLOYMENT)
    return deployment.options(
        num_replicas=num_replicas,
        max_ongoing_requests=max_requests,
        max_queued_requests=max_requests,  # In each proxy. A burst waits there for a moment, whatever room there is.
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=settings.drain_timeout + _SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=1.0,
        logging_config=LoggingConfig(enable_access_log=False),  # The service writes its own.
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0},
    ).bind(dict(arguments), worker_target)


def replica_settings(arguments: Mapping[str, Any]) -> Settings:
    """Settings of a replica.

    Args:
        arguments: As of `build`.

    Raises:
        StartupError: As `build`.
    """
    shown = [name for name in _SECRETS if arguments.get(name)]
    if shown:
        raise StartupError(
            f"{shown[0]} would be shown by Ray's dashboard: name a file with {shown[0]}_file, or set the environment"
        )
    unknown = sorted(set(arguments) - set(Settings.model_fields))
    if unknown:
        raise StartupError(f"no such settings: {', '.join(unknown)}")
    # They would be in one replica's memory, and asked for at whichever happens to answer.
    settings = load_settings(arguments).model_copy(update={"async_max": 0})
    if settings.metrics_port is None:
        settings = settings.model_copy(update={"metrics_access": "off"})  # For the same reason.
    return settings


class Replica:
    """One replica: the whole service, but for the socket.

    Args:
        arguments: As of `build`.
        worker_target: Dotted name of what runs in a worker process.
    """

    def __init__(self, arguments: Mapping[str, Any], worker_target: str) -> None:
        settings = replica_settings(arguments)
        if settings.cpu_threads is None:
            # Several replicas share a machine's cores, and each has those that Ray gave it.
            given = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
            settings = settings.model_copy(update={"cpu_threads": given or None})
        configure_logging(settings)
        self._settings = settings
        self._metrics = Metrics()
        self._engine = Engine(settings, self._metrics, worker_target=worker_target)
        self._started_at = time.monotonic()
        self._last_ready_at: float | None = None
        self._max_unready_seconds = _MIN_UNREADY_SECONDS

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application; called by Ray once."""
        self._engine.adapters.prepare()
        app = create_app(self._settings, self._engine, self._metrics)
        app.router.lifespan_context = self._around(app.router.lifespan_context)
        return ReplicaApp(app, self._engine, self._settings.max_body_bytes)

    async def check_health(self) -> None:
        """Called by Ray every few seconds, and first before the replica gets requests: then it waits for a worker.

        Raises:
            StartupError: No worker can start.
            RuntimeError: None has been ready for so long that another replica is the better choice.
        """
        if self._last_ready_at is None:
            await self._engine.wait_ready()
            load_seconds = time.monotonic() - self._started_at
            self._max_unready_seconds = max(_MIN_UNREADY_SECONDS, _UNREADY_LOADS * load_seconds)
        now = time.monotonic()
        if self._engine.is_ready or self._last_ready_at is None:
            self._last_ready_at = now
        elif now - self._last_ready_at > self._max_unready_seconds and not self._engine.is_draining:
            raise RuntimeError(f"no worker has been ready for {now - self._last_ready_at:.0f} s")

    def _around(self, lifespan: Any) -> Any:  # noqa: ANN401 - the router's own type says no more
        """The application's life, and that of its metrics' port."""

        @asynccontextmanager
        async def around(app: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - as above
            asyncio.get_running_loop().set_exception_handler(log_loop_error)
            with ExitStack() as sockets:
                if self._settings.metrics_port is None:
                    async with lifespan(app) as state:
                        yield state
                    return
                listener = sockets.enter_context(listen_near(self._settings.host, self._settings.metrics_port))
                async with serving_metrics(self._metrics, listener), lifespan(app) as state:
                    yield state

        return around
