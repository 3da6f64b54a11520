"""The application: routes, middleware, error answers, and the engine's life around them."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service.api import adapters, docs, inpaint, ops, playground_page, requests, wire_formats
from service.api.access_log import AccessLog
from service.api.async_request import AsyncRequest
from service.api.async_requests import AsyncRequests
from service.api.deliveries import Deliveries
from service.api.docs import OPENAPI_PATH
from service.api.gate import Gate
from service.api.kept_answers import KeptAnswers
from service.api.kept_requests import KeptRequests
from service.api.keys import load_keys
from service.api.openapi import TITLE, openapi_document
from service.api.problems import on_http_exception, on_inpaint_error, on_validation_error
from service.api.state import Intake, ServiceState
from service.api.webhook import webhook_policy, webhook_secret
from service.engine.devices import usable_cores
from service.engine.engine import Engine
from service.errors import InpaintError
from service.metrics import Metrics
from service.settings import Settings
from service.spans import NO_TRACING, Tracing

MAX_PICTURE_THREADS = 8
MAX_ADAPTER_UPLOADS = 4

_SWEEP_SECONDS = 30.0

# After the drain, for results that are being made and webhooks on their way: at least, and at most where there is time.
_MIN_GRACE_SECONDS = 1.0
_MAX_GRACE_SECONDS = 5.0


def create_app(settings: Settings, engine: Engine, metrics: Metrics, tracing: Tracing = NO_TRACING) -> FastAPI:
    """The application; its lifespan starts, drains and stops the engine.

    Args:
        settings: The operator's settings.
        engine: Not started yet.
        metrics: Where the engine counts, too.
        tracing: Where traces of requests begin.

    Raises:
        StartupError: The keys cannot be read, or webhooks cannot be sent as is asked for.
    """
    keys = load_keys(settings)
    app = _App(
        title=TITLE,
        # FastAPI's own documentation pages load their scripts from another site.
        docs_url=None,
        redoc_url=None,
        openapi_url=None if settings.docs_access == "off" else OPENAPI_PATH,
        redirect_slashes=False,
        # FastAPI's own would, where its environment variables ask for it, send queries and messages of exceptions.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        generate_unique_id_function=lambda route: route.name,
        lifespan=_lifespan,
        exception_handlers={
            InpaintError: on_inpaint_error,
            HTTPException: on_http_exception,
            RequestValidationError: on_validation_error,
        },
    )
    app.state.service = ServiceState(
        settings=settings,
        engine=engine,
        metrics=metrics,
        executor=ThreadPoolExecutor(min(MAX_PICTURE_THREADS, usable_cores() + 1), thread_name_prefix="pictures"),
        intake=Intake(settings.queue_size, metrics),
        uploads=Intake(MAX_ADAPTER_UPLOADS, metrics),
        kept_answers=KeptAnswers(settings.idempotency_bytes, settings.idempotency_ttl),
        async_requests=_async_requests(settings, metrics),
        created=int(time.time()),
    )
    inpaint.add_routes(app)
    requests.add_routes(app)
    wire_formats.add_routes(app)
    with_metrics = settings.metrics_port is None and settings.metrics_access != "off"
    ops.add_routes(app, with_metrics=with_metrics, with_index=not settings.playground)
    if settings.playground:
        playground_page.add_routes(app)
    adapters.add_routes(app)
    if settings.docs_access != "off":
        docs.add_routes(app)
    app.add_middleware(Gate, settings=settings, keys=keys, engine=engine)
    app.add_middleware(
        AccessLog, metrics=metrics, error_form_of=wire_formats.error_form_of, tracing=tracing
    )  # The last one is the outermost.
    return app


def _async_requests(settings: Settings, metrics: Metrics) -> AsyncRequests:
    policy, secret = webhook_policy(settings), webhook_secret(settings)
    kept: KeptRequests[AsyncRequest] = KeptRequests(settings.async_bytes, settings.async_max, settings.async_ttl)
    metrics.watch_async(num_kept=lambda: kept.num_kept, num_bytes=lambda: kept.num_bytes)
    return AsyncRequests(kept, policy, None if secret is None else Deliveries(secret, metrics))


class _App(FastAPI):
    """FastAPI with a document that knows the form."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made once."""
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document(self.routes)
        return self.openapi_schema


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Workers load while the first requests already get answers (503) and health is reported."""
    state = app.state.service
    await state.engine.start()
    sweep = asyncio.create_task(_drop_expired(state))
    try:
        yield
    finally:
        sweep.cancel()
        if not state.engine.is_draining:
            await state.engine.drain(state.settings.drain_timeout)
        await state.engine.stop()
        grace_seconds = min(max(state.engine.drain_seconds_left, _MIN_GRACE_SECONDS), _MAX_GRACE_SECONDS)
        await state.async_requests.close(grace_seconds)
        state.executor.shutdown(wait=False, cancel_futures=True)


async def _drop_expired(state: ServiceState) -> None:
    """Pictures that are too old leave the memory even where no request comes."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        state.kept_answers.drop_expired()
        state.async_requests.kept.drop_expired()
