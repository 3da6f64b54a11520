"""Whether something grows with the number of requests: a robust slope and a bound for it. Pure functions of numbers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

PER_REQUESTS = 1000
MIN_POINTS = 4


@dataclass(frozen=True, slots=True)
class Growth:
    """How something went with the requests answered.

    Attributes:
        first: At the beginning of what counts.
        last: At its end.
        slope: Growth for each 1000 requests.
        bound: The most that counts as flat.
    """

    first: float
    last: float
    slope: float
    bound: float

    @property
    def is_flat(self) -> bool:
        """Whether it does not grow by more than the bound; what shrinks does not leak."""
        return self.slope <= self.bound


def theil_sen(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points, which up to 29 % of outliers do not move far.

    Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968.

    Args:
        xs: Where.
        ys: What was there.

    Raises:
        ValueError: The two differ in length, or there are no two different places.
    """
    if len(xs) != len(ys):
        raise ValueError("a slope needs as many values as places")
    points = zip(xs, ys, strict=True)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    if not slopes:
        raise ValueError("a slope needs two places")
    return statistics.median(slopes)


def growth(num_requests: Sequence[float], values: Sequence[float], bound: float) -> Growth:
    """How values went over the second half of the samples; caches and pools fill in the first.

    Args:
        num_requests: Requests answered by each sample, ascending.
        values: What each sample found.
        bound: The most growth for 1000 requests that counts as flat.

    Raises:
        ValueError: There are fewer than `MIN_POINTS` samples in the second half.
    """
    half = len(values) // 2
    xs, ys = num_requests[half:], values[half:]
    if len(ys) < MIN_POINTS:
        raise ValueError(f"{len(values)} samples are too few to say what grows")
    return Growth(ys[0], ys[-1], PER_REQUESTS * theil_sen(xs, ys), bound)
