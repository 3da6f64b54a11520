"""`benchmarks.promises` end to end on the real HTTP side and the fake worker; no verdict about speed counts here."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.bad_requests import STAGES, bad_requests, hang_up
from benchmarks.cases import equal_cases, mixed_cases, served_model
from benchmarks.connections import ConnectionsPlan, connections_verdicts, measure_connections
from benchmarks.exchange import ANSWERED_TWICE, NO_ANSWER, TIMEOUT, Exchange, Wire, address_of, exchange, with_body
from benchmarks.load import GOOD
from benchmarks.mixed import MixedTraffic, faults_of, refusal_of, tally
from benchmarks.overload import OverloadPlan, measure_overload, overload_verdicts
from benchmarks.references import WrongAnswerError, take_references
from benchmarks.servers import Server, Where, inpaint_service
from benchmarks.soak import LEAKED, SoakPlan, growths, soak
from tests.http.serving import LiveServer, serving

KEY = {"Authorization": "Bearer right"}
MEBIBYTE = 1024 * 1024
ABOUT_SPEED = ("goodput", "429, p99", "/healthz, p99")


def server_of(live: LiveServer) -> Server:
    """As the benchmark starts one."""
    return Server("this service", f"http://127.0.0.1:{live.port}/v1/inpaint", 0.0, os.getpid())


# --- one exchange --------------------------------------------------------------------

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def exchange_with(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], wire: Wire, seconds: float = 20.0
) -> Exchange:
    """An exchange with a server that does just this."""

    async def run() -> Exchange:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await exchange(server.sockets[0].getsockname(), wire, seconds)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "status", "fault"),
    [
        (ANSWER, 200, None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200, None),
        (ANSWER + ANSWER, 200, ANSWERED_TWICE),
        (ANSWER[:-1], None, NO_ANSWER),
        (b"", None, NO_ANSWER),
        (b"what?\r\n\r\n", None, NO_ANSWER),
    ],
)
def test_exactly_one_answer_is_an_answer(answer: bytes, status: int | None, fault: str | None) -> None:
    """Half of one, none, two and something else are told apart."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    found = exchange_with(serve, with_body("/", b"", {}))
    assert found.status == status
    assert (found.fault or "").startswith(fault or "")
    assert (found.fault is None) == (fault is None)


def test_an_answer_may_come_before_the_request_is_sent() -> None:
    """It is read while the rest waits to be sent; its time counts from the start then."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()
        await writer.wait_closed()

    found = exchange_with(serve, with_body("/", bytes(64 * MEBIBYTE), {}))
    assert (found.status, found.body, found.sent_at) == (200, b"ok", None)
    assert found.seconds_after_sending == found.ended_at - found.started_at


def test_silence_is_a_timeout() -> None:
    """A server that says nothing is given up on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    found = exchange_with(serve, with_body("/", b"", {}), seconds=0.1)
    assert found.status is None
    assert (found.fault or "").startswith(TIMEOUT)


# --- the parts -----------------------------------------------------------------------


def test_every_bad_request_is_refused_as_it_is_due() -> None:
    """The benchmark's list is the contract's: status and code of each."""
    with serving(api_keys="right", max_body_mib=1.0) as live:
        address = address_of(server_of(live).base_url)
        job = equal_cases(served_model(server_of(live).base_url, KEY), 2, seed=1)[0].job
        bad = bad_requests(job, KEY, MEBIBYTE)

        async def run() -> list[str | None]:
            return [refusal_of(one, await exchange(address, one.wire, 30.0))[1] for one in bad]

        faults = asyncio.run(run())
    assert faults == [None] * len(bad)


def test_mixed_traffic_finds_nothing_wrong_and_leaves_nothing_in_flight() -> None:
    """Good and bad requests at once, clients that hang up at each stage, and references that can be told apart."""
    with serving(api_keys="right", max_body_mib=1.0) as live:
        base_url = server_of(live).base_url
        address = address_of(base_url)

        async def run() -> list[str]:
            known = await take_references(address, mixed_cases(served_model(base_url, KEY), (2, 4), seed=1), KEY)
            bad = bad_requests(known.cases[0].job, KEY, MEBIBYTE)
            for stage in STAGES:
                await hang_up(address, known.cases[0].wire(KEY), stage, random.Random(1))  # noqa: S311 - traffic
            traffic = MixedTraffic(address, known, bad, KEY, timeout_seconds=30.0, may_be=frozenset())
            outcomes = await traffic.send(4, "1", max_requests=80)
            assert len(outcomes) >= 80
            assert tally(outcomes)[GOOD] >= 20
            return faults_of(outcomes)

        assert asyncio.run(run()) == []
        live.client.headers.update(KEY)
        while live.metric("inpaint_in_flight") or live.metric("inpaint_queue_depth"):
            pass  # Asking is what takes the time.


def test_references_that_cannot_be_told_apart_are_refused() -> None:
    """Two requests with the same answer would hide a mix-up."""
    with serving() as live:
        base_url = server_of(live).base_url
        cases = equal_cases(served_model(base_url, {}), 2, seed=1)
        with pytest.raises(WrongAnswerError, match="only 0 of 255 apart"):
            asyncio.run(take_references(address_of(base_url), [cases[0], cases[0]], {}))


def test_overload_of_a_small_queue() -> None:
    """Some are painted and the others refused; each is answered, and nothing is wrong but perhaps the speed."""
    with serving(model="fake?step_seconds=0.01", queue_size=2) as live:
        plan = OverloadPlan(num_steps=4, capacity_seconds=0.5, open_seconds=1.0)
        found = asyncio.run(measure_overload(server_of(live), {}, plan, seed=1))
    broken = [one.promise for one in overload_verdicts(found) if not one.holds]
    assert [promise for promise in broken if not promise.startswith(ABOUT_SPEED)] == []
    assert {one.outcome for one in found.overload.sent} == {GOOD, "429 overloaded"}
    assert found.capacity_per_second > 0


def test_idle_and_slow_connections() -> None:
    """They are there while the others are served, and still alive at the end."""
    with serving(model="fake?step_seconds=0.005") as live:
        plan = ConnectionsPlan(num_steps=4, round_seconds=0.5, pairs=2, num_idle=20, num_slow=6)
        found = asyncio.run(measure_connections(server_of(live), {}, plan, seed=1))
    broken = [one.promise for one in connections_verdicts(found) if not one.holds]
    assert [promise for promise in broken if not promise.startswith(ABOUT_SPEED)] == []
    assert found.num_idle_alive == (20, 20)


def test_soak_finds_the_leaks_of_its_control() -> None:
    """Memory, descriptors and tasks, each one a request; and sees that descriptors are given back without it."""
    settings = {"INPAINT_API_KEYS": "right", "INPAINT_MAX_BODY_MIB": "2"}
    plan = SoakPlan((2, 3), rounds=8, round_requests=6, control_rounds=8, control_requests=6, max_seconds=60.0)
    found = []
    for flags in ([], ["--leak"]):
        entry = ["tests.http.serve_soak_fake", *flags]
        with inpaint_service("fake", Where("cpu", None, 1), environment=settings, entry=entry) as server:
            found.append(asyncio.run(soak(server, KEY, plan, seed=1)))
    calm, leaking = (growths(one.looks) for one in found)
    assert [fault for one in found for fault in faults_of(one.outcomes)] == []
    assert calm["API: descriptors"].is_flat
    assert calm["API: tasks"].is_flat
    assert [name for name in LEAKED if leaking[name].is_flat] == []
