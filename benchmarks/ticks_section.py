"""Where a saturated worker's time goes, in Markdown, from what `benchmarks.ticks` wrote."""

from collections.abc import Mapping
from typing import Any

from benchmarks.report import words
from benchmarks.tables import table
from benchmarks.timeline import LONG_GAP_MS

NAME_WIDTH = 100
"""Characters of a kernel's name that a table shows."""

NUM_COSTLIEST = 15
"""Kernels that a table lists; the JSON has more."""

READING = (
    "A worker as the service starts it, kept saturated, its loop under a profiler. Busy is the time with at least one "
    "of its {unit} running, idle what lies between two of them; what overlaps counts in full for each part, so that "
    "parts can sum to more than the busy time. Steps are timed on the host."
)
ON_A_CPU = (
    "Of a CPU the profiler sees the operators of the loop's thread: idle is what it spends between them. Requests are "
    "prepared and decoded there, too, between steps."
)

Document = Mapping[str, Any]


def ticks_section(document: Document) -> str:
    """The page's section."""
    facts = "\n".join(f"- {key}: {words(value)}" for key, value in document["facts"].items())
    parts = ["## Where a worker's time goes", facts, reading(document), ticks_tables(document)]
    return "\n\n".join(parts) + "\n"


def reading(document: Document) -> str:
    """What one needs to know to read the tables."""
    text = READING.format(unit=document["unit"])
    return f"{text} {ON_A_CPU}" if document["unit"] == "operators" else text


def ticks_tables(document: Document) -> str:
    """The parts, the gaps, the loop, the costliest kernels."""
    device, unit, ticks = document["device"], document["unit"], document["host"]["ticks"]
    window_ms, busy_ms, gaps = device["window_ms"], device["busy_ms"], device["gaps"]
    parts = [
        [cost["name"], str(cost["count"]), _ms(cost["total_ms"]), _ms(cost["total_ms"] / ticks), _share(cost)]
        for cost in device["parts"]
    ]
    idle = [
        ["busy", _ms(busy_ms), f"{busy_ms / window_ms:.1%}"],
        ["idle", _ms(gaps["total_ms"]), f"{gaps['total_ms'] / window_ms:.1%}"],
        [f"idle, in gaps > {LONG_GAP_MS} ms", _ms(gaps["long_ms"]), f"{gaps['long_ms'] / window_ms:.1%}"],
    ]
    lengths = ["p50_ms", "p95_ms", "max_ms"]
    costliest = [
        [f"`{_cell(cost['name'])}`", str(cost["count"]), _ms(cost["total_ms"]), _share(cost)]
        for cost in device["costliest"][:NUM_COSTLIEST]
    ]
    return "\n\n".join(
        [
            table(["part", unit, "ms", "ms/step", "share of busy"], parts),
            table([f"of {window_ms:.0f} ms", "ms", "share"], idle),
            table(
                ["gaps", f"> {LONG_GAP_MS} ms", "p50, ms", "p95, ms", "longest, ms"],
                [[str(gaps["count"]), str(gaps["long_count"]), *(f"{gaps[length]:.3f}" for length in lengths)]],
                num_texts=0,
            ),
            _host_table(document),
            table([f"costliest {unit}", "count", "ms", "share of busy"], costliest),
        ]
    )


def _host_table(document: Document) -> str:
    """With the profiler beside without: what it costs itself shows there."""
    columns = [document["host"], document["without_profiler"]]
    rows = {
        "steps": ("ticks", 0),
        "from step to step, median ms": ("tick_ms", 2),
        "step, median ms": ("step_ms", 2),
        "outside steps, median ms": ("outside_p50_ms", 3),
        "outside steps, p95 ms": ("outside_p95_ms", 3),
        "rows/step": ("rows", 1),
        "images/step": ("images", 1),
        "images finished": ("images_finished", 0),
        "images/s": ("images_per_second", 2),
    }
    cells = [[label, *(f"{column[name]:.{digits}f}" for column in columns)] for label, (name, digits) in rows.items()]
    cells.insert(5, ["outside steps, share", *(f"{column['outside_share']:.1%}" for column in columns)])
    return table(["the loop", "profiled", "just before"], cells)


def _cell(name: str) -> str:
    return (name if len(name) <= NAME_WIDTH else f"{name[:NAME_WIDTH]}…").replace("|", "\\|")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}"


def _share(cost: Mapping[str, Any]) -> str:
    return f"{cost['busy_share']:.1%}"
