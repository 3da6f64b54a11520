"""When requests arrive: a Poisson process, bursts, or a recorded trace."""

import csv
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.traffic import Wish

TRACE_FIELDS = ("seconds", "steps", "size", "scheduler")


class TraceError(ValueError):
    """A trace cannot be read; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace.

    Attributes:
        seconds: From the start.
        wish: What the trace says about the request.
    """

    seconds: float
    wish: Wish


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


def burst_arrivals(
    size: int, interval_seconds: float, seconds: float, background_per_second: float, seed: int
) -> tuple[float, ...]:
    """`size` requests at once every `interval_seconds`, over a Poisson background; ascending.

    Args:
        size: Requests of a burst.
        interval_seconds: From burst to burst; the first comes after half of it.
        seconds: Length of the window; every moment is before its end.
        background_per_second: Mean rate of the background, 0 for none.
        seed: Of the background.

    Raises:
        ValueError: A size, interval or window is not positive, or the background's rate is negative.
    """
    if size < 1 or interval_seconds <= 0 or seconds <= 0 or background_per_second < 0:
        raise ValueError("bursts need a positive size, interval and window, and no negative background")
    moments = []
    moment = interval_seconds / 2
    while moment < seconds:
        moments += [moment] * size
        moment += interval_seconds
    if background_per_second > 0:
        moments += poisson_arrivals(background_per_second, seconds, seed)
    return tuple(sorted(moments))


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """The requests of a trace, ascending.

    A CSV with a header, or JSON lines where the name ends in `.jsonl`, `.ndjson` or `.json`:
    `seconds` from the start, and where given `steps`, `size` (pixels) and `scheduler`.

    Raises:
        TraceError: A line lacks its moment, has a field of another name, or a value that is no number.
    """
    read = _json_lines if path.suffix in (".jsonl", ".ndjson", ".json") else _csv_lines
    arrivals = []
    for number, line in read(path):
        try:
            arrivals.append(_arrival(line))
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if not arrivals:
        raise TraceError(f"{path} has no requests")
    return tuple(sorted(arrivals, key=lambda arrival: arrival.seconds))


def _json_lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if text.strip():
            try:
                lines.append((number, json.loads(text)))
            except json.JSONDecodeError as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
    return lines


def _csv_lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return [(reader.line_num, line) for line in reader]


def _arrival(line: Mapping[str, Any]) -> Arrival:
    if unknown := set(line) - set(TRACE_FIELDS):
        raise ValueError(f"no field is called {', '.join(map(str, unknown))}; there are {', '.join(TRACE_FIELDS)}")
    seconds = float(line["seconds"])
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"seconds must be 0 or more, not {seconds}")
    wish = Wish(_positive(line, "steps"), _positive(line, "size"), line.get("scheduler") or None)
    return Arrival(seconds, wish)


def _positive(line: Mapping[str, Any], name: str) -> int | None:
    if line.get(name) in (None, ""):
        return None
    number = int(line[name])
    if number < 1:
        raise ValueError(f"{name} must be positive, not {number}")
    return number
