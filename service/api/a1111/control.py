"""`progress`, `interrupt` and `skip`: of a client's own `img2img` requests, and of no others."""

import base64
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from service.api.a1111.errors import documented
from service.api.a1111.runs import Run, runs_of
from service.api.a1111.schemas import A1111Progress, A1111State
from service.api.painting import preview
from service.api.records import record_of
from service.errors import ErrorCode

_JOB = "scripts_img2img"


def add_routes(add_route: Callable[..., None]) -> None:
    """Their routes."""
    add_route(
        "/sdapi/v1/progress",
        progress,
        summary="How far the client's oldest running img2img request has come",
        responses=documented(ErrorCode.INVALID_FIELD),
    )
    for path, summary in (("interrupt", "Interrupt"), ("skip", "Interrupt, as there is but one batch to skip,")):
        add_route(
            f"/sdapi/v1/{path}",
            interrupt,
            methods=["POST"],
            name=f"a1111_{path}",
            summary=f"{summary} the client's own img2img requests",
            responses=documented(
                ErrorCode.CROSS_ORIGIN,
                ErrorCode.BODY_TOO_LARGE,
                ErrorCode.UNSUPPORTED_MEDIA,
                ErrorCode.NOT_READY,
                ErrorCode.DRAINING,
            ),
        )


async def progress(request: Request, *, skip_current_image: bool = False) -> A1111Progress:
    """The oldest of the requests that came with the same API key; nothing runs where there is none."""
    runs = runs_of(request).of(record_of(request.scope).client)
    if not runs:
        return A1111Progress(state=A1111State())
    run = runs[0]
    latest = run.admitted.handle.latest
    return A1111Progress(
        progress=run.progress,
        eta_relative=run.eta_seconds,
        state=A1111State(
            interrupted=run.is_interrupted,
            job=_JOB,
            job_count=1,
            job_timestamp=run.job_timestamp,
            sampling_step=0 if latest is None else latest.step,
            sampling_steps=0 if latest is None else latest.steps,
        ),
        current_image=None if skip_current_image else await _current_image(run),
    )


async def interrupt(request: Request) -> dict[str, Any]:
    """Those that came with the same API key leave the batch at the next step, and are answered without pictures."""
    for run in runs_of(request).of(record_of(request.scope).client):
        run.interrupt()
    return {}


async def _current_image(run: Run) -> str | None:
    """The latest preview, which has passed the safety checker."""
    latest = run.admitted.handle.latest
    if latest is None or latest.preview is None:
        return None
    return base64.b64encode(await preview(run.admitted, latest.preview)).decode("ascii")
