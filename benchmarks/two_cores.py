"""This service beside the stock diffusers pipeline behind a lock, on a CPU.

    python -m benchmarks.two_cores [--quick] [--json FILE]

Both servers are started as processes on 127.0.0.1 with the same checkpoint in fp32
and the same number of torch threads, one per core; while one is measured the other
is idle. Both get the same requests in the same run, in rounds that take turns, so
that the machine's noise meets both:

1. closed loop with 1 client and with 4: the next request goes out with the answer;
2. open loop: Poisson arrivals at 80 % of the stock server's measured capacity,
   latency counted from the moment at which a request was due.

The first requests warm both up and do not count. Every answer is checked. Prints
Markdown, writes every single figure as JSON, and exits non-zero when an answer was
not a PNG of the right size.
"""

import argparse
import asyncio
import json
import shlex
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.arrivals import poisson_arrivals
from benchmarks.load import Round, closed_loop, open_client, open_loop
from benchmarks.report import Comparison, NoGoodAnswerError, document, figures_of, machine_facts, markdown, num_cores
from benchmarks.servers import Server, ServerFailedError, Where, inpaint_service, stock_lock
from benchmarks.traffic import Mix, draw_jobs

BUNDLED_FOLDER = Path(__file__).parent.parent / "service" / "worker" / "models" / "demo"
OPEN_LOOP_LOAD = 0.8
STEPS = (6, 14)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to send.

    Attributes:
        warm_up_jobs: Requests per server that do not count.
        rounds: Rounds of each load.
        closed_jobs: Requests of a closed-loop round, by number of clients.
        closed_max_seconds: A closed-loop round sends nothing after these.
        open_seconds: Length of an open-loop round.
        max_seconds: After these, counted from the first round, each load gets no more than one round.
    """

    warm_up_jobs: int
    rounds: int
    closed_jobs: dict[int, int]
    closed_max_seconds: float
    open_seconds: float
    max_seconds: float


FULL = Plan(
    warm_up_jobs=6,
    rounds=3,
    closed_jobs={1: 9, 4: 18},
    closed_max_seconds=16.0,
    open_seconds=15.0,
    max_seconds=220.0,
)
QUICK = Plan(
    warm_up_jobs=4,
    rounds=1,
    closed_jobs={1: 9, 4: 9},
    closed_max_seconds=8.0,
    open_seconds=8.0,
    max_seconds=60.0,
)

Load = Callable[[Server, int], Awaitable[Round]]
"""One round of one load on one server: (server, number of the round)."""


async def measure(service: Server, peer: Server, plan: Plan, size: int, seed: int) -> list[Comparison]:
    """All loads on both servers."""
    async with open_client() as client:
        for server in (service, peer):
            _say(f"{server.name}: ready after {server.start_seconds:.0f} s, warming up")
            jobs = draw_jobs(plan.warm_up_jobs, _mix(size), seed)
            figures_of([await closed_loop(client, server.url, jobs, 4, plan.closed_max_seconds)])
        deadline = time.perf_counter() + plan.max_seconds
        comparisons = []
        for concurrency in plan.closed_jobs:
            load = _closed(client, plan, concurrency, size, seed)
            title = f"closed loop, {concurrency} client{'s' if concurrency > 1 else ''}"
            rounds = await _take_turns(title, load, (service, peer), plan.rounds, deadline)
            comparisons.append(Comparison(title, *rounds, is_open=False))
        # The last load kept the stock server busy all the time: its rate there is its capacity.
        rate = OPEN_LOOP_LOAD * figures_of(comparisons[-1].peer).requests_per_second
        load = _open(client, plan, rate, size, seed)
        title = f"open loop, Poisson, {rate:.2f} requests/s ({OPEN_LOOP_LOAD:.0%} of stock)"
        rounds = await _take_turns(title, load, (service, peer), plan.rounds, deadline)
        comparisons.append(Comparison(title, *rounds, is_open=True))
        return comparisons


def _mix(size: int) -> Mix:
    return Mix(STEPS, {size: 1.0})


def _closed(client: httpx.AsyncClient, plan: Plan, concurrency: int, size: int, seed: int) -> Load:
    async def load(server: Server, number: int) -> Round:
        jobs = draw_jobs(plan.closed_jobs[concurrency], _mix(size), seed + 1000 * concurrency + number)
        return await closed_loop(client, server.url, jobs, concurrency, plan.closed_max_seconds)

    return load


def _open(client: httpx.AsyncClient, plan: Plan, rate: float, size: int, seed: int) -> Load:
    async def load(server: Server, number: int) -> Round:
        arrivals = poisson_arrivals(rate, plan.open_seconds, seed + number)
        return await open_loop(client, server.url, draw_jobs(len(arrivals), _mix(size), seed + number), arrivals)

    return load


async def _take_turns(
    title: str, load: Load, servers: tuple[Server, Server], num_rounds: int, deadline: float
) -> tuple[Sequence[Round], Sequence[Round]]:
    """Rounds of one load on both servers, which take turns at going first."""
    first: list[Round] = []
    second: list[Round] = []
    for number in range(num_rounds):
        if number > 0 and time.perf_counter() > deadline:
            _say(f"{title}: out of time after {number} of {num_rounds} rounds")
            break
        turns = list(zip(servers, (first, second), strict=True))
        for server, rounds in turns if number % 2 == 0 else reversed(turns):
            one = await load(server, number)
            rounds.append(one)
            _say(f"{title}, round {number + 1}, {server.name}: {len(one.answers)} in {one.seconds:.1f} s")
    return first, second


def main() -> int:
    """Measure, report; 0 when every answer was good."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the servers end, too.
    started_at = time.perf_counter()
    plan = QUICK if arguments.quick else FULL
    facts = machine_facts() | {
        "model": arguments.model.name,
        "threads": f"{arguments.threads} of torch in each server; the load generator shares the same cores",
        "requests": f"{arguments.size}x{arguments.size} PNG, 6 to 14 steps, guidance on, five schedulers, seed "
        f"{arguments.seed}; ratios of rates are medians over pairs of rounds",
        "command": shlex.join(["python", "-m", "benchmarks.two_cores", *sys.argv[1:]]),
    }
    is_bundled = arguments.model == BUNDLED_FOLDER
    where = Where("cpu", "float32", arguments.threads)
    try:
        with (
            inpaint_service("demo" if is_bundled else arguments.model, where) as service,
            stock_lock(arguments.model, where) as peer,
        ):
            comparisons = asyncio.run(measure(service, peer, plan, arguments.size, arguments.seed))
    except (ServerFailedError, NoGoodAnswerError) as error:
        _say(str(error))
        return 1
    facts["took"] = f"{time.perf_counter() - started_at:.0f} s"
    arguments.json.write_text(json.dumps(document(comparisons, facts), indent=1) + "\n", encoding="utf-8")
    print(markdown(comparisons, facts))
    faults = [fault for c in comparisons for rounds in (c.service, c.peer) for fault in figures_of(rounds).faults]
    for fault in faults:
        _say(f"not answered well: {fault}")
    return 1 if faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="This service beside the stock pipeline behind a lock, on a CPU.")
    parser.add_argument("--quick", action="store_true", help="one short round of each load, about a minute")
    parser.add_argument("--model", type=Path, default=BUNDLED_FOLDER, help="folder in diffusers format")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of torch in each server")
    parser.add_argument("--seed", type=int, default=1, help="of the requests and their arrivals")
    parser.add_argument("--json", type=Path, default=Path("two_cores.json"), help="where every figure goes")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
