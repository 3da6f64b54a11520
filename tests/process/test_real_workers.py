"""The engine with real worker processes and a real (tiny) model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from service.engine.engine import Engine
from service.metrics import Metrics
from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests
from tests.model.stock import Stock
from tests.process.support import num_ready, until

pytestmark = pytest.mark.timeout(300)

SCHEDULERS = ("ddim", "euler_a", "dpmpp_2m", "pndm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a 9-channel UNet."""
    return make_checkpoint(tmp_path_factory.mktemp("real-workers"))


@asynccontextmanager
async def running_engine(checkpoint: Path) -> AsyncIterator[Engine]:
    """An engine with two CPU workers, ready both."""
    settings = Settings(model=str(checkpoint), devices=("cpu", "cpu"), cpu_threads=1, max_images=3, queue_size=100)
    engine = Engine(settings, Metrics())
    await engine.start()
    try:
        await engine.wait_ready()
        await until(lambda: num_ready(engine) == 2)
        yield engine
    finally:
        await engine.stop()


async def paint(engine: Engine, index: int, request: InpaintRequest) -> InpaintResult:
    handle = engine.submit(request.params, request.image, request.mask, request_id=f"request-{index}")
    return await handle.result()


def assert_equal_to_stock(checkpoint: Path, requests: list[InpaintRequest], results: list[InpaintResult]) -> None:
    stock = Stock(checkpoint)
    for request, result in zip(requests, results, strict=True):
        expected, flags = stock(request)
        assert result.nsfw == tuple(flags)
        assert np.abs(result.images.astype(int) - expected.astype(int)).max() <= 1, request.params


def test_two_workers_share_the_work_and_one_may_be_killed(checkpoint: Path) -> None:
    """`devices=cpu,cpu`: both work; kill -9 of one mid-batch costs no request its answer, nor its picture."""

    async def scenario() -> list[InpaintResult]:
        async with running_engine(checkpoint) as engine:
            tasks = [asyncio.create_task(paint(engine, index, one)) for index, one in enumerate(requests)]
            await until(lambda: all(worker.num_running_images for worker in engine.workers()))
            victim = engine.workers()[0].pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            results = await asyncio.wait_for(asyncio.gather(*tasks), 240)
            await until(lambda: [worker.restarts for worker in engine.workers()] == [1, 0])  # It starts after a pause.
            return results

    requests = mixed_requests(SCHEDULERS, 16, NATIVE_SIZE, seed=1)
    assert_equal_to_stock(checkpoint, requests, asyncio.run(scenario()))
