"""Several clients, one engine and its real workers."""

import asyncio

import pytest

from service.engine.clients import Client
from service.errors import ErrorCode, InpaintError
from tests.process.support import Client as Sender
from tests.process.support import Gate, Run, metric, running

GREEDY, MODEST, URGENT = Client(1, "greedy"), Client(2, "modest"), Client(3, "urgent", has_priority=True)


def refused_for(sender: Sender, client: Client) -> float:
    """The seconds after which a client that is refused should come back."""
    with pytest.raises(InpaintError) as refused:
        sender.submit(client=client)
    assert refused.value.code == ErrorCode.OVERLOADED
    assert refused.value.retry_after_seconds is not None
    return refused.value.retry_after_seconds


def test_newcomers_are_started_before_what_others_have_waiting(run: Run, gate: Gate) -> None:
    """One client's long queue delays nobody else: the next place is a newcomer's, a priority key's before all."""

    async def main() -> None:
        async with running({"gate": gate, "max_images": 1}) as sender:
            handles = [sender.submit(number, "hold", client=GREEDY) for number in range(8)]
            modest = sender.submit(20, client=MODEST)
            assert (modest.position, handles[2].position) == (0, 1)
            urgent = sender.submit(21, client=URGENT)
            assert (urgent.position, modest.position, handles[2].position) == (0, 1, 2)
            ended: list[int] = []
            for handle in (*handles, modest, urgent):
                outcome = asyncio.ensure_future(sender.assert_right(handle))
                outcome.add_done_callback(lambda _, seed=handle.request.params.seed: ended.append(seed))
            gate.open()
            await asyncio.gather(*(handle.result() for handle in (*handles, modest, urgent)))
            await asyncio.sleep(0)
            # Two of the first client were in the worker already.
            assert ended[:5] == [0, 1, 21, 20, 2]

    run(main)


def test_retry_after_is_for_who_is_refused(run: Run, gate: Gate) -> None:
    """A client that has filled its share is told when its own requests are done with, and not when everybody's are."""

    async def main() -> None:
        model = {"gate": gate, "max_images": 1, "step_seconds": 0.05}
        async with running(model, queue_size=8) as sender:
            steps = {"num_inference_steps": 60}
            handles = [sender.submit(number, "hold", client=GREEDY, **steps) for number in range(10)]
            alone = refused_for(sender, GREEDY)
            handles += [sender.submit(number, "hold", client=MODEST, **steps) for number in range(20, 24)]
            greedy, modest = refused_for(sender, GREEDY), refused_for(sender, MODEST)
            # Eight of its own; then also four of the other; of the other four and as many of the first in turn.
            assert greedy == pytest.approx(alone * 12 / 8, abs=2)
            assert modest == pytest.approx(alone, abs=2)
            assert modest < greedy
            assert metric(sender.engine, 'inpaint_rejected_total{reason="overloaded"}') == 3
            assert metric(sender.engine, "inpaint_queue_depth") == 12
            for handle in handles:
                handle.cancel("client")

    run(main)
