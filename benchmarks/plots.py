"""Plots of measurements, as PNGs that are read at 900 pixels' width. Needs matplotlib."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import percentile
from benchmarks.load import GOOD, Round
from benchmarks.pieces import NAMES

try:
    from matplotlib.figure import Figure
except ImportError:  # Tables and JSON need none.
    Figure = None

DPI = 150
WIDTH_INCHES = 7.0
"""With `DPI` 1,050 pixels: text stays legible when a page shows it at 900."""

COLOURS = ("#0b6bcb", "#d9630f", "#3a3a3a", "#2a8c4a", "#8e44ad", "#a67c00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GRID = {"color": "#dddddd", "linewidth": 0.6}


class NoMatplotlibError(Exception):
    """matplotlib is not installed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Series:
    """One server over its loads.

    Attributes:
        name: One of the names of `benchmarks.pieces`.
        rates: Requests a second that were offered, ascending.
        values: One per rate, by what it is, such as `p50`: seconds, or answers a second.
    """

    name: str
    rates: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]


def need_matplotlib() -> None:
    """Refuse to go on without it.

    Raises:
        NoMatplotlibError: It is not installed.
    """
    if Figure is None:
        raise NoMatplotlibError("plots need matplotlib: pip install matplotlib")


def latency_against_load(series: Sequence[Series], path: Path) -> None:
    """p50 and p95 of each server against the rate offered, side by side on one logarithmic scale."""
    figure = _figure(3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, ("p50", "p95"), strict=True):
        for one in series:
            panel.plot(one.rates, one.values[name], label=one.name, **_style(one.name))
        panel.set_title(f"{name} latency", fontsize=10)
        panel.set_xlabel("requests offered per second")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(_plain)
        panel.yaxis.set_minor_formatter(_two_and_five)
        panel.grid(visible=True, which="both", **GRID)
        panel.set_xlim(left=0)
    panels[0].set_ylabel("seconds (log scale)")
    _legend_below(figure, panels[0])
    _save(figure, path)


def goodput_against_offered(series: Sequence[Series], bound_seconds: float, path: Path) -> None:
    """Answers within the bound against the rate offered; the diagonal is what could be had at most."""
    figure = _figure(4.0)
    panel = figure.subplots()
    most = max((rate for one in series for rate in one.rates), default=1.0)
    panel.plot((0, most), (0, most), color="#999999", linestyle=":", linewidth=1, label="all within the bound")
    for one in series:
        panel.plot(one.rates, one.values["goodput"], clip_on=False, zorder=3, label=one.name, **_style(one.name))
    panel.set_xlabel("requests offered per second")
    panel.set_ylabel(f"answers within {bound_seconds:.2f} s, per second")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.grid(visible=True, **GRID)
    _legend_below(figure, panel)
    _save(figure, path)


def throughput_bars(loads: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Images a second of saturated servers: a group of bars per server, a bar per load.

    Args:
        loads: What was sent, in words -> server's name -> images a second.
        path: Of the PNG.
    """
    names = list(dict.fromkeys(name for found in loads.values() for name in found))
    figure = _figure(1.4 + 0.55 * len(names))
    panel = figure.subplots()
    height = 0.8 / len(loads)
    for number, (load, found) in enumerate(loads.items()):
        places = [row + (number - (len(loads) - 1) / 2) * height for row, name in enumerate(names) if name in found]
        widths = [found[name] for name in names if name in found]
        bars = panel.barh(places, widths, height * 0.92, label=load, color=COLOURS[number])
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("images per second, server kept busy")
    panel.margins(x=0.1)
    panel.grid(visible=True, axis="x", **GRID)
    panel.set_axisbelow(True)
    _legend_below(figure, panel)
    _save(figure, path)


def batch_histograms(loads: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Shares of steps by the number of images that shared them, a panel per load.

    Args:
        loads: What was sent, in words -> upper bound of images -> steps.
        path: Of the PNG.
    """
    bounds = sorted({float(bound) for steps in loads.values() for bound in steps})
    figure = _figure(0.7 + 1.5 * len(loads))
    panels = figure.subplots(len(loads), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (load, steps) in zip(panels, loads.items(), strict=True):
        total = sum(steps.values()) or 1
        by_bound = {float(bound): count for bound, count in steps.items()}
        heights = [100 * by_bound.get(bound, 0) / total for bound in bounds]
        bars = panel.bar(range(len(bounds)), heights, color=COLOURS[0])
        panel.bar_label(bars, [f"{height:.0f}" if height >= 0.5 else "" for height in heights], fontsize=8, padding=1)
        panel.set_title(f"{load} ({total:,} steps)", fontsize=9, loc="left")
        panel.set_ylabel("% of steps")
        panel.margins(y=0.18)
        panel.grid(visible=True, axis="y", **GRID)
        panel.set_axisbelow(True)
    panels[-1].set_xticks(range(len(bounds)), bucket_labels(bounds))
    panels[-1].set_xlabel("images that shared a step")
    _save(figure, path)


def bucket_labels(bounds: Sequence[float]) -> list[str]:
    """What whole numbers are in each bucket: `3`, `9-12`, `> 128`."""
    labels = []
    for below, bound in zip((0.0, *bounds), bounds, strict=False):
        first = f"{below + 1:g}"
        labels.append(f"> {below:g}" if math.isinf(bound) else first if bound == below + 1 else f"{first}-{bound:g}")
    return labels


def answers(one: Round, bound_seconds: float | None, path: Path) -> None:
    """Every answer of one round over time, and the distribution of the good ones' latencies."""
    figure = _figure(3.8)
    over_time, distribution = figure.subplots(1, 2, width_ratios=(3, 2))
    outcomes = dict.fromkeys([GOOD, *(answer.outcome for answer in one.answers)])
    for number, outcome in enumerate(outcomes):
        found = [answer for answer in one.answers if answer.outcome == outcome]
        times, latencies = [answer.due_seconds for answer in found], [answer.latency_seconds for answer in found]
        over_time.scatter(
            times, latencies, s=9, color=COLOURS[number % len(COLOURS)], label=f"{outcome} ({len(found)})"
        )
    over_time.set_xlabel("due, seconds from the start")
    over_time.set_ylabel("latency, seconds")
    latencies = sorted(answer.latency_seconds for answer in one.good)
    shares = [100 * (rank + 1) / len(latencies) for rank in range(len(latencies))]
    distribution.step(latencies, shares, where="post", color=COLOURS[0])
    if latencies:
        ranks = {rank: percentile(latencies, rank) for rank in (50, 95, 99)}
        distribution.plot(list(ranks.values()), list(ranks), "o", markersize=4, color=COLOURS[0])
        title = ", ".join(f"p{rank} {seconds:.3g} s" for rank, seconds in ranks.items())
        distribution.set_title(title, fontsize=8)
    if bound_seconds is not None:
        for draw, label in ((over_time.axhline, f"bound {bound_seconds:g} s"), (distribution.axvline, None)):
            draw(bound_seconds, color="#999999", linestyle="--", linewidth=1, label=label)
    distribution.set_xlabel("latency, seconds")
    distribution.set_ylabel("% of good answers")
    distribution.set_ylim(0, 104)
    for panel in (over_time, distribution):
        panel.grid(visible=True, **GRID)
        panel.set_axisbelow(True)
    over_time.set_ylim(bottom=0)
    distribution.set_xlim(left=0)
    _legend_below(figure, over_time)
    _save(figure, path)


def _figure(height_inches: float) -> Any:  # noqa: ANN401 - matplotlib may not be there
    need_matplotlib()
    return Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")


def _style(name: str) -> dict[str, Any]:
    """The same for a server in every plot of every run."""
    number = list(NAMES.values()).index(name)
    return {
        "color": COLOURS[number],
        "marker": MARKERS[number],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _two_and_five(value: float, _: int | None = None) -> str:
    """A label between powers of ten, only where they do not overlap."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _legend_below(figure: Any, panel: Any) -> None:  # noqa: ANN401 - matplotlib may not be there
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 - matplotlib may not be there
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    figure.savefig(path)
