"""Asking workers about LoRAs, over their whole lives."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.errors import ErrorCode, InpaintError
from service.messages import LoraInfo
from tests.process.support import Client, Gate, Run, first_step, num_ready, running, until


def lora(path: Path, **words: str) -> Path:
    """A LoRA with these words in its metadata."""
    path /= "lora.safetensors"
    tensors = {"unet.a": np.zeros((4, 2), np.float32), "text_encoder.a": np.zeros((8, 2), np.float32)}
    save_file({**tensors, "unet.b": np.zeros((2, 2), np.float32)}, path, words or None)
    return path


async def code_of(client: Client, path: Path) -> ErrorCode:
    """What an inspection fails with."""
    with pytest.raises(InpaintError) as error:
        await client.engine.inspect_lora(path)
    return error.value.code


def test_worker_says_what_it_is(run: Run, tmp_path: Path, gate: Gate) -> None:
    """A ready worker answers, also while it paints, and each caller hears of its own file."""

    async def main() -> None:
        async with running({"gate": gate}) as client:
            handle = client.submit(1, "hold")
            await first_step(handle)
            (tmp_path / "bad").mkdir()
            good, refused = await asyncio.gather(
                client.engine.inspect_lora(lora(tmp_path)),
                client.engine.inspect_lora(lora(tmp_path / "bad", refuse="1")),
                return_exceptions=True,
            )
            assert good == LoraInfo(rank=8, num_unet_layers=2, num_text_encoder_layers=1)
            assert isinstance(refused, InpaintError)
            assert (refused.code, refused.field) == (ErrorCode.INVALID_LORA, "adapter")
            assert refused.message == "The LoRA is for another model."
            gate.open()
            await client.assert_right(handle)

    run(main)


def test_worker_that_dies_of_it_is_not_the_last_to_be_asked(run: Run, tmp_path: Path) -> None:
    """When the worker is lost over a file, another one is asked."""

    async def main() -> None:
        async with running(devices=("cpu", "cpu")) as client:
            info = await client.engine.inspect_lora(lora(tmp_path, crash=str(tmp_path / "crashed")))
            assert info.rank == 8
            assert (tmp_path / "crashed").exists()

    run(main)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_file_that_kills_workers_is_given_up(run: Run, tmp_path: Path, num_workers: int) -> None:
    """A file costs two workers at most; requests in them are painted all the same."""

    async def main() -> None:
        async with running({"step_seconds": 0.02}, devices=("cpu",) * num_workers) as client:
            handles = [client.submit(number) for number in range(4)]
            assert await code_of(client, lora(tmp_path, crash="")) == ErrorCode.WORKER_LOST
            await asyncio.gather(*map(client.assert_right, handles))
            await until(lambda: num_ready(client.engine) == num_workers)
            restarts = sum(worker.restarts for worker in client.engine.workers())
            assert restarts == min(num_workers, 2)

    run(main)


def test_killed_while_it_looks(run: Run, tmp_path: Path) -> None:
    """Kill -9 of the worker that was asked counts as its loss."""

    async def main() -> None:
        async with running(devices=("cpu", "cpu")) as client:
            inspection = asyncio.create_task(code_of(client, lora(tmp_path, hang="1")))
            for _ in range(2):
                await until(lambda: bool(client.engine._inspections._pending))
                (pending,) = client.engine._inspections._pending.values()
                assert pending.worker.pid is not None
                os.kill(pending.worker.pid, signal.SIGKILL)
                await until(lambda pending=pending: pending.answer.done())
                await asyncio.sleep(0)
            assert await inspection == ErrorCode.WORKER_LOST
            assert client.engine._inspections._pending == {}

    run(main)


def test_worker_that_never_answers(run: Run, tmp_path: Path) -> None:
    """An inspection ends with the time that any request has; the answer that comes too late is dropped."""

    async def main() -> None:
        async with running({"gate": tmp_path / "gate"}, timeout=0.3) as client:
            assert await code_of(client, lora(tmp_path, hold="1")) == ErrorCode.DEADLINE
            (tmp_path / "gate").touch()
            assert (await client.engine.inspect_lora(lora(tmp_path))).rank == 8

    run(main)


def test_nobody_to_ask(run: Run, tmp_path: Path, gate: Gate) -> None:
    """Before a worker is ready, and once the service drains, inspections are refused like requests."""

    async def main() -> None:
        async with running({"startup_gate": gate}, wait_for=0) as client:
            assert await code_of(client, lora(tmp_path)) == ErrorCode.NOT_READY
            gate.open()
            await client.engine.wait_ready()
            await client.engine.drain(5.0)
            assert await code_of(client, lora(tmp_path)) == ErrorCode.DRAINING

    run(main)


def test_stop_answers_who_waits(run: Run, tmp_path: Path) -> None:
    """When the service ends at once, nobody waits for ever."""

    async def main() -> None:
        async with running() as client:
            inspection = asyncio.create_task(code_of(client, lora(tmp_path, hang="1")))
            await until(lambda: bool(client.engine._inspections._pending))
            await client.engine.stop()
            assert await inspection == ErrorCode.WORKER_LOST

    run(main)


def test_drain_lets_an_inspection_end(run: Run, tmp_path: Path, gate: Gate) -> None:
    """What was asked before the service drains is answered."""

    async def main() -> None:
        async with running({"gate": gate}) as client:
            inspection = asyncio.create_task(client.engine.inspect_lora(lora(tmp_path, hold="1")))
            await until(lambda: bool(client.engine._inspections._pending))
            draining = asyncio.create_task(client.engine.drain(20.0))
            await until(lambda: client.engine.is_draining)
            gate.open()
            assert (await inspection).rank == 8
            assert await draining is True

    run(main)
