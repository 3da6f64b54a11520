"""Good and bad traffic mixed: valid requests of many kinds, requests that must be refused, clients that hang up."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.bad_requests import STAGES, BadRequest, hang_up
from benchmarks.exchange import Address, Exchange, exchange
from benchmarks.load import GOOD, NO_ANSWER, WRONG_PICTURE
from benchmarks.references import Known, code_in

BAD_SHARE = 0.35
HANG_UP_SHARE = 0.15
HURRIED_SHARE = 0.03
"""Share of good requests whose deadline may well be over before they are painted."""
HURRIED_SECONDS = "0.2"
DEADLINE = "504 deadline"

TURNED_AWAY = (429, 503)
TURNED_AWAY_SECONDS = 0.5
"""How long a client waits that was told to come back."""

HUNG_UP = "hung up"
WRONG_REFUSAL = "wrong refusal"
CHECKING_THREADS = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        name: Which it was.
        outcome: As in `benchmarks.references.Finding`, `HUNG_UP` for those that wanted no answer, or
            `WRONG_REFUSAL` for a bad request that was not refused as it must be.
        status: Of the answer, None without one.
        request_id: The service's name for the request; empty without one.
        seconds: From the start to the end of the answer.
        fault: What was wrong with the answer; None where nothing was.
    """

    name: str
    outcome: str
    status: int | None
    request_id: str
    seconds: float
    fault: str | None


class MixedTraffic:
    """Clients that send one request after the other, each drawn from a seed.

    Args:
        address: The service.
        known: Good requests and what each gave alone.
        bad: Requests that must be refused.
        headers: Of good requests and of those that hang up.
        timeout_seconds: A request without an answer by then is given up.
        may_be: Outcomes of good requests, such as "429 overloaded", that are no fault here;
            bad ones may have them, too, since a service that has no room does not read what is sent.
    """

    def __init__(
        self,
        address: Address,
        known: Known,
        bad: Sequence[BadRequest],
        headers: Mapping[str, str],
        *,
        timeout_seconds: float,
        may_be: frozenset[str],
    ) -> None:
        self._address = address
        self._known = known
        self._bad = bad
        self._wires = [case.wire(headers) for case in known.cases]
        self._hurried = [case.with_fields(timeout=HURRIED_SECONDS).wire(headers) for case in known.cases]
        self._timeout_seconds = timeout_seconds
        self._may_be = may_be

    async def send(
        self, num_clients: int, seed: str, *, max_requests: int | None = None, is_over: Callable[[], bool] = bool
    ) -> list[Outcome]:
        """Send until enough was sent, or until it is over; every answer has been awaited and checked then.

        Args:
            num_clients: How many send at the same time.
            seed: The same seed gives each client the same requests.
            max_requests: Of all clients together; None for no limit.
            is_over: Asked before each request.
        """
        outcomes: list[Outcome] = []
        num_sent = 0

        async def one_client(draw: random.Random) -> None:
            nonlocal num_sent
            while not is_over() and (max_requests is None or num_sent < max_requests):
                num_sent += 1
                outcomes.append(await self._one(draw, checking))
                if outcomes[-1].status in TURNED_AWAY:
                    await asyncio.sleep(TURNED_AWAY_SECONDS)

        with ThreadPoolExecutor(CHECKING_THREADS, thread_name_prefix="check") as checking:
            async with asyncio.TaskGroup() as clients:
                for number in range(num_clients):
                    clients.create_task(one_client(random.Random(f"{seed} {number}")))  # noqa: S311 - traffic
        return outcomes

    async def _one(self, draw: random.Random, checking: ThreadPoolExecutor) -> Outcome:
        share = draw.random()
        if share < BAD_SHARE:
            return await self._send_bad(draw.choice(self._bad))
        number = draw.randrange(len(self._wires))
        if share < BAD_SHARE + HANG_UP_SHARE:
            stage = draw.choice(STAGES)
            await hang_up(self._address, self._wires[number], stage, draw)
            return Outcome(f"hangs up {stage}", HUNG_UP, None, "", 0.0, None)
        is_hurried = draw.random() < HURRIED_SHARE
        wire = (self._hurried if is_hurried else self._wires)[number]
        answer = await exchange(self._address, wire, self._timeout_seconds)
        found = await asyncio.get_running_loop().run_in_executor(checking, self._known.judged, number, answer)
        is_excused = found.outcome in self._may_be or (is_hurried and found.outcome == DEADLINE)
        fault = None if is_excused else found.fault
        name = self._known.cases[number].name + (" in a hurry" if is_hurried else "")
        return Outcome(name, found.outcome, found.status, found.request_id, _seconds(answer), fault)

    async def _send_bad(self, bad: BadRequest) -> Outcome:
        answer = await exchange(self._address, bad.wire, self._timeout_seconds)
        outcome, fault = refusal_of(bad, answer, self._may_be)
        request_id = answer.headers.get("x-request-id", "")
        return Outcome(bad.name, outcome, answer.status, request_id, _seconds(answer), fault)


def refusal_of(bad: BadRequest, answer: Exchange, may_be: frozenset[str] = frozenset()) -> tuple[str, str | None]:
    """What the answer to a bad request counts as, and what is wrong with it.

    Args:
        bad: The request.
        answer: What came.
        may_be: Further outcomes that are no fault.
    """
    if answer.fault is not None or answer.status is None:
        return NO_ANSWER, f"{bad.name}: {answer.fault}"
    outcome = f"{answer.status} {code_in(answer)}"
    if outcome == f"{bad.status} {bad.code}" or outcome in may_be:
        return outcome, None
    return WRONG_REFUSAL, f"{bad.name}: {outcome} instead of {bad.status} {bad.code}"


def tally(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many came to what, the most frequent first."""
    return dict(Counter(outcome.outcome for outcome in outcomes).most_common())


def num_unanswered(outcomes: Sequence[Outcome]) -> int:
    """Requests that were owed one answer and did not get exactly one."""
    return sum(outcome.outcome == NO_ANSWER for outcome in outcomes)


def num_wrong(outcomes: Sequence[Outcome]) -> int:
    """Answers with a wrong picture, seed or flag, or a refusal of another kind than is due."""
    return sum(outcome.outcome in (WRONG_PICTURE, WRONG_REFUSAL) for outcome in outcomes)


def is_answered(outcome: Outcome) -> bool:
    """Whether it was owed an answer and got it."""
    return outcome.outcome not in (HUNG_UP, NO_ANSWER)


def faults_of(outcomes: Sequence[Outcome]) -> list[str]:
    """What was wrong, each kind once, with how often."""
    counts = Counter(outcome.fault for outcome in outcomes if outcome.fault is not None)
    return [f"{count} times: {fault}" for fault, count in counts.most_common()]


def num_good(outcomes: Sequence[Outcome]) -> int:
    """Requests that were painted as they must be."""
    return sum(outcome.outcome == GOOD for outcome in outcomes)


def _seconds(answer: Exchange) -> float:
    return answer.ended_at - answer.started_at
