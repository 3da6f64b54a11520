"""A load generator for any server that takes `POST /v1/inpaint`.

    python -m benchmarks.generate --url http://127.0.0.1:8000 --rate 4 --seconds 30 --steps 10-40
    python -m benchmarks.generate --url … --arrivals bursts --burst-size 16 --burst-interval 10 --rate 1
    python -m benchmarks.generate --url … --arrivals trace --trace requests.csv
    python -m benchmarks.generate --url … --arrivals closed --clients 32

Except with `closed`, requests go out at their moments whatever has become of those
before, and latency counts from the moment at which one was due. Every answer is
checked. Prints the figures, writes them and every answer as JSON, and exits non-zero
when no answer was good.
"""

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.arrivals import Arrival, TraceError, burst_arrivals, poisson_arrivals, read_trace
from benchmarks.figures import Spread, Summary, summary_of
from benchmarks.load import ANSWER_TIMEOUT_SECONDS, Round, closed_loop, open_client, open_loop
from benchmarks.plots import NoMatplotlibError
from benchmarks.traffic import PROMPTS, SCHEDULERS, Mix, Wish, fulfil

MAX_CLOSED_JOBS = 20_000
PATH = "/v1/inpaint"


async def generate(arguments: argparse.Namespace) -> Round:
    """Send what the command line asks for.

    Raises:
        TraceError: The trace cannot be read.
    """
    mix = Mix(
        steps=arguments.steps,
        sizes=arguments.sizes,
        schedulers=arguments.schedulers,
        guided_share=arguments.guided_share,
        guidance_scale=arguments.guidance_scale,
        prompts=arguments.prompts,
    )
    url = arguments.url.rstrip("/").removesuffix(PATH) + PATH
    manner: dict[str, Any] = {"timeout_seconds": arguments.timeout, "checks_pixels": arguments.check_pixels}
    async with open_client() as client:
        if arguments.arrivals == "closed":
            jobs = fulfil([Wish()] * MAX_CLOSED_JOBS, mix, arguments.seed)
            return await closed_loop(client, url, jobs, arguments.clients, arguments.seconds, **manner)
        arrivals = planned(arguments)
        # Drawn before the start: a picture takes longer to draw than to send.
        jobs = fulfil([arrival.wish for arrival in arrivals], mix, arguments.seed)
        moments = [arrival.seconds for arrival in arrivals]
        window_seconds = None if arguments.arrivals == "trace" else arguments.seconds
        return await open_loop(client, url, jobs, moments, window_seconds=window_seconds, **manner)


def planned(arguments: argparse.Namespace) -> Sequence[Arrival]:
    """The arrivals that the command line asks for.

    Raises:
        TraceError: The trace cannot be read.
        ValueError: A rate, size or window makes no arrivals.
    """
    if arguments.arrivals == "trace":
        return read_trace(arguments.trace)
    if arguments.arrivals == "bursts":
        moments = burst_arrivals(
            arguments.burst_size, arguments.burst_interval, arguments.seconds, arguments.rate, arguments.seed
        )
    else:
        moments = poisson_arrivals(arguments.rate, arguments.seconds, arguments.seed)
    return [Arrival(moment, Wish()) for moment in moments]


def lines(summary: Summary) -> list[str]:
    """The figures, for people."""
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in summary.outcomes.items())
    rates = f"offered {summary.offered_per_second:.2f}/s, answered well {summary.achieved_per_second:.2f}/s"
    found = [
        f"requests: {summary.requests} ({outcomes or 'none'}) in {summary.seconds:.1f} s",
        f"rate: {rates}, model calls {summary.model_calls_per_second:.1f}/s",
    ]
    if summary.latency is not None:
        found.append(f"latency, s: {_spread(summary.latency, 1, 3)}")
    if summary.goodput_per_second is not None:
        found.append(f"goodput: {summary.goodput_per_second:.2f}/s within {summary.bound_seconds:g} s")
    if summary.late is not None:
        found.append(f"sender late, ms: {_spread(summary.late, 1000, 1)}")
    return found


def main() -> int:
    """Send and report; 0 when an answer was good."""
    arguments = parse(sys.argv[1:])
    try:
        if arguments.plot is not None:
            plots.need_matplotlib()
        one = asyncio.run(generate(arguments))
    except (NoMatplotlibError, TraceError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    summary = summary_of(one, arguments.bound)
    print("\n".join(lines(summary)))
    for fault in dict.fromkeys(answer.fault for answer in one.answers if answer.fault is not None):
        print(f"not good: {fault}", file=sys.stderr)
    if arguments.json is not None:
        document = {
            "command": shlex.join(["python", "-m", "benchmarks.generate", *sys.argv[1:]]),
            "figures": asdict(summary),
            "round": asdict(one),
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plots.answers(one, arguments.bound, arguments.plot)
    return 0 if one.good else 1


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A load generator for servers that take POST /v1/inpaint.")
    parser.add_argument("--url", required=True, help="http://host:port")
    parser.add_argument("--arrivals", choices=("poisson", "bursts", "trace", "closed"), default="poisson")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="requests/s; with bursts, of the background, 0 for none"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long requests are sent")
    parser.add_argument("--burst-size", type=int, default=8, help="requests at once")
    parser.add_argument("--burst-interval", type=float, default=10.0, help="seconds from burst to burst")
    parser.add_argument("--trace", type=Path, help="CSV or JSON lines: seconds; where given steps, size, scheduler")
    parser.add_argument("--clients", type=int, default=4, help="of a closed loop")
    parser.add_argument("--steps", type=_steps, default=(20, 20), help="20, or 10-40")
    parser.add_argument("--sizes", type=_sizes, default={512: 1.0}, help="512, 512,768, or with weights 512:3,768:1")
    parser.add_argument("--schedulers", type=_names, default=SCHEDULERS, help="short names, comma-separated")
    parser.add_argument("--guided-share", type=float, default=1.0, help="share of requests with guidance, 0 to 1")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="of these")
    parser.add_argument("--prompts", type=_prompts, default=PROMPTS, help="file with one prompt a line")
    parser.add_argument("--seed", type=int, default=1, help="of the requests and their arrivals")
    parser.add_argument("--timeout", type=float, default=ANSWER_TIMEOUT_SECONDS, help="seconds of a request")
    parser.add_argument("--bound", type=float, help="seconds within which an answer counts for goodput")
    parser.add_argument("--check-pixels", action="store_true", help="pixels outside the mask must be the upload's")
    parser.add_argument("--json", type=Path, help="file for the figures and every answer")
    parser.add_argument("--plot", type=Path, help="PNG of every answer; needs matplotlib")
    arguments = parser.parse_args(words)
    if arguments.arrivals == "trace" and arguments.trace is None:
        parser.error("--arrivals trace needs --trace")
    return arguments


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"steps must ascend from 1, not {text}")
    return low, high


def _sizes(text: str) -> dict[int, float]:
    sizes = {}
    for part in text.split(","):
        size, _, weight = part.partition(":")
        sizes[int(size)] = float(weight or 1)
    if min(sizes) < 1 or min(sizes.values()) < 0 or sum(sizes.values()) <= 0:
        raise argparse.ArgumentTypeError(f"sizes and weights must be positive, not {text}")
    return sizes


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _prompts(text: str) -> tuple[str, ...]:
    prompts = tuple(line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip())
    if not prompts:
        raise argparse.ArgumentTypeError(f"{text} has no prompts")
    return prompts


def _spread(spread: Spread, factor: float, digits: int) -> str:
    parts = {"mean": spread.mean_seconds, "p50": spread.p50_seconds, "p95": spread.p95_seconds}
    parts |= {"p99": spread.p99_seconds, "max": spread.max_seconds}
    return ", ".join(f"{name} {factor * seconds:.{digits}f}" for name, seconds in parts.items())


if __name__ == "__main__":
    sys.exit(main())
