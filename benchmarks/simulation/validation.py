"""What was measured beside what is predicted: the same requests at the same moments, simulated."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.arrivals import poisson_arrivals
from benchmarks.figures import percentile, steady_rates
from benchmarks.load import GOOD, Answer, Round
from benchmarks.measurement import MAX_CLOSED_JOBS
from benchmarks.pieces import SERVICE
from benchmarks.simulation.costs import Costs, StageCost
from benchmarks.simulation.fleet import PAINTED, Fleet, Simulated, simulate, simulate_closed
from benchmarks.simulation.traffic import Wanted
from benchmarks.tables import table
from benchmarks.traffic import Mix, draw_jobs

TOLERANCE = 0.15

FITTING_ROUNDS = 4
"""The first leaves a tenth of what is missing, each further one a tenth of that."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load.

    Attributes:
        per_second: Good answers a second.
        p50_seconds: Of their latencies.
        p95_seconds: Of the same.
    """

    per_second: float
    p50_seconds: float
    p95_seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load, measured and predicted; medians where it was measured several times."""

    title: str
    measured: Figures
    predicted: Figures

    def error(self, name: str) -> float:
        """By how much the prediction is off, as a share of what was measured."""
        measured = float(getattr(self.measured, name))
        return float(getattr(self.predicted, name)) / measured - 1

    @property
    def agrees(self) -> bool:
        """Whether throughput and p50 are predicted within the tolerance."""
        return all(abs(self.error(name)) <= TOLERANCE for name in ("per_second", "p50_seconds"))


def as_round(simulated: Simulated, sending_seconds: float) -> Round:
    """As if it had been measured."""
    answers = tuple(
        Answer(
            fate.wanted.due_seconds,
            0.0,
            fate.seconds,
            fate.wanted.num_steps,
            GOOD if fate.outcome == PAINTED else fate.outcome,
            None if fate.outcome == PAINTED else fate.outcome,
        )
        for fate in simulated.fates
    )
    return Round(answers, simulated.seconds, sending_seconds, is_cut_short=False)


def figures_of(one: Round, per_second: float | None = None) -> Figures:
    """The figures of a round with good answers; its rate is by default that up to the last of them."""
    latencies = [answer.latency_seconds for answer in one.good]
    rate = one.requests_per_second if per_second is None else per_second
    return Figures(rate, percentile(latencies, 50), percentile(latencies, 95))


def median_of(figures: Sequence[Figures]) -> Figures:
    """Of each figure on its own."""
    return Figures(
        *(
            statistics.median(getattr(one, name) for one in figures)
            for name in ("per_second", "p50_seconds", "p95_seconds")
        )
    )


def against_results(document: Mapping[str, Any], costs: Costs, seed: int) -> list[Comparison]:
    """What `benchmarks.gpu` measured of this service alone, saturated and under Poisson arrivals.

    The device's time for preparing and finishing beside steps follows from one load, see `device_time_from`: the
    throughput of that load is no prediction, everything else is.

    Args:
        document: Its results.
        costs: What the results do not tell.
        seed: That it was run with.
    """
    worker = document["served"]["workers"][0]
    costs = replace(
        costs,
        step_seconds={int(rows): seconds for rows, seconds in worker["step_seconds"].items()},
        max_images=worker["max_images"],
    )
    size = document["served"]["native_size"]
    pieces = [
        piece
        for piece in document["pieces"]
        if piece["server"] == SERVICE
        and piece["kind"] in ("alone", "saturated", "open")
        and piece["figures"]["latency"] is not None
    ]
    costs = device_time_from(pieces, costs, size, seed)
    return [_piece_against(piece, costs, size, seed) for piece in pieces]


def device_time_from(pieces: Sequence[Mapping[str, Any]], costs: Costs, size: int, seed: int) -> Costs:
    """What preparing and finishing an image take of the device's time, from the last load that kept it saturated.

    It is what makes the simulation of that load paint as much. No metric tells it, because kernels of steps and of the
    jobs beside them run interleaved.

    Args:
        pieces: Of `benchmarks.gpu`; without a saturated one nothing changes.
        costs: Its steps are those of the device; preparing and finishing share the time as they do here.
        size: Of the pictures.
        seed: That the load was drawn with.
    """
    saturated = [piece for piece in pieces if piece["kind"] == "saturated"]
    if not saturated or not costs.has_background:
        return costs
    for _ in range(FITTING_ROUNDS):
        one = _piece_against(saturated[-1], costs, size, seed)
        missing = 1 / one.measured.per_second - 1 / one.predicted.per_second
        costs = _with_device_time(costs, max(0.0, _device_time(costs) + missing))
    return costs


def _device_time(costs: Costs) -> float:
    return costs.prepare.device_seconds + costs.finish.device_seconds


def _with_device_time(costs: Costs, seconds: float) -> Costs:
    """Shared by preparing and finishing as it was, or in halves where it was none."""
    share = costs.prepare.device_seconds / _device_time(costs) if _device_time(costs) else 0.5
    return replace(
        costs,
        prepare=replace(costs.prepare, device_seconds=share * seconds),
        finish=replace(costs.finish, device_seconds=(1 - share) * seconds),
    )


def _piece_against(piece: Mapping[str, Any], costs: Costs, size: int, seed: int) -> Comparison:
    if (piece.get("service") or {}).get("stage_seconds"):
        costs = with_stages(costs, piece["service"]["stage_seconds"])
    mix = Mix(tuple(piece["steps"]), {size: 1.0})
    fleet = Fleet((costs,))
    latency = piece["figures"]["latency"]
    if piece["kind"] == "open":
        arrivals = poisson_arrivals(piece["rate"], piece["seconds"], seed)
        jobs = draw_jobs(len(arrivals), mix, seed)
        traffic = [Wanted(moment, job.num_steps) for moment, job in zip(arrivals, jobs, strict=True)]
        predicted = figures_of(as_round(simulate(fleet, traffic), piece["seconds"]))
        per_second = piece["figures"]["achieved_per_second"]
    else:
        steps = [job.num_steps for job in draw_jobs(piece["max_jobs"] or MAX_CLOSED_JOBS, mix, seed)]
        simulated = simulate_closed(fleet, steps, piece["clients"], piece["seconds"])
        one = as_round(simulated, min(piece["seconds"], simulated.seconds))
        predicted = figures_of(one, steady_rates(one)[0])
        per_second = piece["steady_requests_per_second"]
    measured = Figures(per_second, latency["p50_seconds"], latency["p95_seconds"])
    return Comparison(piece["title"], measured, predicted)


def with_stages(costs: Costs, stage_seconds: Mapping[str, float]) -> Costs:
    """Stages as the service's metrics have them: the time of whatever was prepared, or finished, together."""
    edges = sum(stage_seconds.get(stage, 0.0) for stage in ("decode", "fit", "render"))
    finish = stage_seconds.get("vae_decode", 0.0) + stage_seconds.get("safety", 0.0)
    return replace(
        costs,
        prepare=StageCost(stage_seconds.get("prepare", 0.0), 0.0, costs.prepare.device_seconds),
        finish=StageCost(finish, 0.0, costs.finish.device_seconds),
        edge_seconds=edges / 2,
    )


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table, and whether it is good enough."""
    header = ["load", "figure", "measured", "predicted", "error"]
    names = {"per_second": "requests/s", "p50_seconds": "p50, s", "p95_seconds": "p95, s"}
    rows = [
        [
            one.title,
            label,
            f"{getattr(one.measured, name):.2f}",
            f"{getattr(one.predicted, name):.2f}",
            f"{one.error(name):+.1%}",
        ]
        for one in comparisons
        for name, label in names.items()
    ]
    num_off = sum(not one.agrees for one in comparisons)
    verdict = f"{num_off} of {len(comparisons)} loads are off by more than {TOLERANCE:.0%} in throughput or p50."
    return f"{table(header, rows, num_texts=2)}\n\n{verdict}"
