"""The arithmetic of a measurement: percentiles, ratios, rates. Pure functions of numbers."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load import Round


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile, with linear interpolation between the two nearest ranks (NumPy's default).

    Args:
        values: At least one number, in any order.
        percent: 0 to 100.

    Raises:
        ValueError: There are no values, or `percent` is out of range.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be within 0 and 100, not {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    lower = math.floor(rank)
    upper = math.ceil(rank)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (rank - lower)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the pairwise ratios: element i of both was measured in round i.

    Pairs share their moment's machine noise, so their ratios vary less than either side.

    Raises:
        ValueError: The two differ in length or are empty, or a denominator is not positive.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError("ratios need as many numerators as denominators, and at least one")
    if any(denominator <= 0 for denominator in denominators):
        raise ValueError("ratios need positive denominators")
    return statistics.median(top / bottom for top, bottom in zip(numerators, denominators, strict=True))


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, percentiles and maximum of times, in seconds."""

    mean_seconds: float
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What one round of load came to.

    Attributes:
        requests: Requests sent.
        outcomes: How many came to what, `good` among them.
        seconds: From the start to the last answer.
        offered_per_second: Requests sent a second of the window in which they were.
        achieved_per_second: Good answers a second, up to the last answer.
        model_calls_per_second: Steps of good answers a second, guidance not counted twice.
        latency: Of good answers; None when there was none.
        bound_seconds: The latency that goodput asks for, None when it was not asked for.
        goodput_per_second: Good answers within the bound, a second of the window.
        late: How late the sender was, over all requests; None when none was sent.
    """

    requests: int
    outcomes: dict[str, int]
    seconds: float
    offered_per_second: float
    achieved_per_second: float
    model_calls_per_second: float
    latency: Spread | None
    bound_seconds: float | None
    goodput_per_second: float | None
    late: Spread | None


def summary_of(one: Round, bound_seconds: float | None = None) -> Summary:
    """The figures of one round.

    Args:
        one: The round.
        bound_seconds: The latency that counts as good enough, None for no goodput.
    """
    latencies = [answer.latency_seconds for answer in one.good]
    window_seconds = one.sending_seconds or one.seconds
    return Summary(
        requests=len(one.answers),
        outcomes=dict(Counter(answer.outcome for answer in one.answers).most_common()),
        seconds=one.seconds,
        offered_per_second=len(one.answers) / window_seconds,
        achieved_per_second=one.requests_per_second,
        model_calls_per_second=one.model_calls_per_second,
        latency=spread_of(latencies),
        bound_seconds=bound_seconds,
        goodput_per_second=None if bound_seconds is None else goodput(latencies, bound_seconds, window_seconds),
        late=spread_of([answer.late_seconds for answer in one.answers]),
    )


def spread_of(seconds: Sequence[float]) -> Spread | None:
    """The spread of some times, None of none."""
    if not seconds:
        return None
    return Spread(
        mean_seconds=statistics.fmean(seconds),
        p50_seconds=percentile(seconds, 50),
        p95_seconds=percentile(seconds, 95),
        p99_seconds=percentile(seconds, 99),
        max_seconds=max(seconds),
    )


def goodput(latencies: Sequence[float], bound_seconds: float, window_seconds: float) -> float:
    """Good answers within the bound, for each second of the window in which they were asked for."""
    return sum(latency <= bound_seconds for latency in latencies) / window_seconds


def rate_within(one: Round, begin_seconds: float, end_seconds: float) -> float:
    """Good answers a second of a stretch within a round, by the moments at which they ended.

    Raises:
        ValueError: The stretch has no length.
    """
    if end_seconds <= begin_seconds:
        raise ValueError("a rate needs a stretch of some length")
    ends = [answer.due_seconds + answer.latency_seconds for answer in one.good]
    return sum(begin_seconds <= end < end_seconds for end in ends) / (end_seconds - begin_seconds)


def steady_rates(one: Round) -> tuple[float, float]:
    """Good answers and model calls a second of a closed loop, without its start and its end.

    Each answer counts with the share of its life, from sending to the last byte, that lies
    between the first answer and the end of sending. While the number of clients is
    constant this is their number over the mean life (Little's law), also where answers
    come in clumps, as those of a batch that ends together: counting the ends within the
    window would be wrong by up to a clump.

    Args:
        one: A closed-loop round. One that is over before its window begins counts as a whole.
    """
    lives = [(answer.due_seconds, answer.due_seconds + answer.latency_seconds, answer.num_steps) for answer in one.good]
    begin, end = min((life[1] for life in lives), default=0.0), one.sending_seconds
    shares = [(max(0.0, min(b, end) - max(a, begin)) / (b - a), num_steps) for a, b, num_steps in lives]
    if end <= begin or not any(share for share, _ in shares):
        return one.requests_per_second, one.model_calls_per_second
    requests = sum(share for share, _ in shares)
    model_calls = sum(share * num_steps for share, num_steps in shares)
    return requests / (end - begin), model_calls / (end - begin)
