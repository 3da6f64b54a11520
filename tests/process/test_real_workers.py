"""The engine with real worker processes and a real (tiny) model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from service.engine.engine import WORKER_TARGET, Engine
from service.errors import ErrorCode
from service.metrics import Metrics
from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests
from tests.model.rows import Model
from tests.model.stock import Stock
from tests.process.faulty_worker import Faults
from tests.process.support import metric, num_ready, until

pytestmark = pytest.mark.timeout(300)

SCHEDULERS = ("ddim", "euler_a", "dpmpp_2m", "pndm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a 9-channel UNet."""
    return make_checkpoint(tmp_path_factory.mktemp("real-workers"))


@asynccontextmanager
async def running_engine(
    checkpoint: Path, *, num_workers: int = 2, worker_target: str = WORKER_TARGET, max_images: int = 3
) -> AsyncIterator[Engine]:
    """An engine with CPU workers, all of them ready."""
    settings = Settings(
        model=str(checkpoint), devices=("cpu",) * num_workers, cpu_threads=1, max_images=max_images, queue_size=100
    )
    engine = Engine(settings, Metrics(), worker_target=worker_target)
    await engine.start()
    try:
        await engine.wait_ready()
        await until(lambda: num_ready(engine) == num_workers)
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


def test_device_short_of_memory_and_then_lost(tmp_path: Path) -> None:
    """Out of memory: all are answered, in smaller batches from then on. A sticky CUDA error: a new worker answers."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    faults = Faults(checkpoint)
    model = Model(NATIVE_SIZE, width=32, loras={}, scheduler="ddim")
    requests = [model.request(seed=seed, num_inference_steps=4 + seed) for seed in range(6)]

    async def paint_all(engine: Engine) -> list[InpaintResult]:
        tasks = [asyncio.create_task(paint(engine, index, one)) for index, one in enumerate(requests)]
        return await asyncio.wait_for(asyncio.gather(*tasks), 240)

    async def scenario() -> list[list[InpaintResult]]:
        target = "tests.process.faulty_worker:run"
        async with running_engine(checkpoint, num_workers=1, worker_target=target, max_images=8) as engine:
            (before,) = engine.workers()
            assert before.max_images == 8
            faults.short_of_memory.touch()
            short = await paint_all(engine)
            (after,) = engine.workers()
            assert (after.pid, after.restarts) == (before.pid, 0)
            # What operators see, and what the next requests get.
            assert after.max_images is not None
            assert 1 <= after.max_images <= 4
            assert metric(engine, 'inpaint_max_images{worker="0"}') == after.max_images

            faults.lost.touch()
            lost = await paint_all(engine)
            (replaced,) = engine.workers()
            assert replaced.restarts == 1
            assert replaced.pid != before.pid
            assert all(metric(engine, f'inpaint_failed_total{{reason="{code}"}}') == 0 for code in ErrorCode)
            return [short, lost]

    short, lost = asyncio.run(scenario())
    assert_equal_to_stock(checkpoint, requests + requests, short + lost)
