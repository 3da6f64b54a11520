"""An engine with fake workers, for one test."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

from service.engine import clients
from service.engine.engine import Engine, Handle
from service.errors import ErrorCode, InpaintError
from service.messages import StepProgress
from service.metrics import Metrics
from service.request import InpaintParams, InpaintRequest
from service.settings import Settings
from tests.fake_worker import paint

PARAMS = InpaintParams(
    prompt="a tree",
    negative_prompt="",
    num_inference_steps=4,
    guidance_scale=7.5,
    strength=1.0,
    num_images_per_prompt=1,
    seed=0,
    scheduler="ddim",
    eta=0.0,
    clip_skip=0,
    height=64,
    width=64,
)

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Gate:
    """The file that lets go of requests with "hold" in their prompt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        """Let go."""
        self.path.touch()


class Client:
    """Submits numbered requests to an engine and knows the right answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def submit(
        self,
        number: int = 0,
        prompt: str = "a tree",
        timeout_seconds: float | None = None,
        *,
        client: clients.Client = clients.ANONYMOUS,
        **changes: Any,
    ) -> Handle:
        """Submit a request whose picture, mask and seed are those of `number`."""
        params = dataclasses.replace(PARAMS, prompt=prompt, seed=number, **changes)
        image, mask = pixels(number)
        return self.engine.submit(
            params,
            image,
            mask,
            timeout_seconds=timeout_seconds,
            request_id=f"request-{number}",
            client=client,
        )

    @staticmethod
    async def assert_right(handle: Handle) -> None:
        """The answer must be this very request's picture."""
        result = await handle.result()
        request = handle.request
        np.testing.assert_array_equal(result.images, paint(request.params, request.image, request.mask))


def pixels(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and a mask of their own for each number."""
    random = np.random.default_rng(number)
    image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = (random.random((64, 64)) < 0.5).astype(np.uint8) * 255
    return image, mask


_PIXELS = pixels(0)


@asynccontextmanager
async def running(
    model: dict[str, object] | None = None, *, wait_for: int | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """A started engine; with `wait_for` workers ready, by default all."""
    defaults = {"devices": ("cpu",), "model": f"fake?{urlencode(model or {})}"}
    engine = Engine(Settings(**(defaults | settings)), Metrics(), worker_target="tests.fake_worker:run")
    await engine.start()
    try:
        expected = len(engine.workers()) if wait_for is None else wait_for
        await until(lambda: num_ready(engine) >= expected)
        yield Client(engine)
    finally:
        await engine.stop()


def num_ready(engine: Engine) -> int:
    """Workers that take requests."""
    return sum(worker.state == "ready" for worker in engine.workers())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that sends no event."""
    while not condition():  # noqa: ASYNC110 - what is waited for is a state of other processes
        await asyncio.sleep(0.01)


async def first_step(handle: Handle) -> StepProgress:
    """Wait until the request is in a batch."""
    return await anext(handle.progress())


def metric(engine: Engine, line_start: str) -> float:
    """The value of the series whose line starts so."""
    lines = engine._metrics.render()[0].decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(line_start)), 0.0)


async def code_of(handle: Handle) -> ErrorCode:
    """The code of the error that a request ends in."""
    with pytest.raises(InpaintError) as caught:
        await handle.result()
    return caught.value.code


class Admitted(Handle):
    """A request for tests of pure code: one without an event loop, and so without an outcome."""

    def __init__(
        self,
        key: str,
        num_images: int = 1,
        *,
        age_seconds: float = 0.0,
        num_losses: int = 0,
        client: clients.Client = clients.ANONYMOUS,
    ) -> None:
        admitted_at = time.monotonic() - age_seconds
        params = dataclasses.replace(PARAMS, num_images_per_prompt=num_images)
        self.key = self.request_id = key
        self.request = InpaintRequest(params, *_PIXELS, admitted_at=admitted_at, deadline=admitted_at + 60)
        self.num_losses = num_losses
        self.client = client

    def __repr__(self) -> str:
        return self.key
