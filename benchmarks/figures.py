"""The arithmetic of a measurement: percentiles, arrivals, ratios. Pure functions of numbers."""

import math
import random
import statistics
from collections.abc import Sequence


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


def poisson_arrivals(per_second: float, seconds: float, seed: int) -> tuple[float, ...]:
    """Moments of a Poisson process, in seconds from its start, ascending.

    Args:
        per_second: Mean rate, positive.
        seconds: Length of the window; every moment is before its end.
        seed: The same seed gives the same moments, scaled by the rate.

    Raises:
        ValueError: The rate or the window is not positive.
    """
    if per_second <= 0 or seconds <= 0:
        raise ValueError("arrivals need a positive rate and a positive window")
    draw = random.Random(seed)  # noqa: S311 - traffic, no secret
    moments = []
    moment = draw.expovariate(per_second)
    while moment < seconds:
        moments.append(moment)
        moment += draw.expovariate(per_second)
    return tuple(moments)
