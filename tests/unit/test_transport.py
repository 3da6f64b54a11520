"""The pipe to a worker, without a worker."""

import asyncio
import os
import pickle
import struct
import threading
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import numpy as np
import pytest

from service.engine import frames
from service.engine.transport import Transport
from service.messages import Cancel, Finished, Loading, Ping, Pong, Report, Submit
from service.request import InpaintRequest, InpaintResult, InpaintTensors, Timings
from tests.process.support import PARAMS, pixels


def over_a_pipe(main: Callable[[Transport, Connection, "asyncio.Queue[Report]"], Awaitable[None]]) -> None:
    """Run `main` with a transport, the worker's end, and what the transport has handed over."""

    async def run() -> None:
        ours, theirs = frames.make_pipe()
        reports: asyncio.Queue[Report] = asyncio.Queue()
        transport = Transport(ours, "test", reports.put_nowait)
        try:
            await main(transport, theirs, reports)
        finally:
            theirs.close()
            await transport.close()

    threads_before = threading.active_count()
    asyncio.run(asyncio.wait_for(run(), 30))
    assert threading.active_count() == threads_before


def test_reports_arrive_in_order() -> None:
    """Reports reach the event loop in the order in which the worker sent them, then the end of the pipe."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        for number in range(100):
            theirs.send(Pong(number))
        theirs.close()
        await transport.at_eof
        assert [reports.get_nowait() for _ in range(100)] == [Pong(number) for number in range(100)]

    over_a_pipe(main)


def test_commands_arrive_in_order_and_intact() -> None:
    """A worker gets what was sent: ids, parameters, every pixel."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        image, mask = pixels(1)
        request = InpaintRequest(PARAMS, image, mask, admitted_at=1.0, deadline=2.0)
        transport.send(Submit("a", request))
        transport.send(Cancel("a"))
        submit, cancel = await asyncio.to_thread(lambda: (theirs.recv(), theirs.recv()))
        assert (submit.request_id, submit.request.params) == ("a", PARAMS)
        np.testing.assert_array_equal(submit.request.image, image)
        np.testing.assert_array_equal(submit.request.mask, mask)
        assert cancel == Cancel("a")
        assert reports.empty()

    over_a_pipe(main)


def test_large_messages_are_intact_both_ways() -> None:
    """Pictures and tensors larger than the pipe holds arrive whole: contiguous or not, by rows or by columns."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        draw = np.random.default_rng(0)
        image = draw.integers(0, 256, (512, 640, 3), dtype=np.uint8)
        mask = np.asfortranarray(image[..., 0])
        latents = draw.normal(size=(4, 128, 160)).astype(np.float32)[:, ::-1]
        for array in (mask, latents):
            array.flags.writeable = False
        request = InpaintRequest(PARAMS, image, mask, 1.0, 2.0, InpaintTensors(latents=latents), image[::2, ::2])
        for number in range(3):
            transport.send(Submit(str(number), request))
        submits = await asyncio.to_thread(lambda: [theirs.recv() for _ in range(3)])
        assert [submit.request_id for submit in submits] == ["0", "1", "2"]
        for received in (submit.request for submit in submits):
            np.testing.assert_array_equal(received.image, image)
            np.testing.assert_array_equal(received.mask, mask)
            np.testing.assert_array_equal(received.tensors.latents, latents)
            np.testing.assert_array_equal(received.ip_adapter_image, image[::2, ::2])

        timings = Timings(queue=0.0, prepare=0.0, denoise=0.0, vae_decode=0.0, safety=0.0, time_to_first_step=0.0)
        result = InpaintResult(images=np.stack([image] * 4), nsfw=(False,) * 4, timings=timings, mean_images=1.0)
        await asyncio.to_thread(theirs.send, Finished("0", result))
        finished = await reports.get()
        assert isinstance(finished, Finished)
        np.testing.assert_array_equal(finished.result.images, result.images)
        finished.result.images[:] = 0  # Pictures of its own, not a view of anything read-only.

    over_a_pipe(main)


def test_messages_of_gigabytes_have_longer_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their length takes eight bytes behind a mark, in either direction; here the limit is a hundred bytes."""
    monkeypatch.setattr(frames, "_MAX_LENGTH", 100)

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        transport.send(Cancel("a" * 1000))
        assert await asyncio.to_thread(theirs.recv) == Cancel("a" * 1000)
        frame = pickle.dumps(Loading("b" * 1000))
        os.write(theirs.fileno(), struct.pack("!iQ", -1, len(frame)) + frame)
        assert await reports.get() == Loading("b" * 1000)

    over_a_pipe(main)


def test_full_pipe_blocks_nobody() -> None:
    """Sending to a worker that does not read returns, reports still arrive, and closing works."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        image = np.zeros((2048, 2048, 3), np.uint8)
        request = InpaintRequest(PARAMS, image, image[..., 0], admitted_at=1.0, deadline=2.0)
        for number in range(3):
            transport.send(Submit(str(number), request))
        theirs.send(Loading("still here"))
        assert await reports.get() == Loading("still here")

    over_a_pipe(main)


def test_closed_pipe_is_the_end_and_not_an_error() -> None:
    """After the worker is gone, sending is dropped in silence and closing twice is fine."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        theirs.close()
        await transport.at_eof
        transport.send(Ping(1))
        await transport.close()
        await transport.close()
        assert reports.empty()

    over_a_pipe(main)


def test_torn_frame_is_the_end() -> None:
    """A worker that dies in the middle of a message is a dead worker; what it said before counts."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        theirs.send(Pong(1))
        os.write(theirs.fileno(), struct.pack("!i", 1000) + b"only the beginning")
        theirs.close()
        await transport.at_eof
        assert reports.get_nowait() == Pong(1)
        assert reports.empty()

    over_a_pipe(main)


def test_garbage_is_the_end() -> None:
    """A frame that is no message ends the conversation instead of the thread's life going unnoticed."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        theirs.send_bytes(b"\x80garbage")
        await transport.at_eof
        assert reports.empty()

    over_a_pipe(main)


def test_hang_up_ends_the_wait_for_a_silent_worker() -> None:
    """Closing does not wait for the other end, which a worker's own children may still hold."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        await transport.close()
        assert not theirs.closed
        assert reports.empty()

    over_a_pipe(main)


def test_a_command_that_cannot_be_sent_costs_the_worker() -> None:
    """It is hung up on and counts as lost, and what it had runs again elsewhere; nothing waits for ever."""

    async def main(transport: Transport, theirs: Connection, reports: "asyncio.Queue[Report]") -> None:
        transport.send(Cancel(lambda: None))  # type: ignore[arg-type]  # no pickle holds a function without a name
        await transport.at_eof
        assert reports.empty()
        assert theirs.poll(20)  # The end of the pipe.

    over_a_pipe(main)
