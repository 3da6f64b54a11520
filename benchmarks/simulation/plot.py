"""Goodput and latency of simulated fleets against load, as a PNG. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.simulation.points import Point


def against_load(points: Sequence[Point], bound: float, path: Path) -> None:
    """Two panels, a line for each number of devices; dashed where workers are lost.

    Args:
        points: With placement of keys.
        bound: That goodput asks for.
        path: Of the PNG.

    Raises:
        NoMatplotlibError: It is not installed.
    """
    plots.need_matplotlib()
    figure = plots.Figure(figsize=(plots.WIDTH_INCHES, 4.2), dpi=plots.DPI, layout="constrained")
    goodput, latency = figure.subplots(1, 2)
    for number, num_devices in enumerate(dict.fromkeys(point.question.num_devices for point in points)):
        name = f"{num_devices} device{'s' if num_devices > 1 else ''}"
        for has_losses in (False, True):
            found = [point for point in points if _is_of(point, num_devices, has_losses=has_losses)]
            loads = [point.question.load for point in found]
            style = {"color": plots.COLOURS[number], "linewidth": 1.6, "linestyle": "--" if has_losses else "-"}
            shares = [100 * point.good_share * point.offered_per_second / point.capacity_per_second for point in found]
            label = f"{name}, workers lost" if has_losses else name
            goodput.plot(loads, shares, marker=plots.MARKERS[number], markersize=4, label=label, **style)
            if not has_losses:
                latency.plot(loads, [point.p50_seconds for point in found], marker=plots.MARKERS[number], **style)
                latency.plot(
                    loads, [point.p99_seconds for point in found], marker=plots.MARKERS[number], alpha=0.45, **style
                )
    most = max(point.question.load for point in points)
    goodput.plot((0, 1), (0, 100), color="#999999", linestyle=":", linewidth=1, label="everything in time")
    goodput.set_ylabel(f"answers within {bound:g} times alone, % of capacity")
    latency.set_ylabel("seconds: p50, and p99 paler (log scale)")
    latency.set_yscale("log")
    for panel in (goodput, latency):
        panel.set_xlabel("requests sent, share of capacity")
        panel.set_xlim(0, most + 0.05)
        panel.grid(visible=True, which="both", **plots.GRID)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    latency.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    goodput.set_ylim(bottom=0)
    figure.legend(*goodput.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)


def _is_of(point: Point, num_devices: int, *, has_losses: bool) -> bool:
    question = point.question
    return question.num_devices == num_devices and question.has_losses == has_losses and question.places_keys
