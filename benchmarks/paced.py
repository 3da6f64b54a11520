"""Load of equal requests, each on a connection of its own, with its answer judged once the load is over."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.exchange import Address, Exchange, Wire, exchange
from benchmarks.figures import steady_rates
from benchmarks.load import GOOD, NO_ANSWER, Answer, Round
from benchmarks.references import Known

OVERLOADED = "429 overloaded"
SERVER_ERROR = 500


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a load.

    Attributes:
        due_seconds: When it was to be sent, from the start; in a closed loop, when it was.
        started_seconds: When its connection was asked for.
        ended_seconds: When its answer was complete.
        after_sending_seconds: From its last byte to the end of the answer.
        working_seconds: What the service says that it spent on it, waiting not counted; 0 where it says nothing.
        outcome: As in `benchmarks.references.Finding`.
        status: Of the answer, None without one.
        has_retry_after: Whether the answer says when to come back, in whole seconds from 1.
        num_steps: Steps that it asked for.
        fault: What was wrong, None for a good answer.
    """

    due_seconds: float
    started_seconds: float
    ended_seconds: float
    after_sending_seconds: float
    working_seconds: float
    outcome: str
    status: int | None
    has_retry_after: bool
    num_steps: int
    fault: str | None


@dataclass(frozen=True, slots=True)
class Load:
    """A load and what came of it.

    Attributes:
        sent: Its requests, in the order in which they were due.
        sending_seconds: How long requests were sent.
        seconds: Up to the last answer.
    """

    sent: tuple[Sent, ...]
    sending_seconds: float
    seconds: float

    @property
    def good_per_second(self) -> float:
        """Good answers a second while the service had enough to do; see `served_per_second`."""
        return served_per_second(self.sent, self.sending_seconds, self.seconds)

    def of(self, outcome: str) -> tuple[Sent, ...]:
        """Those that came to this."""
        return tuple(one for one in self.sent if one.outcome == outcome)

    @property
    def num_answered(self) -> int:
        """Requests with one complete answer."""
        return len(self.sent) - len(self.of(NO_ANSWER))

    @property
    def num_server_errors(self) -> int:
        """Answers of 5xx."""
        return sum(one.status is not None and one.status >= SERVER_ERROR for one in self.sent)


def served_per_second(sent: Sequence[Sent], sending_seconds: float, seconds: float) -> float:
    """Good answers a second from the first of them to the end of sending.

    Each counts with the share of its working time that lies in this window, so that it makes no
    difference whether the answers of a batch come just before the window's end or just after.

    Args:
        sent: Requests of a load that leaves the service no pause.
        sending_seconds: How long requests were sent.
        seconds: Up to the last answer.
    """
    answers = [
        Answer(one.ended_seconds - one.working_seconds, 0.0, one.working_seconds, one.num_steps, GOOD, None)
        for one in sent
        if one.outcome == GOOD and one.working_seconds > 0
    ]
    rate, _ = steady_rates(Round(tuple(answers), seconds, sending_seconds, is_cut_short=False))
    return rate


class PacedTraffic:
    """Sends requests in the order of their cases, over and over.

    Args:
        address: The service.
        known: The requests and what each gave alone.
        headers: Of every request.
        timeout_seconds: A request without an answer by then is given up.
    """

    def __init__(self, address: Address, known: Known, headers: Mapping[str, str], timeout_seconds: float) -> None:
        self._address = address
        self._known = known
        self._wires: list[Wire] = [case.wire(headers) for case in known.cases]
        self._timeout_seconds = timeout_seconds

    async def closed_loop(self, num_clients: int, seconds: float) -> Load:
        """Clients that send the next request when they have an answer, for so many seconds."""
        started_at = time.perf_counter()
        answers: list[tuple[int, float, Exchange]] = []
        num_sent = 0

        async def one_client() -> None:
            nonlocal num_sent
            while (due := time.perf_counter() - started_at) < seconds:
                number, num_sent = num_sent % len(self._wires), num_sent + 1
                answers.append((number, due, await self._send(number)))

        async with asyncio.TaskGroup() as clients:
            for _ in range(num_clients):
                clients.create_task(one_client())
        return await self._judged(answers, started_at, seconds)

    async def open_loop(self, arrivals: Sequence[float], seconds: float) -> Load:
        """Requests at these moments, ascending within so many seconds, whatever becomes of those before."""
        started_at = time.perf_counter()
        answers: list[tuple[int, float, Exchange]] = []

        async def one(number: int, due: float) -> None:
            answers.append((number, due, await self._send(number)))

        async with asyncio.TaskGroup() as requests:
            for count, due in enumerate(arrivals):
                await asyncio.sleep(due - (time.perf_counter() - started_at))
                requests.create_task(one(count % len(self._wires), due))
        return await self._judged(answers, started_at, seconds)

    async def _send(self, number: int) -> Exchange:
        return await exchange(self._address, self._wires[number], self._timeout_seconds)

    async def _judged(
        self, answers: Sequence[tuple[int, float, Exchange]], started_at: float, sending_seconds: float
    ) -> Load:
        seconds = time.perf_counter() - started_at

        def judge() -> list[Sent]:
            return [
                _sent(self._known, number, due, answer, started_at)
                for number, due, answer in sorted(answers, key=lambda one: one[1])
            ]

        return Load(tuple(await asyncio.to_thread(judge)), sending_seconds, seconds)


def _sent(known: Known, number: int, due: float, answer: Exchange, started_at: float) -> Sent:
    found = known.judged(number, answer)
    return Sent(
        due_seconds=due,
        started_seconds=answer.started_at - started_at,
        ended_seconds=answer.ended_at - started_at,
        after_sending_seconds=answer.seconds_after_sending,
        working_seconds=working_seconds(answer.headers.get("server-timing", "")),
        outcome=found.outcome,
        status=found.status,
        has_retry_after=_is_whole_seconds(answer.headers.get("retry-after", "")),
        num_steps=known.cases[number].job.num_steps,
        fault=found.fault,
    )


def working_seconds(server_timing: str) -> float:
    """The sum of a `Server-Timing` header's stages, without waiting and without the total of all."""
    total = 0.0
    for part in server_timing.split(","):
        stage, _, duration = part.strip().partition(";dur=")
        if duration and stage not in ("queue", "total"):
            total += float(duration) / 1000
    return total


def _is_whole_seconds(text: str) -> bool:
    return text.isdecimal() and int(text) >= 1
