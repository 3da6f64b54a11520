"""What the web UI's clients ask when they connect: models, samplers, settings, and much that there is not."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.a1111.errors import documented
from service.api.a1111.options import options, setting_faults
from service.api.a1111.samplers import SCHEDULE_TYPES, available_samplers
from service.api.a1111.schemas import (
    A1111Embedding,
    A1111Embeddings,
    A1111Flags,
    A1111Lora,
    A1111Memory,
    A1111Model,
    A1111Sampler,
    A1111Scheduler,
    A1111Scripts,
    A1111Upscaler,
)
from service.api.json_body import JSON_MEDIA_TYPE, parse_json_object, read_json_body
from service.api.problems import InvalidRequest
from service.api.state import state_of
from service.engine.adapters import SUFFIX
from service.errors import ErrorCode

_BASE = "/sdapi/v1"

EMPTY_LISTS = (
    "extensions",
    "face-restorers",
    "hypernetworks",
    "latent-upscale-modes",
    "prompt-styles",
    "realesrgan-models",
    "script-info",
    "sd-vae",
)

REFRESHES = ("refresh-checkpoints", "refresh-embeddings", "refresh-loras", "refresh-vae")
"""What is new in a folder is found without being asked to; other things are what they were at the start."""

_UNAVAILABLE = {"error": "unavailable"}

_WRITE_CODES = (
    ErrorCode.CROSS_ORIGIN,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.UNSUPPORTED_MEDIA,
    ErrorCode.NOT_READY,
    ErrorCode.DRAINING,
)


def add_routes(add_route: Callable[..., None]) -> None:
    """Their routes."""
    about_model = documented(ErrorCode.NOT_READY)
    add_route(f"{_BASE}/samplers", samplers, summary="Samplers", responses=about_model)
    add_route(f"{_BASE}/schedulers", schedulers, summary="Schedule types", responses=about_model)
    add_route(f"{_BASE}/sd-models", sd_models, summary="The served model", responses=about_model)
    add_route(f"{_BASE}/embeddings", embeddings, summary="Textual inversions", responses=about_model)
    add_route(f"{_BASE}/options", get_options, summary="Settings", responses=about_model)
    add_route(f"{_BASE}/loras", loras, summary="LoRAs that a prompt can name", responses=documented())
    add_route(f"{_BASE}/upscalers", upscalers, summary="There are none", responses=documented())
    add_route(f"{_BASE}/scripts", scripts, summary="There are none", responses=documented())
    add_route(f"{_BASE}/cmd-flags", cmd_flags, summary="Flags", responses=documented())
    add_route(f"{_BASE}/memory", memory, summary="Memory, which is not told", responses=documented())
    for path in EMPTY_LISTS:
        add_route(f"{_BASE}/{path}", nothing, name=f"a1111_{path}", summary="There are none", responses=documented())
    for path in REFRESHES:
        add_route(
            f"{_BASE}/{path}",
            refresh,
            methods=["POST"],
            name=f"a1111_{path}",
            summary="Nothing to do",
            responses=documented(*_WRITE_CODES),
        )
    add_route(
        f"{_BASE}/options",
        set_options,
        methods=["POST"],
        response_model=None,
        summary="Set what is so already; anything else is refused",
        openapi_extra={"requestBody": {"required": True, "content": {JSON_MEDIA_TYPE: {"schema": {"type": "object"}}}}},
        responses=documented(*_WRITE_CODES, ErrorCode.REQUEST_TIMEOUT, ErrorCode.INVALID_FIELD),
    )


async def samplers(request: Request) -> list[A1111Sampler]:
    """Those that the served model can be run with; an option names the schedule that is automatic."""
    return [
        A1111Sampler(
            name=sampler.name,
            aliases=list(sampler.aliases),
            options={"scheduler": sampler.automatic} if sampler.has_schedules else {},
        )
        for sampler in available_samplers(state_of(request).model.schedulers)
    ]


async def schedulers(request: Request) -> list[A1111Scheduler]:
    """Not every sampler goes with each."""
    names = state_of(request).model.schedulers
    return [
        A1111Scheduler(name=one.name, label=one.label)
        for one in SCHEDULE_TYPES
        if one.name in ("automatic", "uniform") or any(name.endswith(f"_{one.name}") for name in names)
    ]


async def sd_models(request: Request) -> list[A1111Model]:
    """The one that is served."""
    name = state_of(request).model.id
    return [A1111Model(title=name, model_name=name, filename=name)]


async def embeddings(request: Request) -> A1111Embeddings:
    """Those that were loaded at start."""
    model = state_of(request).model
    return A1111Embeddings(
        loaded={
            one.token: A1111Embedding(shape=model.embeds_width, vectors=one.num_vectors) for one in model.embeddings
        }
    )


async def get_options(request: Request) -> dict[str, Any]:
    """Every setting that has a meaning here, as it is."""
    return options(state_of(request).model)


async def set_options(request: Request) -> Response:
    """A service that many share has no settings that one of them could change."""
    state = state_of(request)
    body = await read_json_body(request.headers.get("Content-Type", ""), request.stream())
    settings = await state.in_thread(lambda: parse_json_object(body))
    faults = tuple(setting_faults(settings, state.model))
    if faults:
        raise InvalidRequest(faults)
    return JSONResponse(None)


async def loras(request: Request) -> list[A1111Lora]:
    """Those that a prompt can name."""
    state = state_of(request)
    entries = await state.in_thread(state.engine.adapters.entries)
    return [A1111Lora(name=entry.name, alias=entry.name, path=f"{entry.name}{SUFFIX}") for entry in entries]


async def upscalers() -> list[A1111Upscaler]:
    """None."""
    return [A1111Upscaler()]


async def scripts() -> A1111Scripts:
    """None."""
    return A1111Scripts()


async def cmd_flags() -> A1111Flags:
    """That there is an API and no page."""
    return A1111Flags()


async def memory() -> A1111Memory:
    """Not told here: `/metrics` has the memory of every worker's device."""
    return A1111Memory(ram=_UNAVAILABLE, cuda=_UNAVAILABLE)


async def nothing() -> list[dict[str, Any]]:
    """None."""
    return []


async def refresh() -> None:
    """What is new is found without it."""
