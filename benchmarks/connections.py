"""Hundreds of connections that do nothing, and tens that are slow: the others must not notice."""

import asyncio
import itertools
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cases import Case, equal_cases, served_model
from benchmarks.exchange import Address, AnswerParser, Wire, address_of, connected, with_body
from benchmarks.figures import median_ratio
from benchmarks.load import GOOD, WRONG_PICTURE
from benchmarks.paced import Load, PacedTraffic
from benchmarks.references import take_references
from benchmarks.servers import Server
from benchmarks.verdicts import Verdict, at_least, equals

MIN_GOODPUT = 0.95
ANSWER_SECONDS = 600.0
OPENING_SECONDS = 60.0
PAUSE_SECONDS = 1.0
"""Between two bytes, or blocks, of a slow client: far from what a service takes for a stall."""
SLOW_BODY_BYTES = 512
SLOW_READ_BYTES = 256
SMALL_BUFFER_BYTES = 4096
SPARE_DESCRIPTORS = 200
OK = 200

SLOW_KINDS = ("head", "body", "reading")


@dataclass(frozen=True, slots=True)
class ConnectionsPlan:
    """How much to send.

    Attributes:
        num_steps: Steps of each request.
        round_seconds: Of each round.
        pairs: Rounds without the crowd, and as many with it.
        num_idle: Connections that stay open and do nothing.
        num_slow: Connections that send or read slowly.
    """

    num_steps: int
    round_seconds: float
    pairs: int
    num_idle: int
    num_slow: int


@dataclass(frozen=True, slots=True)
class Connections:
    """What was measured; round i of one list was run next to round i of the other.

    Attributes:
        alone: Rounds without the crowd.
        crowded: Rounds with it.
        num_idle_alive: How many idle connections still answered at the end, by round.
        num_slow_bytes: What slow clients sent and read, by kind, over all rounds.
        num_idle: How many there were in each round.
    """

    alone: tuple[Load, ...]
    crowded: tuple[Load, ...]
    num_idle_alive: tuple[int, ...]
    num_slow_bytes: dict[str, int]
    num_idle: int


async def measure_connections(
    server: Server, headers: Mapping[str, str], plan: ConnectionsPlan, seed: int
) -> Connections:
    """Rounds of a closed loop with the crowd and without, which take turns at going first.

    Raises:
        WrongAnswerError: Requests are not answered well even alone.
    """
    allow_descriptors(plan.num_idle + plan.num_slow + SPARE_DESCRIPTORS)
    served = served_model(server.base_url, headers)
    address = address_of(server.base_url)
    known = await take_references(address, equal_cases(served, plan.num_steps, seed), headers)
    traffic = PacedTraffic(address, known, headers, ANSWER_SECONDS)
    num_clients = 2 * served.max_images
    crowd = _Crowd(address, known.cases[0], headers, plan)
    alone: list[Load] = []
    crowded: list[Load] = []
    for number in range(plan.pairs):
        for is_crowded in (False, True) if number % 2 == 0 else (True, False):
            if is_crowded:
                async with crowd.gathered():
                    crowded.append(await traffic.closed_loop(num_clients, plan.round_seconds))
            else:
                alone.append(await traffic.closed_loop(num_clients, plan.round_seconds))
    return Connections(tuple(alone), tuple(crowded), tuple(crowd.num_idle_alive), dict(crowd.num_bytes), plan.num_idle)


def allow_descriptors(count: int) -> None:
    """Raise this process's own limit as far as it may, where it is lower.

    Raises:
        OSError: The system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise OSError(f"this takes {count} descriptors, and the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@dataclass(slots=True)
class _Crowd:
    """Idle and slow connections.

    Attributes:
        address: The service.
        case: A good request, for those who send slowly.
        headers: Of every request.
        plan: How many.
        num_idle_alive: Idle connections that still answered at the end of each round.
        num_bytes: What slow clients sent and read, by kind.
    """

    address: Address
    case: Case
    headers: Mapping[str, str]
    plan: ConnectionsPlan
    num_idle_alive: list[int] = field(default_factory=list)
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SLOW_KINDS, 0))

    @asynccontextmanager
    async def gathered(self) -> AsyncIterator[None]:
        """All of them, from the moment at which they are connected to the end of the block."""
        slow = {"head": self._send_head, "body": self._send_body, "reading": self._read}
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(OPENING_SECONDS):
                opening = [stack.enter_async_context(self._idle()) for _ in range(self.plan.num_idle)]
                idle = [await one for one in opening]
            kinds = itertools.islice(itertools.cycle(SLOW_KINDS), self.plan.num_slow)
            tasks = [asyncio.create_task(self._again_and_again(slow[kind])) for kind in kinds]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self.num_idle_alive.append(sum([await _answers_health(*streams) for streams in idle]))

    @asynccontextmanager
    async def _idle(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection that has had one answer, as a browser or a pool keeps it."""
        async with connected(self.address) as streams:
            if not await _answers_health(*streams):
                raise ConnectionError("an idle connection got no answer to begin with")
            yield streams

    async def _again_and_again(self, be_slow: Callable[[], Awaitable[None]]) -> None:
        """A service may close what is too slow; such a client comes back."""
        while True:
            with suppress(OSError):
                await be_slow()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _send_head(self) -> None:
        """A byte of a head every second."""
        async with connected(self.address) as (reader, writer):
            for byte in self.case.wire(self.headers).head:
                writer.write(bytes([byte]))
                await writer.drain()
                self.num_bytes["head"] += 1
                if reader.at_eof():
                    return
                await asyncio.sleep(PAUSE_SECONDS)

    async def _send_body(self) -> None:
        """A whole head, and then a little of the body every second."""
        wire = self.case.wire(self.headers)
        async with connected(self.address) as (_, writer):
            writer.write(wire.head)
            for start in range(0, len(wire.body), SLOW_BODY_BYTES):
                block = wire.body[start : start + SLOW_BODY_BYTES]
                writer.write(block)
                await writer.drain()
                self.num_bytes["body"] += len(block)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        """A long answer, read a little every second into buffers that hold little more."""
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            await loop.sock_connect(connection, self.address)
            await loop.sock_sendall(connection, _get("/openapi.json", self.headers).data)
            while data := await loop.sock_recv(connection, SLOW_READ_BYTES):
                self.num_bytes["reading"] += len(data)
                await asyncio.sleep(PAUSE_SECONDS)


async def _answers_health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether `/healthz` is answered on this connection, which stays open."""
    parser = AnswerParser()
    try:
        writer.write(_get("/healthz", {"Connection": "keep-alive"}).data)
        await writer.drain()
        async with asyncio.timeout(OPENING_SECONDS):
            await parser.read(reader)
    except (OSError, TimeoutError):
        return False
    return parser.status == OK


def _get(path: str, headers: Mapping[str, str]) -> Wire:
    return with_body(path, b"", headers, method="GET")


def connections_verdicts(found: Connections) -> list[Verdict]:
    """What is promised of many connections."""
    rounds = (*found.alone, *found.crowded)
    rates = ([one.good_per_second for one in loads] for loads in (found.crowded, found.alone))
    ratio = median_ratio(*rates) if all(load.good_per_second > 0 for load in found.alone) else None
    num_sent = sum(len(one.sent) for one in rounds)
    return [
        at_least("goodput beside idle and slow connections, of that without", ratio, MIN_GOODPUT, "{:.1%}"),
        equals("requests answered, of those sent", sum(one.num_answered for one in rounds), num_sent),
        equals("answers other than a right picture", num_sent - sum(len(one.of(GOOD)) for one in rounds), 0),
        equals("wrong pictures", sum(len(one.of(WRONG_PICTURE)) for one in rounds), 0),
        equals(
            "idle connections that still answer",
            sum(found.num_idle_alive),
            found.num_idle * len(found.crowded),
        ),
        equals(
            "kinds of slow connections that got anywhere",
            sum(count > 0 for count in found.num_slow_bytes.values()),
            len(SLOW_KINDS),
        ),
    ]


def connections_facts(found: Connections) -> dict[str, str]:
    """What else a reader needs."""

    def rates(loads: tuple[Load, ...]) -> str:
        return ", ".join(f"{one.good_per_second:.2f}" for one in loads)

    return {
        "connections": f"{rates(found.alone)} requests/s without, {rates(found.crowded)} beside {found.num_idle} idle "
        f"and some slow ones, rounds taking turns"
    }


def connections_document(found: Connections) -> dict[str, Any]:
    """Everything, for `json.dump`."""
    return asdict(found)
