"""The HTTP side of a peer in one process: a thread of its own, while the model has the main thread.

CUDA graphs of `torch.compile` belong to the thread that imported the compiler, and a thread pool's
are any: only the main thread is always the right one.
"""

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.peers import wire
from benchmarks.peers.wire import FormError, PeerRequest
from service.request import Pixels


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request, and where its (H, W, 3) picture is due."""

    request: PeerRequest
    picture: "Future[Pixels]" = field(default_factory=Future)


class Inbox:
    """Requests that wait for the model, in the order of their arrival."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Waiting] = queue.SimpleQueue()

    async def ask(self, request: PeerRequest) -> Pixels:
        """Have a request painted."""
        waiting = Waiting(request)
        self._waiting.put(waiting)
        return await asyncio.wrap_future(waiting.picture)

    def take(self, most: int = 1, window_seconds: float = 0.0) -> list[Waiting]:
        """The requests of the next batch; waits for the first.

        Args:
            most: Of these a batch is full.
            window_seconds: How long the first one waits for others.
        """
        taken = [self._waiting.get()]
        closes_at = time.monotonic() + window_seconds
        while len(taken) < most:
            try:
                taken.append(self._waiting.get(timeout=max(0.0, closes_at - time.monotonic())))
            except queue.Empty:
                break
        return taken


def create_app(inbox: Inbox) -> FastAPI:
    """The peer's two routes. Pictures are decoded and encoded in threads, beside the model."""
    app = FastAPI()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post(wire.PATH)
    async def inpaint(request: Request) -> Response:
        form = await request.form()
        try:
            asked = await asyncio.to_thread(wire.read_form, form)
        except FormError as error:
            return Response(str(error), status_code=422)
        pixels = await inbox.ask(asked)
        return Response(await asyncio.to_thread(wire.encode, pixels), media_type=wire.MEDIA_TYPE)

    return app


def open_front(port: int) -> Inbox:
    """Listen on 127.0.0.1 from now on: call it when the model is loaded and warm, so that an answer means readiness."""
    inbox = Inbox()
    config = uvicorn.Config(create_app(inbox), host="127.0.0.1", port=port, log_level="warning")
    threading.Thread(target=uvicorn.Server(config).run, name="http", daemon=True).start()
    return inbox
