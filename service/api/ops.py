"""What operators and clients ask besides pictures: health, readiness, metrics, the served model."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import __version__
from service.api.docs import DOCS_PATH, OPENAPI_PATH
from service.api.field_types import MAX_CLIP_SKIP, MAX_IMAGES_PER_PROMPT, MAX_PROMPT_CHARACTERS, MAX_STEPS
from service.api.fields import side_bounds
from service.api.openapi import Tag, problems
from service.api.problems import PROBLEM_MEDIA_TYPE, STATUS, problem_body, problem_headers
from service.api.records import new_request_id, record_of
from service.api.schemas import (
    Health,
    ModelAdapter,
    ModelLimits,
    ModelList,
    ModelWorker,
    Readiness,
    ReadyWorker,
    ServedEmbedding,
    ServedIpAdapter,
    ServedModel,
    WorkingSize,
)
from service.api.state import ServiceState, state_of
from service.engine.engine import Engine
from service.errors import ErrorCode, InpaintError
from service.fitting import buckets
from service.messages import ModelInfo
from service.metrics import Metrics

METRICS_PATH = "/metrics"

_NO_KEY: dict[str, Any] = {"security": []}

_READY_POLL_SECONDS = 5

_DESCRIPTIONS = {
    "demo": "The bundled demo model: small, trained on drawn scenes, here to show that everything works. "
    "For photographs, serve a real checkpoint with --model.",
}


def add_routes(app: FastAPI, *, with_metrics: bool, with_index: bool) -> None:
    """Their routes.

    Args:
        app: Where to add them.
        with_metrics: Whether `/metrics` is here, and not on a port of its own.
        with_index: Whether `/` is the index, and not a page that answers it, too.
    """
    _add_get(app, "/healthz", healthz, openapi_extra=_NO_KEY, tags=[Tag.OPERATION], summary="Whether the process lives")
    _add_get(
        app,
        "/readyz",
        readyz,
        response_model=Readiness,
        openapi_extra=_NO_KEY,
        tags=[Tag.OPERATION],
        summary="Whether requests are taken now",
        responses=problems(ErrorCode.NOT_READY, ErrorCode.DRAINING),
    )
    _add_get(
        app,
        "/v1/models",
        models,
        tags=[Tag.MODELS],
        summary="The served model, its schedulers and limits",
        responses=problems(ErrorCode.NOT_READY),
    )
    if with_metrics:
        _add_get(
            app,
            METRICS_PATH,
            metrics,
            response_class=Response,
            response_model=None,
            tags=[Tag.OPERATION],
            summary="Prometheus metrics",
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
        )
    if with_index:
        _add_get(app, "/", index, include_in_schema=False)


def _add_get(app: FastAPI, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401
    """A route that takes HEAD, too, as many probes ask; documented is GET."""
    app.add_api_route(path, endpoint, **options)
    app.add_api_route(path, endpoint, **{**options, "methods": ["HEAD"], "include_in_schema": False})


async def index(request: Request) -> dict[str, str]:
    """Where to go from here."""
    has_docs = state_of(request).settings.docs_access != "off"
    return {
        "service": "inpaint-service",
        "version": __version__,
        "inpaint": "POST /v1/inpaint",
        "models": "/v1/models",
        "adapters": "/v1/adapters",
        **({"docs": DOCS_PATH, "openapi": OPENAPI_PATH} if has_docs else {}),
        "ready": "/readyz",
    }


async def healthz() -> Health:
    """200 while the process answers at all; it does no work."""
    return Health()


async def readyz(request: Request) -> Response:
    """200 when a worker takes requests, else 503; each worker's state either way."""
    engine = state_of(request).engine
    workers = [
        ReadyWorker(name=worker.name, device=worker.device, state=worker.state, restarts=worker.restarts)
        for worker in engine.workers()
    ]
    error = _why_not_ready(engine)
    if error is None:
        return JSONResponse(Readiness(status="ready", workers=workers).model_dump())
    record = record_of(request.scope)
    record.code = error.code
    body = {
        **problem_body(error, record.request_id),
        "workers": [worker.model_dump() for worker in workers],
    }
    return Response(json.dumps(body), STATUS[error.code], problem_headers(error), PROBLEM_MEDIA_TYPE)


def _why_not_ready(engine: Engine) -> InpaintError | None:
    """Not `check_room`, which counts what it refuses, and refuses also when the queue is full."""
    if engine.is_draining:
        return InpaintError(
            ErrorCode.DRAINING, "The service is shutting down.", retry_after_seconds=_READY_POLL_SECONDS
        )
    if not engine.is_ready:
        return InpaintError(ErrorCode.NOT_READY, "No worker is ready.", retry_after_seconds=_READY_POLL_SECONDS)
    return None


async def models(request: Request) -> ModelList:
    """The one served model in OpenAI's list shape, with our fields beside."""
    return ModelList(data=[await served_model(state_of(request))])


async def served_model(state: ServiceState) -> ServedModel:
    """What there is to say of the served model.

    Raises:
        InpaintError: `NOT_READY`, none has loaded yet.
    """
    model = state.model
    entries = await state.in_thread(state.engine.adapters.entries)
    return _served(state, model, [ModelAdapter(name=entry.name) for entry in entries])


def _served(state: ServiceState, model: ModelInfo, adapters: list[ModelAdapter]) -> ServedModel:
    settings = state.settings
    min_side, max_side = side_bounds(model)
    workers = [
        ModelWorker(
            name=worker.name,
            state=worker.state,
            device=worker.device,
            dtype=worker.dtype,
            max_images=worker.max_images,
            step_seconds=worker.step_seconds,
        )
        for worker in state.engine.workers()
    ]
    return ServedModel(
        id=model.id,
        created=state.created,
        owned_by=model.id.partition("/")[0] if "/" in model.id else "inpaint-service",
        kind=model.kind,
        description=_DESCRIPTIONS.get(model.kind, "A checkpoint that the operator named."),
        native_size=model.native_size,
        working_sizes=[
            WorkingSize(height=size.height, width=size.width)
            for size in buckets(model.native_size, model.size_multiple)
        ],
        schedulers=list(model.schedulers),
        default_scheduler=model.default_scheduler,
        default_steps=model.default_steps,
        timesteps_schedulers=list(model.timesteps_schedulers),
        sigmas_schedulers=list(model.sigmas_schedulers),
        prediction_type=model.prediction_type,
        unet_in_channels=model.unet_in_channels,
        embeds_guidance=model.embeds_guidance,
        embeds_width=model.embeds_width,
        max_tokens=model.max_tokens,
        latent_channels=model.latent_channels,
        latent_multiple=model.latent_multiple,
        vae=model.vae,
        attention_backend=model.attention_backend,
        embeddings=[
            ServedEmbedding(token=embedding.token, num_vectors=embedding.num_vectors) for embedding in model.embeddings
        ],
        ip_adapter=None if model.ip_adapter is None else ServedIpAdapter(**asdict(model.ip_adapter)),
        has_safety_checker=model.has_safety_checker,
        nsfw_policy=settings.nsfw_policy,
        adapters=adapters,
        limits=ModelLimits(
            max_prompt_characters=MAX_PROMPT_CHARACTERS,
            max_steps=MAX_STEPS,
            max_clip_skip=min(MAX_CLIP_SKIP, model.max_clip_skip),
            max_images_per_prompt=MAX_IMAGES_PER_PROMPT,
            min_side=min_side,
            max_side=max_side,
            side_multiple=model.size_multiple,
            max_pixels=settings.max_pixels,
            max_body_bytes=settings.max_body_bytes,
            timeout_seconds=settings.timeout,
            queue_size=settings.queue_size,
        ),
        workers=workers,
    )


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return _exposition(state_of(request).metrics)


def _exposition(source: Metrics) -> Response:
    body, content_type = source.render()
    return Response(body, headers={"Content-Type": content_type})


def metrics_app(source: Metrics) -> ASGIApp:
    """An application of `/metrics` alone, for a port of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_scrape = scope["path"] == METRICS_PATH and scope["method"] in ("GET", "HEAD")
        response = _exposition(source) if is_scrape else Response(status_code=404)
        response.headers["X-Request-Id"] = new_request_id()  # As every answer has one, though nothing is logged.
        await response(scope, receive, send)

    return app
