"""A page of results: tables and plots from `results.json` alone.

    python -m benchmarks.page RESULTS.json... [--ticks ticks.json] --out benchmarks/results

Writes `README.md` there with a section for each run, its plots, and a copy of its
JSON, and with `--ticks` one of what `benchmarks.ticks` wrote. What people wrote about
the runs is taken over from `commentary.md`, verbatim.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.pieces import NAMES, SAME_RATE_SHARE, SERVICE, STATIC
from benchmarks.plots import NoMatplotlibError, Series
from benchmarks.report import words
from benchmarks.tables import NOTHING, percent, table
from benchmarks.ticks_section import ticks_section

MAX_JSON_BYTES = 200_000
READING = (
    "Images and model calls per second are those of saturated servers in a closed loop, without its start and end; "
    "guidance does not count twice. Latency counts from the moment at which a request was due."
)
INSIDE = (
    "Time in steps is the sum of all steps' times over the whole load, its last answers included; the other two are "
    "means while requests were sent. The service's own gauge looks back ten seconds, so that shorter loads have none. "
    "NVML's is the share of time with a kernel running{left_out}."
)
PLOTS = {
    "latency": "Latency percentiles against the offered rate, by server",
    "throughput": "Images per second of each server, saturated",
    "goodput": "Answers within the bound against the offered rate, by server",
    "batch": "How many images shared a step",
}

Document = Mapping[str, Any]
"""What `benchmarks.gpu` writes."""


class TooLargeError(Exception):
    """A file holds more than figures."""


def overview(document: Document) -> str:
    """A column per server: throughput, latency alone, latency at the rate that all are compared at."""
    columns = _measured(document)
    rows = []
    for name, measure in {
        "images/s": "steady_requests_per_second",
        "model calls/s": "steady_model_calls_per_second",
    }.items():
        for steps, found in _by_steps(document, "saturated").items():
            rows.append([f"saturated, {steps}: {name}", *(_number(found.get(server), measure) for server in columns)])
    for steps, found in _by_steps(document, "alone").items():
        rows.append(
            [f"alone, {steps}: median latency, s", *(_latency(found.get(server), "p50_seconds") for server in columns)]
        )
    same_rate = {piece["server"]: piece for piece in _same_rate(document)}
    for name in ("p50", "p95", "p99") if same_rate else ():
        rate = next(iter(same_rate.values()))["rate"]
        latencies = [_latency(same_rate.get(server), f"{name}_seconds") for server in columns]
        rows.append([f"Poisson, {rate:.2f}/s: latency {name}, s", *latencies])
    if same_rate:
        goodputs = [_figure(same_rate.get(server), "goodput_per_second") for server in columns]
        rows.append([f"Poisson, {rate:.2f}/s: goodput/s", *goodputs])
    return table(["", *(NAMES[server] for server in columns)], rows)


def section(name: str, document: Document, pictures: Sequence[str]) -> str:
    """One run, in Markdown.

    Args:
        name: Of the run, for its heading.
        document: Its figures.
        pictures: Which of `PLOTS` there are.
    """
    parts = [
        f"## {name}",
        "\n".join(f"- {key}: {words(value)}" for key, value in document["facts"].items()),
        *((overview(document), _reading(document)) if document["pieces"] else ()),
        *(f"![{PLOTS[plot]}]({name}-{plot}.png)" for plot in pictures),
        *_arrivals(document),
        *_service_parts(document),
        "### Start",
        _starts_table(document),
    ]
    if document["left_out"]:
        parts += ["### Left out", "\n".join(_left_out(document))]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(name: str, document: Document, folder: Path) -> list[str]:
    """Draw what the run has figures for; returns which of `PLOTS` that was.

    Raises:
        NoMatplotlibError: matplotlib is not installed.
    """
    drawn = []
    series = open_series(document)
    if any(len(one.rates) > 1 for one in series):
        plots.latency_against_load(series, folder / f"{name}-latency.png")
        drawn.append("latency")
    throughput = {
        steps: {NAMES[server]: piece["steady_requests_per_second"] for server, piece in found.items()}
        for steps, found in _by_steps(document, "saturated").items()
    }
    if throughput:
        plots.throughput_bars(throughput, folder / f"{name}-throughput.png")
        drawn.append("throughput")
    if document["bound_seconds"] is not None and any(len(one.rates) > 1 for one in series):
        plots.goodput_against_offered(series, document["bound_seconds"], folder / f"{name}-goodput.png")
        drawn.append("goodput")
    if batches := batch_loads(document):
        plots.batch_histograms(batches, folder / f"{name}-batch.png")
        drawn.append("batch")
    return drawn


def open_series(document: Document) -> list[Series]:
    """Each server's Poisson loads by rate; of two at one rate the longer one."""
    found = []
    for server in _measured(document):
        by_rate: dict[float, Document] = {}
        for piece in _kind(document, "open"):
            rate = round(piece["rate"], 3)
            is_longer = rate not in by_rate or piece["seconds"] > by_rate[rate]["seconds"]
            if piece["server"] == server and piece["figures"]["latency"] is not None and is_longer:
                by_rate[rate] = piece
        if by_rate:
            pieces = [by_rate[rate]["figures"] for rate in sorted(by_rate)]
            values = {
                "p50": tuple(figures["latency"]["p50_seconds"] for figures in pieces),
                "p95": tuple(figures["latency"]["p95_seconds"] for figures in pieces),
                "goodput": tuple(figures["goodput_per_second"] or 0.0 for figures in pieces),
            }
            found.append(Series(NAMES[server], tuple(figures["offered_per_second"] for figures in pieces), values))
    return found


def batch_loads(document: Document) -> dict[str, dict[str, int]]:
    """What shared a step in this service: when saturated, when compared at one rate, in bursts."""
    wanted = [
        *(piece for piece in _kind(document, "saturated") if piece["steps"][0] != piece["steps"][1]),
        *_same_rate(document),
        *_kind(document, "bursts"),
    ]
    return {
        piece["title"]: piece["service"]["batch_images"]
        for piece in wanted
        if piece["server"] == SERVICE and piece["service"] and piece["service"]["batch_images"]
    }


def _reading(document: Document) -> str:
    lines = [READING]
    if found := _same_rate(document):
        lines.append(
            f"The rate that all are compared at, {found[0]['rate']:.2f} requests/s, is {SAME_RATE_SHARE:.0%} of the "
            f"capacity of {NAMES[STATIC]}. Servers without figures there cannot keep up with it, or no time was left."
        )
    if document["bound_seconds"] is not None:
        lines.append(f"Goodput counts answers within {document['bound_seconds']:.2f} s, which is {document['bound']}.")
    return " ".join(lines)


def _arrivals(document: Document) -> list[str]:
    header = ["server", "load", "offered/s", "answered/s", "p50, s", "p95, s", "p99, s", "goodput/s", "not good"]
    rows = [
        [
            NAMES[piece["server"]],
            piece["title"],
            _figure(piece, "offered_per_second"),
            _figure(piece, "achieved_per_second"),
            *(_latency(piece, f"{name}_seconds") for name in ("p50", "p95", "p99")),
            _figure(piece, "goodput_per_second"),
            _not_good(piece),
        ]
        for kind in ("open", "bursts")
        for piece in sorted(_kind(document, kind), key=lambda piece: (_order(piece), piece["rate"]))
    ]
    return ["### Given arrivals", table(header, rows, num_texts=2)] if rows else []


def _service_parts(document: Document) -> list[str]:
    """What only this service counts, load by load, and what it measured of its own steps."""
    loads = [piece for piece in document["pieces"] if piece["server"] == SERVICE and piece["service"]]
    if not loads:
        return []
    header = [
        "load",
        "images/step",
        "rows/step",
        "time in steps",
        "busy, own gauge",
        "busy, NVML",
        "API process, CPU ms/request",
    ]
    header += ["queue, s", "device memory, GB"]
    rows = [
        [
            piece["title"],
            _number(piece["service"], "mean_images"),
            _number(piece["service"], "mean_rows"),
            percent(piece["stepping_ratio"]),
            percent(piece["busy_ratio"]),
            percent(None if piece["gpu"] is None else piece["gpu"]["busy_ratio"]),
            _number(piece, "api_cpu_ms_per_request", digits=1),
            _number(piece["service"], "queue_seconds"),
            _memory(piece["memory_bytes"]),
        ]
        for piece in loads
    ]
    settle_seconds = document.get("settle_seconds", 0)
    left_out = f", the first {settle_seconds:g} seconds left out" if settle_seconds else ""
    parts = ["### Inside this service", INSIDE.format(left_out=left_out), table(header, rows)]
    for worker in document["served"].get("workers", ()):
        if worker["step_seconds"]:
            rows = [[str(number), f"{1000 * seconds:.1f}"] for number, seconds in worker["step_seconds"].items()]
            parts += [
                f"Steps by UNet rows, as `/v1/models` gives them; at most {worker['max_images']} images share one:",
                table(["rows", "ms"], rows),
            ]
    return parts


def _starts_table(document: Document) -> str:
    rows = [
        [NAMES[start["server"]], start["cache"] or NOTHING, f"{start['seconds']:.1f}"] for start in document["starts"]
    ]
    return table(["server", "compile cache", "ready after, s"], rows, num_texts=2)


def _left_out(document: Document) -> Iterator[str]:
    for entry in document["left_out"]:
        yield f"- {NAMES[entry['server']]}, {entry['what']}: {entry['why'].splitlines()[0]}"


def _kind(document: Document, kind: str) -> list[Document]:
    return [piece for piece in document["pieces"] if piece["kind"] == kind]


def _same_rate(document: Document) -> list[Document]:
    """The longest Poisson load of each server at the rate that all are compared at."""
    longest: dict[str, Document] = {}
    for piece in _kind(document, "open"):
        is_one = piece["share_of"] == STATIC and piece["share"] == SAME_RATE_SHARE
        if is_one and piece["seconds"] > longest.get(piece["server"], {"seconds": 0})["seconds"]:
            longest[piece["server"]] = piece
    return list(longest.values())


def _measured(document: Document) -> list[str]:
    found = {piece["server"] for piece in document["pieces"]}
    return [server for server in NAMES if server in found]


def _order(piece: Document) -> int:
    return list(NAMES).index(piece["server"])


def _steps(piece: Document) -> str:
    first, last = piece["steps"]
    return f"{first} steps" if first == last else f"{first} to {last} steps"


def _by_steps(document: Document, kind: str) -> dict[str, dict[str, Document]]:
    """Steps in words -> server -> piece."""
    found: dict[str, dict[str, Document]] = {}
    for piece in _kind(document, kind):
        found.setdefault(_steps(piece), {})[piece["server"]] = piece
    return found


def _number(figures: Document | None, name: str, digits: int = 2) -> str:
    return NOTHING if figures is None or figures[name] is None else f"{figures[name]:.{digits}f}"


def _figure(piece: Document | None, name: str) -> str:
    return NOTHING if piece is None else _number(piece["figures"], name)


def _latency(piece: Document | None, name: str) -> str:
    return NOTHING if piece is None else _number(piece["figures"]["latency"], name)


def _memory(memory_bytes: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {num_bytes / 1e9:.1f}" for kind, num_bytes in memory_bytes.items()) or NOTHING


def _not_good(piece: Document) -> str:
    found = [f"{count} {outcome}" for outcome, count in piece["figures"]["outcomes"].items() if outcome != "good"]
    return ", ".join(found) or "0"


def run_name(path: Path) -> str:
    """The file's name, or its folder's where every run's file is called `results.json`."""
    return path.resolve().parent.name if path.stem == "results" else path.stem


def main() -> int:
    """Write the page; 0 when it is there."""
    arguments = _arguments()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    commentary = folder / "commentary.md"
    parts = ["# Measured\n\nMade by `python -m benchmarks.page` from the JSON files beside it.\n"]
    parts += [commentary.read_text(encoding="utf-8")] if commentary.exists() else []
    try:
        for path in arguments.results:
            name, text = run_name(path), _figures_in(path)
            document = json.loads(text)
            parts.append(section(name, document, draw(name, document, folder)))
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        if arguments.ticks is not None:
            text = _figures_in(arguments.ticks)
            parts.append(ticks_section(json.loads(text)))
            (folder / "ticks.json").write_text(text, encoding="utf-8")
    except (NoMatplotlibError, TooLargeError) as error:
        print(error, file=sys.stderr)
        return 1
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
    return 0


def _figures_in(path: Path) -> str:
    """The file's text, which goes to the page's folder."""
    text = path.read_text(encoding="utf-8")
    if len(text) > MAX_JSON_BYTES:
        raise TooLargeError(f"{path} has {len(text):,} bytes: more than figures")
    return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tables and plots of runs of benchmarks.gpu.")
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a run")
    parser.add_argument("--ticks", type=Path, help="ticks.json of benchmarks.ticks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
