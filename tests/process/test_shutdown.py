"""The end of an engine, wanted or not."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from service.errors import ErrorCode, InpaintError
from tests.process.support import Gate, Run, code_of, first_step, num_ready, running, until


def test_drain_answers_what_was_accepted(run: Run, gate: Gate) -> None:
    """SIGTERM under load: new work 503, accepted work answered, queued work too, workers exit by themselves."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as client:
            pid = client.engine.workers()[0].pid
            handles = [client.submit(number, "hold") for number in range(5)]
            drain = asyncio.create_task(client.engine.drain(30))
            await until(lambda: client.engine.is_draining)
            with pytest.raises(InpaintError) as refused:
                client.engine.check_room()
            assert refused.value.code == ErrorCode.DRAINING
            assert refused.value.retry_after_seconds >= 1
            assert not client.engine.is_ready
            gate.open()
            await asyncio.gather(*map(client.assert_right, handles))
            assert await drain
            assert not psutil.pid_exists(pid)
            assert client.engine.workers()[0].state == "stopped"

    run(main)


def test_drain_survives_a_kill(run: Run, gate: Gate) -> None:
    """A worker lost while draining is started again for the work that was accepted."""

    async def main() -> None:
        async with running({"gate": gate}) as client:
            handle = client.submit(1, "hold")
            await first_step(handle)
            drain = asyncio.create_task(client.engine.drain(30))
            await until(lambda: client.engine.is_draining)
            os.kill(client.engine.workers()[0].pid, signal.SIGKILL)
            gate.open()
            await client.assert_right(handle)
            assert await drain

    run(main)


def test_drain_time_is_bounded(run: Run, gate: Gate) -> None:
    """What cannot be answered within the drain time gets a definite answer, and the workers go."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as client:
            pid = client.engine.workers()[0].pid
            handles = [client.submit(number, "hold") for number in range(4)]
            await first_step(handles[0])
            assert not await client.engine.drain(0.2)
            assert await asyncio.gather(*map(code_of, handles)) == [ErrorCode.DRAINING] * 4
            assert not psutil.pid_exists(pid)

    run(main)


def test_stop_during_drain(run: Run, gate: Gate) -> None:
    """A second signal ends a drain at once, and the drain says that not all was answered."""

    async def main() -> None:
        async with running({"gate": gate}) as client:
            handle = client.submit(1, "hold")
            drain = asyncio.create_task(client.engine.drain(1000))
            await first_step(handle)
            await client.engine.stop()
            assert await code_of(handle) == ErrorCode.DRAINING
            assert not await drain

    run(main)


def test_stop_while_loading(run: Run) -> None:
    """A worker that still loads does not hold up the end."""

    async def main() -> None:
        async with running({"load_forever": 1}, wait_for=0) as client:
            await until(lambda: client.engine.workers()[0].state == "loading: loading the model")
            assert await client.engine.drain(1000)

    run(main)


def test_stop_leaves_nothing(run: Run, gate: Gate) -> None:
    """After stop no process, thread or descriptor is left, also not of workers that were lost."""

    def census() -> tuple[list[psutil.Process], list[str], int]:
        threads = sorted(thread.name for thread in threading.enumerate())
        return psutil.Process().children(recursive=True), threads, psutil.Process().num_fds()

    async def main() -> None:
        async with running():
            pass  # Starts the one process that multiprocessing keeps, its resource tracker.
        before = census()
        async with running({"gate": gate}, devices=("cpu", "cpu")) as client:
            handles = [client.submit(number, "hold") for number in range(9)]
            await asyncio.gather(*map(first_step, handles[:8]))
            os.kill(client.engine.workers()[0].pid, signal.SIGKILL)
            await until(lambda: client.engine.workers()[0].restarts == 1)
            await until(lambda: num_ready(client.engine) == 2)
            assert census() != before
            await client.engine.stop()
            await client.engine.stop()
            assert await asyncio.gather(*map(code_of, handles)) == [ErrorCode.DRAINING] * 9
        assert census() == before

    run(main)


ABANDONED = """
import asyncio
from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import Settings

async def main():
    engine = Engine(Settings(model="MODEL", devices=("cpu", "cpu")), Metrics(), worker_target="tests.fake_worker:run")
    await engine.start()
    while not all(worker.state.startswith("STATE") for worker in engine.workers()):
        await asyncio.sleep(0.01)
    print(*(worker.pid for worker in engine.workers()), flush=True)
    END

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("model", "state", "end"),
    [
        ("fake", "ready", "await asyncio.sleep(60)"),
        ("fake?load_forever=1", "loading: loading", "await asyncio.sleep(60)"),
        ("fake?load_forever=1", "loading: loading", "raise SystemExit"),
    ],
    ids=["killed", "killed-loading", "exits-loading"],
)
def test_workers_do_not_outlive_their_parent(tmp_path: Path, model: str, state: str, end: str) -> None:
    """When the API process is killed, or ends without stopping its engine, no worker is left behind."""
    script = tmp_path / "abandon.py"
    script.write_text(ABANDONED.replace("MODEL", model).replace("STATE", state).replace("END", end))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], cwd=root, env=environment, stdout=subprocess.PIPE) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        if "sleep" in end:
            parent.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        parent.kill()
    assert len(workers) == 2
    assert alive == []
