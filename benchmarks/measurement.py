"""One run of the comparison: pieces of load on running servers, and what came of them, written as it comes."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.arrivals import burst_arrivals, poisson_arrivals
from benchmarks.figures import Summary, steady_rates, summary_of
from benchmarks.load import Round, closed_loop, open_client, open_loop
from benchmarks.pieces import (
    MAIN,
    NAMES,
    OWN_SHARES,
    SAME_RATE_SHARE,
    SERVICE,
    STATIC,
    STOCK,
    Budget,
    Piece,
    Plan,
    burst_pieces,
    closed_pieces,
    own_rate_pieces,
    same_rate_pieces,
)
from benchmarks.servers import Server
from benchmarks.traffic import Job, Mix, draw_jobs
from benchmarks.watch import Watch, Watched

MAX_CLOSED_JOBS = 4000
BOUND_FACTOR = 2.0
MODELS_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one piece came to.

    Attributes:
        piece: What was sent.
        summary: The figures of all of it.
        steady_requests_per_second: Of a closed loop, without its start and end.
        steady_model_calls_per_second: The same, of model calls.
        watched: What server and device did meanwhile.
    """

    piece: Piece
    summary: Summary
    steady_requests_per_second: float
    steady_model_calls_per_second: float
    watched: Watched


class Measurement:
    """A run in the making.

    Args:
        folder: Where `results.json` and `answers.jsonl` go.
        facts: What was measured on, for the report.
        plan: How much to send.
        budget: How long it may take.
        device: What the servers run on.
        seed: Of requests and arrivals; the same for all servers.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], plan: Plan, budget: Budget, device: str, *, seed: int
    ) -> None:
        self._folder = folder
        self._facts = facts
        self._plan = plan
        self._budget = budget
        self._device = device
        self._seed = seed
        self._findings: list[Finding] = []
        self._starts: list[dict[str, Any]] = []
        self._left_out: list[dict[str, str]] = []
        self._served: dict[str, Any] = {}
        self.has_failed = False
        (folder / "answers.jsonl").write_text("", encoding="utf-8")

    def note_start(self, key: str, cache: str | None, server: Server) -> None:
        """A server is ready; `cache` says whether its compile cache was `cold` or `cached`."""
        self._starts.append({"server": key, "cache": cache, "seconds": server.start_seconds})
        self._say(f"{NAMES[key]}: ready after {server.start_seconds:.1f} s" + (f" ({cache})" if cache else ""))
        if key == SERVICE:
            self._served = _served_model(server.base_url)
        self._write()

    def note_failure(self, key: str, reason: str) -> None:
        """A server did not start, or gave no good answer to warm up with."""
        self.has_failed = True
        self._leave_out(key, "everything", reason)

    def take_all(self, running: Mapping[str, Server]) -> None:
        """Every piece that the time allows, on servers that are ready; the first ones are compared first."""
        running = {key: server for key, server in running.items() if self._warm_up(key, server)}
        first = [key for key in running if key in MAIN]
        others = [key for key in running if key not in MAIN]
        plan = self._plan
        self._take(closed_pieces(plan, first), running)
        self._take(same_rate_pieces(plan, self._capacities(first), SAME_RATE_SHARE, plan.same_rate_seconds), running)
        self._take(burst_pieces(plan, self._capacities(first)), running)
        self._take(closed_pieces(plan, others), running)
        self._take(own_rate_pieces(plan, self._capacities(running)), running)
        # The static server's own shares are its part of the comparison at these rates.
        able = {key: rate for key, rate in self._capacities(running).items() if key != STATIC}
        same_rates = [
            piece
            for share in (SAME_RATE_SHARE, *(share for share in OWN_SHARES if share != SAME_RATE_SHARE))
            for piece in same_rate_pieces(plan, self._capacities(running), share, plan.open_seconds)
            if piece.server in able and not self._has(piece)
        ]
        self._take(same_rates, running)
        self._write()

    def document(self) -> dict[str, Any]:
        """Everything but the single answers, for `json.dump`."""
        return {
            "facts": dict(self._facts),
            "bound_seconds": self._bound_seconds(),
            "bound": f"{BOUND_FACTOR:g} times the median latency of one request alone, "
            f"{self._plan.steps} steps, of {NAMES[self._bound_server()]}",
            "starts": self._starts,
            "served": self._served,
            "settle_seconds": self._plan.settle_seconds,
            "pieces": [_entry(finding) for finding in self._findings],
            "left_out": self._left_out,
        }

    def _take(self, pieces: Sequence[Piece], running: Mapping[str, Server]) -> None:
        for piece in pieces:
            if self._has(piece):
                continue
            if not self._budget.allows(piece, self._plan):
                self._leave_out(piece.server, piece.title, "no time left")
                continue
            self._take_one(piece, running[piece.server])

    def _take_one(self, piece: Piece, server: Server) -> None:
        metrics_url = server.base_url if piece.server == SERVICE else None
        requests = draw(piece, self._plan, self._seed)  # Before the watch: it takes a second in which nothing is sent.
        settle_seconds = self._plan.settle_seconds if piece.kind in ("saturated", "open") else 0.0
        with Watch(server.pid, self._device, metrics_url, piece.seconds, settle_seconds) as watch:
            one = asyncio.run(send(server.url, piece, self._plan, requests))
        finding = Finding(piece, summary_of(one, self._bound_seconds()), *steady_rates(one), watch.seen)
        self._findings.append(finding)
        with (self._folder / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"piece": asdict(piece), "round": asdict(one)}) + "\n")
        self._write()
        summary = finding.summary
        p95 = f", p95 {summary.latency.p95_seconds:.2f} s" if summary.latency else ""
        self._say(
            f"{NAMES[piece.server]}, {piece.title}: {summary.outcomes} in {summary.seconds:.1f} s, "
            f"{summary.achieved_per_second:.2f}/s{p95}; {self._budget.left_seconds():.0f} s left"
        )

    def _warm_up(self, key: str, server: Server) -> bool:
        plan = self._plan
        piece = Piece(
            key,
            "saturated",
            plan.mixed_steps,
            plan.timeout_seconds,
            clients=plan.lock_clients,
            max_jobs=plan.warm_up_jobs,
        )
        one = asyncio.run(send(server.url, piece, plan, draw(piece, plan, self._seed)))
        if not one.good:
            self.note_failure(key, f"no good answer: {one.answers[0].fault}")
        return bool(one.good)

    def _capacities(self, keys: Sequence[str] | Mapping[str, Server]) -> dict[str, float]:
        """Requests of mixed steps that servers answered a second when saturated, where measured."""
        found = {
            finding.piece.server: finding.steady_requests_per_second
            for finding in self._findings
            if finding.piece.kind == "saturated" and finding.piece.steps == self._plan.mixed_steps
        }
        return {key: found[key] for key in keys if found.get(key, 0.0) > 0}

    def _has(self, piece: Piece) -> bool:
        """Whether it was measured, for a longer or shorter time."""
        return any(_load_of(finding.piece) == _load_of(piece) for finding in self._findings)

    def _bound_server(self) -> str:
        return STOCK if self._alone_seconds(STOCK) is not None else SERVICE

    def _bound_seconds(self) -> float | None:
        alone_seconds = self._alone_seconds(self._bound_server())
        return None if alone_seconds is None else BOUND_FACTOR * alone_seconds

    def _alone_seconds(self, key: str) -> float | None:
        for finding in self._findings:
            piece, latency = finding.piece, finding.summary.latency
            if (piece.server, piece.kind, piece.steps[0]) == (key, "alone", self._plan.steps) and latency is not None:
                return latency.p50_seconds
        return None

    def _leave_out(self, key: str, what: str, why: str) -> None:
        self._left_out.append({"server": key, "what": what, "why": why})
        self._say(f"left out: {NAMES[key]}, {what}: {why}")
        self._write()

    def _write(self) -> None:
        """Replace the file in one go: a run may be cut off at any moment."""
        unfinished = self._folder / "results.json.new"
        unfinished.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._folder / "results.json")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one piece of load sends.

    Attributes:
        jobs: Its requests, in order.
        arrivals: When they are due, in seconds from the start; empty for a closed loop.
    """

    jobs: Sequence[Job]
    arrivals: Sequence[float]


def draw(piece: Piece, plan: Plan, seed: int) -> Drawn:
    """The requests of one piece; the same seed gives all servers the same."""
    mix = Mix(piece.steps, {plan.size: 1.0})
    if piece.kind in ("alone", "saturated"):
        return Drawn(draw_jobs(piece.max_jobs or MAX_CLOSED_JOBS, mix, seed), ())
    if piece.kind == "open":
        arrivals = poisson_arrivals(piece.rate, piece.seconds, seed)
    else:
        arrivals = burst_arrivals(plan.burst_size, plan.burst_interval_seconds, piece.seconds, piece.rate, seed)
    return Drawn(draw_jobs(len(arrivals), mix, seed), arrivals)


async def send(url: str, piece: Piece, plan: Plan, drawn: Drawn) -> Round:
    """One piece of load on one server."""
    async with open_client() as client:
        if piece.kind in ("alone", "saturated"):
            return await closed_loop(
                client, url, drawn.jobs, piece.clients, piece.seconds, timeout_seconds=plan.timeout_seconds
            )
        return await open_loop(
            client,
            url,
            drawn.jobs,
            drawn.arrivals,
            window_seconds=piece.seconds,
            timeout_seconds=plan.timeout_seconds,
        )


def _load_of(piece: Piece) -> tuple[str, str, tuple[int, int], int, float]:
    return piece.server, piece.kind, piece.steps, piece.clients, round(piece.rate, 6)


def _entry(finding: Finding) -> dict[str, Any]:
    watched, answers = finding.watched, finding.summary.requests
    api_seconds = watched.cpu_seconds("api")
    return asdict(finding.piece) | {
        "title": finding.piece.title,
        "figures": asdict(finding.summary),
        "steady_requests_per_second": finding.steady_requests_per_second,
        "steady_model_calls_per_second": finding.steady_model_calls_per_second,
        "api_cpu_ms_per_request": 1000 * api_seconds / answers if answers else None,
        "cpu_seconds": {role: watched.cpu_seconds(role) for role in ("api", "worker", "other")},
        "watched_seconds": watched.seconds,
        "gpu": None if watched.gpu is None else asdict(watched.gpu),
        "service": None if watched.service is None else asdict(watched.service),
        "stepping_ratio": None if watched.service is None else watched.service.stepping_seconds / watched.seconds,
        "busy_ratio": watched.busy_ratio,
        "memory_bytes": watched.memory_bytes,
    }


def _served_model(base_url: str) -> dict[str, Any]:
    """What `/v1/models` says that bears on speed."""
    response = httpx.get(f"{base_url}/v1/models", timeout=MODELS_TIMEOUT_SECONDS, trust_env=False)
    served = response.raise_for_status().json()["data"][0]
    return {name: served[name] for name in ("attention_backend", "native_size", "workers")}
