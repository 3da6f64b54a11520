"""Worker processes that die, hang or never come up."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from service.engine.engine import Engine
from service.errors import ErrorCode, InpaintError, StartupError
from service.metrics import Metrics
from service.settings import Settings
from tests.process.support import Client, Gate, Run, code_of, first_step, metric, num_ready, running, until


def kill(engine: Engine, index: int = 0, number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to a worker; returns the pid it had."""
    pid = engine.workers()[index].pid
    assert pid is not None
    os.kill(pid, number)
    return pid


def test_kill_of_one_of_two_workers_costs_no_answer(run: Run, gate: Gate) -> None:
    """Kill -9 of a worker mid-batch: its requests are run again, each is answered with its own picture."""

    async def main() -> None:
        async with running({"gate": gate}, devices=("cpu", "cpu")) as client:
            handles = [client.submit(number, "hold") for number in range(10)]
            waiting = [client.submit(number) for number in range(10, 14)]
            await asyncio.gather(*map(first_step, handles[:8]))
            kill(client.engine)
            await until(lambda: num_ready(client.engine) == 1)
            assert client.engine.is_ready
            assert metric(client.engine, 'inpaint_worker_up{worker="0"}') == 0
            gate.open()
            await asyncio.gather(*map(client.assert_right, handles + waiting))
            await until(lambda: num_ready(client.engine) == 2)
            assert [worker.restarts for worker in client.engine.workers()] == [1, 0]
            assert metric(client.engine, 'inpaint_worker_restarts_total{worker="0"}') == 1
            assert metric(client.engine, 'inpaint_worker_up{worker="0"}') == 1

    run(main)


def test_kill_of_the_only_worker(run: Run, gate: Gate) -> None:
    """Kill -9 of all workers: unready, new work refused with Retry-After, admitted work waits and is answered."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as client:
            handles = [client.submit(number, "hold") for number in range(4)]
            await first_step(handles[0])
            pid = kill(client.engine)
            await until(lambda: not client.engine.is_ready)
            with pytest.raises(InpaintError) as refused:
                client.engine.check_room()
            assert refused.value.code == ErrorCode.NOT_READY
            assert refused.value.retry_after_seconds >= 1
            # What it had is at the head of the queue, in order.
            assert [handle.position for handle in handles] == [0, 1, 2, 3]
            gate.open()
            await asyncio.gather(*map(client.assert_right, handles))
            assert client.engine.workers()[0].pid not in {None, pid}

    run(main)


def test_deadline_holds_while_no_worker_lives(run: Run, tmp_path: Path, gate: Gate) -> None:
    """A request that waits for a worker to come back is answered at its deadline."""

    async def main() -> None:
        model = {"gate": gate, "starts": tmp_path / "starts", "die_from_start": 2}
        async with running(model) as client:
            handle = client.submit(1, "hold", timeout_seconds=1)
            await first_step(handle)
            kill(client.engine)
            assert await code_of(handle) == ErrorCode.DEADLINE

    run(main)


def test_request_lost_twice_is_given_up(run: Run) -> None:
    """A request that kills its worker twice is answered 503 worker_lost; its neighbours still succeed."""

    async def main() -> None:
        async with running({"step_seconds": 0.01}) as client:
            prompts = ["a", "b", "crash", "c"]
            handles = [client.submit(number, prompt) for number, prompt in enumerate(prompts)]
            crashing = handles.pop(2)
            assert await code_of(crashing) == ErrorCode.WORKER_LOST
            await asyncio.gather(*map(client.assert_right, handles))
            assert client.engine.workers()[0].restarts in {1, 2}
            assert metric(client.engine, 'inpaint_failed_total{reason="worker_lost"}') == 1

    run(main)


def test_worker_that_fails_and_does_not_exit_is_replaced_at_once(run: Run) -> None:
    """A process that a hanging device keeps from ending: nobody waits for the watchdog."""

    async def main() -> None:
        async with running({"step_seconds": 0.01}, hang_timeout=3600) as client:
            lingering, neighbour = client.submit(1, "linger"), client.submit(2)
            assert await code_of(lingering) == ErrorCode.WORKER_LOST
            await client.assert_right(neighbour)

    run(main)


def test_cancelled_request_is_not_run_again(run: Run, gate: Gate) -> None:
    """A request that was given up before its worker died is gone for good."""

    async def main() -> None:
        async with running({"gate": gate}) as client:
            handle = client.submit(1, "hang")
            await first_step(handle)
            handle.cancel("disconnect")
            kill(client.engine)
            await until(lambda: not client.engine.is_ready)
            await until(lambda: client.engine.is_ready)
            assert await code_of(handle) == ErrorCode.CANCELLED
            assert client.engine.workers()[0].num_in_flight == 0

    run(main)


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_stopped_worker_is_replaced(run: Run, gate: Gate, is_busy: bool) -> None:
    """Hang: unready at the watchdog's limit, worker replaced, requests answered."""

    async def main() -> None:
        async with running({"gate": gate}, hang_timeout=2.0) as client:
            handles = [client.submit(number, "hold") for number in range(2 * is_busy)]
            await asyncio.gather(*map(first_step, handles))
            pid = kill(client.engine, number=signal.SIGSTOP)
            await until(lambda: not client.engine.is_ready)
            await until(lambda: client.engine.is_ready)
            assert client.engine.workers()[0].pid != pid
            gate.open()
            await asyncio.gather(*map(client.assert_right, [*handles, client.submit(9)]))

    run(main)


def test_healthy_worker_is_left_alone(run: Run) -> None:
    """A worker that answers its pings, idle or with a request that takes long, is not replaced."""

    async def main() -> None:
        async with running({"step_seconds": 0.01}, hang_timeout=1.5) as client:
            pid = client.engine.workers()[0].pid
            await client.assert_right(client.submit(1, num_inference_steps=80))
            await asyncio.sleep(2.0)  # Nothing may happen in this time, so no event can end it.
            assert client.engine.workers()[0].pid == pid

    run(main)


def test_flood_into_a_stopped_worker_blocks_nobody(run: Run) -> None:
    """A pipe that nobody reads does not block the event loop, and the worker can still be replaced."""

    async def main() -> None:
        async with running({"max_images": 1}, hang_timeout=2.0) as client:
            kill(client.engine, number=signal.SIGSTOP)
            # One request of 1 MB: far more than a pipe holds.
            handle = client.submit(1, num_images_per_prompt=1)
            big = client.engine.submit(
                handle.request.params,
                handle.request.image.repeat(8, 0).repeat(8, 1),
                handle.request.mask.repeat(8, 0).repeat(8, 1),
                request_id="big",
            )
            await until(lambda: not client.engine.is_ready)
            await asyncio.gather(*map(client.assert_right, [handle, big]))

    run(main)


def test_crash_loop_backs_off(run: Run, tmp_path: Path) -> None:
    """Crash loop: unready, growing pauses, no spin, and no end of the service once it was ready."""

    async def main() -> None:
        starts = tmp_path / "starts"
        async with running({"starts": starts, "die_from_start": 2}) as client:
            loop = asyncio.get_running_loop()
            kill(client.engine)
            await until(lambda: client.engine.workers()[0].restarts == 1)
            first = loop.time()
            await until(lambda: client.engine.workers()[0].restarts == 2)
            assert not client.engine.is_ready
            assert loop.time() - first >= 1.0  # A lower bound, which no slow machine can break.
            assert len(starts.read_text().splitlines()) <= 3
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.engine.wait_failed(), 0.01)

    run(main)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("fake?cannot_start=no+such+model%3A+there", {}, "no such model: there"),
        ("fake?die_from_start=0&starts=/dev/null", {}, "exited with status 3"),
        ("fake?load_forever=1", {"load_timeout": 1.0}, "not ready within 1 s"),
    ],
    ids=["cannot-start", "dies", "load-timeout"],
)
def test_service_that_cannot_start_says_so(run: Run, model: str, settings: dict[str, float], words: str) -> None:
    """Corrupt or missing model: one line that names what and where."""

    async def main() -> None:
        configured = Settings(model=model, devices=("cpu", "cpu"), **settings)
        engine = Engine(configured, Metrics(), worker_target="tests.fake_worker:run")
        await engine.start()
        try:
            with pytest.raises(StartupError) as failed:
                await engine.wait_ready()
            assert words in str(failed.value)
            assert len(str(failed.value).splitlines()) == 1
            assert await engine.wait_failed() is failed.value
            assert not engine.is_ready
        finally:
            await engine.stop()

    run(main)


def test_worker_that_cannot_be_imported(run: Run) -> None:
    """A worker whose libraries are missing ends the start with one line as well."""

    async def main() -> None:
        engine = Engine(Settings(devices=("cpu",)), Metrics(), worker_target="tests.no_such_module:run")
        await engine.start()
        try:
            with pytest.raises(StartupError, match=r"cannot be imported: .*no_such_module"):
                await engine.wait_ready()
        finally:
            await engine.stop()

    run(main)


def test_one_worker_that_cannot_start_is_not_the_end(run: Run) -> None:
    """With another worker ready, one that fails to start is tried again and again, and the service serves."""

    async def main() -> None:
        model = {"fails_on": "cpu:1"}
        async with running(model, wait_for=1, devices=("cpu:0", "cpu:1")) as client:
            await until(lambda: client.engine.workers()[1].restarts == 1)
            await client.assert_right(client.submit(1))
            assert client.engine.is_ready

    run(main)


def test_no_room_before_the_first_ready(run: Run, gate: Gate) -> None:
    """Before a worker has loaded, work is refused and the state says what it does."""

    async def main() -> None:
        async with running({"startup_gate": gate}, wait_for=0) as client:
            await until(lambda: client.engine.workers()[0].state == "loading: loading the model")
            with pytest.raises(InpaintError) as refused:
                client.submit(1)
            assert refused.value.code == ErrorCode.NOT_READY
            assert client.engine.model is None
            gate.open()
            await client.engine.wait_ready()
            assert client.engine.model is not None
            await client.assert_right(client.submit(1))

    run(main)


def test_signals_to_the_process_group_are_the_parents(run: Run, gate: Gate) -> None:
    """Ctrl-C and a service manager's SIGTERM reach the workers too, which leave them to the API process."""

    async def main() -> None:
        async with running({"gate": gate}) as client:
            handle = client.submit(1, "hold")
            await first_step(handle)
            kill(client.engine, number=signal.SIGINT)
            kill(client.engine, number=signal.SIGTERM)
            gate.open()
            await Client.assert_right(handle)
            assert client.engine.workers()[0].restarts == 0

    run(main)
