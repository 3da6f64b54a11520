"""Five times more than a service can do: it must do as much as before, and tell the others at once."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from benchmarks.arrivals import poisson_arrivals
from benchmarks.cases import equal_cases, served_model
from benchmarks.exchange import address_of
from benchmarks.figures import percentile
from benchmarks.load import GOOD, WRONG_PICTURE
from benchmarks.paced import OVERLOADED, Load, PacedTraffic
from benchmarks.references import take_references
from benchmarks.servers import Server
from benchmarks.verdicts import Verdict, at_least, at_most, equals

OVERLOAD = 5.0
MIN_GOODPUT = 0.95
MAX_REFUSAL_SECONDS = 0.050
MAX_HEALTH_SECONDS = 0.100
HEALTH_INTERVAL_SECONDS = 0.1
HEALTH_TIMEOUT_SECONDS = 30.0
ANSWER_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """How much to send.

    Attributes:
        num_steps: Steps of each request.
        capacity_seconds: Of the closed loop, before and after.
        open_seconds: Of the open loop.
    """

    num_steps: int
    capacity_seconds: float
    open_seconds: float


@dataclass(frozen=True, slots=True)
class Overload:
    """What was measured.

    Attributes:
        capacity: Closed loops, before the overload and after it.
        rate: Requests a second of the open loop.
        overload: The open loop.
        health_seconds: Of each `/healthz` meanwhile; None for one without a good answer.
    """

    capacity: tuple[Load, Load]
    rate: float
    overload: Load
    health_seconds: tuple[float | None, ...]

    @property
    def capacity_per_second(self) -> float:
        """The mean of before and after, so that a machine that gets slower meets both sides."""
        before, after = self.capacity
        return (before.good_per_second + after.good_per_second) / 2


async def measure_overload(server: Server, headers: Mapping[str, str], plan: OverloadPlan, seed: int) -> Overload:
    """Capacity, overload, and capacity again.

    Raises:
        WrongAnswerError: Requests are not answered well even alone.
        ValueError: Nothing was answered well in the closed loop.
    """
    served = served_model(server.base_url, headers)
    address = address_of(server.base_url)
    known = await take_references(address, equal_cases(served, plan.num_steps, seed), headers)
    traffic = PacedTraffic(address, known, headers, ANSWER_SECONDS)
    # More clients than the batch has places: the next request is always there.
    num_clients = 2 * served.max_images
    before = await traffic.closed_loop(num_clients, plan.capacity_seconds)
    rate = OVERLOAD * before.good_per_second
    arrivals = poisson_arrivals(rate, plan.open_seconds, seed)
    health = asyncio.create_task(_probe_health(server.base_url, plan.open_seconds))
    overload = await traffic.open_loop(arrivals, plan.open_seconds)
    after = await traffic.closed_loop(num_clients, plan.capacity_seconds)
    return Overload((before, after), rate, overload, await health)


async def _probe_health(base_url: str, seconds: float) -> tuple[float | None, ...]:
    """Latencies of `/healthz`, asked at a fixed pace whatever becomes of those before."""

    async def probe(client: httpx.AsyncClient) -> float | None:
        started_at = time.perf_counter()
        try:
            response = await client.get(f"{base_url}/healthz")
        except httpx.HTTPError:
            return None
        return time.perf_counter() - started_at if response.status_code == httpx.codes.OK else None

    probes = []
    async with httpx.AsyncClient(trust_env=False, timeout=HEALTH_TIMEOUT_SECONDS) as client:
        for _ in range(round(seconds / HEALTH_INTERVAL_SECONDS)):
            probes.append(asyncio.create_task(probe(client)))
            await asyncio.sleep(HEALTH_INTERVAL_SECONDS)
        return tuple(await asyncio.gather(*probes))


def overload_verdicts(found: Overload) -> list[Verdict]:
    """What is promised under overload."""
    load = found.overload
    refused = load.of(OVERLOADED)
    goodput = _ratio(load.good_per_second, found.capacity_per_second)
    health = [seconds for seconds in found.health_seconds if seconds is not None]
    return [
        at_least(f"goodput at {OVERLOAD:g}x capacity, of capacity", goodput, MIN_GOODPUT, "{:.1%}"),
        equals("answers of 5xx", load.num_server_errors, 0),
        equals("requests answered, of those sent", load.num_answered, len(load.sent)),
        equals("answers other than a right picture or 429", len(load.sent) - len(load.of(GOOD)) - len(refused), 0),
        equals("wrong pictures", sum(len(one.of(WRONG_PICTURE)) for one in (load, *found.capacity)), 0),
        at_most(
            "429, p99 from the request's last byte, ms",
            _milliseconds([one.after_sending_seconds for one in refused]),
            1000 * MAX_REFUSAL_SECONDS,
            "{:.1f}",
        ),
        equals("429 without Retry-After", sum(not one.has_retry_after for one in refused), 0),
        at_most("/healthz, p99, ms", _milliseconds(health), 1000 * MAX_HEALTH_SECONDS, "{:.1f}"),
        equals("/healthz without a good answer", len(found.health_seconds) - len(health), 0),
    ]


def overload_facts(found: Overload) -> dict[str, str]:
    """What else a reader needs."""
    load, refused = found.overload, found.overload.of(OVERLOADED)
    before, after = (one.good_per_second for one in found.capacity)
    since_due = _milliseconds([one.ended_seconds - one.due_seconds for one in refused])
    return {
        "capacity": f"{before:.2f} requests/s before, {after:.2f} after, closed loop",
        "overload": f"{found.rate:.2f} requests/s, Poisson, for {load.sending_seconds:g} s: {len(load.sent)} sent, "
        f"{len(load.of(GOOD))} painted ({load.good_per_second:.2f}/s), {len(refused)} refused",
        "429, p99 from the moment at which the request was due": "-" if since_due is None else f"{since_due:.1f} ms",
    }


def overload_document(found: Overload) -> dict[str, Any]:
    """Everything, for `json.dump`."""
    return {"rate": found.rate, "capacity_per_second": found.capacity_per_second} | asdict(found)


def _milliseconds(seconds: Sequence[float]) -> float | None:
    """The 99th percentile, None of nothing."""
    return 1000 * percentile(seconds, 99) if seconds else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
