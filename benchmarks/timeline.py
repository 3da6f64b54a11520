"""The arithmetic of a profile: what a device did when, how long it idled, and what the loop did meanwhile.

Pure functions of a trace's events, in the format of Chrome's trace viewer, which `torch.profiler` exports.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.figures import percentile

DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LONG_GAP_MS = 0.1
"""Longer than what lies between two kernels that were launched ahead: the device waited for the host."""

MAX_NAME = 200
"""Characters of a kernel's name that are kept: some are templates of thousands."""

ATTENTION, CONVOLUTION, MATRIX = "attention", "convolution", "matrix products"
POINTWISE, COPIES, OTHER = "normalisation, pointwise", "copies", "other"

_KERNELS = (
    # What inductor makes of a layer's surroundings is named after the layer; only its templates are the layer itself.
    (CONVOLUTION, r"^triton_tem_.*conv"),
    (ATTENTION, r"^triton_tem_.*attention"),
    (MATRIX, r"^triton_tem_"),
    (POINTWISE, r"^triton_"),
    (COPIES, r"^mem(cpy|set)|copy_kernel|batchedcopy"),
    (ATTENTION, r"flash|fmha|sdpa|attention|softmax"),
    (POINTWISE, r"elementwise"),
    (CONVOLUTION, r"conv|implicit_gemm|fprop|dgrad|winograd|nchw|nhwc|im2col"),
    (MATRIX, r"gemm|gemv|cublas|nvjet|cutlass|splitk"),
    (POINTWISE, r"norm|reduce|vectorized|triton|rowwisemoments|computefusedparams|upsample|gather|index"),
)
_OPERATORS = (
    (ATTENTION, r"scaled_dot_product|softmax|^(bmm|baddbmm)"),
    (CONVOLUTION, r"conv"),
    (MATRIX, r"^(addmm|addmv|linear|mm|mv|matmul|einsum)"),
    (COPIES, r"copy|^(to|contiguous|clone|cat|stack|pad|constant_pad_nd|repeat|repeat_interleave|index.*|embedding)$"),
    (
        POINTWISE,
        r"norm|silu|gelu|sigmoid|tanh|upsample|^(mul|add|sub|rsub|div|neg|exp|pow|sqrt|sin|cos|clamp|where|mean|sum)_?$",
    ),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """One kernel, copy or operator, in milliseconds of the trace's clock."""

    name: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class Gaps:
    """Idle stretches between two busy ones.

    Attributes:
        count: How many.
        total_ms: Their sum.
        p50_ms: Median.
        p95_ms: 95th percentile.
        max_ms: The longest.
        long_count: How many are longer than `LONG_GAP_MS`.
        long_ms: Sum of these.
    """

    count: int
    total_ms: float
    p50_ms: float
    p95_ms: float
    max_ms: float
    long_count: int
    long_ms: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What all intervals of one name, or of one part, come to.

    Attributes:
        name: The kernel, operator or part.
        count: How often it ran.
        total_ms: How long. Intervals that overlap count in full.
        busy_share: That, as a share of the busy time.
    """

    name: str
    count: int
    total_ms: float
    busy_share: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where a device's time went.

    Attributes:
        window_ms: From the first interval's start to the last one's end.
        busy_ms: What is covered by at least one interval.
        gaps: What is not.
        parts: Every part that took time, the longest first.
        costliest: Single kernels or operators, the longest first.
    """

    window_ms: float
    busy_ms: float
    gaps: Gaps
    parts: tuple[Cost, ...]
    costliest: tuple[Cost, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """One step of the running batch as the loop's thread sees it, in seconds of the host's clock."""

    began_at: float
    ended_at: float
    rows: int
    images: int


@dataclass(frozen=True, slots=True)
class Host:
    """What the loop did in a window that begins with a step and ends where the next one would.

    Attributes:
        seconds: The window's length.
        ticks: Steps in it.
        tick_ms: Median from one step's begin to the next one's.
        step_ms: Median of a step.
        outside_p50_ms: Median from a step's end to the next one's begin.
        outside_p95_ms: 95th percentile of that.
        outside_share: Share of the window that is not within a step.
        rows: Mean of UNet rows that shared a step, padding not counted.
        images: Mean of images that shared a step.
        images_finished: Images that were decoded in the window.
        images_per_second: Steps of images, over the steps that an image takes and the window. Decoded images would
            say the same of a long window; in a short one they come in clumps.
    """

    seconds: float
    ticks: int
    tick_ms: float
    step_ms: float
    outside_p50_ms: float
    outside_p95_ms: float
    outside_share: float
    rows: float
    images: float
    images_finished: int
    images_per_second: float


def device_intervals(events: Iterable[Mapping[str, Any]]) -> list[Interval]:
    """What ran on the device, in order of start; kernels of a CUDA graph are kernels like others."""
    return sorted(
        (_interval(event) for event in events if event.get("ph") == "X" and event.get("cat") in DEVICE_CATEGORIES),
        key=lambda interval: interval.start_ms,
    )


def top_level_operators(events: Iterable[Mapping[str, Any]]) -> list[Interval]:
    """Operators that no other one of their thread called, in order of start."""
    by_thread: dict[Any, list[Interval]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "cpu_op":
            by_thread.setdefault((event.get("pid"), event.get("tid")), []).append(_interval(event))
    found = []
    for intervals in by_thread.values():
        outer_end = float("-inf")
        # Of two that start together the longer one has called the other.
        for interval in sorted(intervals, key=lambda interval: (interval.start_ms, -interval.end_ms)):
            if interval.start_ms >= outer_end:
                found.append(interval)
                outer_end = interval.end_ms
    return sorted(found, key=lambda interval: interval.start_ms)


def busy_stretches(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """The union of the intervals: stretches with idle time between them, in order."""
    stretches: list[tuple[float, float]] = []
    for interval in sorted(intervals, key=lambda interval: interval.start_ms):
        if stretches and interval.start_ms <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(stretches[-1][1], interval.end_ms))
        else:
            stretches.append((interval.start_ms, interval.end_ms))
    return stretches


def gaps_of(stretches: Sequence[tuple[float, float]]) -> Gaps:
    """What lies between stretches that are in order."""
    lengths = [later[0] - earlier[1] for earlier, later in pairwise(stretches)]
    long = [length for length in lengths if length > LONG_GAP_MS]
    return Gaps(
        count=len(lengths),
        total_ms=sum(lengths),
        p50_ms=percentile(lengths, 50) if lengths else 0.0,
        p95_ms=percentile(lengths, 95) if lengths else 0.0,
        max_ms=max(lengths, default=0.0),
        long_count=len(long),
        long_ms=sum(long),
    )


def kernel_part(name: str) -> str:
    """The part of the work that a kernel of this name does."""
    return _part(name.lower(), _KERNELS)


def operator_part(name: str) -> str:
    """The part of the work that an operator of this name, such as `aten::conv2d`, does."""
    return _part(name.rpartition("::")[2].lower(), _OPERATORS)


def timeline_of(intervals: Sequence[Interval], part_of: Callable[[str], str], num_costliest: int = 60) -> Timeline:
    """Where the time went.

    Args:
        intervals: What ran.
        part_of: The part of a name.
        num_costliest: How many single names to list.

    Raises:
        ValueError: Nothing ran.
    """
    if not intervals:
        raise ValueError("a timeline needs at least one interval")
    stretches = busy_stretches(intervals)
    busy_ms = sum(end - start for start, end in stretches)
    part_by_name = {name: part_of(name) for name in {interval.name for interval in intervals}}
    parts = _costs(((part_by_name[interval.name], interval) for interval in intervals), busy_ms)
    names = _costs(((interval.name[:MAX_NAME], interval) for interval in intervals), busy_ms)
    return Timeline(stretches[-1][1] - stretches[0][0], busy_ms, gaps_of(stretches), parts, names[:num_costliest])


def host_of(ticks: Sequence[Tick], ended_at: float, images_finished: int, steps: int) -> Host:
    """What the loop did.

    Args:
        ticks: The steps of the window, which begins with the first one.
        ended_at: When the next step would have begun.
        images_finished: Images that were decoded meanwhile.
        steps: Steps that each image takes.

    Raises:
        ValueError: There are no steps.
    """
    if not ticks:
        raise ValueError("a window needs at least one step")
    begins = [*(tick.began_at for tick in ticks), ended_at]
    outside = [begin - tick.ended_at for tick, begin in zip(ticks, begins[1:], strict=True)]
    seconds = ended_at - ticks[0].began_at
    return Host(
        seconds=seconds,
        ticks=len(ticks),
        tick_ms=1000 * statistics.median(later - earlier for earlier, later in pairwise(begins)),
        step_ms=1000 * statistics.median(tick.ended_at - tick.began_at for tick in ticks),
        outside_p50_ms=1000 * percentile(outside, 50),
        outside_p95_ms=1000 * percentile(outside, 95),
        outside_share=sum(outside) / seconds,
        rows=statistics.fmean(tick.rows for tick in ticks),
        images=statistics.fmean(tick.images for tick in ticks),
        images_finished=images_finished,
        images_per_second=sum(tick.images for tick in ticks) / steps / seconds,
    )


def _interval(event: Mapping[str, Any]) -> Interval:
    """Traces count in microseconds."""
    start = float(event["ts"])
    return Interval(str(event["name"]), start / 1000, (start + float(event.get("dur", 0.0))) / 1000)


def _part(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    return next((part for part, pattern in patterns if re.search(pattern, name)), OTHER)


def _costs(named: Iterable[tuple[str, Interval]], busy_ms: float) -> tuple[Cost, ...]:
    counts: dict[str, int] = {}
    totals: dict[str, float] = {}
    for name, interval in named:
        counts[name] = counts.get(name, 0) + 1
        totals[name] = totals.get(name, 0.0) + interval.end_ms - interval.start_ms
    ordered = sorted(totals, key=lambda name: -totals[name])
    return tuple(
        Cost(name, counts[name], totals[name], totals[name] / busy_ms if busy_ms > 0 else 0.0) for name in ordered
    )
