"""Good and bad traffic for minutes: nothing of a request may stay behind.

Traffic comes in rounds. After each the service comes to rest and is looked at, so that what
is counted is what is left, and not what happens to be under way.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from benchmarks.bad_requests import bad_requests
from benchmarks.cases import Served, mixed_cases, served_model
from benchmarks.exchange import address_of
from benchmarks.flatness import Growth, growth
from benchmarks.mixed import (
    HUNG_UP,
    MixedTraffic,
    Outcome,
    faults_of,
    is_answered,
    num_good,
    num_unanswered,
    num_wrong,
    tally,
)
from benchmarks.paced import OVERLOADED, SERVER_ERROR
from benchmarks.references import Known, take_references
from benchmarks.scrape import scrape
from benchmarks.servers import Server
from benchmarks.soak_server import INSIDE_PATH
from benchmarks.verdicts import Verdict, at_most, equals
from benchmarks.watch import workers_of

MEBIBYTE = 1024 * 1024

BOUNDS: Mapping[str, float] = {
    "API: memory, MiB": 4.0,
    "API: descriptors": 2.0,
    "API: threads": 2.0,
    "API: tasks": 2.0,
    "worker: memory, MiB": 8.0,
    "worker: descriptors": 2.0,
    "worker: threads": 2.0,
}
"""The most growth for 1000 requests that counts as flat."""

LEAKED = ("API: memory, MiB", "API: descriptors", "API: tasks")
"""What the leaking control leaks."""

MAX_BODY_MIB = 2
NUM_CLIENTS = 8
ANSWER_SECONDS = 120.0
REST_SECONDS = 40.0
REST_POLL_SECONDS = 0.1
STILL_POLLS = 3


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """How much to send.

    Attributes:
        steps: Least and most steps of good requests.
        rounds: Of traffic, each with a look after it.
        round_requests: Requests of a round.
        control_rounds: Rounds of the leaking control.
        control_requests: Requests of such a round.
        max_seconds: No further round is begun after these; the control's count for themselves.
    """

    steps: tuple[int, int]
    rounds: int
    round_requests: int
    control_rounds: int
    control_requests: int
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Look:
    """The service at rest.

    Attributes:
        num_requests: Sent so far.
        values: What was found, by name as in `BOUNDS`.
    """

    num_requests: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Soak:
    """What was measured.

    Attributes:
        outcomes: Of every request.
        looks: After each round.
        seconds: How long it took.
    """

    outcomes: tuple[Outcome, ...]
    looks: tuple[Look, ...]
    seconds: float


async def soak(
    server: Server, headers: Mapping[str, str], plan: SoakPlan, seed: int, *, is_control: bool = False
) -> Soak:
    """Rounds of traffic.

    Raises:
        WrongAnswerError: Requests are not answered well even alone.
    """
    address = address_of(server.base_url)
    served = served_model(server.base_url, headers)
    known = await _known(server, headers, served, plan, seed)
    bad = bad_requests(known.cases[0].job, headers, MAX_BODY_MIB * MEBIBYTE)
    traffic = MixedTraffic(address, known, bad, headers, timeout_seconds=ANSWER_SECONDS, may_be=frozenset({OVERLOADED}))
    rounds = plan.control_rounds if is_control else plan.rounds
    num_requests = plan.control_requests if is_control else plan.round_requests
    started_at = time.perf_counter()
    outcomes: list[Outcome] = []
    looks: list[Look] = []
    with httpx.Client(base_url=server.base_url, headers=dict(headers), timeout=30.0, trust_env=False) as client:
        for number in range(rounds):
            if time.perf_counter() - started_at > plan.max_seconds:
                break
            outcomes += await traffic.send(NUM_CLIENTS, f"{seed} {number}", max_requests=num_requests)
            looks.append(Look(len(outcomes), await asyncio.to_thread(look_at_rest, client, server.pid)))
    return Soak(tuple(outcomes), tuple(looks), time.perf_counter() - started_at)


async def _known(server: Server, headers: Mapping[str, str], served: Served, plan: SoakPlan, seed: int) -> Known:
    cases = mixed_cases(served, plan.steps, seed)
    return await take_references(address_of(server.base_url), cases, headers)


def look_at_rest(client: httpx.Client, pid: int) -> dict[str, float]:
    """Wait until nothing is in flight and nothing changes any more, and count what there is.

    Args:
        client: Of the service.
        pid: Of its API process.
    """
    give_up_at = time.monotonic() + REST_SECONDS
    seen: list[dict[str, float]] = []
    while time.monotonic() < give_up_at:
        time.sleep(REST_POLL_SECONDS)
        now = scrape(client, "")
        is_busy = any(sum(now.values(f"inpaint_{name}", "").values()) for name in ("in_flight", "queue_depth"))
        seen = [] if is_busy else [*seen[1 - STILL_POLLS :], _look(client, pid)]
        counts = [{name: value for name, value in one.items() if "memory" not in name} for one in seen]
        if len(seen) == STILL_POLLS and all(count == counts[0] for count in counts):
            break
    return seen[-1] if seen else _look(client, pid)


def _look(client: httpx.Client, pid: int) -> dict[str, float]:
    tasks = float(client.get(INSIDE_PATH).raise_for_status().json()["tasks"])
    api, workers = psutil.Process(pid), workers_of(pid)
    return {**_counted("API", [api]), "API: tasks": tasks, **_counted("worker", workers)}


def _counted(role: str, processes: Sequence[psutil.Process]) -> dict[str, float]:
    return {
        f"{role}: memory, MiB": sum(one.memory_info().rss for one in processes) / MEBIBYTE,
        f"{role}: descriptors": float(sum(one.num_fds() for one in processes)),
        f"{role}: threads": float(sum(one.num_threads() for one in processes)),
    }


def growths(looks: Sequence[Look]) -> dict[str, Growth]:
    """How each thing that is looked at went with the requests.

    Raises:
        ValueError: There are too few looks.
    """
    places = [float(look.num_requests) for look in looks]
    return {name: growth(places, [look.values[name] for look in looks], bound) for name, bound in BOUNDS.items()}


def soak_verdicts(found: Soak, control: Soak) -> list[Verdict]:
    """What is promised of minutes of traffic, and that a leak would have been seen."""
    outcomes = found.outcomes
    owed = [one for one in outcomes if one.outcome != HUNG_UP]
    verdicts = [
        equals("requests answered exactly once, of those that waited", sum(map(is_answered, owed)), len(owed)),
        equals("wrong pictures and wrong refusals", num_wrong(outcomes), 0),
        equals("answers of 5xx", sum(_is_server_error(one) for one in outcomes), 0),
        equals("unexpected answers of any kind", sum(one.fault is not None for one in outcomes), 0),
    ]
    verdicts += [
        at_most(f"{name}: growth for 1000 requests", one.slope, one.bound, "{:.2f}")
        for name, one in growths(found.looks).items()
    ]
    leaking = growths(control.looks)
    return [
        *verdicts,
        *(
            Verdict(
                f"leaking control, {name}: found",
                f"more than {leaking[name].bound:.2f}",
                f"{leaking[name].slope:.2f}",
                not leaking[name].is_flat,
            )
            for name in LEAKED
        ),
    ]


def _is_server_error(outcome: Outcome) -> bool:
    """Whether it is one that the client did not ask for by a deadline of its own."""
    return outcome.status is not None and outcome.status >= SERVER_ERROR and outcome.fault is not None


def soak_facts(found: Soak, control: Soak) -> dict[str, str]:
    """What else a reader needs."""
    first, last = found.looks[len(found.looks) // 2].values, found.looks[-1].values
    counts = ", ".join(f"{name} {first[name]:.0f} to {last[name]:.0f}" for name in BOUNDS)
    return {
        "soak": f"{len(found.outcomes)} requests in {found.seconds:.0f} s, {num_good(found.outcomes)} painted, "
        f"{num_unanswered(found.outcomes)} without an answer; control: {len(control.outcomes)} requests",
        "soak, answers": ", ".join(f"{outcome} {count}" for outcome, count in tally(found.outcomes).items()),
        "soak, second half": counts,
    }


def soak_document(found: Soak, control: Soak) -> dict[str, Any]:
    """Everything but the single answers, for `json.dump`."""
    return {
        name: {
            "requests": len(one.outcomes),
            "seconds": one.seconds,
            "answers": tally(one.outcomes),
            "faults": faults_of(one.outcomes),
            "looks": [asdict(look) for look in one.looks],
            "growth": {what: asdict(how) for what, how in growths(one.looks).items()},
        }
        for name, one in (("service", found), ("leaking control", control))
    }
