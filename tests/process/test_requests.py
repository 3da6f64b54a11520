"""Requests through real worker processes that behave."""

import asyncio

import pytest

from service.errors import ErrorCode, InpaintError
from tests.process.support import Client, Gate, Run, code_of, first_step, metric, running, until


def test_answers_are_not_mixed_up(run: Run) -> None:
    """Every admitted request gets exactly one answer: its own."""

    async def main() -> None:
        async with running({"step_seconds": 0.001}, devices=("cpu", "cpu")) as client:
            handles = [
                client.submit(number, num_inference_steps=1 + number % 5, num_images_per_prompt=1 + number % 3)
                for number in range(40)
            ]
            await asyncio.gather(*map(client.assert_right, handles))
            assert metric(client.engine, "inpaint_images_total") == sum(1 + number % 3 for number in range(40))

    run(main)


def test_what_is_done_at_the_end_of_a_request_cannot_harm_it(run: Run) -> None:
    """What fails when a request has its outcome, such as its trace, costs neither the outcome nor other requests."""

    async def main() -> None:
        async with running() as client:
            handles = [client.submit(number) for number in range(3)]
            ends = []

            def fail(outcome: object) -> None:
                ends.append(outcome)
                raise ValueError

            for handle in handles:
                handle.when_ended(fail)
            await asyncio.gather(*map(client.assert_right, handles))
            assert len(ends) == 3
            assert await client.engine.drain(30)

    run(main)


def test_two_workers_share_the_work(run: Run, gate: Gate) -> None:
    """Work goes to the worker with the least to do."""

    async def main() -> None:
        async with running({"gate": gate}, devices=("cpu", "cpu")) as client:
            handles = [client.submit(number, "hold") for number in range(4)]
            assert [worker.num_in_flight for worker in client.engine.workers()] == [2, 2]
            gate.open()
            await asyncio.gather(*map(client.assert_right, handles))

    run(main)


def test_a_failure_is_its_own(run: Run) -> None:
    """One request raises: its neighbours' results are what they would have been."""

    async def main() -> None:
        async with running() as client:
            bad, *good = [client.submit(number, prompt) for number, prompt in enumerate(["fail", "a", "b"])]
            assert await code_of(bad) == ErrorCode.INTERNAL
            await asyncio.gather(*map(client.assert_right, good))
            assert metric(client.engine, 'inpaint_failed_total{reason="internal"}') == 1

    run(main)


def test_flagged_images_come_back_black(run: Run) -> None:
    """The worker's flags and black pixels reach the caller, and are counted."""

    async def main() -> None:
        async with running() as client:
            result = await client.submit(1, "nsfw", num_images_per_prompt=2).result()
            assert result.nsfw == (True, True)
            assert not result.images.any()
            assert metric(client.engine, "inpaint_nsfw_flagged_total") == 2

    run(main)


def test_progress_ends_with_the_outcome(run: Run) -> None:
    """Progress names the caller's request, never goes back, and ends when the answer is there."""

    async def main() -> None:
        async with running() as client:
            handle = client.submit(1, num_inference_steps=6)
            steps = [progress async for progress in handle.progress()]
            assert {progress.request_id for progress in steps} == {"request-1"}
            assert [progress.step for progress in steps] == sorted({progress.step for progress in steps})
            assert steps[-1].step == steps[-1].steps == 6
            assert handle.is_ended
            await client.assert_right(handle)

    run(main)


def test_queued_request_is_cancelled(run: Run, gate: Gate) -> None:
    """Client gone while queued: never started, and the others move up."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as client:
            running_ones = [client.submit(number, "hold") for number in range(2)]
            queued, behind = client.submit(2), client.submit(3)
            assert [handle.position for handle in (*running_ones, queued, behind)] == [None, None, 0, 1]
            queued.cancel("disconnect")
            queued.cancel("disconnect")
            assert behind.position == 0
            assert await code_of(queued) == ErrorCode.CANCELLED
            gate.open()
            await asyncio.gather(*map(client.assert_right, [*running_ones, behind]))
            assert [progress async for progress in queued.progress()] == []
            assert metric(client.engine, 'inpaint_cancelled_total{reason="disconnect"}') == 1

    run(main)


def test_running_request_is_cancelled(run: Run, gate: Gate) -> None:
    """Client gone mid-denoise: out of the batch at the next step, and its place is free again."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as client:
            handle = client.submit(1, "hold")
            await first_step(handle)
            handle.cancel("client")
            assert await code_of(handle) == ErrorCode.CANCELLED
            # It counts until the worker has let go of it.
            assert client.engine.workers()[0].num_in_flight == 1
            await until(lambda: client.engine.workers()[0].num_in_flight == 0)
            await client.assert_right(client.submit(2))

    run(main)


@pytest.mark.parametrize("num_before", [0, 2], ids=["running", "queued"])
def test_deadline(run: Run, gate: Gate, num_before: int) -> None:
    """Deadline passed, queued or running: answered so at once, and what ran is taken out of the batch."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as client:
            before = [client.submit(number, "hold") for number in range(num_before)]
            late = client.submit(9, "hold", timeout_seconds=0.2)
            assert (late.position is None) == (num_before == 0)
            assert await code_of(late) == ErrorCode.DEADLINE
            assert late.position is None
            await until(lambda: client.engine.workers()[0].num_in_flight == num_before)
            gate.open()
            await asyncio.gather(*map(client.assert_right, before))

    run(main)


def test_operators_timeout_bounds_the_clients(run: Run, gate: Gate) -> None:
    """The client's deadline is never beyond the server's."""

    async def main() -> None:
        async with running({"gate": gate}, timeout=0.2) as client:
            assert await code_of(client.submit(1, "hold", timeout_seconds=1000)) == ErrorCode.DEADLINE

    run(main)


def test_full_queue_refuses(run: Run, gate: Gate) -> None:
    """Queue full: 429 with a computed Retry-After, and what was admitted is answered."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1, "step_seconds": 0.05}, queue_size=3) as client:
            handles = [client.submit(number, "hold", num_inference_steps=60) for number in range(5)]
            for refuse in (client.engine.check_room, client.submit):
                with pytest.raises(InpaintError) as refused:
                    refuse()
                assert refused.value.code == ErrorCode.OVERLOADED
                # Three waiting requests of 60 steps, 0.05 s each, at most: at least what two rows at once would take.
                assert refused.value.retry_after_seconds in range(4, 10)
            assert metric(client.engine, 'inpaint_rejected_total{reason="overloaded"}') == 2
            assert metric(client.engine, "inpaint_queue_depth") == 3
            assert metric(client.engine, "inpaint_in_flight") == 2
            for handle in handles:
                handle.cancel("client")

    run(main)


def test_large_request_is_not_starved(run: Run) -> None:
    """A request with more images than a batch holds still runs, when the worker has nothing else."""

    async def main() -> None:
        async with running({"max_images": 2}) as client:
            small = [client.submit(number) for number in range(4)]
            large = client.submit(9, num_images_per_prompt=8)
            more = [client.submit(number) for number in range(10, 14)]
            await asyncio.gather(*map(Client.assert_right, [*small, large, *more]))

    run(main)
