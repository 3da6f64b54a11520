"""This service with a look inside, and on request with leaks: `python -m benchmarks.soak_server [--leak] serve …`.

Application and engine are the service's own. Beside them there is one more route, which
counts the event loop's tasks. With `--leak` every request that paints, or tries to,
leaves something behind for ever: what watches the service must find that.
"""

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.peers.wire import PATH
from service import cli
from service.api import server
from service.api.app import create_app
from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import Settings
from service.spans import Tracing

INSIDE_PATH = "/inside"
LEAK_FLAG = "--leak"
LEAKED_BYTES = 64 * 1024


class Leaks:
    """Middleware that leaks memory, a descriptor and a task for each request of the endpoint.

    Args:
        app: What to wrap.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._kept: list[tuple[bytearray, BinaryIO, asyncio.Task[bool]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leak, and pass on."""
        if scope["type"] == "http" and scope["path"] == PATH:
            memory = bytearray(b"\1") * LEAKED_BYTES  # Written to, or it would take up no memory.
            task = asyncio.create_task(asyncio.Event().wait())
            self._kept.append((memory, Path("/dev/null").open("rb"), task))  # noqa: ASYNC230, SIM115 - it is a leak
        await self._app(scope, receive, send)


def inside() -> dict[str, Any]:
    """What psutil cannot see, once garbage is collected: only what is still held counts as a leak."""
    gc.collect()
    return {"tasks": len(asyncio.all_tasks(asyncio.get_running_loop()))}


async def _inside() -> dict[str, Any]:
    return inside()


def main(arguments: list[str]) -> int:
    """Serve as `inpaint-service` would."""
    is_leaking = LEAK_FLAG in arguments

    def create(settings: Settings, engine: Engine, metrics: Metrics, tracing: Tracing) -> FastAPI:
        app = create_app(settings, engine, metrics, tracing)
        app.add_api_route(INSIDE_PATH, _inside)
        if is_leaking:
            app.add_middleware(Leaks)
        return app

    server.create_app = create
    return cli.main([argument for argument in arguments if argument != LEAK_FLAG])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
