"""What is measured of which server, in which order, and how much of it fits a given time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SERVICE, STATIC, STOCK, COMPILED, LITSERVE = "service", "static", "stock", "stock_compiled", "litserve"
NAMES = {
    SERVICE: "this service",
    STATIC: "static micro-batching",
    STOCK: "stock behind a lock",
    COMPILED: "stock compiled, behind a lock",
    LITSERVE: "stock in LitServe",
}
PEERS = (STATIC, STOCK, COMPILED, LITSERVE)
MAIN = (SERVICE, STATIC, STOCK)
ONE_AT_A_TIME = (STOCK, COMPILED)
"""Servers behind a lock: more clients than keep it busy only make the end of a round longer."""

SAME_RATE_SHARE = 0.8
HIGHEST_SHARE = 0.95
OWN_SHARES = (0.8, 0.6, HIGHEST_SHARE, 0.4, 0.2)

Kind = Literal["alone", "saturated", "open", "bursts"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to send.

    Attributes:
        size: Side of the pictures in pixels.
        steps: Steps where all requests have the same number.
        many_steps: Steps of the second, longer request that is sent alone.
        mixed_steps: Least and most steps where they differ; their mean is `steps`.
        warm_up_jobs: Requests to each server that do not count.
        alone_jobs: Requests of which the median is the latency alone.
        alone_seconds: None of these is sent after so many seconds.
        clients: Of a closed loop; `lock_clients` for servers that do one request at a time.
        lock_clients: See there.
        saturated_seconds: How long they send.
        same_rate_seconds: How long requests arrive where servers are compared at the same rate.
        open_seconds: How long they arrive at the other rates.
        burst_size: Requests that arrive at once.
        burst_interval_seconds: From one burst to the next.
        bursts_seconds: How long requests arrive in bursts.
        burst_background_share: Share of the capacity that arrives between bursts.
        settle_seconds: From the start of a round, until the device is as busy as it gets.
        tail_seconds: What the last answers of a round are taken to need when a piece is fitted into the time left.
        timeout_seconds: A request without an answer by then is given up.
    """

    size: int
    steps: int
    many_steps: int
    mixed_steps: tuple[int, int]
    warm_up_jobs: int
    alone_jobs: int
    alone_seconds: float
    clients: int
    lock_clients: int
    saturated_seconds: float
    same_rate_seconds: float
    open_seconds: float
    burst_size: int
    burst_interval_seconds: float
    bursts_seconds: float
    burst_background_share: float
    settle_seconds: float
    tail_seconds: float
    timeout_seconds: float


FULL = Plan(
    size=512,
    steps=20,
    many_steps=50,
    mixed_steps=(10, 30),
    warm_up_jobs=4,
    alone_jobs=5,
    alone_seconds=8.0,
    clients=32,
    lock_clients=4,
    saturated_seconds=12.0,
    same_rate_seconds=24.0,
    open_seconds=10.0,
    burst_size=16,
    burst_interval_seconds=6.0,
    bursts_seconds=12.0,
    burst_background_share=0.2,
    settle_seconds=2.0,
    tail_seconds=4.0,
    timeout_seconds=60.0,
)
TINY = Plan(
    size=64,
    steps=4,
    many_steps=8,
    mixed_steps=(2, 6),
    warm_up_jobs=2,
    alone_jobs=2,
    alone_seconds=2.0,
    clients=4,
    lock_clients=2,
    saturated_seconds=1.0,
    same_rate_seconds=1.5,
    open_seconds=0.8,
    burst_size=4,
    burst_interval_seconds=1.0,
    bursts_seconds=1.0,
    burst_background_share=0.2,
    settle_seconds=0.2,
    tail_seconds=0.5,
    timeout_seconds=20.0,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of load on one server.

    Attributes:
        server: Its key, such as `SERVICE`.
        kind: `alone`: one client; `saturated`: as many as keep it busy; `open`: Poisson
            arrivals; `bursts`: many at once over a Poisson background.
        steps: Least and most steps of its requests.
        seconds: How long requests are sent.
        clients: Of a closed loop, else 0.
        rate: Requests a second of Poisson arrivals, else 0.
        share: Which part of a capacity that rate is.
        share_of: Whose capacity.
        max_jobs: It ends with so many requests; 0 for no such end.
    """

    server: str
    kind: Kind
    steps: tuple[int, int]
    seconds: float
    clients: int = 0
    rate: float = 0.0
    share: float = 0.0
    share_of: str = ""
    max_jobs: int = 0

    @property
    def title(self) -> str:
        """What was sent, in words."""
        first, last = self.steps
        steps = f"{first} steps" if first == last else f"{first} to {last} steps"
        if self.kind == "alone":
            return f"one client, {steps}"
        if self.kind == "saturated":
            return f"{self.clients} clients, {steps}"
        arrivals = "Poisson" if self.kind == "open" else "bursts over Poisson"
        return f"{arrivals}, {self.rate:.2f}/s ({self.share:.0%} of {NAMES[self.share_of]}), {steps}"


def closed_pieces(plan: Plan, servers: Sequence[str]) -> list[Piece]:
    """Each server alone and saturated, kind by kind, so that the servers are compared before time runs out."""
    same, many = (plan.steps, plan.steps), (plan.many_steps, plan.many_steps)
    alone = [
        Piece(server, "alone", steps, plan.alone_seconds, clients=1, max_jobs=plan.alone_jobs)
        for steps in (same, many)
        for server in servers
    ]
    # The last one gives the capacity that the rates of mixed requests are shares of.
    saturated = [
        Piece(server, "saturated", steps, plan.saturated_seconds, clients=_clients(plan, server))
        for steps in (same, plan.mixed_steps)
        for server in servers
    ]
    return alone + saturated


def same_rate_pieces(plan: Plan, capacities: Mapping[str, float], share: float, seconds: float) -> list[Piece]:
    """All servers at one rate: a share of the static micro-batching server's capacity.

    Servers that the rate would overload are left out: in a queue that only grows, latency is
    the length of the measurement.

    Args:
        plan: Its mix of steps.
        capacities: Server -> requests a second that it answered when saturated.
        share: 0 to 1.
        seconds: How long requests arrive.
    """
    if STATIC not in capacities:
        return []
    rate = share * capacities[STATIC]
    able = [server for server, capacity in capacities.items() if rate <= HIGHEST_SHARE * capacity]
    return [
        Piece(server, "open", plan.mixed_steps, seconds, rate=rate, share=share, share_of=STATIC) for server in able
    ]


def own_rate_pieces(plan: Plan, capacities: Mapping[str, float]) -> list[Piece]:
    """Each server at shares of its own capacity, the telling ones first."""
    return [
        Piece(server, "open", plan.mixed_steps, plan.open_seconds, rate=share * capacity, share=share, share_of=server)
        for share in OWN_SHARES
        for server, capacity in capacities.items()
        if capacity > 0
    ]


def burst_pieces(plan: Plan, capacities: Mapping[str, float]) -> list[Piece]:
    """Each server under the same bursts, over a background that is a share of the slowest server's capacity."""
    able = {server: capacity for server, capacity in capacities.items() if capacity > 0}
    if not able:
        return []
    slowest = min(able, key=lambda server: able[server])
    share = plan.burst_background_share
    rate = share * able[slowest]
    return [
        Piece(server, "bursts", plan.mixed_steps, plan.bursts_seconds, rate=rate, share=share, share_of=slowest)
        for server in able
    ]


class Budget:
    """The time that a run may take.

    Args:
        max_seconds: From now on.
        clock: Seconds that only grow.
    """

    def __init__(self, max_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_at = clock() + max_seconds

    def left_seconds(self) -> float:
        """What is left, never negative."""
        return max(0.0, self._ends_at - self._clock())

    def allows(self, piece: Piece, plan: Plan) -> bool:
        """Whether a piece, its last answers included, would end in time."""
        return piece.seconds + plan.tail_seconds <= self.left_seconds()


def _clients(plan: Plan, server: str) -> int:
    return plan.lock_clients if server in ONE_AT_A_TIME else plan.clients
